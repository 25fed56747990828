"""What mirrors and the vote cost: step time with mirrors on against off, and the vote's share of a step."""

from __future__ import annotations

from functools import partial

import common
from runs import Running, Turns, gpt_job, side_by_side


def shares(turns: Turns, name: str) -> dict[str, float]:
    """Median share of every phase in a step, percent."""
    phases = sorted({phase for step in turns.steps[name] for phase in step.phases if phase != "step_s"})
    return {
        f"{phase.removesuffix('_s')} %": 100
        * common.median(step.phases.get(phase, 0.0) / step.seconds for step in turns.steps[name])
        for phase in phases
    }


def main() -> None:
    options = common.arguments(
        __doc__,
        lambda parser: (
            parser.add_argument("--workers", type=int, default=4),
            parser.add_argument("--lanes", type=int, default=4, help="per worker"),
            parser.add_argument("--rounds", type=int, default=None),
        ),
    )
    common.prepare_data()
    results = common.Results("mirrors", "What mirrors and the vote cost", options)
    with common.scratch("mirrors") as folder:

        def start(name: str, mirrors: bool) -> Running:
            where, lanes = folder / name, options.workers * options.lanes
            return Running.elastictrain(where, gpt_job(where, workers=options.workers, lanes=lanes, mirrors=mirrors))

        runs = {"mirrors on": partial(start, "on", True), "mirrors off": partial(start, "off", False)}
        turns = side_by_side(runs, rounds=options.rounds or (5 if options.quick else 40), turn_s=1.0)
    for name in runs:
        results.row(
            **{
                "workers": options.workers,
                "lanes per worker": options.lanes,
                "run": name,
                "ms per step": 1000 * turns.step_s(name),
                "over rounds": turns.spread(name),
                "cpu ms per step": 1000 * turns.cpu_s(name),
                **shares(turns, name),
            }
        )
    cost = 100 * (1 / turns.speed("mirrors on", "mirrors off") - 1)
    busy = 100 * (turns.cpu_s("mirrors on") / turns.cpu_s("mirrors off") - 1)
    vote = shares(turns, "mirrors on")["vote %"]
    note = "the vote phase includes the wait for the slowest worker, as any collective does"
    results.figure(
        "cost of mirrors, % of a step", cost, "with the vote 3 or less", common.verdict(cost, 3, at_most=True)
    )
    results.figure("cost of mirrors, % of processor time", busy, "none", "beside it")
    results.figure("share of the vote, % of a step", vote, "with the mirrors 3 or less", note)
    results.raw = {name: turns.rounds[name] for name in runs}
    results.notes.append("GPT of examples/gpt (2.8 million parameters), 2 sequences of 128 bytes per lane.")
    results.write()


if __name__ == "__main__":
    main()
