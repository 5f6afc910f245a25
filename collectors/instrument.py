"""A bundle as a collector needs it: what is measured at each token, and a measured response as a `Projection`.

It knows directions, weights and the contract, and neither models nor tokens. The watch and the witness both make their
projections here, so that the same response gives the same event.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from collectors.measure import Measurement
from monitor.axis.bundle import Bundle
from monitor.events import Projection, Windows, decode_projection, encode

__all__ = ["Instrument"]


class Instrument:
    """The measured directions of a bundle, at its layer.

    Attributes:
        names: of the directions, in the order of the columns.
        directions: unit columns [hidden, k], float32.
        readout: what the lowest window is looked for with, [k]: the readout's weights on the response's coordinates;
            without a readout, the Assistant Axis.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self.names, self.directions = bundle.directions()
        readout = bundle.info.readout
        weights = readout.coordinates if readout else {"assistant_axis": 1.0}
        self.readout: NDArray[np.float64] = np.array([weights.get(name, 0.0) for name in self.names])

    def projection(
        self,
        measured: Measurement,
        at_prompt: NDArray[np.floating],
        *,
        id: str,
        time: str,
        source: str,
        conversation_id: str,
        turn: int,
        model: str,
        deployment: str,
        held: float = 0.0,
        attributes: Mapping[str, str] | None = None,
    ) -> Projection:
        """One measured response as an event; the keywords are the fields of `Projection`.

        Args:
            measured: the response.
            at_prompt: the directions at the last prompt token, [k].

        Raises:
            EventError: a worker would have to refuse the event; it is told here, where the event is made.
        """
        projection = Projection(
            id=id,
            time=time,
            source=source,
            conversation_id=conversation_id,
            turn=turn,
            model=model,
            axis_id=self._bundle.id,
            layer=self._bundle.layer,
            deployment=deployment,
            projection=_rounded(measured.mean[self.names.index("assistant_axis")]),
            coordinates=self._named(measured.mean),
            prompt=self._named(at_prompt),
            windows=Windows(lowest=self._named(measured.lowest_window), last=self._named(measured.last_window)),
            tokens=measured.tokens,
            held=held,
            attributes=dict(attributes or {}),
        )
        decode_projection(encode(projection))
        return projection

    def _named(self, values: NDArray[np.floating]) -> dict[str, float]:
        return {name: _rounded(value) for name, value in zip(self.names, values, strict=True)}


def _rounded(value: float) -> float:
    """Seven digits are what a float32 activation has; more would only be bytes on the wire."""
    return float(f"{value:.7g}")
