"""From an axis bundle to the detector's configuration. It knows where a bundle keeps its calibration, and no more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from monitor.axis.bundle import Bundle
from monitor.detect.baseline import Baseline, Boundaries, DetectorConfig, PersonaSpace
from monitor.errors import ConfigurationError

__all__ = ["calibration_record", "detector_config", "persona_space_of"]

_CONSTANTS = ("ewma_weight", "cusum_slack", "release_fraction", "release_turns", "session_gap_seconds")


def detector_config(bundle: Bundle, **constants: float) -> DetectorConfig:
    """What the fold reads, as the bundle's calibration says.

    Args:
        bundle: a calibrated bundle.
        constants: detector constants that replace the calibration's, such as `session_gap_seconds`.

    Raises:
        ConfigurationError: the bundle is not calibrated, or a value is wrong.
    """
    calibration = bundle.info.calibration
    if calibration is None or bundle.info.readout is None:
        raise ConfigurationError(
            "this axis bundle is not calibrated, so nothing can be judged with it",
            cure="run `anchorwatch axis calibrate`, or use a shipped bundle",
        )
    kept = {name: calibration[name] for name in _CONSTANTS if name in calibration}
    try:
        # The bundle's id covers its calibration, so the calibration can't state it: it is filled in here.
        baseline = msgspec.convert({**calibration["baseline"], "axis_id": bundle.id}, Baseline)
        boundaries = msgspec.convert(calibration["boundaries"], Boundaries)
    except (KeyError, msgspec.ValidationError) as error:
        raise ConfigurationError(f"the bundle's calibration is malformed: {error}", cure="calibrate again") from error
    return DetectorConfig(
        axis_id=bundle.id,
        readout=bundle.info.readout,
        baselines={baseline.deployment: baseline},
        boundaries=boundaries,
        persona_space=persona_space_of(bundle),
        **{**kept, **constants},
    )


def calibration_record(config: DetectorConfig, deployment: str, source: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse: what a bundle keeps of a configuration, with where it came from."""
    baseline = msgspec.to_builtins(config.baselines[deployment])
    del baseline["axis_id"]
    return {
        "baseline": baseline,
        "boundaries": msgspec.to_builtins(config.boundaries),
        **{name: getattr(config, name) for name in _CONSTANTS},
        "source": dict(source),
    }


def persona_space_of(bundle: Bundle) -> PersonaSpace | None:
    """The roles' places on the persona components that events carry; None where the bundle was imported without."""
    names = [name for name in bundle.directions()[0] if name.startswith("pc")]
    if not names:
        return None
    basis = np.asarray(bundle.tensors["basis"], dtype=np.float64)[: len(names)]
    places = np.asarray(bundle.tensors["role_vectors"], dtype=np.float64) @ basis.T
    return PersonaSpace(
        components=names,
        centre=(np.asarray(bundle.tensors["role_mean"], dtype=np.float64) @ basis.T).round(4).tolist(),
        roles={role: place.round(4).tolist() for role, place in zip(bundle.info.roles, places, strict=True)},
    )
