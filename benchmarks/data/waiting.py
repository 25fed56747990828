"""What a real run loses to its data: two workers on Ray whose step is 20 % slower than a reading thread delivers, text
that is tokenised (BPE) in every epoch, read from Parquet. Judged by the run's own metrics.jsonl, first epoch and first
step included; the time spent in asking for batches that lie ready stands beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyarrow as pa
import pyarrow.parquet as pq
from tokens_per_s import documents

import common
import elastictrain as et
from elastictrain.data import LaneReader, open_source
from elastictrain.observe.metrics import MetricsRow, data_wait, history, parse_rows

WORKERS, LANES, SIZE, LENGTH = 2, 4, 2, 1024
GROUP_BYTES = 32 << 10
"""So that a run reads a thousand row groups, as of a corpus of 20 GB in row groups of 64 MB in three epochs."""
SLOWER = 1.2
FITTING_STEPS = 60


def write(folder: Path, megabytes: int) -> dict[str, Any]:
    """Text in row groups of `GROUP_BYTES` and a tokenizer of its own; the settings of its data."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    texts = list(documents(megabytes << 20))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=4000, special_tokens=["<|end|>"], show_progress=False)
    bpe.train_from_iterator(texts[: max(1, len(texts) // megabytes)], trainer)
    bpe.save(str(folder / "tokenizer.json"))
    rows = max(1, len(texts) * GROUP_BYTES // (megabytes << 20))
    pq.write_table(pa.table({"text": texts}), folder / "text.parquet", row_group_size=rows, compression="zstd")
    return {"kind": "parquet", "path": str(folder / "text.parquet"), "text_column": "text", "sequence_length": LENGTH,
            "tokenizer": str(folder / "tokenizer.json")}  # fmt: skip


def read_alone(data: dict[str, Any], lanes: Sequence[int]) -> tuple[float, int]:
    """Seconds that one thread needs for these lanes' batches of a step, and the steps of an epoch."""
    source = open_source(et.Data(**data), seed=1, lanes=LANES, lane_batch_size=SIZE)
    reader, steps = LaneReader(source), source.steps_per_epoch
    begun_s = time.perf_counter()
    for step in range(steps):
        for lane in lanes:
            reader.batch(step, lane)
    seconds = time.perf_counter() - begun_s
    reader.close()
    return seconds / steps, steps


def read_together(data: dict[str, Any]) -> tuple[float, int]:
    """The same of as many readers at a time as there will be workers, each in a process; the slowest."""
    own = [list(range(worker, LANES, WORKERS)) for worker in range(WORKERS)]
    commands = [[sys.executable, __file__, "--read", json.dumps([data, lanes])] for lanes in own]
    running = [subprocess.Popen(command, env=os.environ, stdout=subprocess.PIPE, text=True) for command in commands]
    found = [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]
    return max(step_s for step_s, _ in found), found[0][1]


def train(folder: Path, data: dict[str, Any], lane_s: float, steps: int) -> list[MetricsRow]:
    """What metrics.jsonl says of a run of so many steps."""
    job = et.Job(
        recipe=f"{Path(__file__).parent / 'touch_recipe.py'}:Touch", recipe_args={"lane_s": lane_s},
        data=et.Data(**data), lanes=LANES, lane_batch_size=SIZE, steps=steps, workers={"max": WORKERS},
        run_dir=str(folder),
    )  # fmt: skip
    et.run(job)
    lines = next(folder.rglob("metrics.jsonl")).read_text(encoding="utf-8").splitlines()
    return history(parse_rows(json.loads(line) for line in lines))


def step_s(rows: Sequence[MetricsRow]) -> float:
    return common.median(row.step_s or 0.0 for row in rows)


def share(rows: Sequence[MetricsRow]) -> tuple[float, dict[str, float]]:
    lost, causes = data_wait(rows) or (float("nan"), {})
    total_s = sum(row.step_s or 0.0 for row in rows)
    return lost, {cause: seconds / total_s for cause, seconds in causes.items()}


def main() -> None:
    options = common.arguments(__doc__, lambda parser: parser.add_argument("--read", default=None))
    if options.read is not None:
        print(json.dumps(read_alone(*json.loads(options.read))))
        return
    os.environ |= common.child_environment() | {"TOKENIZERS_PARALLELISM": "false"}
    common.prepare_data()
    results = common.Results("data_waiting", "Data: what a run loses to it", options)
    with common.scratch("waiting") as place:
        os.environ["XDG_CACHE_HOME"] = str(place / "cache")
        data = write(place, 4 if options.quick else 12)
        read_together(data)  # what tokenising found is kept from here on
        alone_s, epoch = read_together(data)
        share_s = SLOWER * alone_s / (LANES // WORKERS)
        fitted = train(place / "fitting", data, share_s, FITTING_STEPS)
        over_s = step_s(fitted[FITTING_STEPS // 2 :]) - SLOWER * alone_s  # exchange and all else that a step takes
        lane_s = max(0.0, share_s - max(0.0, over_s) / (LANES // WORKERS))
        for number in range(1 if options.quick else 2):
            rows = train(place / f"run-{number}", data, lane_s, epoch * (2 if options.quick else 3))
            lost, causes = share(rows)
            first, _ = share(rows[:epoch])
            later, later_causes = share(rows[epoch:])
            results.row(what=f"run {number + 1}", steps=len(rows), reader_ms=1e3 * alone_s, step_ms=1e3 * step_s(rows),
                        step_of_reader=step_s(rows) / alone_s, lost=lost, lost_in_epoch_1=first, lost_later=later,
                        first_step_s=sum(filter(None, rows[0].data_wait.values())),
                        asking=later_causes.get("call", 0.0),
                        causes={cause: round(part, 5) for cause, part in causes.items()})  # fmt: skip
    results.judge("data wait in a run whose step is 20 % slower than the reader, share of the step",
                  common.median(row["lost"] for row in results.rows), 0.01, at_most=True)  # fmt: skip
    results.figure("data wait of the first step, s", common.median(row["first_step_s"] for row in results.rows),
                   "none", "beside it")  # fmt: skip
    for name, key in (("from the second epoch on", "lost_later"), ("asking for batches that lie ready", "asking")):
        results.figure(f"data wait, {name}, share of the step", common.median(row[key] for row in results.rows),
                       "none", "beside it")  # fmt: skip
    results.notes.append(
        "`reader_ms`: of one thread for the lanes of one worker in a step, with as many such readers at a time as "
        "there are workers. `lost`: of the worker that publishes, as the run's metrics.jsonl says it."
    )
    results.notes.append(
        "The first step waits for the first windows of its lanes, before which nothing can have been read: "
        "`first_step_s`, a share of the run that goes with the row groups that it trains on."
    )
    results.write()


if __name__ == "__main__":
    main()
