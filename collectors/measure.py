"""From the tap's buffer to numbers per response. It knows token masks and directions, and nothing of events.

Everything here is numpy in float64 on what the tap recorded: one copy off the device, after the response has ended.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["WINDOW", "Measurement", "measure_response"]

WINDOW = 16  # tokens

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Measurement:
    """One response on k directions, raw residual units; every array has shape [k]."""

    mean: Floats
    lowest_window: Floats
    last_window: Floats
    tokens: int


def measure_response(values: Floats, counted: NDArray[np.bool_], readout: Floats) -> Measurement | None:
    """Average a response, and find its lowest and last windows.

    Args:
        values: directions at each response token, [tokens, k].
        counted: which tokens are averaged, [tokens].
        readout: weights [k]; the lowest window is the one where `window @ readout` is least.

    Returns:
        None when no token counts, or when a value that counts is not finite.
    """
    kept = np.asarray(values, dtype=np.float64)[counted]
    if len(kept) == 0 or not np.isfinite(kept).all():
        return None
    mean = kept.mean(axis=0)
    if len(kept) < WINDOW:
        return Measurement(mean, mean, mean, len(kept))
    sums = np.concatenate([np.zeros((1, kept.shape[1])), np.cumsum(kept, axis=0)])
    windows = (sums[WINDOW:] - sums[:-WINDOW]) / WINDOW
    return Measurement(mean, windows[int(np.argmin(windows @ readout))], windows[-1], len(kept))
