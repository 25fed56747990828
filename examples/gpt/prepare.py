"""Write the source text of Python's own standard library as Parquet: about 30 MB of real text, no download.

    python examples/gpt/prepare.py [--out FOLDER] [--force]

Every 50th file is held out for validation. The order of the files is that of their names, so the same Python
gives the same data everywhere. When everything is there already, nothing is done.
"""

from __future__ import annotations

import argparse
import json
import platform
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import track

OUT = Path(__file__).parent / "data"
ROW_GROUP_BYTES = 1 << 20
HOLD_OUT_EVERY = 50
SCHEMA = pa.schema([("text", pa.string()), ("path", pa.string())])
VERSION = 1

console = Console(stderr=True)


def python_files(root: Path) -> list[Path]:
    """Return the standard library's source files by name; installed packages do not count."""
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    found = [path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts)]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def read_text(path: Path) -> str | None:
    """Return a source file's text in its declared encoding; None for the few that are broken on purpose."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError, OSError):
        return None


def row_groups(documents: list[tuple[str, str]]) -> Iterator[pa.Table]:
    """Cut documents into tables of about `ROW_GROUP_BYTES`."""
    group: list[tuple[str, str]] = []
    size = 0
    for number, (text, name) in enumerate(documents, start=1):
        group.append((text, name))
        size += len(text)
        if size >= ROW_GROUP_BYTES or number == len(documents):
            texts, names = zip(*group, strict=True)
            yield pa.table({"text": texts, "path": names}, schema=SCHEMA)
            group, size = [], 0


def write(file: Path, documents: list[tuple[str, str]]) -> dict[str, int]:
    """Write documents to one Parquet file, in one move."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    groups = 0
    with pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
        for table in row_groups(documents):
            writer.write_table(table, row_group_size=max(1, table.num_rows))
            groups += 1
    temporary.replace(file)
    return {
        "documents": len(documents),
        "text_bytes": sum(len(text.encode()) for text, _ in documents),
        "row_groups": groups,
        "file_bytes": file.stat().st_size,
    }


def complete(out: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """Return the notes of an earlier run if all that it wrote is there and was made from the same Python."""
    try:
        notes: dict[str, Any] = json.loads((out / "prepared.json").read_text())
        whole = all((out / name).stat().st_size == about["file_bytes"] for name, about in notes["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return notes if whole and notes.get("made_from") == wanted else None


def prepare(out: Path = OUT, *, root: Path | None = None, force: bool = False) -> dict[str, Any]:
    """Write `train/stdlib.parquet`, `validation.parquet` and, last, `prepared.json`; return its content."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    files = python_files(root)
    if len(files) < 2 * HOLD_OUT_EVERY:
        raise SystemExit(f"{root} holds {len(files)} Python files; expected the sources of the standard library")
    wanted = {
        "version": VERSION,
        "python": platform.python_version(),
        "files": len(files),
        "bytes": sum(path.stat().st_size for path in files),
    }
    if not force and (notes := complete(out, wanted)):
        return notes
    train: list[tuple[str, str]] = []
    validation: list[tuple[str, str]] = []
    unreadable = 0
    for number, path in enumerate(track(files, "Reading Python's standard library", console=console)):
        text = read_text(path)
        if text is None:
            unreadable += 1
            continue
        part = validation if number % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1 else train
        part.append((text, path.relative_to(root).as_posix()))
    (out / "prepared.json").unlink(missing_ok=True)
    parts = {"train/stdlib.parquet": train, "validation.parquet": validation}
    notes = {
        "made_from": wanted,
        "unreadable_files": unreadable,
        "files": {name: write(out / name, documents) for name, documents in parts.items()},
    }
    temporary = out / "prepared.tmp"
    temporary.write_text(json.dumps(notes, indent=2))
    temporary.replace(out / "prepared.json")
    return notes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write to (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="write again even if everything is there")
    arguments = parser.parse_args()
    notes = prepare(arguments.out, force=arguments.force)
    for name, about in notes["files"].items():
        console.print(
            f"{arguments.out / name}: {about['documents']} files, {about['text_bytes'] / 1e6:.1f} MB of text, "
            f"{about['row_groups']} row groups, {about['file_bytes'] / 1e6:.1f} MB on disk",
            soft_wrap=True,
        )


if __name__ == "__main__":
    main()
