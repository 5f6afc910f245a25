"""Does an axis bundle still measure the same with this model? Projects its canaries again and compares."""

from __future__ import annotations

from typing import Any

import numpy as np

from collectors.assemble import project_canaries
from collectors.models import LoadedModel
from monitor import telemetry
from monitor.axis.bundle import Bundle, check_model
from monitor.errors import BundleError, BundleMismatch

__all__ = ["CANARY_METRICS", "OK_WITHIN", "STALE_BEYOND", "check_bundle"]

# In standard deviations of the default Assistant's projections, the unit in which drift is told. Another dtype or
# engine moves a canary by hundredths; weights that were trained on move it by more than a tenth.
OK_WITHIN = 0.05
STALE_BEYOND = 0.5
CANARY_METRICS = (
    "anchorwatch_canary_state",
    "anchorwatch_canary_shift",
    "anchorwatch_canary_checked_timestamp_seconds",
)


def check_bundle(loaded: LoadedModel, bundle: Bundle, decoder_layers: str | None = None) -> dict[str, Any]:
    """Compare every canary's projection with the one it had, and set the gauges of it.

    Returns:
        `verdict` ok, shifted or stale; `says`, one sentence with the cure; `largest_shift` and `shifts` in standard
        deviations of the default Assistant's projections, None where one is not finite; `mismatch`, what differs in the
        model itself, or None.

    Raises:
        BundleError: the bundle has no canaries, or the model has another shape, so that nothing can be projected.
    """
    if not bundle.info.canaries:
        raise BundleError("this bundle has no canaries", cure="build one with `anchorwatch axis build`")
    mismatch: str | None = None
    try:
        check_model(bundle, loaded.facts)
    except BundleMismatch as error:
        made = bundle.info.model
        if (made.layers, made.hidden) != (loaded.facts.layers, loaded.facts.hidden):
            raise
        mismatch = error.problem
    deviation = bundle.info.figures["default_standard_deviation"]
    now = project_canaries(loaded, bundle, decoder_layers=decoder_layers)
    shifts = [
        (after.projection - before.projection) / deviation
        for before, after in zip(bundle.info.canaries, now, strict=True)
    ]
    largest = float(np.max(np.abs(shifts)))
    if not np.isfinite(largest) or largest > STALE_BEYOND or mismatch:
        verdict, says = "stale", "this axis was made for other weights; build a new one: anchorwatch axis build"
    elif largest > OK_WITHIN:
        verdict, says = (
            "shifted",
            "same weights, other numbers; calibrate again in the dtype and engine that you serve with",
        )
    else:
        verdict, says = "ok", "the axis measures what it measured when it was made"
    for state in ("ok", "shifted", "stale"):
        telemetry.CANARY_STATE.labels(state).set(state == verdict)
    telemetry.CANARY_SHIFT.set(largest)
    telemetry.CANARY_CHECKED.set_to_current_time()
    return {
        "verdict": verdict,
        "says": f"largest shift {largest:.4f} sd over {len(shifts)} canaries; {says}",
        "largest_shift": largest if np.isfinite(largest) else None,
        "shifts": [shift if np.isfinite(shift) else None for shift in shifts],
        "mismatch": mismatch,
    }
