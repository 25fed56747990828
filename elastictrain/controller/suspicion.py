"""Who is frozen, and who only waits for one that is. Pure: reports come in, verdicts go out, time is an argument.

The deadline is measured, never set: `max(2 s, 3 x the median of the last steps)`. Four rules keep it from naming the
wrong one.

- **Only own work counts.** In an exchange, a vote, a gather everybody waits for everybody: whoever stands still there
  is never named while another member of the generation works, stands still in work of its own, or cannot be seen. When
  all members wait for longer than the deadline, the *collective* hangs: form again; if that happens twice in a row, the
  member that was most often furthest behind is named.
- **Starvation is not freezing.** What counts is time in which the worker could have run: the time for which it was
  ready and got no processor is taken off, and so is the time by which the node's agent was late itself. A process that
  spins uses processor time and is found by it; one that sleeps is found by the clock; one that is kept waiting is not
  found at all, until it has had the time that it needs.
- **What was never measured has an allowance**: the first step of a process and compilers 600 s; evaluation, storing,
  forming and remote data ten times the longest seen, at least 60 s.
- **A shared cause is nobody's fault**: when all members stand still reading data or storing, storage is reported and
  nobody is killed, for their successors would stand there too.

A stopped process (SIGSTOP) needs no deadline: it is named after half a second. In debug mode nobody is named who lives.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from statistics import median

from elastictrain.controller.track import Track
from elastictrain.signs import Activity, NodeReport, WorkerSign


class Kind(StrEnum):
    """GONE: the process is no more. STOPPED: by a signal. DEADLOCKED: sleeps in work of its own. LIVELOCKED: runs and
    gets nowhere. HUNG_COLLECTIVE: all members wait for each other. STORAGE: all members wait for storage.
    """

    GONE = "gone"
    STOPPED = "stopped"
    DEADLOCKED = "deadlocked"
    LIVELOCKED = "livelocked"
    HUNG_COLLECTIVE = "hung_collective"
    STORAGE = "storage"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`worker` is to be killed and replaced (GONE: it is gone already). HUNG_COLLECTIVE: park `generation` and form
    again; with a worker, without that one. STORAGE, without a worker: tell people, do nothing. `reason` says it in a
    sentence, `evidence` in numbers, a line per worker. `last_seen_s`: the last progress, on the controller's clock.
    """

    kind: Kind
    generation: int
    worker: int | None
    reason: str
    evidence: tuple[str, ...] = ()
    last_seen_s: float | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """`margin_s` is taken off the deadline, so that the promise holds for the verdict and not for its last beat: a beat
    of the agent and a turn of the controller. `loaded`: how much longer a worker may take that has been held up for a
    fifth of the time: what it had of the processor came in pieces, with cold caches.
    """

    floor_s: float = 2.0
    steps: float = 3.0
    margin_s: float = 0.3
    loaded: float = 1.5
    stopped_s: float = 0.4
    first_step_s: float = 600.0
    long_floor_s: float = 60.0
    long_factor: float = 10.0
    fresh_s: float = 1.0
    window_steps: int = 64


_LONG = frozenset({Activity.MEET, Activity.FORM, Activity.EVALUATE, Activity.STORE})
_STORAGE = frozenset({Activity.DATA, Activity.STORE})


