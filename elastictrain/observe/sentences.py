"""Events in words: one sentence for people for every kind."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from elastictrain.observe.copy_words import COPIES
from elastictrain.observe.events import Data, Event, recovery_seconds
from elastictrain.observe.slow_words import SLOWNESS

_NODE_ID = re.compile(r"\b([0-9a-f]{8})[0-9a-f]{48}\b")
"""Ray's ids of nodes have 56 hexadecimal digits; the first eight tell them apart. (A digest has 64.)"""


def describe(event: Event) -> str:
    """One sentence for people. Never raises: facts that are missing are left out, unknown kinds print as they are."""
    sentence = SENTENCES.get(event.kind)
    try:
        said = _generic(event) if sentence is None else sentence({"generation": event.generation, **event.data})
    except Exception:  # another version wrote other facts under this kind; what happened must still be readable
        said = _generic(event)
    return short_nodes(said)


def short_nodes(text: str) -> str:
    """Ray's ids of nodes cut to what tells them apart."""
    return _NODE_ID.sub(r"\1", text)


def place(node: Any) -> str:
    """A node by name: node 0a1b2c3d, or what its name is."""
    name = str(node)
    return f"node {short_nodes(name)}" if _NODE_ID.fullmatch(name) else name


def _generic(event: Event) -> str:
    facts = ", ".join(f"{key}={value}" for key, value in event.data.items())
    return event.kind.replace("_", " ") + (f": {facts}" if facts else "")


def _join(*parts: str) -> str:
    return "".join(part for part in parts if part)


def _fact(data: Data, key: str, form: str) -> str:
    """`form` with the fact in place of {}; nothing when it is not there."""
    value = data.get(key)
    return "" if value is None or value in ("", [], {}) else form.format(value)


def people(workers: Any) -> str:
    """Worker numbers in words: worker 3; workers 0, 1 and 4."""
    if workers is None or workers in ([], (), {}):
        return ""
    numbers = [str(w) for w in workers] if isinstance(workers, list | tuple | Mapping) else [str(workers)]
    if len(numbers) == 1:
        return f"worker {numbers[0]}"
    return f"workers {', '.join(numbers[:-1])} and {numbers[-1]}"


def _who(data: Data) -> str:
    return people(data["worker"] if data.get("worker") is not None else data.get("workers")) or "a worker"


def _why(data: Data) -> str:
    return next((f": {data[key]}" for key in ("cause", "reason", "error", "message") if data.get(key)), "")


