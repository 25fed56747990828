"""Finding a place: the first batch after resuming in the middle against at the start, and how many bytes of state say
where a stream is. (The order of 10^9 samples: data_order.py.)
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tokens_per_s import LANES, SIZE, spec_of, write_data

import common
import elastictrain as et
from elastictrain.data import LaneReader, open_source
from elastictrain.data.stream_state import dump_state, parse_state
from elastictrain.data_settings import Data, Mixture


def first_batch(folder: Path, share: float) -> float:
    """Seconds from a source that is open to the batches of all lanes of one step."""
    source = open_source(spec_of(folder), seed=1, lanes=LANES, lane_batch_size=SIZE)
    step = int(share * source.steps_per_epoch)
    reader = LaneReader(source)
    begun_s = time.perf_counter()
    for lane in range(LANES):
        reader.batch(step, lane)
    seconds = time.perf_counter() - begun_s
    reader.close()
    return seconds


def states(folder: Path) -> Iterator[tuple[str, bytes]]:
    """What a stream says of where it is, far into a run: of one source, and of mixtures."""
    spec = spec_of(folder)
    yield "one source", far_state(spec)
    for count in (2, 8):
        sources = {f"src{number}": spec for number in range(count)}
        yield (
            f"a mixture of {count}",
            far_state(
                et.data.mixture(sources, sequence_length=spec.sequence_length, weights=dict.fromkeys(sources, 1.0))
            ),
        )


def far_state(data: Data | Mixture) -> bytes:
    """The state of a stream after 10^9 steps, which it has been resumed at."""
    stream = et.data.stream(data, batch_size=512, lanes=64, seed=2**63 - 1)
    stream.resume(dump_state({**parse_state(stream.state()), "step": 10**9}))
    assert stream.step == 10**9
    return stream.state()


def main() -> None:
    options = common.arguments(__doc__)
    common.prepare_data()
    results = common.Results("data_position", "Data: finding a place in the order", options)
    rounds, megabytes = (5, 48) if options.quick else (15, 256)
    with common.scratch("data") as place:
        os.environ["XDG_CACHE_HOME"] = str(place / "cache")
        folder = write_data(place, "text", megabytes)
        first_batch(folder, 0.0)
        shares = (0.0, 0.5, 0.37, 0.81)
        seconds: dict[float, list[float]] = {share: [] for share in shares}
        for _ in range(rounds):
            for share in shares:
                seconds[share].append(first_batch(folder, share))
        for share in shares:
            results.row(what=f"first step at {share:.0%} of the epoch", seconds=common.median(seconds[share]),
                        spread=common.spread(seconds[share]))  # fmt: skip
        middle = [sum(seconds[s][i] for s in shares[1:]) / 3 for i in range(rounds)]
        value = common.median([a / b for a, b in zip(middle, seconds[0.0], strict=True)])
        results.figure("first batch in the middle against at position 0", value, "<= 1.1",
                       common.verdict(value, 1.1, at_most=True))  # fmt: skip
        sizes = {words: len(state) for words, state in states(folder)}
    for words, size in sizes.items():
        results.row(what=f"state of a stream after 10^9 steps: {words}", bytes=size)
    results.judge("state, bytes", sizes["one source"], 256, at_most=True)
    results.judge("state of a mixture of eight, bytes", sizes["a mixture of 8"], 256, at_most=True)
    results.notes.append(f"Peak of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB.")
    results.write()


if __name__ == "__main__":
    main()
