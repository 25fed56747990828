"""Tensors of types that the format holds as bytes, seen as what they are: for who looks at them, not for who stores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elastictrain_checkpoint.convert.from_state_dict import odd_types
from elastictrain_checkpoint.dtypes import width_of
from elastictrain_checkpoint.source import Bytes, Shape, Source, check_range

SHOWN = {
    "complex128": "C128",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
}
"""torch's name → as the others are called here."""


class TrueTypes:
    """A source in which these tensors have their own type and shape, not that of the bytes that are stored.

    Attributes:
        tensors: name → (dtype, shape); dtype may be one of `SHOWN`, which no pack has.
        tree: that of the source.

    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.tree: Any = source.tree
        tensors = dict(source.tensors)
        self._widths: dict[str, int] = {}
        for name, odd in odd_types(source).items():
            dtype, shape = source.tensors[name]
            # What is said of a type is only what somebody has written: the bytes must fit it.
            if odd in SHOWN and dtype == "U8" and shape[-1:] == (width_of(SHOWN[odd]),):
                self._widths[name] = shape[-1]
                tensors[name] = SHOWN[odd], tuple(shape[:-1])
        self.tensors: Mapping[str, tuple[str, Shape]] = tensors

    def read_flat(self, name: str, start: int, stop: int) -> Bytes:
        """See `Source`; of the type that `tensors` names."""
        if name not in self._widths:
            return self._source.read_flat(name, start, stop)
        check_range(name, self.tensors[name][1], start, stop)
        width = self._widths[name]
        return self._source.read_flat(name, start * width, stop * width)
