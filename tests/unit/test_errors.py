from __future__ import annotations

import inspect
import re

import pytest

from elastictrain import errors

CLASSES = {name: value for name, value in vars(errors).items() if inspect.isclass(value)}


def drawn_tree() -> dict[str, str | None]:
    """Parent by name, from the tree in the docstring: depth is the column of the name."""
    parents: dict[str, str | None] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").split("```")[1].strip().splitlines():
        found = re.search(r"[A-Za-z]+", line)
        assert found is not None, line
        while above and above[-1][0] >= found.start():
            above.pop()
        parents[found.group()] = above[-1][1] if above else None
        above.append((found.start(), found.group()))
    return parents


def test_the_drawn_tree_is_the_real_one() -> None:
    real = {name: cls.__base__.__name__ for name, cls in CLASSES.items()}
    assert drawn_tree() == real | {"ElasticTrainError": None}
    assert real["ElasticTrainError"] == "Exception"


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_error_says_who_must_act(name: str) -> None:
    assert CLASSES[name].__doc__
    assert str(CLASSES[name]("what was got")) == "what was got"
