"""What mirrors and the vote cost: step time with mirrors on against off, and the vote's share of a step."""

from __future__ import annotations

from functools import partial

import common
import phases
from runs import Running, gpt_job, side_by_side


def main() -> None:
    options = phases.options_of(__doc__)
    common.prepare_data()
    results = common.Results("mirrors", "What mirrors and the vote cost", options)
    with common.scratch("mirrors") as folder:

        def start(name: str, mirrors: bool) -> Running:
            where, lanes = folder / name, options.workers * options.lanes
            return Running.elastictrain(where, gpt_job(where, workers=options.workers, lanes=lanes, mirrors=mirrors))

        runs = {"mirrors on": partial(start, "on", True), "mirrors off": partial(start, "off", False)}
        turns = side_by_side(runs, rounds=phases.rounds_of(options), turn_s=1.0)
    phases.rows(results, options, turns, runs)
    cost = 100 * (1 / turns.speed("mirrors on", "mirrors off") - 1)
    busy = 100 * (turns.cpu_s("mirrors on") / turns.cpu_s("mirrors off") - 1)
    vote = phases.shares(turns, "mirrors on")["vote %"]
    note = "the vote phase includes the wait for the slowest worker, as any collective does"
    results.figure(
        "cost of mirrors, % of a step", cost, "with the vote 3 or less", common.verdict(cost, 3, at_most=True)
    )
    results.figure("cost of mirrors, % of processor time", busy, "none", "beside it")
    results.figure("share of the vote, % of a step", vote, "with the mirrors 3 or less", note)
    results.write()


if __name__ == "__main__":
    main()
