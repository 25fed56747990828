"""`ckpt prune | pin | unpin | heal`: what stays, and stays whole."""

from __future__ import annotations

import re
from dataclasses import asdict
from datetime import timedelta
from functools import reduce
from operator import or_
from typing import Annotated

import typer
from rich.console import Console

from elastictrain_checkpoint.cli_common import (
    EXIT_CODES,
    AsJson,
    Options,
    Step,
    Where,
    fail,
    guarded,
    open_store,
    parse_options,
    print_json,
    why_of,
)
from elastictrain_checkpoint.commit import list_steps
from elastictrain_checkpoint.errors import InvalidPiece
from elastictrain_checkpoint.policies import Best, EverySteps, Newest, Policy, Spaced, Younger
from elastictrain_checkpoint.rehearsal import Rehearsal
from elastictrain_checkpoint.retain import DEFAULT_LEASE_S, pin, pinned, prune, unpin
from elastictrain_checkpoint.tiers import heal

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
Numbered = Annotated[int, typer.Option("--step", min=0, help="Step.")]
Others = Annotated[list[str], typer.Option("--from", help="Store that may have whole copies; repeatable.")]


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command("prune", epilog=EXIT_CODES)(prune_command)
    app.command("pin", epilog=EXIT_CODES)(pin_command)
    app.command("unpin", epilog=EXIT_CODES)(unpin_command)
    app.command("heal", epilog=EXIT_CODES)(heal_command)


@guarded
def prune_command(
    store: Where,
    keep: Annotated[int, typer.Option("--keep", min=1, help="How many of the newest sound checkpoints stay.")],
    every: Annotated[int | None, typer.Option("--every-steps", min=1, help="Multiples of this step stay, too.")] = None,
    younger: Annotated[str | None, typer.Option("--younger", metavar="AGE", help="So do those of the last 6h.")] = None,
    spaced: Annotated[str | None, typer.Option("--spaced", metavar="AGE", help="So does one for every 1d.")] = None,
    best: Annotated[
        str | None, typer.Option("--best", metavar="METRIC[:min|max][:N]", help="So do the best by a metric in info.")
    ] = None,
    lease_h: Annotated[
        float, typer.Option("--lease-hours", min=0, help="Age from which an attempt without a commit is garbage.")
    ] = DEFAULT_LEASE_S / 3600,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")] = False,
    option: Options = None,
    as_json: AsJson = False,
) -> None:
    """Remove old checkpoints and garbage; nothing goes unless a newer one was verified, every byte, first.

    Pinned steps stay, and packs that a kept step refers to.
    """
    place = open_store(store, parse_options(option))
    policies: list[Policy] = [Newest(keep)]
    policies += [] if every is None else [EverySteps(every)]
    policies += [] if younger is None else [Younger(parse_age(younger, "--younger"))]
    policies += [] if spaced is None else [Spaced(parse_age(spaced, "--spaced"))]
    policies += [] if best is None else [parse_best(best)]
    done = prune(Rehearsal(place) if dry_run else place, reduce(or_, policies), lease_s=lease_h * 3600)
    unsound = [{"step": one.step, "why": why_of(one.step, one.why)} for one in done.unsound]
    if as_json:
        shown = {"kept": done.kept, "removed": done.removed, "garbage": done.garbage, "unsound": unsound}
        print_json({**shown, "dry_run": dry_run})
    else:
        console = Console(highlight=False)
        would = "would be removed" if dry_run else "removed"
        console.print(f"kept: {', '.join(map(str, done.kept)) or 'none'}")
        console.print(f"{would}: {', '.join(map(str, done.removed)) or 'none'}")
        for path in done.garbage:
            console.print(f"{would}, garbage: {path}", markup=False)
        for one in unsound:
            console.print(f"left alone, unsound: step {one['step']}: {one['why']}", markup=False, style="red")
    raise typer.Exit(1 if unsound else 0)


def parse_age(text: str, what: str) -> timedelta:
    """``90s``, ``30m``, ``6h`` or ``2d``. Raises InvalidPiece, naming the option ``what``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if found is None or not float(found[1]):
        raise InvalidPiece(f"{what} {text!r}: expected a time above 0 such as 90s, 30m, 6h or 2d")
    return timedelta(seconds=float(found[1]) * _SECONDS[found[2]])


def parse_best(text: str) -> Best:
    """``loss``, ``loss:min``, ``evaluation.accuracy:max:3``. Raises InvalidPiece."""
    metric, *rest = text.split(":")
    mode = rest.pop(0) if rest and rest[0] in ("min", "max") else "min"
    count = rest.pop(0) if rest else "1"
    if not metric or rest or not count.isdecimal():
        raise InvalidPiece(f"--best {text!r}: expected METRIC, METRIC:min or METRIC:max, and perhaps :N behind it")
    return Best(metric, int(count), mode)  # type: ignore[arg-type]


@guarded
def pin_command(
    store: Where,
    step: Numbered,
    why: Annotated[str, typer.Option("--why", help="A word for those who find it.")] = "",
    option: Options = None,
    as_json: AsJson = False,
) -> None:
    """Keep a step whatever `prune` is told, until `unpin`."""
    place = open_store(store, parse_options(option))
    pin(place, step, why)
    _say_pinned(pinned(place), as_json=as_json)


@guarded
def unpin_command(store: Where, step: Numbered, option: Options = None, as_json: AsJson = False) -> None:
    """Leave a step to `prune` again."""
    place = open_store(store, parse_options(option))
    unpin(place, step)
    _say_pinned(pinned(place), as_json=as_json)


def _say_pinned(steps: list[int], *, as_json: bool) -> None:
    if as_json:
        print_json({"pinned": steps})
    else:
        typer.echo(f"pinned: {', '.join(map(str, steps)) or 'none'}")


@guarded
def heal_command(
    store: Where, others: Others, step: Step = None, option: Options = None, as_json: AsJson = False
) -> None:
    """Read every byte of a step and write what is damaged or missing anew, from whole copies in other stores.

    Without --step it is the newest that has a manifest, however damaged.
    """
    options = parse_options(option)
    place, copies = open_store(store, options), [open_store(other, options) for other in others]
    # The newest that is sound would be the one step that needs nothing.
    number = step if step is not None else max(list_steps(place), default=None)
    if number is None:
        fail(f"{place.url} has no checkpoint", 2)
    done = heal(place, number, copies)
    if as_json:
        print_json({"step": number, **asdict(done)})
    else:
        console = Console(highlight=False, soft_wrap=True)
        for one in done.healed:
            console.print(f"healed: {one.file}, block {one.block}, from {one.source}", markup=False)
        for path in done.rewritten:
            console.print(f"written anew: {path}", markup=False)
        for path in done.left:
            console.print(f"damaged everywhere: {path}", markup=False, style="red")
        if not done.rewritten and not done.left:
            console.print(f"step {number} is whole")
    raise typer.Exit(1 if done.left else 0)
