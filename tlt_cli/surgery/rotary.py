"""Growing head_dim under rotary positions: which new pair is which old pair, turning at the same frequency.

Pair i of a head of h entries turns at theta^(-2i/h) (RoPE, arXiv:2104.09864). In a head of m*h entries, m whole, that
is pair m*i at the same theta. In any other head of h' entries it is pair i once theta becomes theta^(h'/h).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlt_cli.errors import TltError
from tlt_cli.families import Fit
from tlt_cli.families.rotation import with_power
from tlt_cli.model.describe import describe


def pair_sources(old: int, new: int) -> NDArray[np.int64]:
    """For each new pair the old pair of the same frequency, -1 where there is none.

    >>> pair_sources(2, 4).tolist(), pair_sources(2, 3).tolist()
    ([0, -1, 1, -1], [0, 1, -1])
    """
    position = np.arange(new)
    if new % old == 0:
        step = new // old
        return np.where(position % step == 0, position // step, -1)
    return np.where(position < old, position, -1)


def resize_rotation(fit: Fit, config: dict[str, Any], new: int) -> dict[str, Any]:
    """config.json under which the new head's pairs turn as `pair_sources` says; `new` counts pairs.

    Raises TltError for a rotation whose frequencies depend on head_dim in other ways.
    """
    old = fit.sizes["rotary"]
    if new == old:
        return config
    for rope in describe(fit)["ropes"].values():
        if "limit" in rope:
            raise TltError(
                f"cannot grow head_dim from {2 * old} to {2 * new}: config.json scales its rotation dynamically, and "
                "beyond the trained length that scaling depends on head_dim; remove the scaling or keep head_dim"
            )
    if new % old == 0:
        return config
    return with_power(fit, config, new / old)
