"""What can go wrong, sorted by who must act.

```
CheckpointError
├── InvalidPiece          the caller: a piece, a name or a tree that the format cannot hold
├── IncompleteCheckpoint  the caller: the parts do not tile every tensor, or a pack is not as voted
├── AlreadyCommitted      the caller: another attempt has committed this step
│   └── StaleGeneration     … under a newer generation: this caller is not the coordinator any more
├── NoCheckpoint          the caller: there is no such step
├── InvalidMapping        the caller: a rule that cannot be applied to these tensors
├── StateMismatch         the caller: what was asked for and what is there differ; both are listed
├── ForeignFormat         the caller: not a checkpoint of that format, or one that cannot be read
├── MissingExtra          the caller: a foreign format needs a package that is not installed
├── LoadFailed            another rank: it could not take part in a load, and so no rank has loaded
├── SaveFailed            storage, or the caller: a save in the background has come to nothing
│   └── StateChanged        … because the state changed under it without a call of before_mutation
├── SaveDropped           the caller: this save was skipped or superseded, as it had asked for
├── SaveTimeout           storage: a save in the background is too slow for the deadline
└── CorruptData           storage: bytes differ from their hash, are cut short or missing
    └── InvalidManifest     … or the manifest itself cannot be believed
```
"""

from __future__ import annotations


class CheckpointError(Exception):
    """Base of all errors that this library raises on purpose."""


class InvalidPiece(CheckpointError, ValueError):
    """Something was handed in that the format cannot hold; nothing was written for it."""


class IncompleteCheckpoint(CheckpointError):
    """The parts of an attempt do not make a checkpoint; nothing was committed."""


class AlreadyCommitted(CheckpointError):
    """The step has a manifest, and a manifest is never overwritten."""


class StaleGeneration(AlreadyCommitted):
    """The step was committed under a newer generation."""


class NoCheckpoint(CheckpointError):
    """There is no checkpoint at the step that was asked for."""


class CorruptData(CheckpointError):
    """Stored bytes are not those that were written.

    Attributes:
        file: path in the store, or "" where no single file is meant.
        block: number of the block in the file, or None where the whole file is meant.
        tensors: names of the tensors with bytes in that block (or file).

    """

    def __init__(
        self, message: str, *, file: str = "", block: int | None = None, tensors: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message)
        self.file = file
        self.block = block
        self.tensors = tensors


class InvalidManifest(CorruptData):
    """A manifest that cannot be believed: unreadable, altered, unknown version, or contradicting itself."""


class InvalidMapping(CheckpointError, ValueError):
    """A rule that cannot be applied: it fits no tensor, its sizes do not fit, or two tensors end under one name."""


class StateMismatch(CheckpointError):
    """What was asked for is not what the checkpoint holds.

    Attributes:
        missing: names that were asked for and are not there.
        extra: names that are there and were not asked for.
        different: sentences, one for each tensor of another shape or type.

    """

    def __init__(
        self,
        message: str,
        *,
        missing: tuple[str, ...] = (),
        extra: tuple[str, ...] = (),
        different: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.missing = missing
        self.extra = extra
        self.different = different


class ForeignFormat(CheckpointError):
    """A checkpoint of another format that cannot be read (or written): what was found, and what was expected."""


class MissingExtra(CheckpointError, ImportError):
    """A foreign format needs a package that is not installed; the message names it."""


class LoadFailed(CheckpointError):
    """Another rank of those that load together could not take part, for a reason of its own; the message says which."""


class SaveFailed(CheckpointError):
    """A save in the background has failed; the checkpoint of that step does not exist. The cause is chained."""


class StateChanged(SaveFailed):
    """The state was changed while a save still read it: nothing of it can be believed, and nothing was committed."""


class SaveDropped(CheckpointError):
    """There is no result: the save was skipped, or superseded by a later one."""


class SaveTimeout(CheckpointError, TimeoutError):
    """A wait for a save in the background has reached its deadline; the save itself goes on."""
