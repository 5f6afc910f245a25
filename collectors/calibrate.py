"""Calibrates a bundle: what it reads, what healthy responses look like, and where the alarm lies.

It joins played conversations, the witness and the fits of `monitor.detect`. Three splits, each used once: *develop* for
the traits, the readout, the baseline and the shape of the boundaries; *calibrate* for the boundaries alone; *test* for
nothing here.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from collectors.logs import Logged, read_log
from collectors.models import LoadedModel
from collectors.traffic import DRIFTING, HEALTHY, Script, play
from collectors.traits import Labels, learn_traits
from collectors.witness import Witness
from monitor.axis.bundle import Bundle, with_calibration
from monitor.detect.configure import calibration_record
from monitor.detect.fit import calibrate, conversation_peaks, unreachable
from monitor.errors import CatalogueError, ConfigurationError
from monitor.events import Projection, encode
from monitor.origin import Skipped

__all__ = [
    "TRAFFIC_FILE",
    "ByKind",
    "by_kind",
    "calibrate_bundle",
    "learn_and_calibrate",
    "played",
    "read_conversations",
    "write_conversations",
    "write_traffic",
]

TRAFFIC_FILE = "develop.jsonl.gz"
CHUNK = 40  # conversations scored together: what progress counts in

ByKind = dict[str, list[list[Projection]]]
Progress = Callable[[str, int, int], None]


def played(
    loaded: LoadedModel,
    scripts: Sequence[Script],
    *,
    tokens: int = 48,
    batch_size: int = 40,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, list[dict[str, str]]]:
    """Play every script once, unwatched; the messages by script id. Scripts of one length go together."""
    ordered = sorted(scripts, key=lambda script: (len(script.turns), script.id))
    total, done = sum(len(script.turns) for script in ordered), 0
    said: dict[str, list[dict[str, str]]] = {}
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        talks = [(script.id, script) for script in batch]
        said |= play(loaded, None, talks, tokens=tokens, batch_size=batch_size, seed=seed + start)
        done += sum(len(script.turns) for script in batch)
        progress(done, total)
    return {script.id: said[script.id] for script in scripts}


def write_conversations(
    path: Path, scripts: Sequence[Script], said: Mapping[str, list[dict[str, str]]], model: str
) -> None:
    """Keep played conversations as gzipped JSON lines that an audit can read; equal ones give equal bytes."""
    lines = [
        json.dumps(
            {
                "id": script.id,
                "model": model,
                "kind": script.kind,
                "family": script.family,
                "messages": said[script.id],
            },
            ensure_ascii=False,
        )
        for script in scripts
    ]
    path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode(), mtime=0))


def read_conversations(path: Path, scripts: Sequence[Script], deployment: str) -> list[Logged]:
    """Played conversations, which must be exactly these scripts', in their order.

    Raises:
        CatalogueError: a conversation is missing, can't be read, or its user says something else.
    """
    read = {
        item.origin.conversation_id: item
        for item in read_log(str(path), deployment=deployment)
        if not isinstance(item, Skipped)
    }
    wrong = [
        script.id
        for script in scripts
        if script.id not in read
        or script.turns
        != tuple(message["content"] for message in read[script.id].messages if message["role"] == "user")
    ]
    if wrong:
        raise CatalogueError(
            f"{path} does not hold these scripts as they are: {', '.join(wrong[:5])}"
            + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""),
            cure="play the scripts again, into an empty folder",
        )
    return [read[script.id] for script in scripts]


def learn_and_calibrate(
    loaded: LoadedModel,
    bundle: Bundle,
    develop: Sequence[Logged],
    calibration: Sequence[Logged],
    kinds: Mapping[str, str],
    labels: Labels,
    *,
    budget: float = 0.01,
    critical_budget: float | None = None,
    progress: Progress = lambda *_: None,
) -> tuple[Bundle, list[Projection]]:
    """Traits and readout from `develop`, baseline from its healthy conversations, boundaries from `calibration`.

    Args:
        kinds: kind of conversation by conversation id.
        labels: see `learn_traits`; may be empty.

    Returns:
        The calibrated bundle, and the development projections as it measures them.

    Raises:
        ConfigurationError: as `learn_traits` and `calibrate_bundle`.
    """
    reader = Witness(loaded, bundle)
    residuals = []
    for start in range(0, len(develop), CHUNK):
        residuals += reader.residuals(develop[start : start + CHUNK])
        progress("learning the traits", min(start + CHUNK, len(develop)), len(develop))
    learned = learn_traits(bundle, residuals, kinds, labels)
    # Scored anew: the lowest window of a response is found by the readout.
    reader = Witness(loaded, learned)
    seen = _scored(reader, develop, "measuring develop", progress)
    healthy = _scored(reader, calibration, "measuring calibrate", progress)
    calibrated = calibrate_bundle(
        learned, by_kind(seen, kinds), talks_of(healthy), budget=budget, critical_budget=critical_budget
    )
    return calibrated, seen


def calibrate_bundle(
    bundle: Bundle,
    develop: ByKind,
    calibration: Sequence[Sequence[Projection]],
    *,
    budget: float = 0.01,
    critical_budget: float | None = None,
) -> Bundle:
    """Put baseline and boundaries for the bundle's readout into it; its id changes.

    The record keeps which share of the drifting development conversations reaches the boundary: what an operator may
    expect to be detected.

    Args:
        develop: conversations by kind; the healthy ones give the baseline and the boundaries' shape.
        calibration: healthy conversations that were used for nothing else.
        budget, critical_budget: shares of healthy conversations that may warn, and become critical.

    Raises:
        ConfigurationError: the bundle has no readout; or as `monitor.detect.fit.calibrate`.
    """
    if bundle.info.readout is None:
        raise ConfigurationError("this bundle has no readout", cure="learn one first, with `learn_traits`")
    if not calibration:
        raise ConfigurationError("there is no calibration conversation", cure="give healthy conversations")
    deployment = bundle.info.model.name
    config = calibrate(
        [talk for kind in HEALTHY for talk in develop.get(kind, [])],
        calibration,
        deployment=deployment,
        axis_id=calibration[0][0].axis_id,
        readout=bundle.info.readout,
        budget=budget,
        critical_budget=critical_budget,
    )
    free, limits = unreachable(config), config.boundaries
    bounds = (limits.level, limits.drop, limits.cusum, limits.dip)
    drifting = [talk for kind in DRIFTING for talk in develop.get(kind, [])]
    peaks = [conversation_peaks(talk, free) for talk in drifting]
    reached = sum(max(value / bound for value, bound in zip(peak, bounds, strict=True)) >= 1.0 for peak in peaks)
    source = {
        "develop_conversations": sum(map(len, develop.values())),
        "calibration_conversations": len(calibration),
        "drifting_development_conversations": len(drifting),
        "share_of_these_that_warn": round(reached / len(drifting), 4) if drifting else None,
    }
    return with_calibration(bundle, bundle.info.readout, calibration_record(config, deployment, source))


def by_kind(projections: Sequence[Projection], kinds: Mapping[str, str]) -> ByKind:
    """Responses by kind and conversation, in order of their turns."""
    found: ByKind = {}
    for talk in talks_of(projections):
        found.setdefault(kinds[talk[0].conversation_id], []).append(talk)
    return found


def talks_of(projections: Sequence[Projection]) -> list[list[Projection]]:
    """Responses by conversation, each in order of its turns."""
    talks: dict[str, list[Projection]] = {}
    for projection in projections:
        talks.setdefault(projection.conversation_id, []).append(projection)
    return [sorted(talk, key=lambda projection: projection.turn) for talk in talks.values()]


def write_traffic(path: Path, projections: Sequence[Projection]) -> None:
    """Keep projections as gzipped JSON lines; equal ones give equal bytes."""
    path.write_bytes(gzip.compress(b"".join(encode(projection) + b"\n" for projection in projections), mtime=0))


def _scored(reader: Witness, conversations: Sequence[Logged], what: str, progress: Progress) -> list[Projection]:
    found: list[Projection] = []
    for start in range(0, len(conversations), CHUNK):
        found += reader.score(conversations[start : start + CHUNK]).projections
        progress(what, min(start + CHUNK, len(conversations)), len(conversations))
    return found
