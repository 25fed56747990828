"""The sockets of a gloo group are found by their ports, and only they are cut."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch.distributed as dist

from elastictrain.engine import links

HERE = "127.0.0.1"


@pytest.fixture
def sockets() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def listener(stack: ExitStack) -> socket.socket:
    return stack.enter_context(socket.create_server((HERE, 0)))


def connected(stack: ExitStack, server: socket.socket) -> tuple[socket.socket, socket.socket]:
    client = stack.enter_context(socket.create_connection(server.getsockname()))
    return client, stack.enter_context(server.accept()[0])


def is_open(one: socket.socket, other: socket.socket) -> bool:
    other.settimeout(10)
    try:
        one.sendall(b"x")
        return other.recv(1) == b"x"
    except OSError:
        return False


def test_the_port_of_a_new_device_is_known_whatever_else_is_opened(sockets: ExitStack) -> None:
    listener(sockets)  # there before

    def make() -> int:
        sockets.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)).bind((HERE, 0))
        for one in socket.socketpair():
            sockets.enter_context(one)
        sockets.enter_context(socket.socket()).bind((HERE, 0))  # does not listen
        return int(listener(sockets).getsockname()[1])

    made, port = links.listening(make)
    assert port == made
    device, port = links.listening(lambda: dist.ProcessGroupGloo.create_device(hostname=HERE))
    assert port is not None
    connected_to = sockets.enter_context(socket.create_connection((HERE, port)))
    assert connected_to.getpeername()[1] == port
    del device


def test_of_two_new_listeners_neither_is_it(sockets: ExitStack) -> None:
    _, port = links.listening(lambda: (listener(sockets), listener(sockets)))
    assert port is None


def test_connections_from_and_to_the_devices_are_cut_and_no_others(sockets: ExitStack) -> None:
    own, peers, others = listener(sockets), listener(sockets), listener(sockets)
    to_us, to_peer, unrelated = (connected(sockets, server) for server in (own, peers, others))
    cut = links.cut(own.getsockname()[1], {peers.getsockname()})
    assert cut == 2, "the accepted end of the one, the connecting end of the other"
    assert not is_open(*to_us)
    assert not is_open(*to_peer)
    assert is_open(*unrelated)
    assert is_open(*connected(sockets, own)), "listeners go on"
