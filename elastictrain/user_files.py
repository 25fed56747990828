"""Python files of users: recipes, and functions that prepare data. No torch."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


class NotLoaded(Exception):
    """A file that cannot be used, in words that follow its name. The cause is what it has raised itself, if it has."""


def load_file(path: Path, kind: str) -> ModuleType:
    """Run a file as a module, once. `kind` and the name of its folder keep two files of one name apart.

    Raises:
        NotLoaded: there is none, it is not Python, or it raises.

    """
    file = path.expanduser().resolve()
    if not file.is_file():
        raise NotLoaded(f": no such file {file}")
    name = f"_elastictrain_{kind}_{file.parent.name}_{file.stem}"
    if name in sys.modules and getattr(sys.modules[name], "__file__", None) == str(file):
        return sys.modules[name]
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))  # it may import its neighbours
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise NotLoaded(f": {file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it is the user's code: it may raise anything
        del sys.modules[name]
        raise NotLoaded(f" does not import: {type(error).__name__}: {error}") from error
    return module
