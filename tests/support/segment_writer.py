"""A stream processor as a process of its own: appends segments to a manifest, one for every line that it is sent.

Usage: python segment_writer.py URL FOLDER PREFIX; a line is a number of rows, an empty one closes the manifest.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from elastictrain.data.segments import SegmentWriter

if __name__ == "__main__":
    url, folder, prefix = sys.argv[1:]
    writer = SegmentWriter(url)
    print("ready", flush=True)
    for number, line in enumerate(sys.stdin):
        if not line.strip():
            writer.close()
            break
        file = Path(folder) / f"{prefix}{number}.jsonl"
        rows = [{"id": (int(prefix) << 40) + (number << 20) + row} for row in range(int(line))]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(writer.append(file).ordinal, flush=True)
