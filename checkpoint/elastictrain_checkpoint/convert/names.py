"""How each format names things, as rules: from its names to ours and back. Pure.

Ours: ``model/<parameter>`` and ``optim/<parameter>/<key>`` (a run adds ``buffer/``, ``counter/`` and ``ema/``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from elastictrain_checkpoint.mapping import Drop, Only, Rename, Rule

_MEGATRON_STATE = r"(?:chained_\d+\.)?optimizer\.state\.([^.]+)\.(.+)"
_MASTER_KEYS = ("fp32_param", "param")


def safetensors_rules(names: Iterable[str]) -> list[Rule]:
    """Weights of a model and nothing else; names that are ours already stay."""
    if any(re.match(r"(?:model|optim|buffer|counter|ema)/", name) for name in names):
        return []
    return [Rename(match=r"(.+)", to=r"model/\1", optional=True)]


def dcp_rules(names: Iterable[str]) -> list[Rule]:
    """``model.<p>`` and ``optim.state.<p>.<key>`` (also ``optimizer``, and below ``app`` or ``state``); where nothing
    is below ``model.``, all that is no optimizer's is the model's, which is how trainers store a flat state.
    """
    known = list(names)
    below = r"(?:(?:app|state)\.)?"
    optim = below + r"optim(?:izer)?s?\.state\.(.+)\.([^.]+)"
    rules: list[Rule] = [Rename(match=optim, to=r"optim/\1/\2", optional=True)]
    if any(re.fullmatch(below + r"model\..+", name) for name in known):
        return [*rules, Rename(match=below + r"model\.(.+)", to=r"model/\1", optional=True)]
    return [*rules, Rename(match=r"((?!optim/).+)", to=r"model/\1", optional=True)]


def universal_rules() -> list[Rule]:
    """``<p>/fp32`` is the model's, every other key the optimizer's."""
    return [
        Rename(match=r"(.+)/fp32", to=r"model/\1", optional=True),
        Rename(match=r"((?!model/).+)/([^/]+)", to=r"optim/\1/\2", optional=True),
    ]


def megatron_rules(names: Iterable[str]) -> list[Rule]:
    """``optimizer.state.<key>.<p>`` with or without ``chained_N.`` before; fp32 masters take the place of the
    weights of lower precision.
    """
    rules: list[Rule] = []
    for name in names:
        found = re.fullmatch(_MEGATRON_STATE, name)
        if found and found[1] in _MASTER_KEYS:
            rules.append(Drop(match=rf"(?:model\.)?{re.escape(found[2])}", optional=True))
    prefix = r"(?:chained_\d+\.)?optimizer\.state\."
    return [
        *rules,
        Rename(match=rf"{prefix}(?:{'|'.join(_MASTER_KEYS)})\.(?:model\.)?(.+)", to=r"model/\1", optional=True),
        Rename(match=rf"{prefix}([^.]+)\.(?:model\.)?(.+)", to=r"optim/\2/\1", optional=True),
        Rename(match=r"(?!optim/|model/)(?:model\.)?(.+)", to=r"model/\1", optional=True),
    ]


def only_the_model() -> list[Rule]:
    """From ours to what a model zoo expects: parameters and buffers under their own names, nothing else."""
    return [
        Only(match=r"(?:model|buffer|counter)/.+"),
        Rename(match=r"(?:model|buffer|counter)/(.+)", to=r"\1"),
    ]
