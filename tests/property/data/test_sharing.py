"""What a node's feeder reads, keeps and hands out, under random workers; and when a worker relies on it."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from elastictrain.data.reliance import FIRST_PAUSE_S, LONGEST_PAUSE_S, Reliance
from elastictrain.data.sharing import KEEP_S, WANT_S, Ask, Ledger, Look, readers_wanted, share_bytes

LIMIT = 100
BLOCKS = st.integers(0, 7)
WORKERS = st.integers(0, 3)


def size_of(block: int) -> int:
    return 12 * block + 5  # the largest ones fill the store


@dataclass(slots=True)
class Call:
    """A worker's question on its way: sent, then answered with the block or not, then received; or given up."""

    ask: Ask
    answered: bool = False
    given_up: bool = False


class Feeding(RuleBasedStateMachine):
    """Workers that ask, take, let go, lose patience and die, and readers that read or fail. What is on its way arrives
    in any order. The store is what is really in memory: whatever a worker holds or is about to get, the feeder holds,
    or a reader is putting there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(LIMIT)
        self.now_s = 0.0
        self.serial = 0
        self.asked: dict[int, tuple[float, int, float]] = {}  # due, order, when last asked: of what is not there yet
        self.order = 0
        self.reading: set[int] = set()
        self.sized: set[int] = set()
        self.items: dict[int, float] = {}  # what the feeder holds, and since when
        self.held: dict[int, set[int]] = {}
        self.calls: list[Call] = []
        self.served: set[int] = set()
        self.gone: set[int] = set()

    def _drop(self) -> None:
        for block in self.ledger.let_go(self.now_s):
            del self.items[block]  # a KeyError where it was let go twice
            assert block not in self._used(), "somebody holds it, and others may want it"

    def _used(self) -> set[int]:
        coming = {call.ask.block for call in self.calls if call.answered and not call.given_up}
        return coming.union(*self.held.values())

    @rule(worker=WORKERS, block=BLOCKS, due=st.floats(0, 50))
    def send(self, worker: int, block: int, due: float) -> None:
        if worker in self.gone:
            return
        self.serial += 1
        mine = [call.ask.serial for call in self.calls if call.ask.worker == worker and not call.given_up]
        held = frozenset(self.held.setdefault(worker, set()))
        settled = min([*mine, self.serial])
        self.calls.append(Call(Ask(worker, self.serial, settled, "", block, due, held, 0, 0.0)))

    @precondition(lambda self: any(not call.answered for call in self.calls))
    @rule(data=st.data())
    def serve(self, data: st.DataObject) -> None:
        call = data.draw(st.sampled_from([call for call in self.calls if not call.answered]))
        self._serve(call)

    def _serve(self, call: Call) -> None:
        ask = call.ask
        self.served.add(ask.worker)
        self.ledger.tell(ask)
        self._drop()
        look = self.ledger.ask(ask.block, ask.due, self.now_s)
        assert (look is Look.HERE) == (ask.block in self.items)
        if look is Look.HERE:
            self.ledger.take(ask)
            call.answered = True
        else:
            self.calls.remove(call)
        if look is Look.COMING and ask.block not in self.reading:
            before, order, _ = self.asked.get(ask.block, (ask.due, self.order, 0.0))
            self.order += ask.block not in self.asked
            self.asked[ask.block] = (min(before, ask.due), order, self.now_s)
        elif look is Look.FULL:
            self.asked.pop(ask.block, None)
            assert self.memory() + self.unmeasured() > 0, "an empty store has room"
        if call.given_up and call in self.calls:
            self.calls.remove(call)

    @precondition(lambda self: any(call.answered for call in self.calls))
    @rule(data=st.data())
    def receive(self, data: st.DataObject) -> None:
        call = data.draw(st.sampled_from([call for call in self.calls if call.answered]))
        self.receive_one(call)

    @precondition(lambda self: self.calls)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        call = data.draw(st.sampled_from(self.calls))
        call.given_up = True
        if call.answered:
            self.calls.remove(call)

    @rule(worker=WORKERS, block=BLOCKS)
    def all_at_once(self, worker: int, block: int) -> None:
        """A worker gets a block, as it goes when nothing comes between."""
        if worker in self.gone:
            return
        self.send(worker, block, 0.0)
        self._serve(self.calls[-1])
        while block not in self.items and self.asked and not self.reading:
            self.read_next()
            if not self.reading:
                return  # there is no room
            for one in list(self.reading):
                if self.ledger.sized(one, size_of(one)):
                    self.sized.add(one)
                    self._finish(one)
                else:
                    self.reading.discard(one)
        if block in self.items:
            self.send(worker, block, 0.0)
            call = self.calls[-1]
            self._serve(call)
            if call.answered:
                self.calls.remove(call)
                self.held[worker].add(block)

    @rule()
    def read_next(self) -> None:
        block = self.ledger.next(self.now_s)
        alive = {b: facts for b, facts in self.asked.items() if facts[2] >= self.now_s - WANT_S}
        self.asked = alive
        if block is None:
            return
        assert block in alive, "nobody waits for it any more"
        assert block not in self.reading, "two readers read it"
        assert block not in self.items, "it is here"
        assert alive[block][:2] == min(facts[:2] for facts in alive.values()), "another one is needed before"
        del self.asked[block]
        self.reading.add(block)

    @precondition(lambda self: self.reading - self.sized)
    @rule(data=st.data())
    def measure(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.reading - self.sized)))
        if self.ledger.sized(block, size_of(block)):
            self.sized.add(block)
        else:
            self.reading.discard(block)
            assert self.memory() + size_of(block) > LIMIT, "there was room"
            assert self.ledger.look(block) is Look.NONE

    @precondition(lambda self: self.reading)
    @rule(data=st.data(), fails=st.booleans())
    def finish(self, data: st.DataObject, fails: bool) -> None:
        block = data.draw(st.sampled_from(sorted(self.reading)))
        if fails or block not in self.sized:
            self.ledger.failed(block)
            self.reading.discard(block)
            self.sized.discard(block)
        else:
            self._finish(block)

    def _finish(self, block: int) -> None:
        self.ledger.done(block, self.now_s)
        self.items[block] = self.now_s
        self.reading.discard(block)
        self.sized.discard(block)

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        places = [(worker, block) for worker, held in self.held.items() for block in sorted(held)]
        worker, block = data.draw(st.sampled_from(places))
        self.held[worker].discard(block)

    @rule(worker=WORKERS)
    def die(self, worker: int) -> None:
        """What it has asked for may still arrive."""
        if len(self.gone) < 2:
            self.gone.add(worker)
            self.held.pop(worker, None)
            self.ledger.forget(worker)
            for call in [call for call in self.calls if call.ask.worker == worker]:
                call.given_up = True
                if call.answered:
                    self.calls.remove(call)
            self._drop()

    @rule(seconds=st.floats(0, 2 * KEEP_S))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self._drop()

    def memory(self) -> int:
        return sum(size_of(block) for block in {*self.items, *self.sized, *self._used()})

    def unmeasured(self) -> int:
        return len(self.reading - self.sized)

    @invariant()
    def the_store_never_holds_more_than_the_limit(self) -> None:
        assert self.memory() <= LIMIT
        assert self.memory() <= self.ledger.live_bytes <= LIMIT

    @rule()
    def everything_settles(self) -> None:
        """When all has arrived, and all workers have spoken, only what is held is kept."""
        for call in list(self.calls):
            if not call.answered:
                self._serve(call)
        for call in [call for call in self.calls if call.answered]:
            self.receive_one(call)
        for worker in sorted(self.served - self.gone):
            self.send(worker, 0, 100.0)
            call = self.calls.pop()
            self.ledger.tell(call.ask)
        self.now_s += KEEP_S
        self._drop()
        assert self.items.keys() == self._used(), "only what is held stays, and what is held stays"

    def receive_one(self, call: Call) -> None:
        self.calls.remove(call)
        self.held[call.ask.worker].add(call.ask.block)

    @invariant()
    def the_living_are_served(self) -> None:
        assert self.ledger.workers == len(self.served - self.gone)


Feeding.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestFeeding = Feeding.TestCase


def test_what_was_said_before_and_arrives_later_changes_nothing() -> None:
    ledger = Ledger(LIMIT)
    ledger.tell(Ask(0, 2, 2, "", 0, 0.0, frozenset(), 10, 0.0))
    ledger.tell(Ask(0, 1, 1, "", 0, 0.0, frozenset(), 50, 0.0))
    assert ledger.live_bytes == 10
    ledger.tell(Ask(0, 3, 3, "", 0, 0.0, frozenset(), 0, 0.0))
    assert ledger.live_bytes == 0


def test_what_answers_a_question_that_was_given_up_is_held_by_nobody() -> None:
    ledger = Ledger(LIMIT)
    ledger.tell(Ask(0, 5, 5, "", 1, 0.0, frozenset(), 0, 0.0))
    assert ledger.ask(1, 0.0, 0.0) is Look.COMING
    assert ledger.next(0.0) == 1
    assert ledger.sized(1, 17)
    ledger.done(1, 0.0)
    ledger.take(Ask(0, 4, 4, "", 1, 0.0, frozenset(), 0, 0.0))
    assert ledger.let_go(KEEP_S) == [1]


def read_one(ledger: Ledger, block: int, size: int, now_s: float) -> bool:
    """A worker asks for a block, which is read at once and let go when it has been kept; whether it has been here."""
    if ledger.ask(block, 0.0, now_s) is not Look.COMING or ledger.next(now_s) != block or not ledger.sized(block, size):
        return False
    ledger.done(block, now_s)
    assert ledger.let_go(now_s + KEEP_S) == [block]
    return True


def test_a_block_that_never_fits_does_not_keep_others_out() -> None:
    ledger = Ledger(LIMIT)
    assert not read_one(ledger, 0, LIMIT + 1, 0.0)
    assert read_one(ledger, 1, 10, 0.0)
    assert ledger.ask(0, 0.0, 0.0) is Look.FULL, "it is not read in vain again"
    assert read_one(ledger, 2, LIMIT, 0.0), "one that just fits does"


def test_a_single_large_block_is_not_remembered_for_ever() -> None:
    ledger = Ledger(LIMIT)
    assert read_one(ledger, 0, 90, 0.0)
    for block in range(1, 64):
        assert read_one(ledger, block, 10, 0.0)
    for worker, expected in enumerate((Look.FULL, Look.COMING)):
        ledger.tell(Ask(worker, 1, 1, "", 100, 0.0, frozenset(), 20, 0.0))  # 20 bytes are held of a feeder before
        assert ledger.ask(101, 0.0, 0.0) is expected, "with room for 80"
        ledger.forget(worker)
        assert expected is Look.COMING or read_one(ledger, 64, 10, 0.0)


@given(budget=st.integers(1, 1 << 40), workers=st.integers(0, 500))
def test_shares_keep_to_the_budget(budget: int, workers: int) -> None:
    assert share_bytes(budget, workers) >= 1
    assert workers > budget or share_bytes(budget, workers) * workers <= budget


@given(workers=st.integers(0, 500), cpus=st.integers(1, 256))
def test_as_many_readers_as_workers_but_for_processors(workers: int, cpus: int) -> None:
    assert readers_wanted(workers, cpus) == (min(max(workers, 1), cpus))


EVENTS = st.lists(
    st.tuples(st.sampled_from(["brought", "answered", "late", "lost", "ask", "new"]), st.floats(0, 8), st.booleans()),
    max_size=60,
)


@given(events=EVENTS)
def test_a_feeder_that_fails_is_left_alone_for_a_bounded_time_and_asked_again(
    events: list[tuple[str, float, bool]],
) -> None:
    reliance, number, now_s = Reliance(), 1, 0.0
    assert not reliance.may_ask(0, now_s, urgent=False), "there is none"
    reliance.may_ask(number, now_s, urgent=False)
    for kind, seconds, urgent in events:
        now_s += seconds
        if kind == "new":
            number += 1
            assert reliance.may_ask(number, now_s, urgent=urgent), "a new one is trusted at once"
            reliance.lost(number - 1, now_s)
            reliance.late(number - 1, now_s)
            assert reliance.may_ask(number, now_s, urgent=urgent), "what the one before it did says nothing of it"
        elif kind == "lost":
            reliance.lost(number, now_s)
            assert not reliance.may_ask(number, now_s, urgent=urgent), "it is left alone"
            assert not reliance.may_ask(number, now_s + FIRST_PAUSE_S / 2, urgent=True), "and for longer by who waits"
        elif kind == "brought":
            reliance.answered(number, 0.1)
            reliance.brought(number)
            assert reliance.may_ask(number, now_s, urgent=urgent), "all is well"
        elif kind == "answered":
            reliance.answered(number, seconds)
        elif kind == "late":
            reliance.late(number, now_s)
        assert not reliance.may_ask(number - 1, now_s, urgent=False), "an old one is over"
        assert reliance.may_ask(number, now_s + LONGEST_PAUSE_S, urgent=False), "it is always asked again"
        assert 0 < reliance.patience_s(urgent=True) <= reliance.patience_s(urgent=False) <= 120


def test_pauses_double_and_end_with_the_first_block() -> None:
    reliance, now_s, pauses = Reliance(), 0.0, []
    assert reliance.may_ask(1, now_s, urgent=True)
    for _ in range(8):
        reliance.lost(1, now_s)
        reliance.lost(1, now_s)  # two threads had asked
        begun_s = now_s
        while not reliance.may_ask(1, now_s, urgent=False):
            now_s += 0.25
        pauses.append(now_s - begun_s)
        assert not reliance.may_ask(1, now_s, urgent=True), "nobody who waits tries it out"
    assert pauses == [0.5, 1, 2, 4, 8, 15, 15, 15]
    reliance.answered(1, 0.2)
    assert reliance.may_ask(1, now_s, urgent=True), "it has answered"
    reliance.brought(1)
    reliance.lost(1, now_s)
    assert reliance.may_ask(1, now_s + FIRST_PAUSE_S, urgent=False), "from the beginning"


def test_a_feeder_that_is_late_three_times_in_a_row_is_left_alone() -> None:
    reliance = Reliance()
    assert reliance.may_ask(1, 0.0, urgent=True)
    reliance.late(1, 0.0)
    reliance.late(1, 0.0)
    reliance.brought(1)
    reliance.late(1, 0.0)
    reliance.late(1, 0.0)
    assert reliance.may_ask(1, 0.0, urgent=True), "twice in a row is not thrice"
    reliance.late(1, 0.0)
    assert not reliance.may_ask(1, 0.0, urgent=False)
    assert reliance.may_ask(1, FIRST_PAUSE_S, urgent=True), "it lives: whoever waits may ask it again"


def test_patience_grows_with_what_reading_takes() -> None:
    reliance = Reliance()
    reliance.may_ask(1, 0.0, urgent=False)
    assert (reliance.patience_s(urgent=True), reliance.patience_s(urgent=False)) == (0.5, 2.0)
    reliance.answered(1, 3.0)
    assert (reliance.patience_s(urgent=True), reliance.patience_s(urgent=False)) == (6.0, 12.0)
    reliance.answered(1, 0.0)
    assert reliance.patience_s(urgent=True) == 6.0, "a feeder that has read nothing yet says nothing"
    reliance.answered(1, 1000.0)
    assert (reliance.patience_s(urgent=True), reliance.patience_s(urgent=False)) == (10.0, 120.0)
