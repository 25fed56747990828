"""What all benchmarks share: where things are, the load at the time, medians, and results as JSON and Markdown."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"
DATA = ROOT / "examples" / "gpt" / "data" / "train"
PATHS = [str(ROOT), str(ROOT / "actors"), str(ROOT / "checkpoint"), str(HERE)]
sys.path[:0] = [path for path in PATHS if path not in sys.path]


def child_environment() -> dict[str, str]:
    """One thread per process, and the checkout on the path (installed or not)."""
    found = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in PATHS]
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*PATHS, *found])}


def arguments(description: str | None, more: Callable[[argparse.ArgumentParser], Any] = lambda _: None) -> Any:
    """`--quick` (about a minute, for development) or everything; `--out` for the results."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and cases: about a minute, rough figures")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for results (default: %(default)s)")
    more(parser)
    return parser.parse_args()


def prepare_data() -> None:
    """The example's data, if it is not there yet."""
    subprocess.run([sys.executable, str(ROOT / "examples/gpt/prepare.py")], check=True, env=child_environment())


@contextmanager
def scratch(name: str) -> Iterator[Path]:
    """A folder for one benchmark's runs, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix=f"elastictrain-{name}-") as folder:
        yield Path(folder)


# --- the machine ---


def machine() -> dict[str, Any]:
    """Hardware, versions and load: without them a figure says nothing."""
    cpu = next((line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if "model name" in line), "unknown")
    memory_kb = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(memory_kb / 2**20, 1),
        "load_average": load(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "ray", "numpy")},
        "commit": _commit(),
    }


def load() -> list[float]:
    return [round(number, 2) for number in os.getloadavg()]


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _commit() -> str:
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


# --- numbers ---


def median(values: Iterable[float]) -> float:
    found = list(values)
    return statistics.median(found) if found else math.nan


def quantile(values: Iterable[float], q: float) -> float:
    """The smallest value that is at least as large as a share `q` of all (nearest rank): p95 of 30 is the 29th."""
    found = sorted(values)
    return found[max(0, math.ceil(q * len(found)) - 1)] if found else math.nan


def by_chance(values: Sequence[float]) -> tuple[float, float]:
    """Where 90 % of the medians lie when as many values are drawn of these again and again."""
    draw = random.Random(0)
    found = [median(draw.choices(values, k=len(values))) for _ in range(2000)]
    return quantile(found, 0.05), quantile(found, 0.95)


def spread(values: Sequence[float]) -> str:
    return f"{min(values):.3g} .. {max(values):.3g}" if values else "none"


def verdict(value: float, target: float, *, at_most: bool) -> str:
    """Whether a target is reached; NaN never reaches one."""
    return "reached" if (value <= target if at_most else value >= target) else "missed"


# --- results ---


class Results:
    """Rows of one benchmark; `write` leaves <name>.json and <name>.md, with machine, date and load."""

    def __init__(self, name: str, title: str, options: Any) -> None:
        self.name, self.title, self.out, self.quick = name, title, Path(options.out), bool(options.quick)
        self.begun = machine()
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.figures: dict[str, Any] = {}
        self.raw: dict[str, Any] = {}

    def row(self, **values: Any) -> None:
        self.rows.append(values)
        print("  ".join(f"{key}={_shown(value)}" for key, value in values.items()), flush=True)

    def figure(self, name: str, value: Any, target: str, reached: str) -> None:
        """One figure to reach: it goes into the table of benchmarks/README.md."""
        self.figures[name] = {"value": value, "target": target, "verdict": reached}
        print(f"-> {name}: {_shown(value)} (target {target}: {reached})", flush=True)

    def judge(self, name: str, value: float, target: float, *, at_most: bool) -> None:
        """A figure that is to be at least (or, `at_most`, at most) so much."""
        wanted = f"{target:g} or {'less' if at_most else 'more'}"
        self.figure(name, value, wanted, verdict(value, target, at_most=at_most))

    def write(self) -> Path:
        self.out.mkdir(parents=True, exist_ok=True)
        name = f"{self.name}-quick" if self.quick else self.name
        whole = {
            "benchmark": self.name,
            "quick": self.quick,
            "machine": self.begun | {"load_average_at_end": load()},
            "figures": self.figures,
            "rows": self.rows,
            "notes": self.notes,
            "raw": self.raw,
        }
        (self.out / f"{name}.json").write_text(json.dumps(whole, indent=1, default=str) + "\n", encoding="utf-8")
        path = self.out / f"{name}.md"
        path.write_text(self.markdown(), encoding="utf-8")
        print(f"written: {path}", flush=True)
        return path

    def markdown(self) -> str:
        m = self.begun
        lines = [
            f"# {self.title}{' (quick)' if self.quick else ''}",
            "",
            (
                f"{m['date']}, commit {m['commit']}. {m['cpu']}, {m['cores']} cores, {m['memory_gib']} GiB; Python "
                f"{m['python']}, torch {m['torch']}, ray {m['ray']}. Load average {m['load_average'][0]} at the start, "
                f"{load()[0]} at the end."
            ),
            "",
        ]
        if self.figures:
            shown = [
                {"figure": name, "measured": f["value"], "target": f["target"], "": f["verdict"]}
                for name, f in self.figures.items()
            ]
            lines += [*table(shown), ""]
        lines += [*table(self.rows), ""]
        lines += [f"- {note}" for note in self.notes]
        return "\n".join(lines) + "\n"


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown; the columns of all rows in the order of their first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if not columns:
        return []
    body = ["| " + " | ".join(_shown(row.get(key, "")) for key in columns) + " |" for row in rows]
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *body]


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
