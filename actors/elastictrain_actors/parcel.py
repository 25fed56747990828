"""Parcels: which of the user's files travel to a cluster, packed into one archive that Ray unpacks as `working_dir`.

We pack them ourselves instead of handing Ray a folder: Ray leaves out what `.gitignore` names (data are often ignored
by git, and are wanted here), and its `excludes` apply to every shipped package too: a harmless `excludes: [data]` for
the user's folder would cut `elastictrain/data` out of ours.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from elastictrain.errors import ConfigError

LIMIT_BYTES = 256 * 2**20
"""The head keeps a parcel in memory and hands it to every node; Ray itself refuses packages above 512 MiB."""

CACHES = (
    ".git", ".hg", ".venv", "venv", "node_modules", "__pycache__", "*.pyc", ".mypy_cache", ".ruff_cache",
    ".pytest_cache", ".hypothesis", ".ipynb_checkpoints", "*.egg-info",
)  # fmt: skip
RUNS = "runs"
"""Where runs and their checkpoints go by default: a parcel that carried them would grow with every run."""

_LARGEST_NAMED = 3
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip can hold: the same files give the same bytes, so the same URI


@dataclass(frozen=True, slots=True)
class Parcel:
    """Files below `base`, by their names relative to it."""

    base: Path
    files: tuple[PurePosixPath, ...]

    @property
    def size_bytes(self) -> int:
        return sum((self.base / file).stat().st_size for file in self.files)


def collect(
    base: Path, roots: Iterable[Path], *, excludes: Sequence[str] = (), without: Iterable[Path] = (), setting: str
) -> Parcel:
    """The files of `roots` (files or folders below `base`), sorted.

    Left out: caches, folders called `runs`, what matches `excludes` (shell patterns on a file's or folder's name, or
    on its path relative to `base`) and everything below `without`. A root itself always travels. Folders behind
    symbolic links are not followed. Raises ConfigError, naming `setting`, for a root outside of `base`.
    """
    base = base.resolve()
    skipped = {path.resolve() for path in without}
    patterns = (*CACHES, RUNS, *(pattern.strip("/") for pattern in excludes))
    found: set[PurePosixPath] = set()
    for root in roots:
        whole = root.resolve()
        if not whole.is_relative_to(base):
            raise ConfigError(f"{setting}: {root} lies outside of {base}, the folder that travels to the cluster")
        found.update(_relative(file, base) for file in _walk(whole, base, patterns, skipped))
    return Parcel(base, tuple(sorted(found)))


def _walk(root: Path, base: Path, patterns: Sequence[str], skipped: set[Path]) -> Iterable[Path]:
    if root.is_file():
        yield root
        return
    for name, folders, files in os.walk(root):
        folder = Path(name)
        folders[:] = sorted(f for f in folders if not _is_left_out(folder / f, base, patterns, skipped))
        yield from (folder / f for f in files if not _is_left_out(folder / f, base, patterns, skipped))


def _is_left_out(path: Path, base: Path, patterns: Sequence[str], skipped: set[Path]) -> bool:
    relative = str(_relative(path, base))
    return path in skipped or any(
        fnmatch.fnmatchcase(path.name, pattern) or fnmatch.fnmatchcase(relative, pattern) for pattern in patterns
    )


def _relative(path: Path, base: Path) -> PurePosixPath:
    return PurePosixPath(path.relative_to(base).as_posix())


def pack(parcel: Parcel, folder: Path, *, limit_bytes: int = LIMIT_BYTES) -> Path:
    """Write the parcel as a zip into `folder`; its name is the hash of its bytes. Raises ConfigError above the limit.

    The limit is on the files as they are, so that the answer comes before they are read.
    """
    sizes = {file: (parcel.base / file).stat().st_size for file in parcel.files}
    total = sum(sizes.values())
    if total > limit_bytes:
        largest = sorted(sizes, key=lambda file: -sizes[file])[:_LARGEST_NAMED]
        named = ", ".join(f"{file} ({sizes[file] / 2**20:.1f} MiB)" for file in largest)
        raise ConfigError(
            f"{parcel.base}: {total / 2**20:.1f} MiB would travel to the cluster, expected at most "
            f"{limit_bytes / 2**20:.0f} MiB; the largest are {named}. Put data where the workers can read them "
            "(data.path: s3://… or a shared disk), or leave files out (runtime_env: {excludes: [...]})"
        )
    draft = folder / "parcel.zip"
    with zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in parcel.files:
            entry = zipfile.ZipInfo(str(file), _EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            executable = os.access(parcel.base / file, os.X_OK)
            entry.external_attr = (0o755 if executable else 0o644) << 16
            archive.writestr(entry, (parcel.base / file).read_bytes())
    packed = folder / f"elastictrain-{hashlib.sha256(draft.read_bytes()).hexdigest()[:16]}.zip"
    return draft.replace(packed)
