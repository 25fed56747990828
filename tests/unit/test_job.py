from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from elastictrain.errors import ConfigError
from elastictrain.job import Checkpoint, Data, Integrity, Job, Numerics, Workers, dump_job, load_job, parse_job

BASE: dict[str, Any] = {"recipe": "mod:Class", "data": {"kind": "jsonl", "path": "x.jsonl"}, "steps": 10}

WRONG = [
    (
        {"gradients": "hand_over", "stragglers": {"action": "lanes"}},
        (
            "job: stragglers.action=lanes needs gradients=sum: with gradients=hand_over times do not tell who is slow; "
            "set gradients: sum, or stragglers.action: off"
        ),
    ),
    ({"lane": 3}, "job: unknown setting 'lane'; did you mean 'lanes'?"),
    ({"workers": {"maxx": 3}}, "job: unknown setting 'workers.maxx'; did you mean 'max'?"),
    (
        {"checkpoint": {"path": "c", "every_step": 3}},
        "job: unknown setting 'checkpoint.every_step'; did you mean 'every_steps'?",
    ),
    (
        {"checkpoint": {"path": "c", "zzz": 3}},
        (
            "job: unknown setting 'checkpoint.zzz'; known settings: at_end, copy_to, every_steps, full_every, "
            "incremental, keep, max_loss, max_overhead, path, storage_options"
        ),
    ),
    (
        {"checkpoint": {"path": "c", "every_steps": 3, "max_overhead": 0.5, "max_loss": "90s"}},
        (
            "job: checkpoint.every_steps=3 and checkpoint.max_overhead=0.5 and max_loss=0:01:30 both say how often to "
            "store; set either every_steps, or max_overhead and max_loss"
        ),
    ),
    (
        {"checkpoint": {"path": "c", "max_overhead": 1.5}},
        "job: checkpoint.max_overhead: Input should be less than or equal to 1 (got 1.5)",
    ),
    (
        {"checkpoint": {"path": "c", "max_overhead": True}},
        "job: checkpoint.max_overhead: expected a number (got the switch True)",
    ),
    (
        {"checkpoint": {"path": "c", "max_loss": "0s"}},
        "job: checkpoint.max_loss: expected a time above 0, such as 5m or 90s (got 0:00:00)",
    ),
    (
        {"steps": "many"},
        "job: steps: Input should be a valid integer, unable to parse string as an integer (got 'many')",
    ),
    ({"steps": 0}, "job: steps: Input should be greater than or equal to 1 (got 0)"),
    ({"steps": True}, "job: steps: expected a whole number (got the switch True)"),
    ({"workers": {"spares": False}}, "job: workers.spares: expected a whole number (got the switch False)"),
    ({"workers": 5}, "job: workers: Input should be a valid dictionary or instance of Workers (got 5)"),
    ({"workers": {"min": 3, "max": 2}}, "job: workers.min=3 > workers.max=2; lower workers.min or raise workers.max"),
    (
        {"workers": {"min": 2, "max": 4, "start": 5}},
        "job: workers.start=5 is outside workers.min=2 .. workers.max=4",
    ),
    ({"workers": {"lane_shares": {0: -1}}}, "job: workers.lane_shares.0: Input should be greater than 0 (got -1)"),
    (
        {"lanes": 2, "workers": {"max": 4}},
        "job: lanes=2 < workers.max=4: every worker needs a lane; raise lanes or lower workers.max",
    ),
    (
        {"lane_batch_size": 3, "micro_batches": 2},
        "job: lane_batch_size=3 is not a multiple of micro_batches=2",
    ),
    (
        {"data": {"kind": "orc", "path": "x"}},
        (
            "job: data.kind: Input should be 'parquet', 'jsonl', 'arrow', 'csv', 'webdataset', 'text' or 'huggingface' "
            "(got 'orc')"
        ),
    ),
    (
        {"data": {"kind": "jsonl", "path": 3}},
        "job: data.path: Input should be a valid string (got 3)\njob: data.path: Input should be a valid tuple (got 3)",
    ),
    (
        {"data": {"kind": "jsonl", "path": "x", "text_column": "t"}},
        "job: data.text_column and data.sequence_length belong together: set both or neither",
    ),
    ({"recipe": "gpt.py"}, """job: recipe='gpt.py': expected "module:Class" or "file.py:Class\""""),
    ({"clip_grad_norm": float("inf")}, "job: clip_grad_norm: Input should be a finite number (got inf)"),
    ({"block_elements": 5000}, "job: block_elements: Input should be a multiple of 4096 (got 5000)"),
    (
        {"numerics": {"compute_dtype": "f16"}},
        "job: numerics.compute_dtype: Input should be 'f32' or 'bf16' (got 'f16')",
    ),
    ({"on_nan": "ignore"}, "job: on_nan: Input should be 'stop' or 'skip' (got 'ignore')"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[str(change) for change, _ in WRONG])
def test_wrong_setting_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_job(BASE | change)
    assert str(caught.value) == message


def test_all_wrong_settings_are_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_job({"step": 3, "lanes": 0}, where="job.yaml")
    assert str(caught.value).splitlines() == [
        "job.yaml: setting 'recipe' is missing",
        "job.yaml: setting 'data' is missing",
        "job.yaml: lanes: Input should be greater than or equal to 1 (got 0)",
        "job.yaml: setting 'steps' is missing",
        "job.yaml: unknown setting 'step'; did you mean 'steps'?",
    ]


@pytest.mark.parametrize("raw", [None, [1], "text", 3])
def test_not_a_mapping(raw: Any, tmp_path: Path) -> None:
    kind = "nothing (an empty file)" if raw is None else type(raw).__name__
    with pytest.raises(ConfigError) as caught:
        parse_job(raw)
    assert str(caught.value) == f"job: expected a mapping of settings, got {kind}"
    file = tmp_path / "job.yaml"
    file.write_text("" if raw is None else repr(raw))
    with pytest.raises(ConfigError) as caught:
        load_job(file)
    assert str(caught.value) == f"{file}: expected a mapping of settings, got {kind}"


def test_python_says_the_same_as_yaml() -> None:
    with pytest.raises(ConfigError, match=r"^Workers: min: Input should be greater than or equal to 1 \(got 0\)$"):
        Workers(min=0)
    with pytest.raises(ConfigError, match=r"^Data: unknown setting 'pth'; did you mean 'path'\?$"):
        Data(kind="jsonl", path="x", pth="y")  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"^Job: setting 'steps' is missing$"):
        Job(recipe="a:B", data=Data(kind="jsonl", path="x"))  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"^Checkpoint: keep: "):
        Checkpoint(path="x", keep=0)


