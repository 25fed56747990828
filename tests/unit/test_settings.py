"""Settings are given by name; the one that needs none is the text that a class is about."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import elastictrain as et
from elastictrain.errors import ConfigError


def test_the_text_that_a_class_is_about_needs_no_name() -> None:
    assert et.Checkpoint("s3://bucket/run", keep=2) == et.Checkpoint(path="s3://bucket/run", keep=2)


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda: et.Checkpoint("a", "b"), "got 'a', 'b' without a name"),
        (lambda: et.Checkpoint("a", path="b"), "got 'a' without a name"),
        (lambda: et.Checkpoint(3), "got 3 without a name"),
        (lambda: et.Workers("2"), "got '2' without a name"),
    ],
)
def test_everything_else_without_a_name_is_refused_in_words(make: Callable[[], object], got: str) -> None:
    with pytest.raises(ConfigError, match=rf"expected settings by name, such as \w+\((path|min)=\.\.\.\) \({got}\)"):
        make()
