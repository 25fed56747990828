"""Ranks that load together: one chooses the checkpoint, all say what they want of it, and every stored byte is read by
one of them and handed on.

Each phase ends with an agreement, so that nobody is left in a collective by a rank whose arguments, state dict or
storage are at fault. Within the reading itself `together` sees to that.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from elastictrain_checkpoint.documents import pack_documents, unpack_documents
from elastictrain_checkpoint.errors import CorruptData, InvalidManifest, LoadFailed
from elastictrain_checkpoint.host_exchange import HostExchange, Offer
from elastictrain_checkpoint.reader import Reader
from elastictrain_checkpoint.reshard import SPAN_BYTES, plan_reads
from elastictrain_checkpoint.rounds import SHARED_ROUND_BYTES, most_shared_bytes
from elastictrain_checkpoint.store import Store
from elastictrain_checkpoint.tiers import Found
from elastictrain_checkpoint.together import Together
from elastictrain_checkpoint.torch.exchange import (
    GroupExchange,
    exchanges_host_memory,
    over_host,
    place_here,
    share_a_host,
)
from elastictrain_checkpoint.torch.filling import Filling, prepare, put, read_alone
from elastictrain_checkpoint.torch.finding import Asked, fit_of
from elastictrain_checkpoint.torch.fitting import Fit, Said
from elastictrain_checkpoint.torch.places import choose, with_older
from elastictrain_checkpoint.torch.ranks import Ranks
from elastictrain_checkpoint.torch.report import LoadReport, check, said_by_all
from elastictrain_checkpoint.torch.saving import before_mutation
from elastictrain_checkpoint.wants import Columns, Numbering, WantColumns

BESIDE_BYTES = 1 << 20
"""Documents of so many bytes, for all ranks together, travel with the first agreement; larger ones by a broadcast."""
_ROOM_BYTES = SHARED_ROUND_BYTES + SPAN_BYTES // 4
"""What is offered to share before there is a plan: enough unless rows are very long (`most_shared_bytes`)."""


def load_together(state_dict: Any, asked: Asked, ranks: Ranks) -> LoadReport:
    """See `loading.load`; every rank calls it, and all get the same report, or the same kind of error."""
    memory = over_host(ranks.group)
    try:
        return _load(state_dict, asked, ranks, memory)
    finally:
        memory.close()


def _load(state_dict: Any, asked: Asked, ranks: Ranks, memory: HostExchange) -> LoadReport:
    stores, told, found, offers = _open(asked, ranks, memory)
    mine, everybody = _fit(stores, told, found, state_dict, asked, ranks, memory, offers)
    reader, said = mine.reader, everybody.said
    check(said, asked.said(told.step, mine.found.stores[0]), strict=asked.strict)
    reading, exchange = _get_ready(mine, everybody, ranks, memory)
    problem: Exception | None = None
    try:
        if reading is None or exchange is None:
            read_alone(reader, mine.filling)
        else:
            reading.read(exchange)
        put(mine.fit, mine.filling)
    except Exception as error:
        if exchange is not None and exchange.broken:  # nothing can be agreed on any more
            if isinstance(error, ConnectionError | TimeoutError | RuntimeError):
                raise LoadFailed(f"the ranks cannot go on loading: {error}") from error
            raise
        if not (isinstance(error, CorruptData) and not error.file):  # else it is another rank's, which says it itself
            problem = error
    try:
        healed = ranks.agree(reader.healed, problem)
    except CorruptData as error:
        raise with_older(error, stores, reader.manifest) from error
    return LoadReport(
        told.step, said.missing, said.unexpected, said.different,
        passed_over=told.passed_over, healed=[one for there in healed for one in there],
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Told:
    """What rank 0 has chosen: the step, the stores to read it from (numbers of the places), and its documents."""

    step: int
    order: list[int]
    documents: bytes
    passed_over: dict[int, str]


def _open(asked: Asked, ranks: Ranks, memory: HostExchange) -> tuple[list[Store], _Told, Found | None, list[Offer]]:
    """The checkpoint that rank 0 has chosen; storage is asked for its manifest once. Also what it was read into, on
    rank 0, and the memory that all offer to share, if they are on one host.
    """
    stores, called = list[Store](), ""
    told: _Told | None = None
    chosen: Found | None = None
    offer: Offer | None = None
    problem: Exception | None = None
    try:
        stores = asked.stores()
        called = f"step={asked.step}, strict={asked.strict}, {asked.choice()}, {len(stores)} places"
        offer = memory.offer(_ROOM_BYTES)
        if ranks.rank == 0:
            passed_over: dict[int, str] = {}
            chosen = choose(stores, asked.step, passed_over)
            order = [number for one in chosen.stores for number, store in enumerate(stores) if store is one]
            told = _Told(chosen.manifest.step, order, _documents(chosen), passed_over)
    except Exception as error:  # whatever it is, the other ranks must hear of it
        problem = error
    beside = told if told is not None and len(told.documents) * ranks.size <= BESIDE_BYTES else None
    with ranks.patient("load"):
        said = ranks.same(called, (beside, place_here(), offer), problem)
    told = said[0][0] or ranks.from_first(told)
    offers = [offer for _, _, offer in said] if share_a_host([place for _, place, _ in said]) else []
    return stores, told, chosen, offers


def _documents(found: Found) -> bytes:
    for store in found.stores[:-1]:
        with suppress(OSError, InvalidManifest):
            return pack_documents(store, found.manifest)
    return pack_documents(found.stores[-1], found.manifest)


@dataclass(frozen=True, slots=True)
class _Mine:
    """What this rank reads from, and what goes where."""

    found: Found
    reader: Reader
    fit: Fit
    filling: Filling


@dataclass(frozen=True, slots=True)
class _Everybody:
    """What each rank wants; what does not fit between all of them."""

    wants: list[WantColumns]
    said: Said


def _fit(
    stores: Sequence[Store],
    told: _Told,
    found: Found | None,
    state_dict: Any,
    asked: Asked,
    ranks: Ranks,
    memory: HostExchange,
    offers: Sequence[Offer],
) -> tuple[_Mine, _Everybody]:
    fit, filling = Fit(), Filling()
    problem: Exception | None = None
    columns: Columns | None = None
    why_not = "not all on one host"
    try:
        if offers:
            why_not = memory.join(offers)
        if found is None:
            stores = tuple(stores[number] for number in told.order)
            found = Found(unpack_documents(told.documents, told.step), stores)
        reader = found.reader()
        fit = fit_of(reader, state_dict, asked.choice())
        filling = prepare(reader, fit, boxes=True)
        numbering = Numbering(found.manifest)
        columns = numbering.columns(filling.wants)
        before_mutation()  # here, since a save that does not end must be everybody's error
    except Exception as error:  # as a state dict of the caller's may raise
        problem = error
    everybody = ranks.agree((fit.said, columns, why_not), problem)
    assert found is not None  # else there was a problem
    with suppress(OSError):  # of any rank, on all ranks
        memory.settle([why_not for _, _, why_not in everybody])
        ranks.through = memory
    return _Mine(found, reader, fit, filling), _Everybody(
        [WantColumns(numbering, wanted) for _, wanted, _ in everybody],
        said_by_all([one for one, _, _ in everybody]),
    )


def _get_ready(
    mine: _Mine, everybody: _Everybody, ranks: Ranks, memory: HostExchange
) -> tuple[Together | None, HostExchange | GroupExchange | None]:
    """Who reads what, and how it is handed on: through shared memory on one host, else over the group; if that moves
    nothing of the host's (nccl), not at all. All memory for it is made here: who has none says so before others wait.
    """
    exchange: HostExchange | GroupExchange | None = None
    if ranks.through is not None:
        exchange = memory
    elif exchanges_host_memory(ranks.group):
        exchange = GroupExchange(ranks.group)
    reading: Together | None = None
    while True:
        room, problem = 0, None
        try:
            if exchange is not None:
                plan = plan_reads(mine.reader.manifest, everybody.wants)
                reading = Together(mine.reader, plan, everybody.wants, mine.filling.outs, worker=ranks.rank)
                room = most_shared_bytes(plan)
                reading.get_ready(exchange)
        except Exception as error:
            problem = error
        room = max(ranks.agree(room, problem))
        if exchange is not memory or room <= memory.room_bytes:
            return reading, exchange
        ranks.through = None
        try:
            memory.make_room(room)
            ranks.through = memory
        except OSError:  # of any rank, on all ranks
            exchange = GroupExchange(ranks.group) if exchanges_host_memory(ranks.group) else None
