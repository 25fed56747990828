"""The machines of a virtual cluster, and which worker stands on which of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Container
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Node:
    """`leaving`: its end has been announced: nobody is placed on it any more."""

    number: int
    workers: set[int] = field(default_factory=set)
    leaving: bool = False

    @property
    def name(self) -> str:
        return f"node{self.number}"


class Nodes:
    """Machines with `slots` places each; the one that has had room for longest is filled first."""

    def __init__(self, count: int, slots: int) -> None:
        self.slots = slots
        self.live: dict[int, Node] = {}
        self.free: dict[int, None] = {}  # in use as an ordered set: machines with room
        self.waiting: deque[tuple[int, tuple[str, ...]]] = (
            deque()
        )  # workers without a place, and where they must not be
        self.next_number = 0
        for _ in range(count):
            self.arrive()

    def arrive(self) -> Node:
        node = Node(self.next_number)
        self.next_number += 1
        self.live[node.number] = node
        self.free[node.number] = None
        return node

    def place(self, worker: int, avoid: Container[str]) -> Node | None:
        """The machine on which `worker` starts; None: there is no room."""
        for number in self.free:
            node = self.live[number]
            if node.name not in avoid:
                node.workers.add(worker)
                if len(node.workers) >= self.slots:
                    del self.free[number]
                return node
        return None

    def leave(self, worker: int, number: int) -> None:
        """The process of `worker` is gone, so there is room."""
        node = self.live.get(number)
        if node is not None:
            node.workers.discard(worker)
            if not node.leaving:
                self.free[number] = None

    def announce(self, node: Node) -> None:
        """The machine will go: place nobody on it."""
        node.leaving = True
        self.free.pop(node.number, None)

    def lose(self, node: Node) -> None:
        self.announce(node)
        self.live.pop(node.number, None)
