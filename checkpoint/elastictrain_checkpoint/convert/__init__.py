"""Checkpoints of other formats: read as a `elastictrain_checkpoint.source.Source`, written from one.

```python
source = open_source("meta/llama", "safetensors")                  # or "dcp", "universal", "megatron", "auto"
import_checkpoint(Mapped(source, default_rules(source)), Store("runs/a/checkpoints"), step=0)
export_safetensors(Mapped(reader, only_the_model()), Store("out"), cast="BF16")
export_dcp(reader, Store("out-dcp"))
```

No process group, no GPU. Safetensors need nothing beyond this library; the other formats are torch's own files and need
torch, which is imported only when one of them is opened. No file is unpickled freely: see the module of each format.
"""

from __future__ import annotations

from elastictrain_checkpoint.convert.foreign import FORMATS, ForeignSource, default_rules, detect, open_source
from elastictrain_checkpoint.convert.names import only_the_model
from elastictrain_checkpoint.convert.out_dcp import export_dcp
from elastictrain_checkpoint.convert.out_safetensors import Exported, cast_floats, export_safetensors
from elastictrain_checkpoint.convert.take_in import import_checkpoint

__all__ = [
    "FORMATS",
    "Exported",
    "ForeignSource",
    "cast_floats",
    "default_rules",
    "detect",
    "export_dcp",
    "export_safetensors",
    "import_checkpoint",
    "only_the_model",
    "open_source",
]
