"""What Rust raises through pyo3 (the tokenizers do) when it panics: no Exception."""

from __future__ import annotations


class Panic(BaseException):
    """As `pyo3_runtime.PanicException`, which cannot be imported."""
