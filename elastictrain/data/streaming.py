"""The data stream without a job: a plain torch iterable, for any training loop and any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch.utils.data import IterableDataset, get_worker_info

from elastictrain.data.changed import Choice, left_of, used_of_epoch
from elastictrain.data.fingerprint import fingerprint_difference
from elastictrain.data.live import LiveSource, open_live
from elastictrain.data.live_feeder import open_feeder
from elastictrain.data.mixed import MixedSource, open_mixture
from elastictrain.data.mixture import Segment, join_plans, with_new_names
from elastictrain.data.remembered import recall, remember, short_hash
from elastictrain.data.seeds import stage_seed
from elastictrain.data.source import Source, open_source
from elastictrain.data.sources import AnySource
from elastictrain.data.stream_state import dump_state, parse_state
from elastictrain.data_settings import Mixture
from elastictrain.errors import ConfigError, DataEnded, DataError

if TYPE_CHECKING:
    from elastictrain.data_settings import Data

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
        if batch_size < 1 or self._lanes < 1:
            raise ConfigError(f"batch_size={batch_size}, lanes={self._lanes}: expected at least 1 of each")
        if batch_size % self._lanes:
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
        self._asked_for: list[Segment] = []  # by the settings, whose names it has
        self._begun = (0, 0)  # changes of the data so far, and the step after the last one; of one source
        self._renamed: dict[str, str] = {}  # sources of a mixture that have changed, as the order calls them now
        self._step, self._is_remembered = 0, False
        self.source: AnySource = self._open()
        if isinstance(self.source, MixedSource):
            self._asked_for = self.source.plan
            self._plans = [(0, self._asked_for)]

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
            last = self._begun[1] + self._epochs * self.source.steps_per_epoch
        with open_feeder(self.source, self._device) as feeder:
            expected, begin = self._step, self._begun[1]
            while last is None or self._step < last:
                if self._step + _STEPS_AHEAD // 2 >= expected:
                    expected = self._step + _STEPS_AHEAD if last is None else min(last, self._step + _STEPS_AHEAD)
                    places = ((step - begin, lane) for step in range(self._step, expected) for lane in self._mine)
                    feeder.expect(places, until=math.inf if last is None else last - begin)
                try:
                    parts = [feeder.batch(self._step - begin, lane) for lane in self._mine]
                except DataEnded:
                    return
                self._step += 1
                yield {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def state(self) -> bytes:
        """Return where the stream is; the same on all ranks. 256 bytes or less of one source, and of a mixture of eight
        with short names; a mixture's has name, check and weight of each source, and the weights again for each stage.
        """
        content: dict[str, Any] = {
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
        if self._begun != (0, 0):
            content["begun"] = self._begun
        if self._renamed:
            content["renamed"] = self._renamed
        return dump_state(content)

    def resume(self, state: bytes, *, data_changed: Choice = "fail") -> None:
        """Go on where `state` was taken, on any rank of any world.

        A mixture with other proportions than those of the state goes on with them from here: every source where it was.
        Raises DataError if the settings that the order depends on are not those of the state, or the data: with
        `data_changed="new_stage"` these go on as they are now, in a new order from their first sample. Of a mixture
        that goes for the sources that have changed, and the others stay where they were. All ranks must say the same.
        """
        stored = parse_state(state)
        now = {"seed": self._seed, "lanes": self._lanes, "size": self._size}
        differing = [f"{name} was {stored[name]} and is now {new}" for name, new in now.items() if stored[name] != new]
        if not differing and ("plans" in stored) != bool(self._plans):
            differing = ["one source was a mixture, or the other way round"]
        if differing:
            _refuse(differing)
        (changes, begun), step = stored.get("begun", (0, 0)), int(stored["step"])
        renamed = dict(stored.get("renamed", {}))
        changed = self._changed(stored, renamed)
        if changed:
            if data_changed != "new_stage":
                _refuse([said for mine, old in changed.values() for said in self._changes(mine, old)],
                        self._offer(changed, step - begun))  # fmt: skip
            if self._plans:
                planned = {name for _, plan in stored["plans"] for shown in plan for name in shown["weights"]}
                renamed = with_new_names(renamed, list(changed), {*self._mine_by_name(), *planned})
            else:
                changes, begun = changes + 1, step
        elif self.source.growth is not None and "live" in stored:
            self.source.growth.check(stored["live"])
        self._go_on(stored, (int(changes), int(begun)), renamed)

    def _changed(self, stored: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, tuple[str, str]]:
        """The sources that are not those of a state: by the name that its order has for them, the one that the settings
        have, and the hash that it had. A source of a mixture may come or go. Raises DataError for one that is live.
        """
        as_set, mine = {name: own for own, name in renamed.items()}, self._mine_by_name()
        found = {}
        for name, old in stored["data"].items():
            source = mine.get(as_set.get(name, name))
            if source is None or short_hash(source.fingerprint) == old:
                continue
            found[name] = (as_set.get(name, name), str(old))
            if isinstance(source, LiveSource):
                _refuse([*self._changes(*found[name]), "it is live, with one order for good, and so no new stage"])
        return found

    def _offer(self, changed: Mapping[str, tuple[str, str]], position: int) -> str:
        """What a new stage would leave behind, as far as it is known here."""
        left = [
            left_of(known, _whole(self._mine_by_name()[""]), used_of_epoch(known, position)).words()
            for mine, old in changed.values()
            if not mine and (known := recall(old)) is not None
        ]
        which = ", ".join(repr(mine) for mine, _ in changed.values() if mine)
        return (
            'Or take the data as they are now as a new stage, with resume(state, data_changed="new_stage"): a new '
            f"order begins at their beginning{f', of {which}; other sources go on where they were' if which else ''}"
            f"{f' ({left[0]})' if left else ''}"
        )

    def _go_on(self, stored: Mapping[str, Any], begun: tuple[int, int], renamed: dict[str, str]) -> None:
        checked = {name: short_hash(one.fingerprint) for name, one in self._mine_by_name().items()}
        is_same = begun == self._begun and not self._plans
        self._step, self._begun, self._renamed = int(stored["step"]), begun, renamed
        if self._plans:
            plan = [replace(s, weights={renamed.get(n, n): w for n, w in s.weights.items()}) for s in self._asked_for]
            plans = [(int(step), [Segment.from_json(shown) for shown in plan]) for step, plan in stored["plans"]]
            if plans[-1][1] != plan:
                plans.append((self._step, plan))
            self._plans = plans
        if is_same:
            return
        self.source.close()
        self.source = self._open()
        if {name: short_hash(one.fingerprint) for name, one in self._mine_by_name().items()} != checked:
            raise DataError("the data have changed since this stream was opened; open it again, and then resume it")

    def _open(self) -> AnySource:
        settings: dict[str, Any] = {"seed": self._seed, "lanes": self._lanes, "lane_batch_size": self._size}
        if isinstance(self._spec, Mixture):
            return open_mixture(self._spec.renamed(self._renamed), segments=join_plans(self._plans), **settings)
        if self._spec.live is not None:
            return open_live(self._spec, **settings)
        return open_source(self._spec, **settings | {"seed": stage_seed(self._seed, self._begun[0])})

    def _hashes(self) -> dict[str, str]:
        """The first half of each source's fingerprint; by name in a mixture."""
        return {name: short_hash(one.fingerprint) for name, one in self._sources().items()}

    def _sources(self) -> Mapping[str, Source | LiveSource]:
        return self.source.sources if isinstance(self.source, MixedSource) else {"": self.source}

    def _mine_by_name(self) -> dict[str, Source | LiveSource]:
        """The sources by their names in the settings."""
        as_set = {name: mine for mine, name in self._renamed.items()}
        return {as_set.get(name, name): source for name, source in self._sources().items()}

    def _changes(self, name: str, old: str) -> list[str]:
        """Say that a source has changed, and how, if this machine has seen what it was."""
        said = f"the data of source {name!r} changed" if name else "the data changed"
        known = recall(old)
        how = [] if known is None else fingerprint_difference(known, _whole(self._mine_by_name()[name]))
        return [f"{said}: {sentence}" for sentence in how] or [said]


def _refuse(differing: Sequence[str], offer: str = "") -> NoReturn:
    raise DataError(
        f"this state belongs to another stream: {'; '.join(differing)}. Open the stream as it was, or start anew"
        f"{f'. {offer}' if offer else ''}"
    )


def _whole(source: Source | LiveSource) -> dict[str, Any]:
    return source.whole_fingerprint if isinstance(source, Source) else source.fingerprint


def _default_lanes(batch_size: int, world: int) -> int:
    """The number of lanes, at most 64, that serves the most numbers of ranks: the largest divisor of the batch."""
    divisors = [n for n in range(1, min(batch_size, max(64, world)) + 1) if batch_size % n == 0]
    return divisors[-1] if divisors else 1
