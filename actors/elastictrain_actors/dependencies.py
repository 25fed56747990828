"""What elastictrain needs on a cluster beyond Ray and torch, read from our own metadata.

`pip install ray torch` brings click, filelock, pyyaml, packaging, fsspec (through torch) and no more; `ray[default]`
adds pydantic. So numpy, pyarrow, pydantic, xxhash, typer and rich may be missing on a worker that "has Ray and torch".
The list is computed, not written down here: our requirements without what Ray and torch bring with them.

They travel as Ray's `pip` field, which makes a virtual environment per node on top of the node's own packages: torch
and Ray are not installed again. Where Ray itself runs inside a virtual environment, Ray clones that environment, torch
included; so nothing is asked for that is already there.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Literal

from elastictrain.errors import ConfigError

ShipDependencies = Literal["auto", "pip", "none"]
CHOICES: tuple[ShipDependencies, ...] = ("auto", "pip", "none")
ASSUMED = ("ray", "torch")

_NAME = re.compile(r"^\s*([A-Za-z0-9][A-Za-z0-9._-]*)")


def check_choice(value: str) -> ShipDependencies:
    """Raises ConfigError for anything but auto, pip and none."""
    for choice in CHOICES:
        if value == choice:
            return choice
    raise ConfigError(f"ship_dependencies={value!r}: expected one of {', '.join(CHOICES)}")


def name_of(requirement: str) -> str:
    """The normalised distribution name of a requirement: "PyYAML>=6" is "pyyaml"."""
    found = _NAME.match(requirement)
    if found is None:
        raise ConfigError(
            f"{requirement!r} is not a requirement; expected a name and perhaps a version, as in numpy>=2"
        )
    return re.sub(r"[-_.]+", "-", found.group(1)).lower()


def own_requirements() -> list[str]:
    """What elastictrain requires, without extras: from the installed package, or from pyproject.toml in a checkout."""
    try:
        listed = metadata.requires("elastictrain") or []
    except metadata.PackageNotFoundError:
        import elastictrain

        project = Path(str(elastictrain.__file__)).resolve().parent.parent / "pyproject.toml"
        if not project.is_file():
            raise ConfigError(
                "ship_dependencies: elastictrain has neither package metadata nor a pyproject.toml beside it, so its "
                "requirements are not known; install elastictrain, or set ship_dependencies to none and name them "
                "in runtime_env: {pip: [...]}"
            ) from None
        listed = list(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"])
    return without_extras(listed)


def without_extras(requirements: Iterable[str]) -> list[str]:
    return [line for line in requirements if not re.search(r";.*\bextra\s*==", line)]


def brought_by(
    names: Sequence[str] = ASSUMED, *, requires: Callable[[str], list[str] | None] = metadata.requires
) -> set[str]:
    """The distributions `names` and all that they require in turn, without extras."""
    known: set[str] = set()
    waiting = [name_of(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in known:
            continue
        known.add(name)
        try:
            needed = requires(name) or []
        except metadata.PackageNotFoundError:  # a requirement of another platform
            continue
        waiting += [name_of(line) for line in without_extras(needed)]
    return known


def beyond_ray_and_torch() -> list[str]:
    """Our requirements that `pip install ray torch` does not bring, as requirement lines."""
    there = brought_by()
    return [line for line in own_requirements() if name_of(line) not in there]
