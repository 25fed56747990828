from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictrain.errors import RecipeError
from elastictrain.recipe import Recipe, load_recipe, warmup_cosine

GOOD = """
import helper_beside
class Good:
    def __init__(self, width=1): self.width = width
    def model(self): return helper_beside.VALUE
    def optimizer(self, params): ...
    def loss(self, model, batch): ...
class Outer:
    class Inner(Good): pass
class Lossless:
    def model(self): ...
    def optimizer(self, params): ...
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", [*sys.path])
    known = set(sys.modules)
    (tmp_path / "helper_beside.py").write_text("VALUE = 42\n")
    (tmp_path / "recipe.py").write_text(GOOD)
    yield tmp_path  # type: ignore[misc]
    for name in set(sys.modules) - known:
        del sys.modules[name]


def message(reference: object, arguments: dict[str, object] | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(reference, arguments)
    return str(caught.value)


def test_file_class_with_arguments_and_neighbour(folder: Path) -> None:
    recipe = load_recipe(f"{folder}/recipe.py:Good", {"width": 3})
    assert (recipe.width, recipe.model()) == (3, 42)
    assert type(load_recipe(f"{folder}/recipe.py:Outer.Inner")).__name__ == "Inner"
    # The same file gives the same class, so that pickled instances are recognised.
    assert type(load_recipe(f"{folder}/recipe.py:Good")) is type(recipe)


def test_two_recipe_files_of_one_name(folder: Path) -> None:
    other = folder / "other"
    other.mkdir()
    (other / "recipe.py").write_text(GOOD.replace("helper_beside.VALUE", "7"))
    assert load_recipe(f"{folder}/recipe.py:Good").model() == 42
    assert load_recipe(f"{other}/recipe.py:Good").model() == 7


def test_file_problems(folder: Path) -> None:
    reference = f"{folder}/missing.py:Good"
    assert message(reference) == f"recipe={reference!r}: no such file {folder}/missing.py"
    reference = f"{folder}/recipe.py:God"
    assert message(reference) == (
        f"recipe={reference!r}: {folder}/recipe.py has no 'God'; it defines Good, Lossless, Outer"
    )
    reference = f"{folder}/recipe.py:Lossless"
    assert message(reference) == (
        f"recipe={reference!r}: Lossless has no loss(); expected model(), optimizer(params) and loss(model, batch)"
    )
    (folder / "broken.py").write_text("1 / 0\n")
    reference = f"{folder}/broken.py:Good"
    assert message(reference) == f"recipe={reference!r} does not import: ZeroDivisionError: division by zero"
    (folder / "broken.py").write_text(GOOD)  # mended: a failed import leaves nothing behind
    assert load_recipe(reference).model() == 42


def test_module_problems(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert message("no_such_module:Good") == (
        "recipe='no_such_module:Good' does not import: ModuleNotFoundError: No module named 'no_such_module'; expected "
        "a module on the Python path of the workers or a file, as in recipe: path/to/recipe.py:Class"
    )
    (folder / "raising_module.py").write_text("raise RuntimeError('no GPU')\n")
    monkeypatch.syspath_prepend(folder)
    assert message("raising_module:Good").startswith(
        "recipe='raising_module:Good' does not import: RuntimeError: no GPU; expected a module"
    )
    assert message("math:Good").startswith("recipe='math:Good': math has no 'Good'; it defines no classes")
    for reference in ("math", "math:", ":Good"):
        assert message(reference) == f'recipe={reference!r}: expected "module:Class" or "file.py:Class"'


def test_constructor_problems(folder: Path) -> None:
    reference = f"{folder}/recipe.py:Good"
    assert message(reference, {"depth": 2}) == (
        f"recipe={reference!r}: Good(**recipe_args) failed with recipe_args={{'depth': 2}}: TypeError: "
        "Good.__init__() got an unexpected keyword argument 'depth'"
    )


class Unfinished(Recipe):
    def optimizer(self, params: object) -> None: ...  # type: ignore[override]


class Finished(Unfinished):
    def model(self) -> None: ...  # type: ignore[override]
    def loss(self, model: object, batch: object) -> None: ...  # type: ignore[override]


def test_inheriting_a_method_that_nobody_wrote_is_not_having_it() -> None:
    assert "Unfinished has no model(), loss(); expected" in message(Unfinished)
    assert "Unfinished has no model(), loss(); expected" in message(Unfinished())
    assert isinstance(load_recipe(Finished), Finished)
    finished = Finished()
    assert load_recipe(finished) is finished


def test_hooks_have_defaults() -> None:
    recipe = Finished()
    assert recipe.schedule(7) == 1.0
    assert recipe.evaluate(None) == {}  # type: ignore[arg-type]
    assert recipe.buffer_rule("num_batches_tracked") == "same"
    with pytest.raises(NotImplementedError, match=r"Unfinished.model\(\) is missing"):
        Unfinished().model()


@given(
    warmup=st.integers(0, 50),
    extra=st.integers(1, 200),
    floor=st.floats(0, 1),
    step=st.integers(1, 400),
)
def test_warmup_cosine_stays_between_floor_and_one(warmup: int, extra: int, floor: float, step: int) -> None:
    total = warmup + extra
    factor = warmup_cosine(step, warmup_steps=warmup, total_steps=total, floor=floor)
    after = warmup_cosine(step + 1, warmup_steps=warmup, total_steps=total, floor=floor)
    if step <= warmup:
        assert factor == pytest.approx(step / warmup)
        assert after > factor or step == warmup
    else:
        assert floor - 1e-12 <= factor <= 1
        assert after <= factor + 1e-12
    if step >= total:
        assert factor == pytest.approx(floor)


def test_warmup_cosine_half_way() -> None:
    factor = warmup_cosine(60, warmup_steps=10, total_steps=110, floor=0.0)
    assert factor == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))
