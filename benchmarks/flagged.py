"""Share of conversations flagged per kind: on the bundle's readout, and on the paper's axis alone.

The demo's scripts are played several times each with a live model; they had no part in building or calibrating
anything. Both detectors are calibrated in the same way on the same development traffic, so that they differ only in
what they read. Bounds are exact (Clopper-Pearson, 95 %) over conversations; samples of one script are alike, so they
are narrower than the truth.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace
from scipy.stats import beta

from collectors.calibrate import HEALTHY_FILE, by_kind, collect_traffic, read_traffic, write_traffic
from collectors.models import load_model
from collectors.traffic import DRIFTING, HEALTHY, load_scripts
from monitor.axis.bundle import Bundle, load_bundle, resolve_bundle
from monitor.axis.readout import Readout
from monitor.detect.baseline import DetectorConfig
from monitor.detect.configure import detector_config
from monitor.detect.conversation import ConversationState, step
from monitor.detect.fit import calibrate
from monitor.events import Projection


def axis_alone(bundle: Bundle, directory: Path) -> DetectorConfig:
    """A detector that reads the paper's axis and nothing else, calibrated like the bundle's own."""
    assert bundle.info.calibration is not None
    kinds = by_kind(read_traffic(directory / HEALTHY_FILE), load_scripts("develop"))
    healthy = {
        kind: [[replace(event, axis_id=bundle.id) for event in talk] for talk in kinds[kind]]
        for kind in HEALTHY
        if kind in kinds
    }
    return calibrate(
        healthy,
        deployment=bundle.info.model.name,
        axis_id=bundle.id,
        readout=Readout(coordinates={"assistant_axis": 1.0}),
        share=bundle.info.calibration["source"]["share"],
    )


def flagged(talk: Sequence[Projection], config: DetectorConfig) -> tuple[bool, list[float]]:
    """Whether the fold warned in one conversation, and its z."""
    state: ConversationState | None = None
    z: list[float] = []
    warned = False
    for response in talk:
        result = step(state, response, config)
        state = result.state
        z += [] if result.z is None else [result.z]
        warned = warned or any(finding.severity != "info" for finding in result.findings)
    return warned, z


def bounds(count: int, of: int) -> tuple[float, float]:
    """Clopper-Pearson 95 % interval of a share."""
    low = 0.0 if count == 0 else float(beta.ppf(0.025, count, of - count + 1))
    high = 1.0 if count == of else float(beta.ppf(0.975, count + 1, of - count))
    return low, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--bundle", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--samples", type=int, default=4, help="conversations per script")
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--keep", type=Path, help="keep the projections in this file, or read them from it")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    directory = resolve_bundle(options.bundle)
    bundle = load_bundle(directory)
    scripts = load_scripts("demo")
    if options.keep and options.keep.exists():
        projections = [replace(event, axis_id=bundle.id) for event in read_traffic(options.keep)]
    else:
        projections = collect_traffic(
            load_model(options.model, dtype=options.dtype),
            bundle,
            scripts,
            samples=options.samples,
            seed=options.seed,
            batch_size=48,
            progress=lambda done, total: print(f"\r{done} of {total} replies", end="", file=sys.stderr, flush=True),
        )
        if options.keep:
            write_traffic(options.keep, projections)
    kinds = by_kind(projections, scripts)
    detectors = {"readout": detector_config(bundle), "assistant_axis_alone": axis_alone(bundle, directory)}
    table: dict[str, dict[str, Any]] = {}
    print(f"{'kind':<20}{'n':>4}  " + "".join(f"{name:>30}" for name in detectors))
    for kind in (*HEALTHY, *DRIFTING):
        talks = kinds.get(kind, [])
        if not talks:
            continue
        row: dict[str, Any] = {"conversations": len(talks), "scripts": sum(s.kind == kind for s in scripts)}
        cells = []
        for name, config in detectors.items():
            judged = [flagged(talk, config) for talk in talks]
            count = sum(warned for warned, _ in judged)
            low, high = bounds(count, len(talks))
            z = [value for _, values in judged for value in values]
            row[name] = {
                "flagged": count,
                "share": count / len(talks),
                "interval": [low, high],
                "mean_z": sum(z) / len(z),
            }
            cells.append(f"{count / len(talks):>7.0%} [{low:.0%}, {high:.0%}] z {sum(z) / len(z):+.1f}")
        table[kind] = row
        print(f"{kind:<20}{len(talks):>4}  " + "".join(f"{cell:>30}" for cell in cells))
    if options.json:
        print(json.dumps({"benchmark": "flagged", "axis_id": bundle.id, "by_kind": table}))


if __name__ == "__main__":
    main()
