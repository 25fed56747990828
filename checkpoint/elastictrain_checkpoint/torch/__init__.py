"""Save and load the state dicts of plain PyTorch; drop-in for `torch.save` and `torch.distributed.checkpoint`.

```python
import elastictrain_checkpoint.torch as checkpoint

handle = checkpoint.async_save({"model": model.state_dict(), "optim": optimizer.state_dict()}, "/runs/a", step=100)
...  # train on: steps of optimizers are heard of, and what is not written by then is copied first
handle.result()
checkpoint.load(state, "/runs/a")  # in place
```

The only part of the library that imports torch.
"""

from __future__ import annotations

from elastictrain_checkpoint.torch.dropin import async_save, save
from elastictrain_checkpoint.torch.loading import load
from elastictrain_checkpoint.torch.outcome import TorchHandle
from elastictrain_checkpoint.torch.report import LoadReport
from elastictrain_checkpoint.torch.saving import AsyncSaver, before_mutation
from elastictrain_checkpoint.torch.taking import EAGER

__all__ = ["EAGER", "AsyncSaver", "LoadReport", "TorchHandle", "async_save", "before_mutation", "load", "save"]
