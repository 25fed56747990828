"""Several stores that hold the same checkpoints: a fast one near by and a safe one far away.

Stores are given nearest first. The newest step that is whole in any of them, or in all of them together, wins; each
block comes from the first store that has it undamaged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from elastictrain_checkpoint.asking import Asked
from elastictrain_checkpoint.check import Problem, verify
from elastictrain_checkpoint.commit import Skipped, list_steps, wrong_sizes
from elastictrain_checkpoint.errors import CheckpointError, CorruptData, InvalidManifest, NoCheckpoint
from elastictrain_checkpoint.healing import Healed, good_block
from elastictrain_checkpoint.manifest import Manifest, parse_manifest
from elastictrain_checkpoint.paths import manifest_path
from elastictrain_checkpoint.reader import Reader
from elastictrain_checkpoint.sidecar import check_sidecar
from elastictrain_checkpoint.store import Store

ANSWER_S = 10.0
"""So long a store is waited for that others can stand in for."""
LAST_ANSWER_S = 120.0
"""So long, where nothing else is left."""


@dataclass(frozen=True)
class Found:
    """A checkpoint, and the stores to read it from: those that have all of it first, nearest first among these."""

    manifest: Manifest
    stores: tuple[Store, ...]

    def reader(self) -> Reader:
        """Reads each block from the first store that has it undamaged."""
        return Reader(self.stores[0], self.manifest, others=self.stores[1:])


def newest_in(stores: Sequence[Store], skipped: list[Skipped] | None = None, before: int | None = None) -> Found | None:
    """The newest step that is whole: every pack has its size in at least one of the stores.

    Args:
        stores: nearest first.
        skipped: newer steps that were passed over are appended, with the reason.
        before: only steps below this one.

    """
    steps = {step for store in stores for step in list_steps(store) if before is None or step < before}
    for step in sorted(steps, reverse=True):
        found = _find(stores, step)
        if isinstance(found, Found):
            return found
        if skipped is not None:
            skipped.append(Skipped(step, found))
    return None


def newest_older(stores: Sequence[Store], step: int, files: Collection[str]) -> int | None:
    """What to offer where `files` of a step are damaged: the newest older step that is whole and refers to none of
    them. None if there is none, or the stores do not say.
    """
    with suppress(CheckpointError, OSError):
        while (found := newest_in(stores, before=step)) is not None:
            step = found.manifest.step
            if not set(files).intersection(found.manifest.paths):
                return step
    return None


def reachable(stores: Sequence[Store], timeout_s: float = LAST_ANSWER_S) -> tuple[list[Store], dict[str, str]]:
    """The stores that answer, in their order; and of the others why not, by URL. All are asked at the same time."""
    asked = [(store, Asked(store.list)) for store in stores]
    there, silent = [], {}
    for store, question in asked:
        try:
            question.answer(timeout_s)
            there.append(store)
        except OSError as error:
            silent[store.url] = str(error)
    return there, silent


def find(stores: Sequence[Store], step: int) -> Found:
    """Where one step is to be read: from the stores that have it whole first, nearest first.

    If they hold different commits of the step, that of the highest generation counts. A store that does not answer is
    passed over while others can stand in for it; only what the nearest one lacks is looked for in the packs of others.

    Raises:
        NoCheckpoint: no store has the step.
        InvalidManifest, CorruptData: it is whole in none, nor in all together.
        OSError: nobody else has it, and a store could not be asked.

    """
    asked = {store.url: Asked(partial(store.read_all, manifest_path(step))) for store in stores}
    texts: dict[str, bytes] = {}
    failed: dict[str, str] = {}
    begun_s = time.monotonic()
    for within_s in (ANSWER_S, LAST_ANSWER_S):  # who is late is waited for only where nobody can stand in for it
        late = _answers(asked, texts, failed, begun_s + within_s)
        silent = failed | dict.fromkeys(late, f"no answer within {within_s:g} s")
        manifests, problems = _believed(stores, step, texts, silent)
        for manifest in manifests:
            found = _answering(stores, manifest, silent)
            if isinstance(found, Found):
                return found
            problems.append(found)
        if not late:
            break
    if silent:
        why = "; ".join(f"{url} does not answer: {why}" for url, why in silent.items())
        raise OSError(f"step {step} is whole in no store that answers; {why}")
    if not texts:
        raise NoCheckpoint(f"none of {', '.join(store.url for store in stores)} has a checkpoint of step {step}")
    raise (CorruptData if manifests else InvalidManifest)("; ".join(problems))


def _answers(
    asked: dict[str, Asked[bytes]], texts: dict[str, bytes], failed: dict[str, str], until_s: float
) -> list[str]:
    """Take those answers off ``asked`` that have come until then, into ``texts`` and ``failed``; gives who is late."""
    late = []
    for url, question in list(asked.items()):
        try:
            texts[url] = question.answer(max(0.0, until_s - time.monotonic()))
        except TimeoutError:
            late.append(url)
            continue
        except OSError as error:
            if not isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
                failed[url] = str(error)
        del asked[url]
    return late


def _believed(
    stores: Sequence[Store], step: int, texts: Mapping[str, bytes], silent: dict[str, str]
) -> tuple[list[Manifest], list[str]]:
    """The manifests that these texts are, by URL of their stores, the highest generation first; and what is wrong with
    the others. What lies beside a text is read from the same store, or else, damaged there, from another one. A store
    that fails at it is put among the silent ones.
    """
    answered = [store for store in stores if store.url in texts]
    manifests: dict[bytes, Manifest] = {}
    problems: list[str] = []
    for own in answered:
        found: list[Manifest] = []
        errors: list[Exception] = []
        for first in (own, *(store for store in answered if store is not own)):
            try:
                found.append(parse_manifest(texts[own.url], step, _anywhere((first, *answered))))
                break
            except Exception as error:  # whatever a file system raises: fsspec's do not keep to OSError
                errors.append(error)
        if found:
            manifests.setdefault(found[0].raw, found[0])
        elif failures := [error for error in errors if not isinstance(error, InvalidManifest)]:
            silent[own.url] = f"{type(failures[0]).__name__}: {failures[0]}"
        else:
            problems.append(f"{own.url}: {errors[0]}")
    return sorted(manifests.values(), key=lambda one: -one.generation), problems


def _answering(stores: Sequence[Store], manifest: Manifest, silent: dict[str, str]) -> Found | str:
    """As `_lying`, of the stores that are not silent; one that fails now is put among those. Others than the nearest
    one are asked only for what that one lacks.
    """
    wrong: dict[str, list[str]] = {}
    for store in stores:
        if store.url in silent:
            continue
        try:
            wrong[store.url] = wrong_sizes(store, manifest)
        except Exception as error:  # whatever a file system raises: fsspec's do not keep to OSError
            silent[store.url] = f"{type(error).__name__}: {error}"
        if store is stores[0] and wrong.get(store.url) == []:
            return Found(manifest, tuple(one for one in stores if one.url not in silent))
    if not wrong:
        return f"step {manifest.step}: no store says which packs it has"
    return _sorted_by(manifest, [(store, wrong[store.url]) for store in stores if store.url in wrong])


def newest_good(
    stores: Sequence[Store], skipped: list[Skipped] | None = None, before: int | None = None
) -> Found | None:
    """As `newest_in`, but every byte is read, and must be whole in at least one of the stores.

    The way on when a reader raises CorruptData: ``newest_good(stores, before=step)`` is the newest older step that is
    good.
    """
    while (found := newest_in(stores, skipped, before)) is not None:
        left = _not_anywhere(found)
        if not left:
            return found
        before = found.manifest.step
        if skipped is not None:
            skipped.append(Skipped(before, left[0].message))
    return None


def _find(stores: Sequence[Store], step: int) -> Found | str:
    """Where a step lies, or why it is none."""
    manifests: dict[bytes, Manifest] = {}
    why = "no manifest"
    for store in stores:
        try:
            manifest = parse_manifest(store.read_all(manifest_path(step)), step, _anywhere((store, *stores)))
            manifests.setdefault(manifest.raw, manifest)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except InvalidManifest as error:
            why = str(error)
    # The same step may have been committed twice, when a run went back: the later commit is the one that happened.
    for manifest in sorted(manifests.values(), key=lambda one: -one.generation):
        found = _lying(stores, manifest)
        if isinstance(found, Found):
            return found
        why = found
    return why


def _lying(stores: Sequence[Store], manifest: Manifest) -> Found | str:
    """The stores of a checkpoint, those that have every pack first; or which pack is whole in none of them."""
    return _sorted_by(manifest, [(store, wrong_sizes(store, manifest)) for store in stores])


def _sorted_by(manifest: Manifest, complaints: Sequence[tuple[Store, Sequence[str]]]) -> Found | str:
    """The same, from what each store has been found to lack."""
    wrong = [{said.partition(" is ")[0]: said for said in lacks} for _, lacks in complaints]
    lost = set(wrong[0]).intersection(*wrong[1:])
    if lost:
        return f"step {manifest.step}: {wrong[0][min(lost)]}"
    ordered = sorted(((bool(lacks), store) for store, lacks in complaints), key=_first)
    return Found(manifest, tuple(store for _, store in ordered))


def _first(pair: tuple[bool, Store]) -> bool:
    return pair[0]


def _anywhere(stores: Sequence[Store]) -> Callable[[str], bytes]:
    def fetch(path: str) -> bytes:
        for store in stores:
            try:
                return store.read_all(path)
            except (FileNotFoundError, NotADirectoryError):
                continue
        raise FileNotFoundError(path)

    return fetch


def _not_anywhere(found: Found) -> list[Problem]:
    """What is damaged in the first store and not whole in any other."""
    manifest, left = found.manifest, []
    for problem in verify(found.stores[0], manifest):
        if problem.file in manifest.paths:
            numbers = _blocks_of(manifest, problem)
            file = manifest.paths.index(problem.file)
            if all(_block(found.stores[1:], manifest, file, number) is not None for number in numbers):
                continue
            left.append(problem)
    return left


def _blocks_of(manifest: Manifest, problem: Problem) -> range:
    """Blocks that a problem is about; a file that is cut short lacks all from there on."""
    blocks = len(manifest.sums[manifest.paths.index(problem.file)])
    if problem.block is None:
        return range(blocks)
    return range(problem.block, problem.block + 1 if "hash differs" in problem.message else blocks)


def _block(stores: Sequence[Store], manifest: Manifest, file: int, number: int) -> tuple[Store, memoryview] | None:
    start = number * manifest.block_bytes
    out = memoryview(bytearray(min(manifest.block_bytes, manifest.files[file].size_bytes - start)))
    source = good_block(stores, manifest, file, number, out)
    return None if source is None else (source, out)


@dataclass
class Healing:
    """What `heal` did.

    Attributes:
        healed: blocks that were damaged and are whole again.
        rewritten: paths of the files that were written anew.
        left: what is damaged and whole nowhere; these files were left as they were.

    """

    healed: list[Healed] = field(default_factory=list)
    rewritten: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def heal(store: Store, step: int, others: Sequence[Store]) -> Healing:
    """Read every byte of a step and write what is damaged, cut short or missing anew, from copies in other stores.

    A file is put in place only when every block of it is whole; a pack that cannot be healed stays as it is.

    Raises:
        NoCheckpoint: no store has a manifest of this step that can be believed.

    """
    stores = (store, *others)
    manifest = _believable(stores, step)
    result = Healing()
    for number, path in enumerate(manifest.paths):
        _heal_pack(stores, manifest, number, path, result)
    for path, record in manifest.sidecars:
        _heal_small(stores, path, lambda data, record=record: check_sidecar(record, data), result)  # type: ignore[misc]
    _heal_small(stores, manifest.path, lambda data: _same(manifest, data), result)
    return result


def _believable(stores: Sequence[Store], step: int) -> Manifest:
    found: list[Manifest] = []
    for store in stores:
        try:
            found.append(parse_manifest(store.read_all(manifest_path(step)), step, _anywhere((store, *stores))))
        except (FileNotFoundError, NotADirectoryError, InvalidManifest):
            continue
    if not found:
        raise NoCheckpoint(f"none of {', '.join(one.url for one in stores)} has a sound manifest of step {step}")
    return max(found, key=lambda manifest: manifest.generation)


def _heal_pack(stores: Sequence[Store], manifest: Manifest, file: int, path: str, result: Healing) -> None:
    size, blocks = stores[0].size(path), range(len(manifest.sums[file]))
    damaged = (
        [number for number in blocks if _block(stores[:1], manifest, file, number) is None] if size else list(blocks)
    )
    if not damaged and size == manifest.files[file].size_bytes:
        return
    healed = []

    def whole() -> Iterator[memoryview]:
        for number in blocks:
            found = _block(stores, manifest, file, number)
            if found is None:
                raise CorruptData(
                    f"{path}, block {number}: damaged, and whole in no other store", file=path, block=number
                )
            if number in damaged:
                low = number * manifest.block_bytes
                names = manifest.table.tensors_in(file, low, low + manifest.block_bytes)
                healed.append(Healed(path, number, names, found[0].url, f"{path}, block {number} was damaged"))
            yield found[1]

    try:
        stores[0].replace(path, whole())
    except CorruptData as error:
        result.left.append(str(error))
        return
    result.healed += healed
    result.rewritten.append(path)


def _same(manifest: Manifest, data: bytes) -> bytes:
    if data != manifest.raw:
        raise ValueError("not the manifest that was committed")
    return data


def _heal_small(stores: Sequence[Store], path: str, check: Callable[[bytes], bytes], result: Healing) -> None:
    """Write a small file anew from the first store that has it whole."""
    for number, store in enumerate(stores):
        try:
            data = check(store.read_all(path))
        except (OSError, ValueError):
            continue
        if number:
            stores[0].replace(path, [memoryview(data)])
            result.rewritten.append(path)
        return
    result.left.append(f"{path}: damaged or missing, and whole in no other store")
