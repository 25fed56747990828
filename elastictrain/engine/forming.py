"""Entering a generation: roll forward or restore, copy what moves, publish parameters, seal.

The order is that of invariant R4: copy, compare digests, seal. Until the seal the old holders count, and nothing here
takes anything away from them; what is held no more is let go one vote after the seal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from elastictrain.agreement import differences
from elastictrain.controller import events as ev
from elastictrain.engine import restoring, saving, starting
from elastictrain.engine.collective import GATHER_DEADLINE_S, GroupSet, Peer
from elastictrain.engine.commit import apply_step
from elastictrain.engine.flat import published_pieces
from elastictrain.engine.inquest import check_claims, claims_from_json, claims_to_json
from elastictrain.engine.parcels import Arrival, wrap
from elastictrain.engine.worker_model import build_initial
from elastictrain.errors import CheckpointMismatch, CorruptWorker, InternalError, PeerLost
from elastictrain.protocol import FormPlan, ReadBytes
from elastictrain.signs import Activity
from elastictrain_checkpoint import Reader

if TYPE_CHECKING:
    from elastictrain.engine.session import Session

FORMING_DEADLINE_S = 300.0


def enter_generation(session: Session, plan: FormPlan, groups: GroupSet) -> ReadBytes | None:
    """Bring this worker's state to `plan.step` under `plan.layout` and seal. Returns what was read of a checkpoint, if
    the state comes from one. Raises PeerLost, Parked or a checkpoint error; the worker's state is then what its next
    park report says.
    """
    groups.deadline_s = groups.gather_deadline_s = FORMING_DEADLINE_S
    held = session.model.held
    session.pulse.enter(Activity.FORM)
    if session.saver is not None and session.worker != plan.first_known:
        session.saver.copies.rest()  # whoever publishes from now on copies too
    with session.apply_lock:
        session.check()
        session.doubt = None  # it was in this worker's last report, and whoever has formed this generation knows it
    digests: dict[str, str] = {}
    reader: Reader | None = None
    if plan.restore is not None:
        reader = _restore(session, plan, groups)
    else:
        session.pristine = False
        _check_memory(session)
        _roll_forward(session, plan)
        # What an earlier forming that failed had begun to bring here is not whole: only what the truth holds counts.
        known = plan.previous is not None and session.worker in plan.previous.workers
        held.keep_only(plan.previous.held(session.worker) if known and plan.previous is not None else ())
        held.hold(plan.layout.held(session.worker))
        digests = _move(session, plan, groups)
        with session.apply_lock:
            session.check()
            session.committed.step = plan.step
    for number in held.masters:
        session.model.flat.publish(number, held.masters[number])
    session.pulse.enter(Activity.MEET)
    _publish_all(session, plan, groups)
    _share_counters(session, plan, groups)
    _share_rows(session, plan, groups)
    read = _seal(session, plan, groups, digests, reader)
    groups.gather_deadline_s = GATHER_DEADLINE_S
    return read


def _check_memory(session: Session) -> None:
    """What this worker brings along must be what its last apply has left: others are about to copy it."""
    changed = session.guard.verify() if session.job.integrity.state else ""
    session.guard.forget()
    if changed:
        corrupt = f"its memory has changed while it was parked: {changed}"
        failed = f"CorruptWorker: {corrupt}"
        session.emit(ev.WorkerFailed(0.0, session.generation, session.worker, "corrupt", failed))
        session.corrupt = corrupt  # only now: see `inquest`
        raise CorruptWorker(corrupt)


def _roll_forward(session: Session, plan: FormPlan) -> None:
    """Apply the step that a survivor has applied, with its vote result byte for byte (R1)."""
    done = session.committed
    if session.worker in plan.joiners or done.step == plan.step:
        return
    if plan.roll_forward is None or session.pending is None or session.vote_format is None:
        raise InternalError(
            f"worker {session.worker} is at step {done.step}, generation {plan.generation} starts at {plan.step}, and "
            "there is nothing to roll forward with"
        )
    with session.apply_lock:
        session.check()
        pending = session.pending
        session.guard.forget()
        session.model.held.keep_only({n for s in pending.reduced for n in range(s.lo, s.hi)} | _idle_blocks(session))
        tally = apply_step(session, pending, plan.roll_forward, session.vote_format, plan.generation)
        done.remember(session.row_of(tally))


def _idle_blocks(session: Session) -> set[int]:
    """Frozen blocks have no reduced gradient and stay."""
    return {n for n in session.model.held.masters if n >= session.model.space.active_blocks}


def _move(session: Session, plan: FormPlan, groups: GroupSet) -> dict[str, str]:
    """Copy moved blocks from their holders. Returns the digest of every copy that this worker sent or received."""
    rank, held = plan.layout.rank, session.model.held
    out = {i: wrap(held, m.lo, m.hi) for i, m in enumerate(plan.moves) if m.source == session.worker}
    coming = {i: m for i, m in enumerate(plan.moves) if m.target == session.worker}
    digests: dict[str, str] = {}

    def swap(
        sends: Mapping[int, Sequence[torch.Tensor]], recvs: Mapping[int, Sequence[torch.Tensor]],
        between: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        session.pulse.enter(Activity.MEET)
        groups.exchange(
            [(rank(plan.moves[i].target), t) for i, tensors in sends.items() for t in tensors],
            [(rank(plan.moves[i].source), t) for i, tensors in recvs.items() for t in tensors],
            between=between,
        )

    sizes = {i: torch.zeros(2, dtype=torch.int64) for i in coming}
    own = {i: torch.tensor([len(parcel.header), parcel.loose.numel()]) for i, parcel in out.items()}
    swap({i: [size] for i, size in own.items()}, {i: [size] for i, size in sizes.items()})
    headers = {i: torch.empty(int(size[0]), dtype=torch.uint8) for i, size in sizes.items()}
    said = {i: torch.frombuffer(bytearray(parcel.header), dtype=torch.uint8) for i, parcel in out.items()}
    swap({i: [header] for i, header in said.items()}, {i: [header] for i, header in headers.items()})
    arrivals = {
        i: Arrival(held, move.lo, move.hi, headers[i].numpy().tobytes(), int(sizes[i][1])) for i, move in coming.items()
    }
    swap(
        {i: parcel.tensors for i, parcel in out.items()},
        {i: arrival.parcel.tensors for i, arrival in arrivals.items()},
        between=lambda: digests.update({f"{i}>": parcel.digest() for i, parcel in out.items()}),
    )
    session.pulse.enter(Activity.FORM)
    for i, arrival in arrivals.items():
        digests[f"{i}<"] = arrival.parcel.digest()
        arrival.unwrap()
    return digests


def _publish_all(session: Session, plan: FormPlan, groups: GroupSet) -> None:
    """Owners send every parameter and buffer to the workers in `gather_to` that do not hold it themselves."""
    layout, space, flat = plan.layout, session.model.space, session.model.flat
    sends: list[Peer] = []
    recvs: list[Peer] = []
    for shard in layout.shards:
        pieces = published_pieces(flat, *space.span(shard.lo, shard.hi))
        targets = [w for w in plan.gather_to if w not in shard.holders()]
        if shard.owner == session.worker:
            sends += [(layout.rank(worker), piece) for worker in targets for piece in pieces]
        elif session.worker in targets:
            recvs += [(layout.rank(shard.owner), piece) for piece in pieces]
    groups.exchange(sends, recvs)


def _share_counters(session: Session, plan: FormPlan, groups: GroupSet) -> None:
    """Integer buffers are few and replicated: everybody takes them from the first worker that is no newcomer."""
    counters = session.model.flat.counters
    if not counters:
        return
    mine = b"".join(bytes(saving.as_buffer(c)) for c in counters.values())
    at, raw = 0, groups.all_gather_sized(mine)[plan.layout.rank(plan.first_known)]
    for counter in counters.values():
        size = counter.numel() * counter.element_size()
        if size:
            values = torch.frombuffer(bytearray(raw[at : at + size]), dtype=counter.dtype)
            counter.copy_(values.view(counter.shape))
        at += size


def _share_rows(session: Session, plan: FormPlan, groups: GroupSet) -> None:
    """Newcomers take the metrics of steps that the controller has not seen yet: when those who took these steps have
    died with what they had to say, a newcomer publishes them.
    """
    source = plan.first_known
    if plan.restore is not None or source in plan.joiners or plan.published_step >= plan.step:
        return
    done, rank = session.committed, plan.layout.rank
    size = torch.zeros(1, dtype=torch.int64)
    if session.worker == source:
        unseen = [row for step, row in done.rows.items() if plan.published_step < step <= plan.step]
        payload = torch.frombuffer(bytearray(json.dumps(unseen).encode()), dtype=torch.uint8)
        size[0] = payload.numel()
        for part in (size, payload):
            groups.exchange([(rank(worker), part) for worker in plan.joiners], [])
    elif session.worker in plan.joiners:
        groups.exchange([], [(rank(source), size)])
        payload = torch.empty(int(size[0]), dtype=torch.uint8)
        groups.exchange([], [(rank(source), payload)])
        rows = json.loads(payload.numpy().tobytes())
        with session.apply_lock:
            session.check()
            for row in rows:
                done.remember(row)


def _seal(
    session: Session, plan: FormPlan, groups: GroupSet, digests: dict[str, str], reader: Reader | None
) -> ReadBytes | None:
    """The first complete vote of the generation: from then on its layout is the truth."""
    session.probes.at(plan.step + 1, "seal")
    mine = {"generation": plan.generation, "step": plan.step, "copies": digests, **_sums(session, plan)}
    mine["read"] = 0 if reader is None else reader.read_bytes
    mine["healed"] = [] if reader is None else [[block.file, block.block] for block in reader.healed]
    said = [json.loads(raw) for raw in groups.all_gather_sized(json.dumps(mine).encode())]
    if any((s["generation"], s["step"]) != (plan.generation, plan.step) for s in said):
        raise InternalError(f"the seal of generation {plan.generation} at step {plan.step} got {said}")
    copies = {key: value for s in said for key, value in s["copies"].items()}
    torn = [i for i in range(len(plan.moves)) if copies.get(f"{i}>") != copies.get(f"{i}<")] if plan.moves else []
    if torn and plan.restore is None:
        raise PeerLost(f"the copies of {[plan.moves[i] for i in torn]} differ from their originals; forming again")
    _learn(session, plan, groups, dict(zip(plan.layout.workers, said, strict=True)))
    with session.apply_lock:
        session.check()
        done = session.committed
        done.step = done.gathered_step = plan.step
        done.sealed_generation = plan.generation
        done.vote = None
        session.pending = None
    if reader is None:
        return None
    each = tuple((worker, one["read"]) for worker, one in zip(plan.layout.workers, said, strict=True))
    return ReadBytes(reader.manifest.size_bytes, each, len({tuple(block) for one in said for block in one["healed"]}))


def _sums(session: Session, plan: FormPlan) -> dict[str, Any]:
    """What a worker says at the seal beside the digests of its copies: sums of its state, and what it knows."""
    said = {"kind": json.dumps(session.numerics, sort_keys=True), **session.knowledge.to_json()}
    if session.job.integrity.state:
        said["sums"] = claims_to_json(session.guard.begin(plan.layout, session.worker))
    return said


def _learn(session: Session, plan: FormPlan, groups: GroupSet, said: dict[int, dict[str, Any]]) -> None:
    """All members know the same from here on, and have the same state."""
    session.knowledge.learn(said, {worker: one["kind"] for worker, one in said.items()}, plan.step)
    if session.job.integrity.state:
        claims = {worker: claims_from_json(one["sums"]) for worker, one in said.items()}
        check_claims(session, plan.layout, groups, claims, commit=plan.step)


def _restore(session: Session, plan: FormPlan, groups: GroupSet) -> Reader | None:
    """State from a checkpoint, or the recipe's initial state; only the held blocks are filled, the rest is gathered.
    Returns the checkpoint's reader.
    """
    assert plan.restore is not None
    model, held, done = session.model, session.model.held, session.committed
    doubtful = session.saver if plan.restore.discard_newer else None
    if doubtful is not None:
        doubtful.distrust(plan.restore.step, plan.generation)
    with session.apply_lock:
        session.check()
        session.guard.forget()
        session.knowledge.health.went_back(plan.step)
        session.pending, done.vote = None, None
        done.rows.clear()
        held.keep_only(())
        held.hold(plan.layout.held(session.worker))
        if plan.restore.checkpoint is None and session.pristine and model.flat.dtype == torch.float32:
            pass  # just built, and masters are views: the values are there
        elif plan.restore.checkpoint is None:
            initial = build_initial(model.recipe, session.job.seed)
            model.flat.read_initial(initial)
            held.start_from(initial)
    # Without the lock: peers are waited for. What is held here counts for nobody before the seal.
    reader: Reader | None = None
    if plan.restore.checkpoint is not None:
        reader = _load(session, plan, groups)
    else:
        _begin(session, plan, groups)
    with session.apply_lock:
        session.check()
        done.step = plan.step
    if doubtful is not None and session.worker == plan.first_known:
        doubtful.discard_after(plan.restore.step, plan.generation)
    return reader


def _begin(session: Session, plan: FormPlan, groups: GroupSet) -> None:
    """The start of a run that begins with the weights of another one."""
    settings = session.job.start_from
    if settings is None:
        return
    session.pristine = False
    company = _company(session, plan, groups)
    model = session.model
    starting.begin(model.flat, model.held, settings, plan.layout, plan.first_known, company, session.worker)


def _company(session: Session, plan: FormPlan, groups: GroupSet) -> restoring.Company | None:
    """Those who restore together; None for one who is alone."""

    def beat() -> None:
        session.check()
        session.probes.at(plan.step + 1, "restore")

    def meeting(waits: bool) -> None:
        session.pulse.enter(Activity.MEET if waits else Activity.FORM)

    if groups.world == 1:
        beat()
        return None
    workers = plan.layout.workers
    return restoring.Company(groups, workers, [plan.layout.held(worker) for worker in workers], beat, meeting)


def _load(session: Session, plan: FormPlan, groups: GroupSet) -> Reader:
    job, step = session.job, plan.step
    if job.checkpoint is None:
        raise InternalError(f"told to restore step {step}, but the job has no checkpoint setting")
    company = _company(session, plan, groups)
    reader = restoring.open_together(job.checkpoint, step, company)
    stored = reader.tree.get("numerics", {})
    problems = differences(stored, session.numerics, f"worker {session.worker}") if stored else []
    if problems and job.numerics.strict:
        raise CheckpointMismatch("; ".join(problems) + " (numerics.strict is set)")
    session.pristine = False
    try:
        restoring.restore(session.model.flat, session.model.held, reader, company)
    except OSError as error:
        raise restoring.unreadable(job.checkpoint, step, error) from error
    return reader