def count(number: Any, noun: str) -> str:
    """1 step, 2 steps."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _world(data: Data) -> str:
    workers = data.get("workers")
    world = data.get("world", len(workers) if isinstance(workers, list | tuple | Mapping) else workers)
    return "" if world is None else f" with {count(world, 'worker')}"


def _started(data: Data) -> str:
    return _join("run started", _fact(data, "name", " ({})"), _world(data), _fact(data, "steps", ", {} steps"))


def _stage(data: Data) -> str:
    changes = [
        f"{name} {data[key + '_before']} → {data[key]}"
        for key, name in (("lanes", "lanes"), ("lane_batch_size", "samples per lane"))
        if key in data and data.get(key + "_before") != data[key]
    ]
    if data.get("mixture"):
        changes.append("another mixture; every source goes on where it was")
    return _join("a new stage of the data order", _fact(data, "step", " after step {}"), _why(data)) + (
        f": {', '.join(changes)}" if changes else ""
    )


def _node(data: Data) -> str:
    domain = data.get("domain")
    return f" on {place(domain)}" if domain else ""


def _prepared(data: Data) -> str:
    seconds = data.get("prepared_s")
    return f" after {sum(seconds.values()):.1f} s" if isinstance(seconds, Mapping) and seconds else ""


def _slow_start(data: Data) -> str:
    if data.get("free") is None:
        return f"{_who(data)} has not started yet: the head of the Ray cluster does not answer"
    asked, free = (
        ", ".join(f"{number:g} {name.upper().removesuffix('S')}" for name, number in data[key].items() if number)
        for key in ("asked", "free")
    )
    return f"{_who(data)} has not started yet: it needs {asked or 'nothing'}, free are {free or 'none'}"


def _forming(data: Data) -> str:
    moved = data.get("blocks_moved")
    return _join(
        f"generation {data['generation']} is forming",
        _world(data),
        _fact(data, "step", " at step {}"),
        f"; {count(moved, 'block')} to copy" if moved else "",
    )


def _running(data: Data) -> str:
    once = data.get("held_once")
    return _join(
        f"generation {data['generation']} sealed",
        _world(data),
        _fact(data, "step", " at step {}"),
        f"; {count(once, 'block')} held once" if once else "",
    )


def _cost(data: Data) -> str:
    seconds, redone = recovery_seconds(data), data.get("steps_redone")
    before, after = data.get("world_before"), data.get("world_after")
    return _join(
        f"; {seconds:.2f} s" if seconds is not None else "",
        "" if redone is None else f", {count(redone, 'step')} redone",
        "" if before is None or after is None else f", world {before} → {after}",
        _fact(data, "restored_from", ", restored from {}"),
    )


def _recovery(data: Data) -> str:
    lost = people(data.get("workers"))
    return _join("recovered", f" from the loss of {lost}" if lost else "", _why(data), _cost(data))


def _resized(data: Data) -> str:
    joined, left = people(data.get("joined")), people(data.get("left"))
    who = " and ".join(part for part in (joined and f"{joined} joined", left and f"{left} left") if part)
    return (who or f"paused{_why(data)}") + _cost(data)


def _went_back(data: Data) -> str:
    return _join(
        f"went back to step {data['to_step']}",
        _fact(data, "from_step", " from step {}"),
        _fact(data, "restored_from", ", restored from {}"),
    ) + _why(data)


def _dropped(data: Data) -> str:
    return _join(
        "checkpoint refused",
        _fact(data, "step", ", step {}"),
        _fact(data, "path", " at {}"),
        _fact(data, "next_step", ", taking step {} instead"),
    ) + _why(data)


def _started_from(data: Data) -> str:
    kept, skipped = data.get("kept") or (), data.get("skipped") or ()
    return _join(
        "begins with the weights of",
        _fact(data, "checkpoint", " {}"),
        _fact(data, "step", ", step {}"),
        _fact(data, "tensors", ": {} tensors"),
        f", {len(kept)} kept as the recipe made them" if kept else "",
        f", {len(skipped)} not taken" if skipped else "",
    )


def _restored(data: Data) -> str:
    stored, read = data.get("stored_bytes"), data.get("read_bytes")
    by = data.get("read_by_worker") or {}
    return _join(
        f"checkpoint of step {data['step']} restored",
        f": {read / 1e6:.1f} MB read of {stored / 1e6:.1f} MB stored" if stored and read is not None else "",
        f", by {count(len(by), 'worker')}" if by else "",
        f"; {count(data['healed_blocks'], 'damaged block')} read from another place"
        if data.get("healed_blocks")
        else "",
    )


def _checkpoint(data: Data) -> str:
    return _join(f"checkpoint of step {data['step']} committed", _fact(data, "path", " at {}"))


def given_up_words(data: Data) -> str:
    """That a checkpoint came to nothing, why, and what is stored in its place."""
    instead = data.get("stored_instead")
    anew = "; it is written anew" if instead == data["step"] else f"; step {instead} is stored instead"
    return _join(
        f"checkpoint of step {data['step']} given up",
        _fact(data, "why", ": {}"),
        "; nothing is stored before the next one is due" if instead is None else anew,
    )


def _skipped(data: Data) -> str:
    lanes = data.get("lanes", data.get("lane"))
    lanes = lanes if isinstance(lanes, list | tuple) else [] if lanes is None else [lanes]
    place = f" in lane{'s' if len(lanes) > 1 else ''} {', '.join(map(str, lanes))}" if lanes else ""
    worker = f" ({_who(data)})" if place and data.get("worker") is not None else ""
    return f"step {data['step']} skipped on all workers alike: not finite{place}{worker}"


def _finished(data: Data) -> str:
    return _join("finished", _fact(data, "step", " at step {}"), _fact(data, "digest", ", digest {}"))


def _ended(word: str) -> Callable[[Data], str]:
    return lambda data: _join(word, _fact(data, "step", " at step {}"), _why(data))


def _worker(words: str) -> Callable[[Data], str]:
    return lambda data: f"{_who(data)} {words}{_why(data)}"


def _frozen(data: Data) -> str:
    alone, grace_s = data.get("blocks_held_alone"), data.get("grace_s")
    return _join(
        f"{_who(data)} is frozen",
        _why(data),
        f"; it gets {grace_s:g} s to answer, since it alone holds {count(alone, 'block')}" if alone else "",
    )


def _node_lost(data: Data) -> str:
    there = people(data.get("workers"))
    return _join(f"{place(data['node'])} is lost", f" with {there}" if there else "") + _why(data)


def _set_aside(data: Data) -> str:
    failures = list(data.get("failures") or [])
    return _join(
        f"{place(data['node'])} is set aside",
        _fact(data, "after_s", " for {:.0f} s"),
        f", too much has failed there: {', '.join(map(str, failures))}" if failures else "",
    )


def _preemption(data: Data) -> str:
    machine = place(data["node"]) if data.get("node") else "a machine"
    there = people(data.get("workers"))
    return _join(
        f"{machine} goes",
        _fact(data, "notice_s", " in {:.0f} s"),
        f"; {there} will have handed over by then" if there else "",
        _why(data),
    )


def _hung(data: Data) -> str:
    suspect = people(data.get("suspect"))
    return _join(
        f"generation {data['generation']} hangs, all wait for each other",
        _why(data),
        f"; {suspect} is {'blamed' if data.get('blamed') else 'suspected'}" if suspect else "",
    )


def _back(data: Data) -> str:
    on = " (the workers stepped on)" if data.get("phase") == "running" else ""
    return f"the controller is back after {data['gone_s']:.1f} s{on}"


def _incident(data: Data) -> str:
    """What is new at its end; who and why was said when it began, the seconds to the seal with `recovery`."""
    outcome, total_s = data.get("outcome"), (data.get("seconds") or {}).get("total")
    if outcome == "overtaken":
        return f"incident ({data['cause']}): overtaken by the next one before the first commit"
    seconds = "" if total_s is None else f" {total_s:.2f} s after the first sign of trouble"
    if outcome == "recovered":
        return f"incident over ({data['cause']}): first commit{seconds}"
    return f"incident ended with the run, which {_ENDED.get(str(outcome), outcome)} ({data['cause']})"


_ENDED = {"finished": "has finished", "failed": "has failed", "stopped": "was stopped"}


def _waiting(data: Data) -> str:
    waiting, workers = data.get("waiting") or [], data.get("workers") or []
    who = f"worker {waiting[0]} waits as a spare" if len(waiting) == 1 else f"{len(waiting)} workers wait as spares"
    here, with_all = data.get("step_s"), data.get("all_s")
    why = f": {here:.3g} s a step, {with_all:.3g} s with all" if here is not None and with_all is not None else ""
    return f"plan: auto: {len(workers)} workers take part, {who}{why} (cost model, and speeds learned so far)"


SENTENCES: dict[str, Callable[[Data], str]] = {
    "run_started": _started,
    "run_resumed": lambda data: _join("run resumed", _fact(data, "step", " at step {}"), _world(data)),
    "plan_chosen": lambda data: "; ".join(data.get("said") or ["plan: auto"]),
    "workers_waiting": _waiting,
    "stage": _stage,
    "data_changed": lambda data: (
        _join("the data have changed, and are a new stage of the order", _fact(data, "step", " after step {}"))
        + f": {'; '.join(map(str, data.get('changes', ()))) or 'other content'}"
    ),
    "data_skipped": lambda data: (
        _join("taken out of the data", _fact(data, "step", " after step {}"))
        + f": {'; '.join(map(str, data.get('what', ()))) or 'nothing'}"
    ),
    "watch_ended": lambda data: _join("slow workers are not looked for any more", _why(data)),
    "data_awaited": lambda data: f"training waits for data{_why(data)}",
    "worker_started": _worker("is starting"),
    "worker_ready": lambda data: _join(f"{_who(data)} is ready", _node(data)),
    "worker_prepared": lambda data: _join(f"{_who(data)} is prepared", _node(data), _prepared(data)),
    "slow_start": _slow_start,
    "start_failed": _worker("could not start"),
    "feeder_started": lambda data: f"the feeder of {place(data['node'])} reads for the workers there",
    "feeder_lost": lambda data: _join(
        f"the feeder of {place(data['node'])} is lost, its workers read for themselves until there is another",
        _why(data),
    ),
    "feeder_failed": lambda data: _join(
        f"the feeder of {place(data['node'])} cannot open the data, its workers read for themselves", _why(data)
    ),
    "start_paused": lambda data: (
        _join("no new workers for now", _fact(data, "after_s", ", next try in {} s")) + _why(data)
    ),
    "worker_lost": _worker("is lost"),
    "worker_retired": _worker("left"),
    "unresponsive": _worker("does not answer"),
    "frozen": _frozen,
    "doomed": _worker("is killed"),
    "hung": _hung,
    "node_lost": _node_lost,
    "node_set_aside": _set_aside,
    "node_taken_back": lambda data: f"{place(data['node'])} may be used again",
    "preemption": _preemption,
    "controller_back": _back,
    "agent_unheard": lambda data: (
        _join(f"the agent of {place(data['node'])} is not heard", _fact(data, "seconds", ", for {:.0f} s now"))
        + _fact(data, "consequence", ": {}")
    ),
    "storage_stalled": lambda data: f"the storage stands still{_why(data)}",
    **SLOWNESS,
    "parking": lambda data: f"generation {data['generation']} parks{_why(data)}",
    "gathering": lambda data: _join("waiting", _fact(data, "parked", ", parked: {}")) + _why(data),
    "forming": _forming,
    "running": _running,
    "recovery": _recovery,
    "incident": _incident,
    "resized": _resized,
    "went_back": _went_back,
    "drain": lambda data: _join(f"{_who(data)} hands over and leaves", _fact(data, "step", " at step {}")) + _why(data),
    "join": lambda data: _join(f"{_who(data)} joined", _fact(data, "step", " at step {}")),
    "add": lambda data: _join("one more worker asked for", _fact(data, "step", " at step {}")),
    "resize": lambda data: f"asked to run with {count(data['target'], 'worker')}",
    "fault": lambda data: _join(
        f"fault on purpose: {data['do']}",
        f" {_who(data)}" if data.get("worker") is not None else "",
        _fact(data, "step", " at step {}"),
        _fact(data, "phase", ", in {}"),
    ),
    "checkpoint": _checkpoint,
    "checkpoint_dropped": _dropped,
    "checkpoint_given_up": given_up_words,
    **COPIES,
    "restored": _restored,
    "started_from": _started_from,
    "given_up": lambda data: (
        f"checkpoints of steps {', '.join(map(str, data['steps']))} are of a history that is given up by going on from "
        f"step {data['step']}; they go with the first new checkpoint"
    ),
    "refused": lambda data: _join("refused", _fact(data, "request", " to {}")) + _why(data),
    "skipped": _skipped,
    "numerics_differ": lambda data: f"numerics differ: {'; '.join(data['differences'])}",
    "finished": _finished,
    "failed": _ended("failed"),
    "stopped": _ended("stopped"),
}
"""Kind → sentence. Most are the controller's announcements; `finished`, `failed` and `stopped` end a run. The summary
and the plot read `running`, `recovery`, `resized` and the endings.
"""
