"""Calibrates a bundle on the development scripts: plays them, fits the readout, the baseline and the boundaries.

It knows which scripts are healthy and which drift, and keeps what it saw beside the bundle, so that the fit can be
repeated without the model. It judges nothing.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from collectors.models import LoadedModel
from collectors.traffic import DRIFTING, HEALTHY, Script, play
from collectors.watch import watch
from monitor.axis.bundle import Bundle, with_calibration
from monitor.axis.readout import Readout
from monitor.detect.configure import calibration_record
from monitor.detect.fit import Conversations, calibrate, fit_readout
from monitor.errors import CatalogueError
from monitor.events import Projection, decode_projection, encode

__all__ = [
    "HEALTHY_FILE",
    "TRAFFIC_FILE",
    "ByKind",
    "by_kind",
    "calibrate_bundle",
    "collect_traffic",
    "drifted",
    "read_traffic",
    "recorded_traffic",
    "write_traffic",
]

TRAFFIC_FILE = "develop.jsonl.gz"
HEALTHY_FILE = "healthy.jsonl.gz"
# Slow drift begins as a task: its first turns are neither healthy nor drifting, and are not fitted.
SLOW_DRIFT_BEGINS = 3

ByKind = dict[str, list[list[Projection]]]


class Collected:
    """A publisher that keeps what it is given."""

    def __init__(self) -> None:
        self.projections: list[Projection] = []

    def publish(self, projection: Projection) -> bool:
        """Take one."""
        self.projections.append(projection)
        return True


def collect_traffic(
    loaded: LoadedModel,
    bundle: Bundle,
    scripts: Sequence[Script],
    *,
    samples: int = 1,
    tokens: int = 48,
    batch_size: int = 38,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[Projection]:
    """Play every script `samples` times through a watched model; conversation ids are `<script id>.<sample>`."""
    conversations = [(f"{script.id}.{sample}", script) for sample in range(samples) for script in scripts]
    total = sum(len(script.turns) for _, script in conversations)
    done = 0

    def count(_reply: object) -> None:
        nonlocal done
        done += 1
        progress(done, total)

    collected = Collected()
    with watch(loaded.model, loaded.tokenizer, bundle, collected) as watched:
        play(loaded, watched, conversations, tokens=tokens, batch_size=batch_size, seed=seed, on_reply=count)
    return collected.projections


def recorded_traffic(
    path: Path, loaded: Callable[[], LoadedModel], bundle: Bundle, scripts: Sequence[Script], **how: Any
) -> list[Projection]:
    """Traffic from `path`; where there is none yet, it is played as `collect_traffic` does, and kept there.

    Args:
        loaded: gives the model, where it is needed.
        how: keyword arguments of `collect_traffic`.
    """
    if not path.exists():
        write_traffic(path, collect_traffic(loaded(), bundle, scripts, **how))
    return read_traffic(path)


def calibrate_bundle(
    bundle: Bundle,
    projections: Sequence[Projection],
    scripts: Sequence[Script],
    *,
    shrinkage: float = 0.1,
    share: float = 0.08,
    readout: Readout | None = None,
) -> Bundle:
    """Fit readout, baseline and boundaries, and put them into the bundle; its id changes.

    Args:
        shrinkage: see `fit_readout`.
        share: share of the healthy conversations that may warn.
        readout: keep this one, and fit baseline and boundaries only.
    """
    kinds = by_kind(projections, scripts)
    healthy: Conversations = {kind: kinds[kind] for kind in HEALTHY if kind in kinds}
    drifting = {kind: drifted(kind, kinds[kind]) for kind in DRIFTING if kind in kinds}
    if readout is None:
        names = bundle.directions()[0]
        readout = fit_readout(healthy, drifting, coordinates=names, prompt=names, shrinkage=shrinkage)
    deployment = bundle.info.model.name
    config = calibrate(healthy, deployment=deployment, axis_id=projections[0].axis_id, readout=readout, share=share)
    source = {
        "scripts": len(scripts),
        "conversations": sum(map(len, kinds.values())),
        "responses": len(projections),
        "shrinkage": shrinkage,
        "share": share,
    }
    return with_calibration(bundle, readout, calibration_record(config, deployment, source))


def by_kind(projections: Sequence[Projection], scripts: Sequence[Script]) -> ByKind:
    """Responses by kind and conversation, in order of their turns."""
    kind_of = {script.id: script.kind for script in scripts}
    talks: dict[str, list[Projection]] = {}
    for projection in projections:
        talks.setdefault(projection.conversation_id, []).append(projection)
    kinds: ByKind = {}
    for conversation_id, talk in talks.items():
        kinds.setdefault(kind_of[conversation_id.rpartition(".")[0]], []).append(sorted(talk, key=lambda p: p.turn))
    return kinds


def drifted(kind: str, talks: list[list[Projection]]) -> list[list[Projection]]:
    """The turns of a drifting kind in which it drifts."""
    return [talk[SLOW_DRIFT_BEGINS:] for talk in talks] if kind == "slow_drift" else talks


def write_traffic(path: Path, projections: Sequence[Projection]) -> None:
    """Keep projections as gzipped JSON lines; equal ones give equal bytes."""
    path.write_bytes(gzip.compress(b"".join(encode(projection) + b"\n" for projection in projections), mtime=0))


def read_traffic(path: Path) -> list[Projection]:
    """Read what `write_traffic` wrote.

    Raises:
        CatalogueError: it can't be read.
        EventError: a line is not a projection.
    """
    try:
        lines = gzip.decompress(path.read_bytes()).splitlines()
    except (OSError, EOFError) as error:
        raise CatalogueError(f"traffic {path} can't be read: {error}", cure="restore the file") from error
    return [decode_projection(line) for line in lines]
