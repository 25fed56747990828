"""All benchmarks, one after the other, and the table of figures in benchmarks/README.md.

python benchmarks/run_all.py [--quick] [--only recovery throughput ...] [--table]
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import common

CLOSE = shlex.split("--only 'DDP best' elastictrain 'elastictrain on Ray' --workers 2 --lanes 4 --rounds 70")
"""The case nearest to its target, with enough rounds to tell: a single round is some eight percent off."""
BEST = shlex.split("--best --cases '256 MiB' --rounds 14")
LARGE = shlex.split("--best --cases '1 GiB' --rounds 2")
"""Each in about three minutes."""
ALL = {
    "same_bits": ["same_bits.py"],
    "recovery": ["recovery.py"],
    "recovery_ray": ["recovery.py", "--ray"],
    "resize": ["resize.py"],
    "join": ["join.py"],
    "throughput": ["throughput.py", "--ray"],
    "throughput_2x4": ["throughput.py", "--name", "throughput_2x4", *CLOSE],
    "memory": ["memory.py"],
    "formats": ["formats.py"],
    "mirrors": ["mirrors.py"],
    "integrity": ["integrity.py"],
    "corruption": ["corruption.py"],
    "detection": ["detection.py"],
    "startup": ["startup.py"],
    "faults": ["faults/compare.py"],
    "goodput": ["goodput.py"],
    "false_alarms": ["false_alarms.py"],
    "simulate": ["simulate.py"],
    "planner": ["planner.py"],
    "stragglers": ["stragglers.py"],
    "pipelines": ["pipelines.py"],
    "mitigation": ["mitigation.py"],
    "redundancy": ["redundancy.py"],
    "checkpoint_stall": ["checkpoints/stall.py"],
    "checkpoint_stall_best": ["checkpoints/stall.py", "--name", "checkpoint_stall_best", *BEST],
    "checkpoint_stall_1gib": ["checkpoints/stall.py", "--name", "checkpoint_stall_1gib", *LARGE],
    "checkpoint_throughput": ["checkpoints/throughput.py"],
    "checkpoint_reshard": ["checkpoints/reshard.py"],
    "checkpoint_planning": ["checkpoints/planning.py"],
    "checkpoint_copies": ["checkpoints/copies.py"],
    "checkpoint_gpu": ["checkpoints/gpu.py"],
    "data_throughput_text": ["data/tokens_per_s.py", "--case", "text"],
    "data_throughput_prepared": ["data/tokens_per_s.py", "--case", "prepared"],
    "data_throughput_table": ["data/tokens_per_s.py", "--case", "table"],
    "exactly_once": ["exactly_once.py"],
    "data_order": ["data_order.py"],
    "data_position": ["data/position.py"],
    "data_live": ["data/live.py"],
    "data_steady": ["data/steady.py"],
    "data_waiting": ["data/waiting.py"],
    "data_ray_data": ["data/ray_data.py"],
    "data_node_feeder": ["data/node_feeder.py"],
}
BEGIN, END = "<!-- figures: written by run_all.py -->", "<!-- end of figures -->"


def figures(folder: Path) -> list[dict[str, object]]:
    """Every figure in the results there are, the full ones before the quick."""
    rows = []
    for name in ALL:
        path = next((p for p in (folder / f"{name}.json", folder / f"{name}-quick.json") if p.is_file()), None)
        if path is None:
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        when = found["machine"]["date"][:10] + (", quick" if found["quick"] else "")
        loads = f"{found['machine']['load_average'][0]} / {found['machine']['load_average_at_end'][0]}"
        for figure, facts in found["figures"].items():
            rows.append({"figure": figure, "measured": facts["value"], "to reach": facts["target"],
                         "": facts["verdict"], "date": when, "load before / after": loads,
                         "from": f"[{name}](results/{path.stem}.md)"})  # fmt: skip
    return rows


def write_table(folder: Path) -> None:
    readme = common.HERE / "README.md"
    text = readme.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    body = "\n".join(common.table(figures(folder)))
    readme.write_text(f"{head}{BEGIN}\n\n{body}\n\n{END}{tail}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(ALL), default=list(ALL))
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    parser.add_argument("--table", action="store_true", help="only write the table from the results there are")
    options = parser.parse_args()
    failed = []
    for name in [] if options.table else options.only:
        print(f"--- {name} ---", flush=True)
        script, *more = ALL[name]
        command = [sys.executable, str(common.HERE / script), *more, "--out", str(options.out)]
        if subprocess.run(
            [*command, *(["--quick"] if options.quick else [])], env=common.child_environment()
        ).returncode:
            failed.append(name)
    if options.out.resolve() == common.RESULTS:
        write_table(options.out)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
