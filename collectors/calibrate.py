"""Calibrates a bundle: what it reads, what healthy responses look like, and where the alarm lies.

It joins played conversations, the witness and the fits of `monitor.detect`. Three splits, each used once: *develop* for
the traits, the readout, the baseline and the shape of the boundaries; *calibrate* for the boundaries alone; *test* for
nothing here.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path

from collectors.logs import Logged, read_log
from collectors.models import LoadedModel
from collectors.traffic import DRIFTING, HEALTHY, Script, play
from collectors.traits import Labels, held_out_values, learn_traits
from collectors.witness import Witness
from monitor.axis.bundle import Bundle, with_calibration
from monitor.detect.baseline import fit_baseline, moved
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
    "script_id",
    "talks_of",
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
    samples: int = 1,
    tokens: int = 48,
    batch_size: int = 40,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, list[dict[str, str]]]:
    """Play every script, unwatched, `samples` times; scripts of one length go together.

    Returns:
        Messages by conversation id: the script's id, then `<script id>.1`, `<script id>.2`, …
    """
    ordered = sorted(scripts, key=lambda script: (len(script.turns), script.id))
    total, done = samples * sum(len(script.turns) for script in ordered), 0
    said: dict[str, list[dict[str, str]]] = {}
    for sample in range(samples):
        for start in range(0, len(ordered), batch_size):
            batch = ordered[start : start + batch_size]
            talks = [(script.id if sample == 0 else f"{script.id}.{sample}", script) for script in batch]
            drawn = seed + start + 1000 * sample
            said |= play(loaded, None, talks, tokens=tokens, batch_size=batch_size, seed=drawn)
            done += sum(len(script.turns) for script in batch)
            progress(done, total)
    return said


def write_conversations(
    path: Path, scripts: Sequence[Script], said: Mapping[str, list[dict[str, str]]], model: str
) -> None:
    """Keep played conversations as gzipped JSON lines that an audit can read; equal ones give equal bytes."""
    of = {script.id: script for script in scripts}
    lines = []
    for id, messages in said.items():
        script = of[script_id(id, of)]
        row = {"id": id, "model": model, "kind": script.kind, "family": script.family, "messages": messages}
        lines.append(json.dumps(row, ensure_ascii=False))
    path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode(), mtime=0))


def script_id(conversation_id: str, known: Container[str]) -> str:
    """The script that a conversation played: its own id, or that without the number of the sample."""
    return conversation_id if conversation_id in known else conversation_id.rpartition(".")[0]


def read_conversations(path: Path, scripts: Sequence[Script], deployment: str) -> list[Logged]:
    """Played conversations, in the file's order; each script must be there, and its user say exactly what it says.

    Raises:
        CatalogueError: a conversation is missing, can't be read, or its user says something else.
    """
    of = {script.id: script for script in scripts}
    read = [item for item in read_log(str(path), deployment=deployment) if not isinstance(item, Skipped)]
    names = [script_id(item.origin.conversation_id, of) for item in read]
    wrong = {
        item.origin.conversation_id
        for item, name in zip(read, names, strict=True)
        # Joined, since the reader joins what stands on both sides of an empty reply.
        if name not in of or "\n\n".join(of[name].turns) != "\n\n".join(_asked(item))
    }
    if amiss := sorted(wrong | of.keys() - set(names)):
        raise CatalogueError(
            f"{path} does not hold these scripts as they are: {', '.join(amiss[:5])}"
            + (f" and {len(amiss) - 5} more" if len(amiss) > 5 else ""),
            cure="play the scripts again, into an empty folder",
        )
    return read


def learn_and_calibrate(
    loaded: LoadedModel,
    bundle: Bundle,
    develop: Sequence[Logged],
    calibration: Sequence[Logged],
    scripts: Sequence[Script],
    labels: Labels,
    *,
    budget: float = 0.01,
    critical_budget: float | None = None,
    progress: Progress = lambda *_: None,
) -> tuple[Bundle, list[Projection]]:
    """Traits and readout from `develop`, baseline from its healthy conversations, boundaries from `calibration`.

    Args:
        scripts: those of `develop`.
        labels: see `learn_traits`; may be empty.

    Returns:
        The calibrated bundle, and the projections of each development script's first play as it measures them.

    Raises:
        ConfigurationError: as `learn_traits` and `calibrate_bundle`.
    """
    reader = Witness(loaded, bundle)
    residuals = []
    for start in range(0, len(develop), CHUNK):
        residuals += reader.residuals(develop[start : start + CHUNK])
        progress("learning the traits", min(start + CHUNK, len(develop)), len(develop))
    of = {script.id: script for script in scripts}
    names = {one.origin.conversation_id: script_id(one.origin.conversation_id, of) for one in develop}
    kinds = {id: of[name].kind for id, name in names.items()}
    learned = learn_traits(bundle, residuals, kinds, labels)
    # Where it was learned, it flatters itself; what is healthy it must learn from families that it did not see.
    families = {id: of[name].family or name for id, name in names.items()}
    unseen = held_out_values(residuals, kinds, families, labels)
    # Scored anew: the lowest window of a response is found by the readout. One play of each script is enough here.
    reader = Witness(loaded, learned)
    first = [one for one in develop if one.origin.conversation_id in of]
    seen = _scored(reader, first, "measuring develop", progress)
    healthy = _scored(reader, calibration, "measuring calibrate", progress)
    calibrated = calibrate_bundle(
        learned,
        by_kind(seen, kinds),
        talks_of(healthy),
        budget=budget,
        critical_budget=critical_budget,
        unseen=[unseen[talk] for talk in unseen if kinds[talk] in HEALTHY],
    )
    return calibrated, seen


def calibrate_bundle(
    bundle: Bundle,
    develop: ByKind,
    calibration: Sequence[Sequence[Projection]],
    *,
    budget: float = 0.01,
    critical_budget: float | None = None,
    unseen: Sequence[Sequence[float]] | None = None,
) -> Bundle:
    """Put baseline and boundaries for the bundle's readout into it; its id changes.

    The record keeps which share of the drifting development conversations reaches the boundary: what an operator may
    expect to be detected.

    Args:
        develop: conversations by kind; the healthy ones give the baseline and the boundaries' shape.
        calibration: healthy conversations that were used for nothing else.
        budget, critical_budget: shares of healthy conversations that may warn, and become critical.
        unseen: readouts of healthy conversations by a readout that had not learned from them; where the bundle's has
            learned from `develop`, the baseline is moved to them.

    Raises:
        ConfigurationError: the bundle has no readout; or as `monitor.detect.fit.calibrate`.
    """
    if bundle.info.readout is None:
        raise ConfigurationError("this bundle has no readout", cure="learn one first, with `learn_traits`")
    if not calibration:
        raise ConfigurationError("there is no calibration conversation", cure="give healthy conversations")
    deployment = bundle.info.model.name
    healthy = [talk for kind in HEALTHY for talk in develop.get(kind, [])]
    axis_id = calibration[0][0].axis_id
    baseline = fit_baseline(deployment, axis_id, healthy, bundle.info.readout)
    config = calibrate(
        healthy,
        calibration,
        deployment=deployment,
        axis_id=axis_id,
        readout=bundle.info.readout,
        baseline=moved(baseline, unseen) if unseen else baseline,
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


def _asked(conversation: Logged) -> list[str]:
    return [message["content"] for message in conversation.messages if message["role"] == "user"]


def _scored(reader: Witness, conversations: Sequence[Logged], what: str, progress: Progress) -> list[Projection]:
    found: list[Projection] = []
    for start in range(0, len(conversations), CHUNK):
        found += reader.score(conversations[start : start + CHUNK]).projections
        progress(what, min(start + CHUNK, len(conversations)), len(conversations))
    return found
