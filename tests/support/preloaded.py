"""What the fork server of worker processes has imported, so that none of them need: see `process_cluster`."""

from __future__ import annotations

import gc
import importlib

for name in ("torch", "elastictrain.engine.host", "pyarrow.parquet", "numpy.random", "numpy.ma", "pandas"):
    importlib.import_module(name)
gc.freeze()  # a collection in a child would touch, and so copy, all of it
