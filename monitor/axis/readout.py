"""The readout: the one number that the detector reads from what was measured. It knows names and weights only."""

from __future__ import annotations

import math
from collections.abc import Mapping

from msgspec import Struct

from monitor.errors import EventError

__all__ = ["Readout"]


class Readout(Struct, frozen=True):
    """The one number that the detector reads from a response: a weighted sum of what was measured.

    Attributes:
        coordinates: weight of each of the response's coordinates.
        prompt: weight of each coordinate at the last prompt token.
    """

    coordinates: dict[str, float] = {}
    prompt: dict[str, float] = {}

    def value(self, coordinates: Mapping[str, float], prompt: Mapping[str, float]) -> float:
        """The readout in raw residual units; low is drift.

        Raises:
            EventError: a coordinate that the readout names is missing, or the sum is not finite.
        """
        try:
            terms = [weight * coordinates[name] for name, weight in self.coordinates.items()]
            terms += [weight * prompt[name] for name, weight in self.prompt.items()]
        except KeyError:
            missing = [name for name in self.coordinates if name not in coordinates]
            missing += [f"prompt.{name}" for name in self.prompt if name not in prompt]
            raise EventError(
                f"the readout needs coordinates that the event lacks: {', '.join(sorted(missing))}",
                cure="give the collector the axis bundle that the detector was calibrated with",
            ) from None
        try:
            total = math.fsum(terms)
        except (OverflowError, ValueError):  # fsum raises where a plain sum would give inf or nan
            total = math.nan
        if not math.isfinite(total):
            raise EventError("the readout is not finite", cure="check the collector's coordinates and their dtype")
        return total
