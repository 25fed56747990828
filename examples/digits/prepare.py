"""Write scikit-learn's 1797 handwritten digits as Parquet: image (64 pixels, 0 … 16) and label.

    python examples/digits/prepare.py [--out FOLDER] [--force]

Every fifth digit is held out for evaluation. When everything is there already, nothing is done.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from sklearn.datasets import load_digits

OUT = Path(__file__).parent / "data"
HOLD_OUT_EVERY = 5
ROW_GROUP_ROWS = 128
SCHEMA = pa.schema([("image", pa.list_(pa.float32())), ("label", pa.int64())])

console = Console(stderr=True)


def complete(file: Path, rows: int) -> bool:
    """Whether a whole Parquet file with that many rows is there."""
    try:
        meta = pq.read_metadata(file)
    except (OSError, pa.ArrowException):
        return False
    return bool(meta.num_rows == rows and meta.schema.to_arrow_schema().names == SCHEMA.names)


def prepare(out: Path = OUT, *, force: bool = False) -> dict[str, int]:
    """Write `train/digits.parquet` and `test.parquet`; return the rows of each."""
    images, labels = load_digits(return_X_y=True)
    held_out = np.arange(len(labels)) % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1
    rows = {}
    for name, chosen in (("train/digits.parquet", ~held_out), ("test.parquet", held_out)):
        file = out / name
        rows[name] = int(chosen.sum())
        if not force and complete(file, rows[name]):
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        columns = {"image": list(images[chosen].astype(np.float32)), "label": labels[chosen]}
        temporary = file.with_suffix(".tmp")
        pq.write_table(pa.table(columns, schema=SCHEMA), temporary, row_group_size=ROW_GROUP_ROWS)
        temporary.replace(file)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write to (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="write again even if everything is there")
    arguments = parser.parse_args()
    for name, rows in prepare(arguments.out, force=arguments.force).items():
        size = (arguments.out / name).stat().st_size
        console.print(f"{arguments.out / name}: {rows} digits, {size / 1e3:.0f} kB", soft_wrap=True)


if __name__ == "__main__":
    main()
