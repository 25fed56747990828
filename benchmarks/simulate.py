"""A day of a large virtual cluster with seeded faults, under the real controller: events, seconds, goodput.

Every size is simulated once; the time is that of one process on one core, the figures of the day are the same on any
machine.
"""

from __future__ import annotations

import time

import common
from elastictrain.sim import FaultRates, Scenario, simulate

SEED = 9
TARGET_S = 60.0


def main() -> None:
    options = common.arguments(
        __doc__,
        lambda parser: (
            parser.add_argument("--workers", type=int, nargs="+", default=None),
            parser.add_argument("--hours", type=float, default=24.0),
            parser.add_argument("--seed", type=int, default=SEED),
        ),
    )
    results = common.Results("simulate", "A day of a virtual cluster under the real controller", options)
    hours = min(options.hours, 2.0) if options.quick else options.hours
    for workers in options.workers or [64, 1_000, 10_000]:
        scenario = Scenario(workers=workers, hours=hours, seed=options.seed, rates=FaultRates())
        begun_s, used_s = time.perf_counter(), time.process_time()
        report = simulate(scenario)
        wall_s, used_s = time.perf_counter() - begun_s, time.process_time() - used_s
        results.raw[f"{workers} workers"] = report.as_dict() | {"wall_s": wall_s, "processor_s": used_s}
        recovered = report.recoveries
        results.row(
            **{
                "workers": workers,
                "hours": report.hours,
                "wall s": wall_s,
                "processor s": used_s,
                "events": report.events,
                "µs / event": 1e6 * used_s / report.events,
                "faults": sum(report.faults.values()),
                "steps": report.steps,
                "lost or twice": report.steps_lost + report.steps_twice,
                "goodput": report.goodput,
                "recovery p50 s": recovered.p50_s if recovered else "none",
                "recovery p95 s": recovered.p95_s if recovered else "none",
                "redone": report.steps_redone,
                "went back": report.went_back,
                "checks": report.checks,
            }
        )
        if workers == 10_000 and not options.quick:
            reached = common.verdict(wall_s, TARGET_S, at_most=True)
            results.figure(f"10,000 workers, {hours:g} h, wall s", wall_s, f"{TARGET_S:g} or less", reached)
            reached = common.verdict(used_s, TARGET_S, at_most=True)
            results.figure(f"10,000 workers, {hours:g} h, processor s", used_s, f"{TARGET_S:g} or less", reached)
            results.figure("10,000 workers, events handled", report.events, "printed", "printed")
        lost = report.steps_lost + report.steps_twice
        results.figure(
            f"steps lost or committed twice, {workers:,} virtual workers",
            lost,
            "0",
            common.verdict(lost, 0, at_most=True),
        )
    results.notes += [
        f"Seed {options.seed}; rates of faults and costs are the defaults of `elastictrain simulate`: a bad cluster.",
        "A recovery lasts from the fault, not from its detection, to the seal of the next generation.",
        "Detection, start-up, forming and storage take what the scenario says; measured is the controller alone.",
    ]
    results.write()


if __name__ == "__main__":
    main()
