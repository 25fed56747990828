"""The TCP connections of a gloo group, so that they can be cut.

A survivor that waits for a peer that is frozen, or on a node that is lost, waits for ever: the connection stands, and
nothing comes. Dropping the group does not end a wait that is under way, and aborting it does nothing on gloo. What ends
it at once is the end of the connection, and that need not come from the other side: `shutdown` on our own sockets looks
to gloo like a peer that has hung up. It also makes sure that a peer that wakes later writes nothing into our buffers.

Gloo does not hand out its sockets. They are found by their ports: every device listens on one, and each connection of a
group has that port at one of its ends. Linux only (/proc); elsewhere nothing is found, and waits end at their deadline.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

_LISTEN = "0A"
_TABLES = (Path("/proc/self/net/tcp"), Path("/proc/self/net/tcp6"))
_making = threading.Lock()
T = TypeVar("T")
Address = tuple[str, int]


def listening(make: Callable[[], T]) -> tuple[T, int | None]:
    """`make()` and the port of the listening socket that it has opened in this process; None if that is not clear."""
    with _making:  # one at a time, so that what is new is what this one has opened
        before = set(_own_sockets())
        made = make()
        new = [(fd, inode) for inode, fd in _own_sockets().items() if inode not in before]
    # The socket is asked itself: the kernel's table of all connections takes it milliseconds, in every formation.
    ports = [port for fd, inode in new if (port := _with_copy(fd, inode, _listening_port))]
    return made, ports[0] if len(ports) == 1 else None


def cut(own_port: int | None, peers: set[Address]) -> int:
    """Shut down every connection of this process from or to a gloo device: its own port, or one of the peers'. Returns
    how many there were.
    """
    inodes = {
        inode
        for inode, local, remote, state in _connections()
        if state != _LISTEN and (local[1] == own_port or remote in peers)
    }
    return sum(_with_copy(fd, inode, _shut_down) or False for inode, fd in _own_sockets().items() if inode in inodes)


def _with_copy(fd: int, inode: str, act: Callable[[socket.socket], T]) -> T | None:
    """What `act` gives for a socket; None if it is gone, or `act` raises OSError."""
    with suppress(OSError):
        own = os.dup(fd)  # the number may be closed and used again at any moment; a copy of our own may not
        with socket.socket(fileno=own) as found:
            if _inode(own) == inode:
                return act(found)
    return None


def _shut_down(connection: socket.socket) -> bool:
    connection.shutdown(socket.SHUT_RDWR)
    return True


def _listening_port(found: socket.socket) -> int | None:
    is_tcp = found.family in (socket.AF_INET, socket.AF_INET6) and found.type == socket.SOCK_STREAM
    if not is_tcp or not found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return None
    return int(found.getsockname()[1])


def _own_sockets() -> dict[str, int]:
    """File descriptor by inode of every socket of this process."""
    found = {}
    with suppress(FileNotFoundError), os.scandir("/proc/self/fd") as entries:
        for entry in entries:
            inode = _inode(int(entry.name))
            if inode is not None:
                found[inode] = int(entry.name)
    return found


def _inode(fd: int) -> str | None:
    with suppress(OSError):
        target = str(Path(f"/proc/self/fd/{fd}").readlink())
        if target.startswith("socket:["):
            return target[8:-1]
    return None


def _connections() -> Iterator[tuple[str, Address, Address, str]]:
    """(inode, local, remote, state) of every TCP connection in this process's network namespace."""
    for table in _TABLES:
        with suppress(FileNotFoundError):
            for line in table.read_text(encoding="ascii").splitlines()[1:]:
                fields = line.split()
                yield fields[9], _address(fields[1]), _address(fields[2]), fields[3]


def _address(text: str) -> Address:
    """The kernel's hexadecimal address: 32-bit words in the machine's byte order, then the port."""
    host, _, port = text.partition(":")
    words = [int(host[i : i + 8], 16) for i in range(0, len(host), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    name = socket.inet_ntop(family, packed)
    return name.removeprefix("::ffff:"), int(port, 16)