class Whole:
    def model(self) -> None: ...
    def optimizer(self, params: object) -> None: ...
    def loss(self, model: object, batch: object) -> None: ...


class Lossless:
    def model(self) -> None: ...
    def optimizer(self, params: object) -> None: ...

    def __repr__(self) -> str:
        return "Lossless()"


def test_recipe_object() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_job(BASE | {"recipe": Lossless()})
    assert str(caught.value) == (
        "job: recipe=Lossless() has no loss(); expected an object with model(), optimizer(params) and "
        'loss(model, batch), or "module:Class"'
    )
    for given_recipe in (Whole(), Whole):
        assert f"recipe: {__name__}:Whole\n" in dump_job(parse_job(BASE | {"recipe": given_recipe}))


def test_job_file(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    with pytest.raises(ConfigError, match="no such file; expected YAML with at least recipe, data and steps"):
        load_job(file)
    file.write_text("a: [1\n")
    with pytest.raises(ConfigError, match=r"job.yaml: not valid YAML: (?s:.*)line 2"):
        load_job(file)
    file.write_bytes(b"name: \xff\xfe\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_job(file)
    file.write_text("recipe: a:B\ndata: {kind: jsonl, path: x}\nstepz: 3\n")
    with pytest.raises(ConfigError) as caught:
        load_job(file)
    assert str(caught.value) == (
        f"{file}: setting 'steps' is missing\n{file}: unknown setting 'stepz'; did you mean 'steps'?"
    )
    file.write_text("recipe: a:B\ndata: {kind: jsonl, path: x}\nsteps: 3\n")
    assert load_job(file, steps=7, run_dir="d").steps == 7


def test_settings_are_frozen() -> None:
    job = parse_job(BASE)
    for thing, name in ((job, "lanes"), (job.workers, "max"), (job.data, "path"), (job.numerics, "threads")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(thing, name, 4)


def test_workers_start_with_max_unless_told() -> None:
    assert Workers(max=4).initial == 4
    assert Workers(max=4, start=2).initial == 2


names = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=8)
shares = st.dictionaries(st.integers(0, 9), st.floats(0.1, 10), max_size=3)
jobs = st.builds(
    Job,
    name=names,
    recipe=st.just("mod:Class"),
    recipe_args=st.dictionaries(names, st.integers() | names | st.lists(st.booleans(), max_size=2), max_size=2),
    data=st.builds(
        Data,
        kind=st.sampled_from(["parquet", "jsonl"]),
        path=names | st.lists(names, min_size=1, max_size=3).map(tuple),
        columns=st.none() | st.lists(names, max_size=2).map(tuple),
        storage_options=st.dictionaries(names, names, max_size=2),
    ),
    lanes=st.integers(4, 64),
    steps=st.integers(1, 10**9),
    seed=st.integers(-(2**63), 2**63),
    clip_grad_norm=st.none() | st.floats(1e-9, 1e9),
    workers=st.builds(Workers, max=st.integers(1, 4), lane_shares=shares, block_shares=shares),
    checkpoint=st.none()
    | st.builds(Checkpoint, path=names, every_steps=st.integers(1, 99))
    | st.builds(
        Checkpoint,
        path=names,
        max_overhead=st.floats(1e-6, 1),
        max_loss=st.none() | st.timedeltas(timedelta(seconds=1), timedelta(days=9)),
    ),
    numerics=st.builds(Numerics, compute_dtype=st.sampled_from(["f32", "bf16"]), strict=st.booleans()),
    integrity=st.builds(Integrity, state=st.booleans(), recompute_every=st.none() | st.integers(1, 99)),
    run_dir=st.none() | names,
)


@given(job=jobs)
def test_yaml_round_trip(job: Job, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    file.write_text(dump_job(job), encoding="utf-8")
    assert load_job(file) == job


@pytest.mark.parametrize(
    ("written", "seconds"), [("90s", 90), ("5m", 300), ("1h30m", 5400), ("0.5s", 0.5), (45, 45), ("PT5M", 300)]
)
def test_times_may_be_written_as_people_do(written: object, seconds: float) -> None:
    found = parse_job(BASE | {"checkpoint": {"path": "c", "max_loss": written}}).checkpoint
    assert found is not None
    assert found.max_loss == timedelta(seconds=seconds)


def test_steps_are_the_default_only_where_no_budget_is_set() -> None:
    assert Checkpoint(path="c").every_steps == 100
    assert Checkpoint(path="c", every_steps=None).every_steps == 100
    assert Checkpoint(path="c", max_overhead=0.01).every_steps is None
    assert Checkpoint(path="c", max_loss=timedelta(minutes=5)).every_steps is None


# --- which checkpoints stay ---


def kept(keep: Any) -> Any:
    return parse_job(BASE | {"checkpoint": {"path": "c", "keep": keep}}).checkpoint.keep


def test_keep_is_a_number_or_a_mapping() -> None:
    assert kept(4) == 4
    found = kept(
        {
            "every_steps": 10,
            "younger": "2h",
            "spaced": 90,
            "best": {"metric": "loss", "n": 2, "mode": "max"},
            "newest": 1,
        }
    )
    assert (found.newest, found.every_steps, found.verify) == (1, 10, False)
    assert (found.younger, found.spaced) == (timedelta(hours=2), timedelta(seconds=90))
    assert (found.best.metric, found.best.n, found.best.mode) == ("loss", 2, "max")
    assert kept({}).newest == 3
    assert kept(found) == found


def test_keep_survives_being_written_down(tmp_path: Path) -> None:
    for keep in (2, {"newest": 1, "spaced": "1h30m", "best": {"metric": "grad_norm"}, "verify": True}):
        job = parse_job(BASE | {"checkpoint": {"path": "c", "keep": keep}})
        file = tmp_path / "job.yaml"
        file.write_text(dump_job(job))
        assert load_job(file) == job


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (0, "job: checkpoint.keep: Input should be greater than or equal to 1 (got 0)"),
        (True, "job: checkpoint.keep: expected a whole number (got the switch True)"),
        (
            "all",
            "job: checkpoint.keep: Input should be a valid integer, ",
        ),
        ({"newst": 1}, "job: unknown setting 'checkpoint.keep.newst'; did you mean 'newest'?"),
        ({"newest": 0}, "job: checkpoint.keep.newest: Input should be greater than or equal to 1 (got 0)"),
        ({"younger": "-5m"}, "job: checkpoint.keep.younger: "),
        ({"spaced": 0}, "job: checkpoint.keep.spaced: expected a time above 0, such as 5m or 90s (got 0:00:00)"),
        ({"best": {}}, "job: setting 'checkpoint.keep.best.metric' is missing"),
        (
            {"best": {"metric": "accuracy"}},
            "job: checkpoint.keep.best.metric='accuracy': expected loss, grad_norm, or evaluation.NAME for what the ",
        ),
        (
            {"best": {"metric": "loss", "mode": "low"}},
            "job: checkpoint.keep.best.mode: Input should be 'min' or 'max' (got 'low')",
        ),
        (
            {"best": {"metric": "evaluation.loss"}},
            "job: checkpoint.keep.best.metric='evaluation.loss', but evaluate_every is not set: nothing is evaluated; ",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused_with_the_setting_named(keep: Any, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        kept(keep)
    assert str(error.value).startswith(words)


# --- where checkpoints are copied to ---


def copying(*places: Any, **settings: Any) -> dict[str, Any]:
    return BASE | {"checkpoint": {"path": "runs/c", "copy_to": list(places)} | settings}


def test_places_to_copy_to() -> None:
    places = ({"path": "s3://b/c", "every_steps": 100, "keep": {"newest": 1, "spaced": "24h"}}, {"path": "/far"})
    job = parse_job(copying(*places))
    assert job.checkpoint is not None
    first, second = job.checkpoint.copy_to
    assert (first.path, first.every_steps, first.storage_options) == ("s3://b/c", 100, {})
    assert (second.every_steps, second.keep) == (1, 3)
    assert [where for where, _ in job.checkpoint.kept()] == [
        "checkpoint.keep",
        "checkpoint.copy_to.0.keep",
        "checkpoint.copy_to.1.keep",
    ]
    assert parse_job(job.model_dump(mode="json")) == job


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([{"path": "runs/c/"}], "checkpoint.copy_to.0.path='runs/c/' and checkpoint.path are the same place; "),
        ([{"path": "file://{cwd}/runs/../runs/c"}], "and checkpoint.path are the same place; "),
        ([{"path": "runs/c/far"}], "checkpoint.copy_to.0.path='runs/c/far' and checkpoint.path lie one in the other; "),
        ([{"path": "runs"}], "checkpoint.copy_to.0.path='runs' and checkpoint.path lie one in the other; "),
        (
            [{"path": "s3://b/x"}, {"path": "s3://b/x/"}],
            (
                "checkpoint.copy_to.1.path='s3://b/x/' and checkpoint.copy_to.0.path are the same place; a copy must "
                "be somewhere else: set checkpoint.copy_to.1.path to another folder or URL"
            ),
        ),
        ([{"pth": "x"}], "setting 'checkpoint.copy_to.0.path' is missing"),
        ([{"path": "x", "kep": 3}], "unknown setting 'checkpoint.copy_to.0.kep'; did you mean 'keep'?"),
        ([{"path": "x", "every_steps": 0}], "checkpoint.copy_to.0.every_steps: Input should be greater than or equal"),
        ([{"path": "x", "keep": 0}], "checkpoint.copy_to.0.keep: Input should be greater than or equal to 1 (got 0)"),
        (
            [{"path": "x", "keep": {"best": {"metric": "evaluation.y"}}}],
            "checkpoint.copy_to.0.keep.best.metric='evaluation.y', but evaluate_every is not set",
        ),
    ],
)
def test_places_that_cannot_be_meant_are_refused(places: list[dict[str, Any]], message: str) -> None:
    for place in places:
        if "path" in place:
            place["path"] = str(place["path"]).replace("{cwd}", str(Path.cwd()))
    with pytest.raises(ConfigError) as error:
        parse_job(copying(*places))
    assert message in str(error.value)


def test_places_are_a_list() -> None:
    with pytest.raises(ConfigError) as error:
        parse_job(BASE | {"checkpoint": {"path": "c", "copy_to": "s3://b"}})
    assert str(error.value) == "job: checkpoint.copy_to: expected a list of places, each with its path (got 's3://b')"
    beside = parse_job(copying({"path": "runs/cc"}, {"path": "s3://b/c"}, {"path": "gs://b/c"}))
    assert beside.checkpoint is not None
    assert len(beside.checkpoint.copy_to) == 3


@pytest.mark.parametrize(
    ("action", "gradients", "watches"), [("watch", "sum", True), ("watch", "hand_over", False), ("off", "sum", False)]
)
def test_nobody_is_watched_where_times_tell_nothing(action: str, gradients: str, watches: bool) -> None:
    assert parse_job(BASE | {"gradients": gradients, "stragglers": {"action": action}}).watches_workers == watches
