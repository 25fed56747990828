"""Two network namespaces joined by a wire of ours: latency, random loss and cuts in either direction.

Each namespace gets a TUN device; one thread carries all IP packets between the two. (`tc netem` would do the same where
the kernel has it.) Needs root and /dev/net/tun: `why_not()` says what is missing.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000
SIDES = {"a": "10.91.7.1", "b": "10.91.7.2"}


def why_not() -> str:
    """Why namespaces cannot be joined here; empty when they can."""
    if os.geteuid() != 0:
        return "needs root for network namespaces"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "needs /dev/net/tun"
    name = f"etprobe{os.getpid()}"
    try:
        subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True)
        subprocess.run(["ip", "netns", "del", name], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"ip netns does not work here: {error}"
    return ""


class LossyLink:
    """`latency_s`: each way. `loss`: of the packets. `cut`: directions that carry nothing, "ab" and "ba"."""

    def __init__(self, names: dict[str, str], devices: dict[str, int], seed: int) -> None:
        self.names, self._devices = names, devices
        self.latency_s, self.loss = 0.0, 0.0
        self.cut: set[str] = set()
        self.carried, self.dropped = 0, 0
        self._random = random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def inside(self, side: str) -> list[str]:
        """Words to put before a command, so that it runs in the namespace of `side`."""
        return ["ip", "netns", "exec", self.names[side]]

    def address(self, side: str) -> str:
        return SIDES[side]

    def _carry(self) -> None:
        under_way: list[tuple[float, int, str, bytes]] = []
        number = 0
        by_fd = {fd: side for side, fd in self._devices.items()}
        while not self._stop.is_set():
            wait_s = min(0.05, max(0.0, under_way[0][0] - time.monotonic())) if under_way else 0.05
            for fd in select.select(list(by_fd), [], [], wait_s)[0]:
                packet = os.read(fd, 65536)
                way = "ab" if by_fd[fd] == "a" else "ba"
                if way in self.cut or self._random.random() < self.loss:
                    self.dropped += 1
                    continue
                number += 1
                heapq.heappush(under_way, (time.monotonic() + self.latency_s, number, way[1], packet))
            while under_way and under_way[0][0] <= time.monotonic():
                _, _, to, packet = heapq.heappop(under_way)
                with contextlib.suppress(OSError):
                    os.write(self._devices[to], packet)
                    self.carried += 1

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        for fd in self._devices.values():
            os.close(fd)


@contextlib.contextmanager
def lossy_link(seed: int = 0) -> Iterator[LossyLink]:
    """Two fresh namespaces, joined; removed in the end with whatever runs in them."""
    names = {side: f"et{os.getpid()}{side}" for side in SIDES}
    link = None
    try:
        devices = {}
        for side, name in names.items():
            subprocess.run(["ip", "netns", "add", name], check=True)
            devices[side] = _tun_in(name, f"tun{side}")
            for words in (
                ["link", "set", "lo", "up"],
                ["addr", "add", f"{SIDES[side]}/24", "dev", f"tun{side}"],
                ["link", "set", f"tun{side}", "up"],
            ):
                subprocess.run(["ip", "-n", name, *words], check=True)
        link = LossyLink(names, devices, seed)
        yield link
    finally:
        if link is not None:
            link.close()
        for name in names.values():
            if Path(f"/run/netns/{name}").exists():
                subprocess.run(["ip", "netns", "del", name], check=False)


def _tun_in(namespace: str, device: str) -> int:
    """A TUN device in a namespace. The thread that enters it ends there, so that ours stays where it is."""
    result: list[int | OSError] = []

    def enter() -> None:
        handle = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(handle, _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns")
            fd = os.open("/dev/net/tun", os.O_RDWR)
            fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TUN | _IFF_NO_PI))
            result.append(fd)
        except OSError as error:
            result.append(error)
        finally:
            os.close(handle)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    if isinstance(result[0], OSError):
        raise result[0]
    return result[0]
