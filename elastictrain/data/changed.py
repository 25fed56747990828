"""Data that have changed between two starts of a run: what is left of the old ones, and what a user can choose.

A new stage of changed data begins at their beginning, in a new order. What the old order had not come to is left, and
of files that are the same in both, samples may come again: nobody can say of a sample in a new order whether an epoch
of the old one has used it, without keeping a mark for each. So both are counted, and said before anybody chooses. Of a
mixture this goes for the sources that have changed; the others go on where they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from elastictrain.data.fingerprint import ABOUT_ORDER, fingerprint_difference
from elastictrain.data.mixed import MixedSource
from elastictrain.data.sources import AnySource
from elastictrain.errors import DataError
from elastictrain.protocol import Stage

Choice = Literal["fail", "new_stage"]
"""What to do with data that have changed: nothing, or take them as a new stage of the order."""


@dataclass(frozen=True, slots=True)
class Left:
    """What a change leaves of one source (`name`, "" where there is one): of the `samples` of its epoch, `unused` were
    still to come, and as many of the others as `may_repeat` lie in one of the `same_files`, which are in both (None:
    it is not known which files are).
    """

    name: str
    samples: int
    unused: int
    may_repeat: int
    same_files: int | None

    def words(self) -> str:
        """In words."""
        whose = f"source {self.name!r}: " if self.name else ""
        files = "files that have not changed" if self.same_files is None else f"{self.same_files} unchanged file(s)"
        again = f"up to {self.may_repeat} that were used lie in {files} and may come again"
        none = "none that was used comes again in an unchanged file"
        return (
            f"{whose}of the {self.samples} samples of the epoch under way {self.unused} have not been used and are "
            f"left out; {again if self.may_repeat else none}"
        )


def left_of(old: Mapping[str, Any], new: Mapping[str, Any], used: int, name: str = "") -> Left:
    """What is left of a source of fingerprint `old` of whose epoch so many samples were `used`."""
    before, after = (
        None if one.get("files") is None else {file["name"]: file for file in one["files"]} for one in (old, new)
    )
    samples = int(old["samples"])
    used = min(used, samples)
    if before is None or after is None:
        return Left(name, samples, samples - used, used, None)
    same = [file for key, file in before.items() if after.get(key) == file]
    most = used if old.get("text_column") else min(used, sum(file["rows"] for file in same))  # a text is no sample
    return Left(name, samples, samples - used, most if same else 0, len(same))


def used_of_epoch(old: Mapping[str, Any], position: int) -> int:
    """How many samples of its epoch a source has used before step `position` of its order."""
    per_step = int(old["lanes"]) * int(old["lane_batch_size"])
    return position % _steps(old, per_step) * per_step


def used_of_source(old: Mapping[str, Any], places: Sequence[int]) -> int:
    """The same of a source of a mixture; `places`: by lane, how many of its samples the lane has used."""
    return sum(place % _steps(old, int(old["lanes"])) for place in places)


def _steps(old: Mapping[str, Any], per_step: int) -> int:
    more = per_step - 1 if old.get("ragged") == "repeat" else 0
    return max(1, (int(old["samples"]) + more) // per_step)


def changed_sources(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str] | None:
    """The sources of a mixture that have changed; None where the data as a whole are others."""
    if not old.get("kind") == new.get("kind") == "mixture" or old["mixture_version"] != new["mixture_version"]:
        return None
    both = sorted({*old["sources"]} & {*new["sources"]})
    return [n for n in both if fingerprint_difference(old["sources"][n], new["sources"][n], ignoring=ABOUT_ORDER)]


def what_is_left(
    old: Mapping[str, Any], source: AnySource, new: Mapping[str, Any], stages: Sequence[Stage], step: int
) -> list[Left]:
    """What a change of the data after `step` leaves, source by source. `old` and `new`: fingerprints, with their files
    where they are known; `stages`: those of the checkpoint; `source`: the data as they are now, opened under them.
    """
    position, names = stages[-1].position(step + 1), changed_sources(old, new)
    if names is None:
        return [] if "samples" not in old else [left_of(old, new, used_of_epoch(old, position))]
    assert isinstance(source, MixedSource)
    schedule, left = source.schedule, []
    for name in [one for one in names if one in schedule.names]:
        number = schedule.names.index(name)
        places = [schedule.positions(position, lane)[number] for lane in range(schedule.lanes)]
        was = old["sources"][name]
        left.append(left_of(was, new["sources"][name], used_of_source(was, places), name))
    return left


def refuse_live(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise DataError where a source that has changed is live: it has one order for the life of a run."""
    names = changed_sources(old, new)
    pairs = [("data", old, new)] if names is None else [
        (f"data.sources.{name}", old["sources"][name], new["sources"][name]) for name in names
    ]  # fmt: skip
    for setting, *both in pairs:
        if any(_is_live(one) for one in both):
            other = "give it another name in data.sources" if names is not None else "start a new run"
            raise DataError(
                f"{setting}: a live source cannot become a new stage, nor take the place of other data: its order is "
                "recorded for the life of a run, and what arrives belongs in its manifest, which is no change. "
                f"Put back what it was, or {other}"
            )


def _is_live(fingerprint: Mapping[str, Any]) -> bool:
    return "live_version" in fingerprint or any(_is_live(one) for one in fingerprint.get("sources", {}).values())


def offer(changes: Sequence[str], left: Sequence[Left], since: str, how: str, anew: str) -> str:
    """The text of the error: what has changed since when, and what can be chosen. `how`: says how a new stage is asked
    for; `anew`: how to start again.
    """
    shown = "\n  ".join([*changes[:10], *([f"… and {len(changes) - 10} more differences"] if changes[10:] else [])])
    cost = "".join(f"\n      {one.words()}" for one in left)
    return (
        f"the data have changed since {since}:\n  {shown}\n"
        "put the data back, or choose:\n"
        f"    take them as a new stage ({how}): a new order begins at their beginning{cost}\n"
        f"    start again: {anew}"
    )


def as_event(changes: Sequence[str], left: Sequence[Left]) -> dict[str, Any]:
    """What the events of a run say of it."""
    return {"changes": list(changes[:10]), "left": [asdict(one) for one in left]}
