"""The vote: everything that apply consumes beyond the reduced gradient, gathered from all workers.

A payload has a fixed size that follows from the layout, so one small all-gather carries it. The result is the payloads
in rank order, byte for byte: a survivor that rolls forward applies exactly the bytes that another one applied (R1), and
what they mean is computed from them by the same pure function everywhere (`tally`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from elastictrain.engine.verdict import Claims
from elastictrain.errors import InternalError
from elastictrain.layout import Layout
from elastictrain.redundancy import Lanes, taken_over
from elastictrain.stragglers.signals import RECORD_BYTES
from elastictrain.tree import Node, finish, roots, whole

FLAG_PAUSE = 1
FLAG_STORE = 2
FLAG_DUE = 4
"""By its budget of time, this commit is to be stored (see `pacing`)."""
FLAG_STORING = 8
"""This worker still writes its share of a checkpoint."""
FLAG_COMMITTED = 16
"""The checkpoint whose shares have travelled last is committed (only whoever publishes says so)."""
_HEADER = 7  # generation, step, flags, plan, counter hash, tokens, hash of the samples
_PACE = 2  # where lanes are shared: seconds of a lane, lanes in vain; then the lanes' numbers, from 1


@dataclass(frozen=True, slots=True)
class Ballot:
    """One worker's part. `lanes`: (loss sum, weight) of each of its lanes, ascending; `norms`: sums of squares (fp64)
    of the reduced gradient over its roots of the block tree; `counter_hash`: of its integer buffers after this step;
    `plan`: the mark of the newest split of the lanes that it has been offered (`offers`); `signal`: how its step went
    (`stragglers.signals`), where the format has room; `claims`: sums of its state and of its reduced gradients, where
    the format has room for them; `samples_hash`: of the sample ids of its lanes, unsigned 64 bits, of which all
    workers' sum modulo 2**64 is the step's. Where lanes are shared: `numbers`: which lanes they are; `lane_s`: seconds
    of one of those that it has computed; `in_vain`: lanes that it had begun and that others were done with first;
    `dropped`: its own that count for nobody.
    """

    generation: int
    step: int
    flags: int
    plan: int
    counter_hash: int
    tokens: int
    lanes: tuple[tuple[float, float], ...]
    norms: tuple[float, ...]
    largest: tuple[int, ...] = ()
    claims: Claims | None = None
    samples_hash: int = 0
    signal: bytes = b""
    numbers: tuple[int, ...] = ()
    lane_s: float = 0.0
    in_vain: int = 0
    dropped: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Shares:
    """Who has computed what in a step whose lanes are shared, by rank: `lanes`, where `dealt` is how they were dealt
    out; `lane_s`, `in_vain`: see `Ballot`. `workers`: their numbers. `dropped`: lanes that nobody has, ascending; None
    where that cannot be.
    """

    workers: tuple[int, ...]
    dealt: Lanes
    lanes: Lanes
    lane_s: tuple[float, ...]
    in_vain: tuple[int, ...]
    dropped: tuple[int, ...] | None = None

    def row(self) -> dict[str, Any]:
        """What a metrics row says: which lanes were dropped; or how many were taken over, from whom (worker: lanes) and
        by whom, and how many were begun in vain.
        """
        if self.dropped is not None:
            return {"lanes_dropped": list(self.dropped)}
        taken = taken_over(self.dealt, self.lanes)
        losers, takers = (Counter(self.workers[one[i]] for one in taken) for i in (1, 2))
        said = {"lanes": len(taken), "from": dict(losers), "by": dict(takers), "in_vain": sum(self.in_vain)}
        return {"taken_over": said}


@dataclass(frozen=True, slots=True)
class Tally:
    """What a complete vote says. Losses and weights in lane order; `norm` is of the weighted-sum gradient (not yet
    divided by the weight); `flags` is the union, `plan` the mark that all have named, None if they named several;
    `samples_hash` is of the step's sample ids, whoever had which lane; `shares` where lanes are shared.
    """

    step: int
    flags: int
    plan: int | None
    losses: tuple[float, ...]
    weights: tuple[float, ...]
    norm: float
    tokens: int
    counters_agree: bool
    largest: tuple[int, ...]
    samples_hash: int = 0
    shares: Shares | None = None

    @property
    def weight(self) -> float:
        return math.fsum(self.weights)

    @property
    def lanes(self) -> int:
        """How many count."""
        return len(self.losses) - len(self.shares.dropped or () if self.shares is not None else ())

    @property
    def loss(self) -> float:
        """Mean loss of the step; NaN when it is not finite anywhere."""
        if self.bad_lanes or self.weight == 0:
            return math.nan
        return math.fsum(self.losses) / self.weight

    @property
    def bad_lanes(self) -> tuple[int, ...]:
        pairs = zip(self.losses, self.weights, strict=True)
        return tuple(lane for lane, pair in enumerate(pairs) if not all(map(math.isfinite, pair)))

    @property
    def is_finite(self) -> bool:
        return not self.bad_lanes and math.isfinite(self.norm) and self.weight > 0


def norm_roots(layout: Layout, worker: int, active_blocks: int) -> tuple[Node, ...]:
    """The nodes of the block tree whose sums of squares this worker sends."""
    owned = [b for s in layout.owned(worker) for b in range(s.lo, min(s.hi, active_blocks))]
    return roots(owned, active_blocks)


class VoteFormat:
    """Sizes and places of a payload under one layout: whole numbers, floats, with `signals` a record of the step, and
    with `claims` sums of the state (one for all that the forward reads, two for each held shard). `largest` is the
    number of "max" integer elements. `shared`: so many lanes one worker may have in a step, and each ballot says which
    they are; None: those of the layout. `drops`: and which of its own were dropped.
    """

    def __init__(
        self, layout: Layout, active_blocks: int, largest: int, *, claims: bool = False, signals: bool = False,
        shared: int | None = None, drops: bool = False,
    ) -> None:  # fmt: skip
        self.layout, self.active_blocks, self.largest = layout, active_blocks, largest
        self.shared, self.drops = shared, drops
        self.max_lanes = max(len(lanes) for lanes in layout.lanes) if shared is None else shared
        self.roots = [norm_roots(layout, worker, active_blocks) for worker in layout.workers]
        self.max_roots = max((len(r) for r in self.roots), default=0)
        self._floats = 2 * self.max_lanes + self.max_roots + (0 if shared is None else _PACE + shared)
        held = layout.by_holder() if claims else {}
        self._shards = [[s.lo for s in held.get(worker, ())] for worker in layout.workers] if claims else []
        self._sums = 3 + 2 * max(map(len, self._shards)) if claims else 0
        self._signal_bytes = RECORD_BYTES if signals else 0
        self.size = 8 * (_HEADER + largest + self._floats + self._sums) + self._signal_bytes

    def encode(self, ballot: Ballot) -> bytes:
        whole_numbers = np.zeros(_HEADER + self.largest, dtype=np.int64)
        whole_numbers[:_HEADER] = (
            ballot.generation,
            ballot.step,
            ballot.flags,
            ballot.plan,
            ballot.counter_hash,
            ballot.tokens,
            _signed(ballot.samples_hash),
        )
        whole_numbers[_HEADER:] = ballot.largest
        floats = np.zeros(self._floats, dtype=np.float64)
        flat = [number for pair in ballot.lanes for number in pair]
        floats[: len(flat)] = flat
        floats[2 * self.max_lanes : 2 * self.max_lanes + len(ballot.norms)] = ballot.norms
        if self.shared is not None:
            at = 2 * self.max_lanes + self.max_roots
            said = (ballot.lane_s, ballot.in_vain, *(lane + 1 for lane in ballot.numbers))
            said += tuple(-lane - 1 for lane in ballot.dropped)
            floats[at : at + len(said)] = said
        signal = ballot.signal[: self._signal_bytes].ljust(self._signal_bytes, b"\0")
        return whole_numbers.tobytes() + floats.tobytes() + signal + self._encode_claims(ballot.claims)

    def signals(self, result: bytes) -> bytes:
        """The records in a vote result, in rank order; empty when the format has none."""
        ends = [(rank + 1) * self.size - 8 * self._sums for rank in range(self.layout.world_size)]
        return b"".join(result[end - self._signal_bytes : end] for end in ends)

    def _encode_claims(self, claims: Claims | None) -> bytes:
        sums = np.zeros(self._sums, dtype=np.uint64)
        if self._sums and claims is not None:
            shards = sorted(claims.state)
            found = [int(claims.sound), claims.published, claims.lane]
            found += [claims.state[lo] for lo in shards] + [claims.reduced.get(lo, 0) for lo in shards]
            sums[: len(found)] = found
        return sums.tobytes()

    def claims(self, result: bytes) -> dict[int, Claims]:
        """The sums in a vote result, by worker; empty when the format has none."""
        found = {}
        for rank, shards in enumerate(self._shards):
            end = (rank + 1) * self.size
            sound, published, lane, *sums = np.frombuffer(result[end - 8 * self._sums : end], dtype=np.uint64).tolist()
            state = dict(zip(shards, sums, strict=False))
            reduced = dict(zip(shards, sums[len(shards) :], strict=False))
            found[self.layout.workers[rank]] = Claims(bool(sound), published, state, reduced, lane)
        return found

    def tally(self, result: bytes) -> Tally:
        """Read a vote result.

        Raises InternalError when the parts disagree on generation or step: they were never one vote.
        """
        losses, weights = [0.0] * self.layout.lane_count, [0.0] * self.layout.lane_count
        norms: dict[Node, float] = {}
        heads, shares = [], self.shares(result)
        for rank in range(self.layout.world_size):
            raw = result[rank * self.size : (rank + 1) * self.size]
            numbers = np.frombuffer(raw, dtype=np.int64, count=_HEADER + self.largest)
            floats = np.frombuffer(raw, dtype=np.float64, count=self._floats, offset=8 * len(numbers))
            heads.append(numbers)
            for i, lane in enumerate((self.layout if shares is None else shares).lanes[rank]):
                losses[lane], weights[lane] = float(floats[2 * i]), float(floats[2 * i + 1])
            for i, node in enumerate(self.roots[rank]):
                norms[node] = float(floats[2 * self.max_lanes + i])
        if len({(int(h[0]), int(h[1])) for h in heads}) != 1:
            raise InternalError(f"a vote mixes (generation, step) {[(int(h[0]), int(h[1])) for h in heads]}")
        squares = finish(norms, lambda a, b: a + b, whole(self.active_blocks))
        return Tally(
            step=int(heads[0][1]),
            flags=int(np.bitwise_or.reduce([int(h[2]) for h in heads])),
            plan=int(heads[0][3]) if len({int(h[3]) for h in heads}) == 1 else None,
            losses=tuple(losses),
            weights=tuple(weights),
            norm=math.sqrt(squares) if squares >= 0 else math.nan,
            tokens=sum(int(h[5]) for h in heads),
            counters_agree=len({int(h[4]) for h in heads}) == 1,
            largest=tuple(int(n) for n in np.max([h[_HEADER:] for h in heads], axis=0)) if self.largest else (),
            samples_hash=sum(int(h[6]) for h in heads) % (1 << 64),
            shares=shares,
        )

    def shares(self, result: bytes) -> Shares | None:
        """Who has which lane, as a vote result says; None where that is a matter of the layout.

        Raises InternalError when a lane is missing or there twice, or dropped although it must not be.
        """
        if self.shared is None:
            return None
        start, count = 8 * (_HEADER + self.largest + 2 * self.max_lanes + self.max_roots), _PACE + self.shared
        said = [
            np.frombuffer(result, dtype=np.float64, count=count, offset=rank * self.size + start).tolist()
            for rank in range(self.layout.world_size)
        ]
        lanes = tuple(tuple(int(number) - 1 for number in one[_PACE:] if number > 0) for one in said)
        dropped = tuple(sorted(int(-number) - 1 for one in said for number in one[_PACE:] if number < 0))
        if sorted([*dropped, *(lane for own in lanes for lane in own)]) != list(range(self.layout.lane_count)):
            raise InternalError(
                f"a vote has lanes {lanes} and without {dropped}, which is not each of {self.layout.lane_count} once"
            )
        if dropped and not self.drops:
            raise InternalError(f"a vote is without lanes {dropped}, and the job drops none")
        lane_s, in_vain = tuple(one[0] for one in said), tuple(int(one[1]) for one in said)
        without = dropped if self.drops else None
        return Shares(self.layout.workers, self.layout.lanes, lanes, lane_s, in_vain, without)


def _signed(value: int) -> int:
    """The number of the same 64 bits with a sign: whole numbers of a payload have one."""
    return value - (1 << 64) if value >= 1 << 63 else value


def root_sums(nodes: Sequence[Node], squares: Mapping[int, float]) -> tuple[float, ...]:
    """Sums of squares over `nodes` of the block tree, from those of single blocks, in the tree's order."""
    leaves = {Node(block, block + 1): value for block, value in squares.items()}
    return tuple(finish(leaves, lambda a, b: a + b, node) for node in nodes)


def gradient_scale(tally: Tally, clip_grad_norm: float | None) -> float:
    """The one factor from the reduced gradient (sum over lanes of loss-sum gradients) to what the optimizer sees:
    1 / total weight, times the clip factor (global norm; Pascanu et al. 2013, as torch.nn.utils.clip_grad_norm_).
    """
    scale = 1.0 / tally.weight
    if clip_grad_norm is not None:
        scale *= min(1.0, clip_grad_norm / (tally.norm / tally.weight + 1e-6))
    return scale
