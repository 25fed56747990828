"""Reading DeepSpeed universal checkpoints: a folder for each parameter, a ``torch.save`` file for each of its states.

``zero/<parameter>/fp32.pt`` (also ``exp_avg``, ``exp_avg_sq``, …) holds ``{"param": tensor, …}`` with the whole tensor;
``step.pt`` a number. All are read with ``weights_only=True``. What lies beside ``zero/`` (module states with arbitrary
objects of the trainer) would have to be trusted, and is not read.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch

from elastictrain_checkpoint.convert import torch_files
from elastictrain_checkpoint.dtypes import item_bytes
from elastictrain_checkpoint.errors import CorruptData, ForeignFormat
from elastictrain_checkpoint.source import Bytes, Shape, check_range
from elastictrain_checkpoint.store import Store

FOLDER = "zero"


class UniversalSource:
    """Tensors named ``<parameter>/<state>``. See `elastictrain_checkpoint.source.Source`.

    Opening it reads the headers of all files, no data. A tensor is read whole; the last one is kept.

    Raises:
        ForeignFormat: not such a folder, or a file that cannot be read without trusting it.
        CorruptData: a parameter without its weights.

    """

    format = "universal"

    def __init__(self, store: Store, *, check_crc: bool = True) -> None:
        self._store = store
        self._check_crc = check_crc
        self._kept: tuple[str, Bytes] | None = None
        self.tree: dict[str, Any] = {}
        self.skipped: list[str] = [
            f"{name}: beside {FOLDER}/, not read" for name in store.list() if name.endswith("_states.pt")
        ]
        self.tensors: dict[str, tuple[str, Shape]] = {}
        for parameter in store.list(FOLDER):
            files = store.list(f"{FOLDER}/{parameter}")
            if not files:
                self.skipped.append(f"{FOLDER}/{parameter}: a file, expected a folder")
                continue
            if "fp32.pt" not in files:
                raise CorruptData(f"{FOLDER}/{parameter} has no fp32.pt", file=f"{FOLDER}/{parameter}/fp32.pt")
            for file in files:
                if file.endswith(".pt"):
                    self._take(parameter, file.removesuffix(".pt"))
                else:
                    self.skipped.append(f"{FOLDER}/{parameter}/{file}: not a .pt file")
        if not self.tensors:
            raise ForeignFormat(f"{store.url} has no {FOLDER}/<parameter>/fp32.pt: not a universal checkpoint")

    def _take(self, parameter: str, state: str) -> None:
        path = f"{FOLDER}/{parameter}/{state}.pt"
        size = self._store.size(path) or 0
        try:
            # On the meta device torch reads the directory of the file and its types, and leaves the data alone. The
            # buffer keeps its many small reads to a few of storage.
            file = io.BufferedReader(_Ranged(self._store, path, size), buffer_size=1 << 16)
            found = torch.load(file, map_location="meta", weights_only=True)
        except Exception as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise ForeignFormat(f"{path} cannot be read without trusting it: {said[0][:200]}") from None
        value = _value(found, path)
        if isinstance(value, torch.Tensor):
            kind = torch_files.dtype_name(value.dtype, path), tuple(value.shape)
        else:
            kind = ("F32", ())
        self.tensors[f"{parameter}/{state}"] = kind

    def read_flat(self, name: str, start: int, stop: int) -> Bytes:
        """Bytes of the elements [start, stop) of a tensor.

        Raises:
            KeyError: no such tensor.
            InvalidPiece: the range lies outside of it.
            CorruptData: the file is missing, cut short, or its CRC-32 differs.

        """
        dtype, shape = self.tensors[name]
        check_range(name, shape, start, stop)
        if self._kept is None or self._kept[0] != name:
            self._kept = (name, self._load(name, dtype, shape))
        item = item_bytes(dtype)
        return self._kept[1][start * item : stop * item]

    def _load(self, name: str, dtype: str, shape: Shape) -> Bytes:
        path = f"{FOLDER}/{name}.pt"
        try:
            raw = self._store.read_all(path)
        except FileNotFoundError:
            raise CorruptData(f"{path} is missing", file=path, tensors=(name,)) from None
        value = _value(torch_files.load(raw, path, check_crc=self._check_crc), path)
        if not isinstance(value, torch.Tensor):
            return np.array(value, dtype="<f4").reshape(1).view(np.uint8)
        if (torch_files.NAMES.get(value.dtype), tuple(value.shape)) != (dtype, shape):
            raise CorruptData(f"{path} has changed since it was opened", file=path, tensors=(name,))
        return torch_files.to_bytes(value)


def _value(found: Any, path: str) -> Any:
    """The tensor or the number in what a file holds.

    Raises:
        ForeignFormat: there is neither.

    """
    value = found.get("param") if isinstance(found, dict) else found
    if isinstance(value, torch.Tensor) or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise ForeignFormat(f'{path} holds a {type(value).__name__}, expected a tensor, a number, or {{"param": tensor}}')


class _Ranged(io.RawIOBase):
    """A stored file that reads what it is asked for and no more."""

    def __init__(self, store: Store, path: str, size: int) -> None:
        self._store = store
        self._path = path
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, out: Any) -> int:
        view = memoryview(out).cast("B")[: max(0, self._size - self._at)]
        got = self._store.read_into(self._path, self._at, view) if len(view) else 0
        self._at += got
        return got
