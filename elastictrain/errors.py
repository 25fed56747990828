"""Errors, sorted by who must act.

```
ElasticTrainError
├── UserError            you: the job, the recipe or the data must change
│   ├── ConfigError        a setting of the job
│   ├── RecipeError        the recipe's code (import, model, optimizer, loss)
│   ├── DataError          the data set (missing, empty, wrong schema, changed)
│   │   ├── NoSamples        nothing in it to train on
│   │   ├── DataMismatch     it can be read, and is not what the settings say
│   │   ├── StoreFailed      the store of the data does not give what it had listed
│   │   └── DataEnded        a live source has no further step
│   └── CheckpointMismatch the checkpoint does not belong to this job
├── ClusterError         whoever runs the cluster: machines, storage, network
│   ├── WorkerStartError   a worker could not start
│   ├── CapacityError      the job does not fit on what is there
│   ├── CorruptCheckpoint  stored bytes differ from their hash
│   └── CorruptWorker      a machine's memory or arithmetic is wrong
├── PeerLost             nobody: a peer is gone; the controller forms a new generation
└── InternalError        us: an invariant of elastictrain does not hold; please report it
```

Every message says what was got, what was expected and which setting to change.
"""

from __future__ import annotations


class ElasticTrainError(Exception):
    """Base of all errors that elastictrain raises on purpose."""


class UserError(ElasticTrainError):
    """The job, the recipe or the data must change."""


class ConfigError(UserError):
    """A setting of the job is wrong; the message names the setting."""


class RecipeError(UserError):
    """The recipe's code failed or asks for something that cannot be done."""


class DataError(UserError):
    """The data set is missing, empty, has the wrong schema, or has changed."""


class NoSamples(DataError):
    """The data set is readable, and holds nothing to train on."""


class DataMismatch(DataError):
    """Data that can be read and are not what the settings or the other files say: a column is missing or of another
    type, a document is too long. Never left out as corrupt (`data.on_corrupt: skip`).
    """


class StoreFailed(DataError):
    """A file of the data cannot be read just now: its store is out of reach, or refuses it. Nothing is known of the
    content, so it is never left out as corrupt (`data.on_corrupt: skip`).
    """


class DataEnded(DataError):
    """A live source has no further step: it was closed, or its policy says to stop where nothing new is there."""


class CheckpointMismatch(UserError):
    """The checkpoint belongs to another model, optimizer or data set; the message lists the differences."""


class ClusterError(ElasticTrainError):
    """Machines, storage or network must be mended."""


class WorkerStartError(ClusterError):
    """A worker process could not start; the message holds its traceback."""


class CapacityError(ClusterError):
    """The job does not fit on the cluster as it is."""


class CorruptCheckpoint(ClusterError):
    """Stored bytes differ from their recorded hash."""


class CorruptWorker(ClusterError):
    """The memory or the arithmetic of a machine is wrong; the message says how that was found."""


class PeerLost(ElasticTrainError):
    """A peer of the process group is gone or has given up; the step is redone by the next generation."""


class InternalError(ElasticTrainError):
    """An invariant of elastictrain does not hold: a bug of ours."""
