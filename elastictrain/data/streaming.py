"""The data stream without a job: a plain torch iterable, for any training loop and any number of ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from elastictrain.data.fingerprint import fingerprint_difference
from elastictrain.data.live import LiveSource, open_live
from elastictrain.data.live_feeder import open_feeder
from elastictrain.data.mixed import MixedSource, open_mixture
from elastictrain.data.mixture import Segment, join_plans
from elastictrain.data.remembered import recall, remember, short_hash
from elastictrain.data.source import Source, open_source
from elastictrain.data.sources import AnySource
from elastictrain.data_settings import Mixture
from elastictrain.errors import ConfigError, DataEnded, DataError

if TYPE_CHECKING:
    from elastictrain.data_settings import Data

STATE_VERSION = 1
_STEPS_AHEAD = 64
"""Steps whose batches are named to the feeder; how many of them it has ready follows from its bytes."""


class Stream(IterableDataset[dict[str, torch.Tensor]]):
    """Batches of one rank, endlessly or for some epochs. Made by `elastictrain.data.stream`.

    A step's `batch_size` samples are cut into `lanes`, and the lanes dealt to the ranks in neighbouring runs, so the
    samples of a step are the same for every number of ranks. `state` is a step number and what to check it against.
    """

    def __init__(
        self,
        data: Data | Mixture,
        *,
        batch_size: int,
        lanes: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        epochs: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self._lanes = lanes if lanes is not None else _default_lanes(batch_size, world)
        if batch_size < 1 or self._lanes < 1 or batch_size % self._lanes:
            raise ConfigError(f"batch_size={batch_size} is not a multiple of lanes={self._lanes}; change one of them")
        if not 0 <= rank < world or world > self._lanes:
            raise ConfigError(
                f"rank={rank}, world={world}, lanes={self._lanes}: expected rank < world <= lanes, so that every rank "
                "has a lane; raise lanes (a divisor of batch_size), and keep it for the life of the run"
            )
        if epochs is not None and isinstance(data, Mixture):
            raise ConfigError("epochs: the sources of a mixture have epochs of their own; stop after a number of steps")
        if epochs is not None and data.is_live:
            raise ConfigError("epochs: a live source has none; stop after a number of steps, or close its manifest")
        self._spec, self._seed, self._size = data, seed, batch_size // self._lanes
        self._mine = range(rank * self._lanes // world, (rank + 1) * self._lanes // world)
        self._epochs, self._device = epochs, device
        self._plans: list[tuple[int, list[Segment]]] = []
        self._step, self._is_remembered = 0, False
        self.source: AnySource = self._open()
        if isinstance(self.source, MixedSource):
            self._plans = [(0, self.source.plan)]

    @property
    def step(self) -> int:
        """The step that comes next; batches that were handed out are those before it."""
        return self._step

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield this rank's part of every step from `step` on; of a live source until its order ends. Raises DataError,
        as `LaneReader.batch`.
        """
        if get_worker_info() is not None:
            raise ConfigError("a Stream reads ahead by itself, and knows its place: use it with num_workers=0")
        last = None
        if self._epochs is not None and isinstance(self.source, Source):
            last = self._epochs * self.source.steps_per_epoch
        with open_feeder(self.source, self._device) as feeder:
            expected = self._step
            while last is None or self._step < last:
                if self._step + _STEPS_AHEAD // 2 >= expected:
                    expected = self._step + _STEPS_AHEAD if last is None else min(last, self._step + _STEPS_AHEAD)
                    places = ((step, lane) for step in range(self._step, expected) for lane in self._mine)
                    feeder.expect(places, until=math.inf if last is None else last)
                try:
                    parts = [feeder.batch(self._step, lane) for lane in self._mine]
                except DataEnded:
                    return
                self._step += 1
                yield {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def state(self) -> bytes:
        """Return where the stream is; the same on all ranks. 256 bytes or less of one source; a mixture's also has a
        check and a weight for each source by its name, in every stage (some 40 bytes for each).
        """
        content: dict[str, Any] = {
            "v": STATE_VERSION,
            "step": self._step,
            "seed": self._seed,
            "lanes": self._lanes,
            "size": self._size,
            "data": self._hashes(),
        }
        if not self._is_remembered:
            for source in self._sources().values():
                remember(_whole(source))
            self._is_remembered = True
        if self.source.growth is not None and self._step:
            content["live"] = self.source.growth.mark_of(self._step - 1)
        if self._plans:
            content["plans"] = [[step, [segment.as_json() for segment in plan]] for step, plan in self._plans]
        return json.dumps(content, separators=(",", ":")).encode()

    def resume(self, state: bytes) -> None:
        """Go on where `state` was taken, on any rank of any world.

        A mixture with other proportions than those of the state goes on with them from here: every source where it was.
        Raises DataError if the data or the settings that the order depends on are not those of the state.
        """
        stored = _parse(state)
        now = {"seed": self._seed, "lanes": self._lanes, "size": self._size}
        differing = [f"{name} was {stored[name]} and is now {new}" for name, new in now.items() if stored[name] != new]
        hashes = self._hashes()  # a source of a mixture may come or go
        changed = [name for name, old in stored["data"].items() if hashes.get(name, old) != old]
        differing += [sentence for name in changed for sentence in self._changes(name, stored["data"][name])]
        if differing or ("plans" in stored) != bool(self._plans):
            what = "; ".join(differing) or "one source was a mixture, or the other way round"
            raise DataError(f"this state belongs to another stream: {what}. Open the stream as it was, or start anew")
        if self.source.growth is not None and "live" in stored:
            self.source.growth.check(stored["live"])
        self._step = int(stored["step"])
        if self._plans:
            plans = [(int(step), [Segment.from_json(shown) for shown in plan]) for step, plan in stored["plans"]]
            if plans[-1][1] != self._plans[-1][1]:
                plans.append((self._step, self._plans[-1][1]))
            self._plans = plans
            self.source.close()
            self.source = self._open()

    def _open(self) -> AnySource:
        settings: dict[str, Any] = {"seed": self._seed, "lanes": self._lanes, "lane_batch_size": self._size}
        if isinstance(self._spec, Mixture):
            return open_mixture(self._spec, segments=join_plans(self._plans), **settings)
        if self._spec.live is not None:
            return open_live(self._spec, **settings)
        return open_source(self._spec, **settings)

    def _hashes(self) -> dict[str, str]:
        """The first half of each source's fingerprint; by name in a mixture."""
        return {name: short_hash(one.fingerprint) for name, one in self._sources().items()}

    def _sources(self) -> Mapping[str, Source | LiveSource]:
        return self.source.sources if isinstance(self.source, MixedSource) else {"": self.source}

    def _changes(self, name: str, old: str) -> list[str]:
        """Say that a source has changed, and how, if this machine has seen what it was."""
        said = f"the data of source {name!r} changed" if name else "the data changed"
        known = recall(old)
        how = [] if known is None else fingerprint_difference(known, _whole(self._sources()[name]))
        return [f"{said}: {sentence}" for sentence in how] or [said]


def _whole(source: Source | LiveSource) -> dict[str, Any]:
    return source.whole_fingerprint if isinstance(source, Source) else source.fingerprint


def _default_lanes(batch_size: int, world: int) -> int:
    """The number of lanes, at most 64, that serves the most numbers of ranks: the largest divisor of the batch."""
    divisors = [n for n in range(1, min(batch_size, max(64, world)) + 1) if batch_size % n == 0]
    return divisors[-1] if divisors else 1


def _parse(state: bytes) -> Mapping[str, Any]:
    try:
        stored = json.loads(state)
        version = stored["v"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"this is no state of a stream ({error}); expected what Stream.state() gave") from error
    if version != STATE_VERSION:
        raise DataError(f"this state has version {version}; this version of elastictrain reads {STATE_VERSION}")
    return dict(stored)
