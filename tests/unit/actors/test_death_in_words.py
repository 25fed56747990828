"""Ray's paragraphs about dead actors, in a few words that people can read in a sentence."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from elastictrain_actors.deaths import death_in_words

DEAD = "The actor died unexpectedly before finishing this task.\n\tclass_name: WorkerActor\n\tnamespace: 1c1\n"
CRASHED = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was "
    "killed by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed."
)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (DEAD + CRASHED, "its process died (killed or crashed) [SYSTEM_ERROR]"),
        (
            DEAD + "Worker exit type: INTENDED_SYSTEM_EXIT Worker exit detail: x",
            "its process ended [INTENDED_SYSTEM_EXIT]",
        ),
        (
            "Worker exit type: NODE_OUT_OF_MEMORY Worker exit detail: y",
            "killed by Ray: its node ran out of memory [NODE_OUT_OF_MEMORY]",
        ),
        (DEAD + "The actor died because its node has died. Node Id: 12", "its node died"),
        (
            "The actor is dead because it was killed by `ray.kill`.",
            "The actor is dead because it was killed by `ray.kill`.",
        ),
        ("odd\nnews", "odd"),
        ("x" * 500, "x" * 157 + "..."),
        ("", "it died"),
    ],
)
def test_death_in_words(said: str, words: str) -> None:
    assert death_in_words(said) == words


@pytest.mark.parametrize("users", [None, "secret"])
def test_ray_leaves_out_what_we_say_ourselves(users: str | None) -> None:
    """Ray's own filter, in a process of its own: Ray reads the setting once, when it is imported."""
    program = (
        "import elastictrain_actors\n"
        "from ray._private.ray_logging import stdout_deduplicator as filter\n"
        "def kept(s): return [l for b in filter.deduplicate({'lines': [s], 'pid': 'raylet', 'ip': 'a', 'job': 'b'})"
        " for l in b['lines']]\n"
        "print(len(kept('A worker died or was killed while executing a task by an unexpected system error.')),"
        " len(kept('a secret')), len(kept('The node is full.')))"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_DEDUP_LOGS_SKIP_REGEX", "RAY_DEDUP_LOGS")}
    if users is not None:
        environment["RAY_DEDUP_LOGS_SKIP_REGEX"] = users
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert found.stdout.split() == ["0", "1" if users is None else "0", "1"]
