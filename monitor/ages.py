"""How old the instrument is: two gauges, of when its axis was made and since when the calibration in force judges."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from monitor import telemetry
from monitor.actions import decode_action
from monitor.axis.bundle import load_bundle, resolve_bundle
from monitor.errors import BundleError, ConfigurationError, EventError
from monitor.store.store import Actions
from monitor.stream.log import PROJECTIONS

__all__ = ["show_axis_age", "show_calibration_age"]


def show_axis_age(bundle: str | Path, axis_id: str) -> None:
    """Show when the bundle was made, if it is the one of that axis and can be had here; else nothing is shown."""
    try:
        found = load_bundle(resolve_bundle(str(bundle)))
    except (BundleError, ConfigurationError):
        return
    if found.id == axis_id:
        telemetry.AXIS_CREATED.labels(axis_id).set(datetime.fromisoformat(found.info.created).timestamp())


def show_calibration_age(store: Actions, topic: str = PROJECTIONS) -> None:
    """Show when the calibrations in force were activated: the oldest one's moment, by the clock of who did it.

    Raises:
        StoreUnavailable, StoreError: as the store does.
    """
    newest: dict[int, tuple[int, float]] = {}
    for key, value in store.actions(f"calibration/{topic}/").items():
        try:
            partition, offset = map(int, key.rsplit("/", 2)[1:])
            at = datetime.fromisoformat(decode_action(key, value).time).timestamp()
        except (EventError, ValueError):
            continue  # the fold of the actions has told already
        newest[partition] = max(newest.get(partition, (offset, at)), (offset, at))
    if newest:
        telemetry.CALIBRATION_ACTIVATED.set(min(at for _, at in newest.values()))