class Suspicion:
    """Watches all workers of a run. `remote_data`: batches come over the network, so reading has an allowance."""

    def __init__(self, *, debug: bool = False, remote_data: bool = False, limits: Limits | None = None) -> None:
        self.debug, self.limits = debug, limits or Limits()
        self._long = _LONG | {Activity.DATA} if remote_data else _LONG
        self._tracks: dict[int, Track] = {}
        self._over: set[int] = set()
        self._steps: deque[tuple[float, int]] = deque(maxlen=self.limits.window_steps)
        self._longest_s: dict[Activity, float] = {}
        self.generation, self._members, self._expected_s, self._world = 0, frozenset[int](), 0.0, 1
        self._hangs, self._hung_step, self._said_hung, self._said_storage = 0, -1, False, False
        self._behind: Counter[int] = Counter()

    # --- what is known ---

    def expect(self, generation: int, members: Iterable[int], now_s: float) -> None:
        """`generation` is formed now: these workers step together, and wait for each other. Without members: it is
        being parked, and waiting in it is over. What was measured stays.
        """
        self.generation, self._members, self._expected_s = generation, frozenset(members), now_s
        self._world = len(self._members) or self._world
        self._said_hung = self._said_storage = False

    def forget(self, worker: int) -> None:
        """The worker is dead, or lost with its node: whatever is still said of it does not matter. Numbers of workers
        are never used again.
        """
        self._over.add(worker)
        self._tracks.pop(worker, None)
        if worker in self._members:  # the others will wait in vain, which is nobody's fault
            self._members = frozenset()

    def identity(self, worker: int) -> tuple[str, int, int] | None:
        """(node, pid, start ticks) of a worker, for the order to kill it; None when it was never seen."""
        track = self._tracks.get(worker)
        return None if track is None else (track.node, track.sign.pid, track.sign.start_ticks)

    def workers_on(self, node: str) -> tuple[int, ...]:
        """The workers that were last seen on a node, ascending."""
        return tuple(worker for worker, track in sorted(self._tracks.items()) if track.node == node)

    def observe(self, report: NodeReport, now_s: float) -> None:
        """Take in one beat of a node agent, newest only. `now_s`: the controller's clock."""
        for sign in report.workers:
            if sign.worker in self._over:
                continue
            before = self._tracks.get(sign.worker)
            if before is None or before.sign.identity != sign.identity:
                self._tracks[sign.worker] = Track.first(sign, report, now_s)
                self._count_step(0, sign)  # a new controller finds workers that have long been stepping
            else:
                self._measure(before.sign, sign, before.advance(sign, report, now_s))

    def _count_step(self, done_before: int, sign: WorkerSign) -> None:
        if sign.steps_done > done_before and sign.step_s > 0:
            self._steps.append((sign.step_s, self._world))

    def _measure(self, before: WorkerSign, sign: WorkerSign, passed_s: float) -> None:
        self._count_step(before.steps_done, sign)
        ended = sign.activity != before.activity or sign.in_activity_s < before.in_activity_s
        if ended and before.activity in self._long:
            took_s = before.in_activity_s + passed_s
            self._longest_s[before.activity] = max(self._longest_s.get(before.activity, 0.0), took_s)

    # --- deadlines ---

    def step_s(self) -> float | None:
        """The median of the last steps, for the present number of members: a step that four workers shared takes one
        of them four times as long. None before the first.
        """
        return median(step_s * max(1.0, by / self._world) for step_s, by in self._steps) if self._steps else None

    def deadline_s(self) -> float:
        """For a step: what is promised to users."""
        step_s = self.step_s()
        limits = self.limits
        return limits.first_step_s if step_s is None else max(limits.floor_s, limits.steps * step_s)

    def _allowed_s(self, track: Track) -> float:
        """How long `still_s` may grow."""
        limits, sign = self.limits, track.sign
        if sign.activity in (Activity.STARTING, Activity.COMPILE) or sign.steps_done < 1:
            return limits.first_step_s
        allowed_s = self.deadline_s()
        if sign.activity in self._long:
            longest_s = self._longest_s.get(sign.activity, 0.0)
            allowed_s = max(allowed_s, limits.long_floor_s, limits.long_factor * longest_s)
        if track.held_up_s > 0.2 * (track.still_s + track.held_up_s):
            allowed_s *= limits.loaded
        return allowed_s - limits.margin_s

    # --- verdicts ---

    def verdicts(self, now_s: float) -> list[Verdict]:
        """What is new since the last call. A worker is named once, and again only after it has made progress."""
        found = [self._gone(track) for _, track in sorted(self._tracks.items()) if track.sign.is_gone]
        for verdict in found:
            assert verdict.worker is not None
            self.forget(verdict.worker)
        if self.debug:
            return found
        still = [track for _, track in sorted(self._tracks.items()) if self._stands_still(track, now_s)]
        if self._storage_hangs(still, now_s):
            return found + self._say_storage(still)
        for track in still:
            if not track.named:
                track.named = True
                found.append(self._name(track))
        return found + self._collective(now_s)

    def _gone(self, track: Track) -> Verdict:
        sign = track.sign
        reason = f"worker {sign.worker}: its process {sign.pid} is gone, says the agent of its node"
        return self._verdict(Kind.GONE, reason, track)

    def _stands_still(self, track: Track, now_s: float) -> bool:
        if track.stopped_s >= self.limits.stopped_s:
            return True
        if track.sign.is_stopped or track.still_s <= self._allowed_s(track):
            return False
        return not track.is_waiting or self._does_not_come(track, now_s)

    def _does_not_come(self, track: Track, now_s: float) -> bool:
        """A member of the new generation that still waits in an old one: nobody is left there to wait for. One that is
        idle has perhaps not been told yet.
        """
        sign = track.sign
        is_behind = sign.worker in self._members and sign.generation < self.generation
        return is_behind and sign.activity is not Activity.IDLE and now_s - self._expected_s > self.deadline_s()

    def _name(self, track: Track) -> Verdict:
        sign, still_s = track.sign, track.still_s
        where = f"in {sign.activity.name.lower()} of step {sign.step}"
        if track.stopped_s >= self.limits.stopped_s:
            by = "held by a debugger" if sign.state == "t" else "stopped by a signal"
            kind, what = Kind.STOPPED, f"its process has been {by} for {track.stopped_s:.1f} s"
        elif track.used_s >= 0.5 * still_s:
            kind = Kind.LIVELOCKED
            what = f"has used {track.used_s:.1f} s of processor time without progress"
        else:
            kind = Kind.DEADLOCKED
            what = f"has slept for {still_s:.1f} s without progress, using {track.used_s:.1f} s of processor time"
        allowed = "" if kind is Kind.STOPPED else f"; allowed: {self._allowed_s(track) + self.limits.margin_s:.1f} s"
        reason = f"worker {sign.worker} {where}: {what}{allowed}"
        return self._verdict(kind, reason, track)

    def _verdict(self, kind: Kind, reason: str, track: Track) -> Verdict:
        last_seen_s = track.seen_s - max(track.sign.age_s, track.stopped_s)
        return Verdict(kind, track.sign.generation, track.sign.worker, reason, self._evidence([track]), last_seen_s)

    def _evidence(self, tracks: list[Track]) -> tuple[str, ...]:
        step_s = self.step_s()
        measured = "no step measured yet" if step_s is None else f"median step {step_s:.3f} s"
        return (*(track.in_words() for track in tracks), f"{measured}, deadline {self.deadline_s():.1f} s")

    # --- the whole generation ---

    def _in_view(self, now_s: float) -> list[Track]:
        """The members' tracks if every member is in sight and has entered the generation, else none."""
        tracks = [self._tracks.get(worker) for worker in sorted(self._members)]
        seen = [
            track
            for track in tracks
            if track is not None
            and track.sign.generation == self.generation
            and track.sign.count >= 0
            and now_s - track.seen_s <= self.limits.fresh_s
        ]
        return seen if len(seen) == len(tracks) else []

    def _storage_hangs(self, still: list[Track], now_s: float) -> bool:
        """Two at once are no coincidence. All others wait for them; none of them uses the processor."""
        stuck = {
            track.sign.worker
            for track in still
            if track.sign.activity in _STORAGE and track.stopped_s == 0 and track.used_s < 0.5 * track.still_s
        }
        members = self._in_view(now_s)
        explained = all(track.is_waiting or track.sign.worker in stuck for track in members)
        return len(members) >= 2 <= len(stuck) == len(still) and explained

    def _say_storage(self, still: list[Track]) -> list[Verdict]:
        if self._said_storage:
            return []
        self._said_storage = True
        what = " and ".join(sorted({t.sign.activity.name.lower() for t in still}))
        reason = (
            f"{len(still)} workers at once stand still in {what}, for {min(t.still_s for t in still):.1f} s, and all "
            "others wait for them: their storage does not answer; nobody is killed for it"
        )
        return [Verdict(Kind.STORAGE, self.generation, None, reason, self._evidence(still))]

    def _collective(self, now_s: float) -> list[Verdict]:
        members = self._in_view(now_s)
        if not members:
            return []
        step = max(track.sign.step for track in members)
        if step > self._hung_step and self._hangs:
            self._hangs, self._behind = 0, Counter()
        if self._said_hung:
            return []
        if all(track.sign.activity is Activity.IDLE for track in members):
            return []  # between two generations, or at the end
        # One that stands still in its own work has been named by now: the others wait for that one.
        if any(track.named or track.sign.is_stopped for track in members):
            return []
        patience = 2 ** min(self._hangs, 3)
        if not all(track.still_s > self._allowed_s(track) * patience for track in members):
            return []
        self._said_hung, self._hung_step = True, step
        self._hangs += 1
        return [self._say_hung(members)]

    def _worst(self) -> int | None:
        """The member that was behind more often than any other."""
        ranked = self._behind.most_common(2)
        if not ranked or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]):
            return None
        return ranked[0][0]

    def _say_hung(self, members: list[Track]) -> Verdict:
        place = {track.sign.worker: (track.sign.step, track.sign.activity) for track in members}
        last = min(place.values())
        behind = [worker for worker, at in place.items() if at == last]
        if len(behind) < len(place):
            self._behind.update(behind)
        worker = None
        if self._hangs >= 2:
            worker = self._worst()
        still_s = min(track.still_s for track in members)
        places = ", ".join(f"{w} in {at[1].name.lower()} of step {at[0]}" for w, at in place.items())
        reason = f"all members of generation {self.generation} wait for each other since {still_s:.1f} s: {places}"
        if worker is not None:
            reason += f"; for the {self._hangs}. time in a row, and worker {worker} was most often behind"
        last_seen_s = max(track.seen_s - track.sign.age_s for track in members)
        return Verdict(
            Kind.HUNG_COLLECTIVE, self.generation, worker, reason, self._evidence(members), last_seen_s=last_seen_s
        )
