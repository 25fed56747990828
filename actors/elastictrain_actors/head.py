"""Joining a Ray cluster that is there. Ray would ask a head that has gone for many minutes, without a word: so somebody
knocks first.
"""

from __future__ import annotations

import socket
from typing import Any

import ray
from ray._private.services import get_ray_address_from_environment

CONNECT_S = 5.0
"""Longest wait for a head to take a connection."""


def join_cluster(address: str, **settings: Any) -> None:
    """`ray.init` with the cluster at `address`: HOST:PORT of its head, or auto.

    Raises OSError when there is none or nobody listens there, and what `ray.init` does (RuntimeError, ValueError).
    """
    knock(address)
    ray.init(address=address, **settings)


def knock(address: str) -> None:
    """Raises OSError when nobody listens where Ray takes `address` to be (auto: the file that `ray start` leaves, which
    outlives its cluster).
    """
    where = get_ray_address_from_environment(address, None) or address
    host, _, port = where.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except ValueError:
        raise OSError(f"{where!r} is not HOST:PORT") from None
    except OSError as error:
        raise OSError(f"nobody listens at {where} ({error})") from error
