"""From a device to the host, on a stream of its own, beside what the device computes. There are two ways.

`Staging` pins as much memory as the state has. The host waits for nothing: what changes the state waits on the device
itself, and only for the copy. `Bounced` pins a few pages and brings the state through them into ordinary memory, in a
thread; what changes the state waits on the host until all is through. The first stalls less, the second pins less.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from elastictrain_checkpoint.bounce import Chunk, chunks, lay_out, pass_through
from elastictrain_checkpoint.errors import SaveTimeout

PAGE_BYTES, SLAB_BYTES = 16 << 20, 64 << 20


class Engine(Protocol):
    """What copies from a device to pinned pages, in an order of its own beside what the caller gives the device."""

    def make_page(self, size_bytes: int) -> torch.Tensor:
        """Memory that it can copy to by itself; bytes."""

    def follow(self) -> None:
        """What is begun from here on comes after all that was enqueued for the device until now."""

    def begin(self, source: torch.Tensor, page: torch.Tensor) -> Any:
        """Begin to copy bytes to the start of a page; gives what `wait` needs."""

    def wait(self, token: Any) -> None:
        """Return when that copy is done."""

    def copy(self, source: torch.Tensor, out: torch.Tensor, *, at_once: bool) -> None:
        """Begin to copy a tensor to one of its type and shape in a page. `at_once`: among what the caller enqueues, so
        that all that it enqueues afterwards comes after the copy.
        """

    def mark(self) -> Any:
        """What `wait` needs to wait for all that was begun so far (what is `at_once` only if `follow` was called)."""

    def hold(self, token: Any) -> None:
        """What the caller enqueues for the device from here on comes after what was marked; the host does not wait."""


class CudaEngine:
    """See `Engine`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def make_page(self, size_bytes: int) -> torch.Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)

    def follow(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def begin(self, source: torch.Tensor, page: torch.Tensor) -> torch.cuda.Event:
        with torch.cuda.stream(self._stream), torch.no_grad():
            page[: source.numel()].copy_(source, non_blocking=True)
        return self.mark()

    def wait(self, token: torch.cuda.Event) -> None:
        token.synchronize()

    def copy(self, source: torch.Tensor, out: torch.Tensor, *, at_once: bool) -> None:
        stream = torch.cuda.current_stream(self._device) if at_once else self._stream
        with torch.cuda.stream(stream), torch.no_grad():
            out.copy_(source, non_blocking=True)
        if not at_once:
            source.record_stream(stream)  # the allocator must not give its memory away before the copy

    def mark(self) -> torch.cuda.Event:
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(self._stream)
        return done

    def hold(self, token: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(token)


@dataclass(frozen=True, slots=True)
class Copied:
    """What was begun at one time."""

    _engine: Engine
    _token: Any

    def synchronize(self) -> None:
        """Wait until it is on the host."""
        self._engine.wait(self._token)


class Staging:
    """Copies of device tensors on the host, in pinned memory of the state's size that is used again by every save."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._slabs: list[torch.Tensor] = []
        self._buffers: dict[str, torch.Tensor] = {}
        self._token: Any = None

    @property
    def size_bytes(self) -> int:
        """Pinned memory."""
        return sum(slab.nbytes for slab in self._slabs)

    def begin(
        self, tensors: Mapping[str, torch.Tensor], *, fresh: bool, at_once: Collection[str] = ()
    ) -> dict[str, torch.Tensor]:
        """Begin to copy; the result may be read when `copied` is.

        Args:
            tensors: all on the device; what the current stream has enqueued for them comes first.
            fresh: an earlier save may still read the buffers of the last call: use others.
            at_once: names of what may change after this call without `order`: the current stream copies it itself.

        """
        if fresh or not self._fits(tensors):
            self._make(tensors)
        for name in at_once:
            self._engine.copy(tensors[name].detach(), self._buffers[name], at_once=True)
        self._engine.follow()
        for name, tensor in tensors.items():
            if name not in at_once:
                self._engine.copy(tensor.detach(), self._buffers[name], at_once=False)
        self._token = self._engine.mark()
        return dict(self._buffers)

    def _fits(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        held = self._buffers
        return tensors.keys() == held.keys() and all(
            held[name].dtype == one.dtype and held[name].shape == one.shape for name, one in tensors.items()
        )

    def _make(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Memory in few slabs: to pin some takes long, however little it is."""
        self._slabs, self._buffers = [], {}
        sizes, places = lay_out([tensor.nbytes for tensor in tensors.values()], SLAB_BYTES)
        self._slabs = [self._engine.make_page(size) for size in sizes]
        for (name, tensor), (slab, start) in zip(tensors.items(), places, strict=True):
            taken = self._slabs[slab][start : start + tensor.nbytes] if tensor.nbytes else torch.empty(0)
            self._buffers[name] = taken.view(tensor.dtype).view(tensor.shape)

    def order(self) -> None:
        """What the current stream does from here on comes after the copy; the host does not wait."""
        if self._token is not None:
            self._engine.hold(self._token)

    def copied(self) -> Copied:
        """What the last `begin` has begun: `synchronize` it before the copies are read."""
        assert self._token is not None, "nothing was begun"
        return Copied(self._engine, self._token)


class _Passing:
    """A thread that brings tensors through the pages; `wait_urgent` waits for `urgent_bytes`, the first ones."""

    def __init__(
        self,
        engine: Engine,
        pages: Sequence[torch.Tensor],
        sources: list[torch.Tensor],
        outs: list[torch.Tensor],
        urgent_bytes: int,
    ) -> None:
        self._left_bytes, self._urgent = urgent_bytes, threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, args=(engine, pages, sources, outs), name="elastictrain-bounce", daemon=True
        )
        self._thread.start()

    def _run(
        self, engine: Engine, pages: Sequence[torch.Tensor], sources: list[torch.Tensor], outs: list[torch.Tensor]
    ) -> None:
        def begin(chunk: Chunk, page: torch.Tensor) -> Any:
            return engine.begin(sources[chunk.source][chunk.start : chunk.stop], page)

        def take_out(chunk: Chunk, page: torch.Tensor) -> None:
            outs[chunk.source][chunk.start : chunk.stop].copy_(page[: chunk.stop - chunk.start])
            self._left_bytes -= chunk.stop - chunk.start
            if self._left_bytes <= 0:
                self._urgent.set()

        try:
            pass_through(pages, chunks([s.numel() for s in sources], pages[0].numel()), begin, engine.wait, take_out)
        except BaseException as error:  # it is raised where somebody waits for the copies
            self._error = error
        finally:
            self._urgent.set()

    def wait(self, deadline_s: float) -> None:
        self._thread.join(deadline_s)
        self._check(not self._thread.is_alive(), deadline_s)

    def wait_urgent(self, deadline_s: float) -> None:
        self._check(self._urgent.wait(deadline_s), deadline_s)

    def _check(self, came: bool, deadline_s: float) -> None:
        if not came:
            raise SaveTimeout(f"the state has not come from its device after {deadline_s:g} s")

    def synchronize(self, deadline_s: float | None = None) -> None:
        """Wait, and raise what went wrong."""
        self._thread.join(deadline_s)
        if self._error is not None:
            raise self._error


class Bounced:
    """Copies of device tensors in ordinary memory, which is used again by every save, by way of a few pinned pages.

    Args:
        engine: copies from the device.
        bounce_bytes: pinned in all, in two pages at least.
        deadline_s: no call waits longer.

    Raises:
        ValueError: no room for two pages.

    """

    def __init__(self, engine: Engine, bounce_bytes: int, *, deadline_s: float) -> None:
        if bounce_bytes < 2:
            raise ValueError(f"bounce_bytes={bounce_bytes}: two pages are needed at least; pass 64 MiB, say")
        size = min(PAGE_BYTES, bounce_bytes // 2)
        self._engine, self._deadline_s = engine, deadline_s
        self._pages = [engine.make_page(size) for _ in range(bounce_bytes // size)]
        self._buffers: dict[str, torch.Tensor] = {}
        self._passing: _Passing | None = None

    @property
    def size_bytes(self) -> int:
        """Pinned pages, and the memory of the copies."""
        return sum(one.nbytes for one in (*self._pages, *self._buffers.values()))

    def begin(
        self, tensors: Mapping[str, torch.Tensor], *, fresh: bool, at_once: Collection[str] = ()
    ) -> dict[str, torch.Tensor]:
        """As `Staging.begin`. What an earlier call has begun is waited for, since it needs the pages, and so is what is
        to be copied at once.
        """
        self.order()
        if fresh:
            self._buffers = {}
        sources, outs = [], []
        for name, tensor in sorted(tensors.items(), key=lambda item: item[0] not in at_once):
            buffer = self._buffers.get(name)
            if buffer is None or buffer.dtype != tensor.dtype or buffer.shape != tensor.shape:
                buffer = self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
            if tensor.numel():
                sources.append(tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8))
                outs.append(buffer.reshape(-1).view(torch.uint8))
        self._engine.follow()
        self._passing = _Passing(
            self._engine, self._pages, sources, outs, sum(tensors[name].nbytes for name in at_once)
        )
        if at_once:
            self._passing.wait_urgent(self._deadline_s)
        return {name: self._buffers[name] for name in tensors}

    def order(self) -> None:
        """Wait until what was begun is on the host; what went wrong is raised by `copied`.

        Raises:
            SaveTimeout: it takes too long.

        """
        if self._passing is not None:
            self._passing.wait(self._deadline_s)

    def copied(self) -> _Passing:
        """What was begun last: `synchronize` it before the copies are read."""
        assert self._passing is not None, "nothing was begun"
        return self._passing
