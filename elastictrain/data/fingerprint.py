"""The fingerprint of a source: everything that a batch depends on besides the seed and the step. Pure.

It is stored with every checkpoint. Two equal fingerprints mean the same batches; `fingerprint_difference` says
in words how two differ. Names of files are relative to what they share and no times are in it, so that data
which were only moved or copied are the same data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

_MAX_LISTED_FILES = 1000  # beyond, only the hash over all files is kept; manifests must stay small
_MAX_SENTENCES_PER_KIND = 5


def seal_fingerprint(content: Mapping[str, Any], files: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the fingerprint of `content` and of every file (`name`, `bytes`, `rows`, `blocks`, `hash`)."""
    body = {**content, "file_count": len(files), "files_hash": _digest(list(files))}
    listed = list(files) if len(files) <= _MAX_LISTED_FILES else None
    return {**body, "files": listed, "hash": _digest(body)}


def seal_mixture(sources: Mapping[str, Mapping[str, Any]], content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fingerprint of a mixture of sources with these fingerprints."""
    body = {"version": 1, "kind": "mixture", **content, "sources": {name: dict(one) for name, one in sources.items()}}
    return {**body, "hash": _digest({**body, "sources": {name: one["hash"] for name, one in sources.items()}})}


ABOUT_ORDER = ("lanes", "lane_batch_size")
"""Keys of a fingerprint that say how the data are dealt out, and not what they are."""


def identity(fingerprint: Mapping[str, Any]) -> str:
    """Name the data of a fingerprint, whatever the number of lanes and their batch size: 16 hexadecimal digits."""
    body = {key: value for key, value in fingerprint.items() if key not in (*ABOUT_ORDER, "hash", "files")}
    if "sources" in body:
        body["sources"] = {name: identity(one) for name, one in body["sources"].items()}
    return _digest(body)[:16]


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


_UNSAID = {"ragged": "drop", "document": "line", "holes": 0}
"""What it means that a fingerprint does not name a setting."""

_SENTENCES = {
    "manifest": "the manifest of segments was {old} and is now {new} (data.path, data.live)",
    "kind": "the format was {old} and is now {new} (data.kind)",
    "text_column": "the text column was {old} and is now {new} (data.text_column)",
    "schema": "the columns were {old} and are now {new} (data.columns)",
    "tokenizer": "the tokenizer was {old} and is now {new} (data.tokenizer)",
    "packing": "packing was {old} and is now {new} (data.sequence_length)",
    "lanes": "the number of lanes was {old} and is now {new} (lanes)",
    "lane_batch_size": "the samples per lane and step were {old} and are now {new} (lane_batch_size)",
    "shuffle": "the order was {old} and is now {new} (data.shuffle)",
    "document": "a document was a {old} and is now a {new} (data.document)",
    "holes": "{old} corrupt blocks or files were left out and now are {new} (data.on_corrupt)",
    "ragged": "the end of an epoch that fills no step was {old} and is now {new} (data.ragged)",
    "window_row_groups": "the shuffle window was {old} row groups and is now {new} (data.window_row_groups)",
    "columns": "the columns were {old} and are now {new} (data.columns)",
    "rows_per_block": "the lines per block were {old} and are now {new} (data.rows_per_block)",
    "order_version": "the order of an epoch was version {old} and is now {new} (another version of elastictrain)",
    "mixture_version": "mixtures were dealt by version {old} and are now by {new} (another version of elastictrain)",
    "file_count": "there were {old} files and are now {new} (data.path)",
    "samples": "there were {old} samples and are now {new}",
}


def fingerprint_difference(
    old: Mapping[str, Any], new: Mapping[str, Any], *, ignoring: Collection[str] = ()
) -> list[str]:
    """Say how the source differs from the one before; an empty list if batches are the same.

    `old` and `new` are `Source.fingerprint`s, also as JSON gives them back; each sentence names what was, what is, and
    the setting. `ignoring`: keys of them that may differ.
    """
    old, new = ({k: v for k, v in one.items() if k not in ignoring} for one in (old, new))
    if old.get("kind") == new.get("kind") == "mixture":
        return _mixture_differences(old, new, ignoring)
    # `files` is told by `files_hash`, and `hash` covers what is ignored too.
    if all(old.get(key) == new.get(key) for key in {*old, *new} - {"hash", "files"}):
        return []
    sentences = [
        sentence.format(old=_show(old.get(key, _UNSAID.get(key))), new=_show(new.get(key, _UNSAID.get(key))))
        for key, sentence in _SENTENCES.items()
        if old.get(key) != new.get(key)
    ]
    if old.get("files_hash") != new.get("files_hash"):
        sentences += _file_differences(old.get("files"), new.get("files"))
    if not sentences:
        others = sorted(k for k in {*old, *new} - {"hash", "files"} if old.get(k) != new.get(k))
        sentences = [f"the content differs ({', '.join(others)})"]
    return sentences


def _mixture_differences(old: Mapping[str, Any], new: Mapping[str, Any], ignoring: Collection[str]) -> list[str]:
    """Sources that came or went are no difference: a stage of the run says so."""
    sentences = [
        _SENTENCES[key].format(old=_show(old.get(key)), new=_show(new.get(key)))
        for key in ("mixture_version", "lanes", "lane_batch_size")
        if old.get(key) != new.get(key)
    ]
    for name in sorted({*old["sources"]} & {*new["sources"]}):
        found = fingerprint_difference(old["sources"][name], new["sources"][name], ignoring=ignoring)
        sentences += [f"source {name!r}: {sentence}" for sentence in found]
    return sentences


def _file_differences(old: Sequence[Mapping[str, Any]] | None, new: Sequence[Mapping[str, Any]] | None) -> list[str]:
    if old is None or new is None:
        return ["the content of the files differs (too many files to keep a list of them)"]
    before = {str(file["name"]): file for file in old}
    after = {str(file["name"]): file for file in new}
    return [
        *_some(f"{name} is missing" for name in before if name not in after),
        *_some(f"{name} is new" for name in after if name not in before),
        *_some(
            f"{name} has changed ({_file_change(before[name], after[name])})"
            for name in before
            if name in after and before[name] != after[name]
        ),
    ]


def _file_change(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    parts = [f"{old[key]} {key}, now {new[key]}" for key in ("bytes", "rows", "blocks") if old[key] != new[key]]
    return "; ".join(parts) or "other content of the same size"


def _some(sentences: Iterable[str]) -> list[str]:
    """The first ones, and how many more there are; those are made one at a time."""
    rest = iter(sentences)
    first = list(islice(rest, _MAX_SENTENCES_PER_KIND))
    more = sum(1 for _ in rest)
    return [*first, *([f"… and {more} more like this"] if more else [])]


def _show(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(" ".join(map(str, item)) if isinstance(item, list) else str(item) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return "none" if value is None else str(value)
