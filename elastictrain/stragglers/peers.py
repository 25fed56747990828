"""What the peers of a worker share in a step, so that it is nobody's own change. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from elastictrain.stragglers.robust import middle
from elastictrain.stragglers.signals import Floats


def in_common(change: Floats, groups: Sequence[npt.NDArray[np.int64]]) -> Floats:
    """What all peers of a worker share in this step, shape as `change` [causes, workers]; 0 where nobody is to be
    compared with. `groups`: places of those that are peers.
    """
    common = np.zeros_like(change)
    for group in groups:
        part = change[:, group]
        if len(group) <= 2:
            nearest = np.nanargmin(np.where(np.isnan(part), np.inf, np.abs(part)), axis=1)
            shared = np.nan_to_num(part[np.arange(len(part)), nearest])
            if len(group) == 1:  # nobody to compare with: its own history alone
                shared = np.zeros(len(part))
        else:
            shared = middle(part)
        common[:, group] = shared[:, None]
    return common
