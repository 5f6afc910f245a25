"""What a configuration would have raised over recorded responses, and how well, where people have given verdicts.

It knows events, configurations and labels, and no files but the verdicts'. Several configurations are folded side by
side in one pass over the events.
"""

from __future__ import annotations

import csv
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.console import Console

from monitor.axis.geometry import auroc
from monitor.detect.baseline import DetectorConfig
from monitor.detect.budget import exact_interval, limit
from monitor.detect.conversation import ConversationState, Statistics, step
from monitor.detect.fit import unreachable
from monitor.errors import ConfigurationError, EventError
from monitor.events import Projection, Severity

__all__ = [
    "BUDGETS",
    "Label",
    "Outcome",
    "Proposal",
    "Scores",
    "compared",
    "print_compared",
    "propose",
    "read_verdicts",
    "replay",
    "score",
]

BUDGETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
Verdict = Literal["healthy", "warning", "critical"]
_DRIFTING = {"drifting", "true", "true alarm", "true_alarm", "yes", "1"}
_HEALTHY = {"healthy", "false", "false alarm", "false_alarm", "no", "0"}
_UNSURE = {"unsure", "unknown", ""}
_LISTED = 1000  # disagreements by name, in the report
_ORDER: dict[Severity, int] = {"info": 0, "warning": 1, "critical": 2}


class Outcome(NamedTuple):
    """One conversation under one configuration.

    Attributes:
        verdict: the worst severity that was raised.
        kinds: of its findings, sorted.
        first_turn: turn of the first warning; None where there was none.
        peak: the largest statistic over its boundary, with no episode ending early; 1 is the boundary. -inf where
            nothing was judged.
        responses: that were folded.
    """

    verdict: Verdict
    kinds: tuple[str, ...]
    first_turn: int | None
    peak: float
    responses: int


class Label(NamedTuple):
    """A person's verdict: whether a conversation drifted, and from which turn on, where they said so."""

    drifting: bool
    turn: int | None = None


class Scores(NamedTuple):
    """How well a configuration did on labelled conversations; intervals are Clopper-Pearson, 95 %.

    Attributes:
        drifting, healthy: how many were labelled so.
        detected, false_alarms: how many of these warned.
        detection_interval, false_alarm_interval: of the shares.
        auroc: of the peak, drifting against healthy; None where a side is empty.
        delay: turns from the labelled turn (else the first) to the first warning, of each detected conversation;
            negative where it warned before.
        unlabelled: conversations without a verdict, or an unsure one.
        unjudged: labelled conversations of which nothing was judged; they count for nothing else.
        unmatched: verdicts on conversations that are not there.
    """

    drifting: int
    healthy: int
    detected: int
    false_alarms: int
    detection_interval: tuple[float, float]
    false_alarm_interval: tuple[float, float]
    auroc: float | None
    delay: tuple[int, ...]
    unlabelled: int
    unjudged: int
    unmatched: int


class Proposal(NamedTuple):
    """What one budget would do, its boundary calibrated on the conversations labelled healthy.

    Attributes:
        budget: share of healthy conversations that may warn.
        factor: all boundaries times this.
        detection: share of the drifting ones that would warn.
        proposed: whether this is the one to take.
    """

    budget: float
    factor: float
    detection: float
    proposed: bool


class _Running:
    """What is remembered of one conversation under one configuration."""

    def __init__(self) -> None:
        self.state: ConversationState | None = None
        self.free: ConversationState | None = None
        self.worst: Severity = "info"
        self.kinds: set[str] = set()
        self.first_turn: int | None = None
        self.peak = -np.inf
        self.responses = 0

    def outcome(self) -> Outcome:
        verdict: Verdict = "healthy" if self.worst == "info" else self.worst
        return Outcome(verdict, tuple(sorted(self.kinds)), self.first_turn, float(self.peak), self.responses)


def replay(
    events: Iterable[Projection],
    configs: Sequence[DetectorConfig],
    on_poison: Callable[[Projection, EventError], None] | None = None,
) -> list[dict[str, Outcome]]:
    """Fold events, in log order, under each configuration.

    Args:
        on_poison: told of a response that a configuration can't judge, such as one without a coordinate that its
            readout names; the others go on. Without it the error is raised.

    Returns:
        Per configuration, the outcome of each conversation.
    """
    free = [unreachable(config) for config in configs]
    running: list[dict[str, _Running]] = [{} for _ in configs]
    for event in events:
        for config, unbounded, talks in zip(configs, free, running, strict=True):
            talk = talks.setdefault(event.conversation_id, _Running())
            try:
                _advance(talk, event, config, unbounded)
            except EventError as error:
                if on_poison is None:
                    raise
                on_poison(event, error)
    return [{id: talk.outcome() for id, talk in talks.items()} for talks in running]


def _advance(talk: _Running, event: Projection, config: DetectorConfig, unbounded: DetectorConfig) -> None:
    done = step(talk.state, event, config)
    seen = step(talk.free, event, unbounded)
    talk.state, talk.free = done.state, seen.state
    talk.responses += done.outcome == "folded"
    for finding in done.findings:
        talk.kinds.add(finding.kind)
        talk.worst = max(talk.worst, finding.severity, key=_ORDER.__getitem__)
        if finding.severity != "info" and talk.first_turn is None:
            talk.first_turn = finding.turn
    if seen.statistics is not None:
        boundaries = config.boundaries_of(event.deployment)
        limits = (getattr(boundaries, name) for name in Statistics._fields)
        talk.peak = max(talk.peak, *(value / limit for value, limit in zip(seen.statistics, limits, strict=True)))


def read_verdicts(path: Path) -> dict[str, Label | None]:
    """Verdicts from a CSV file with the columns `conversation_id` and `label`, and `turn` where drift began.

    Returns:
        By conversation; None is "unsure".

    Raises:
        ConfigurationError: no such file or columns, an unknown label, or two that contradict; all lines at once.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            columns = rows.fieldnames or []
            if missing := {"conversation_id", "label"} - set(columns):
                raise ConfigurationError(
                    f"{path} has no column {', '.join(sorted(missing))}; it has: {', '.join(columns) or 'none'}",
                    cure="give a CSV file with a header line: conversation_id,label and, if known, turn",
                )
            return _labels(path, list(enumerate(rows, start=2)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigurationError(f"verdicts {path} can't be read: {error}", cure="give a UTF-8 CSV file") from error


def _labels(path: Path, rows: Sequence[tuple[int, Mapping[str, Any]]]) -> dict[str, Label | None]:
    labels: dict[str, Label | None] = {}
    problems = []
    for line, row in rows:
        said, id = str(row["label"] or "").strip().casefold(), str(row["conversation_id"] or "").strip()
        turn = str(row.get("turn") or "").strip()
        label = None
        if not id:
            problems.append(f"line {line}: no conversation_id")
        elif said not in _DRIFTING | _HEALTHY | _UNSURE:
            problems.append(f"line {line}: label {said[:40]!r}")
        elif turn and not turn.isdecimal():
            problems.append(f"line {line}: turn {turn[:40]!r}")
        elif said not in _UNSURE:
            label = Label(said in _DRIFTING, int(turn) if turn else None)
        if id in labels and labels[id] != label:
            problems.append(f"line {line}: {id[:80]!r} already has another verdict")
        labels[id] = label
    if problems:
        raise ConfigurationError(
            f"{path} is not right:\n  - " + "\n  - ".join(problems[:50]),
            cure="labels are drifting, healthy or unsure (or true, false alarm); turn is a number from 0",
        )
    return labels


def score(outcomes: Mapping[str, Outcome], labels: Mapping[str, Label | None]) -> Scores:
    """Compare outcomes with verdicts."""
    found = {id: label for id, label in labels.items() if label is not None and id in outcomes}
    known = {id: label for id, label in found.items() if outcomes[id].responses}
    drifting = [(outcomes[id], label) for id, label in known.items() if label.drifting]
    healthy = [outcomes[id] for id, label in known.items() if not label.drifting]
    detected = [(outcome, label) for outcome, label in drifting if outcome.first_turn is not None]
    alarms = sum(outcome.first_turn is not None for outcome in healthy)
    peaks = [np.array([-outcome.peak for outcome in side]) for side in (healthy, [outcome for outcome, _ in drifting])]
    return Scores(
        drifting=len(drifting),
        healthy=len(healthy),
        detected=len(detected),
        false_alarms=alarms,
        detection_interval=exact_interval(len(detected), len(drifting)),
        false_alarm_interval=exact_interval(alarms, len(healthy)),
        auroc=auroc(*peaks) if drifting and healthy else None,
        delay=tuple(sorted((outcome.first_turn or 0) - (label.turn or 0) for outcome, label in detected)),
        unlabelled=len(outcomes) - len(found),
        unjudged=len(found) - len(known),
        unmatched=sum(id not in outcomes for id in labels),
    )


def propose(outcomes: Mapping[str, Outcome], labels: Mapping[str, Label | None]) -> list[Proposal]:
    """What each budget that the healthy ones can certify would detect, and which one to take.

    Proposed is the smallest budget that detects at least nine tenths of what the largest one detects: beyond it, more
    alarms buy little. Boundary and detection come from the same verdicts: calibrate on other conversations before
    you rely on it.
    """
    known = [
        (outcomes[id], label)
        for id, label in labels.items()
        if label is not None and id in outcomes and outcomes[id].responses
    ]
    healthy = [outcome.peak for outcome, label in known if not label.drifting]
    drifting = [outcome.peak for outcome, label in known if label.drifting]
    rows = []
    for budget in BUDGETS:
        try:
            factor = limit(healthy, budget).value
        except ConfigurationError:
            continue  # too few for this one
        rows.append((budget, factor, sum(peak >= factor for peak in drifting) / len(drifting) if drifting else 0.0))
    enough = 0.9 * max((detection for _, _, detection in rows), default=0.0)
    first = next((budget for budget, _, detection in rows if detection >= enough and detection > 0), None)
    return [Proposal(budget, factor, detection, budget == first) for budget, factor, detection in rows]


def compared(
    outcomes: Mapping[str, Mapping[str, Outcome]],
    configs: Mapping[str, DetectorConfig],
    labels: Mapping[str, Label | None] | None = None,
) -> dict[str, Any]:
    """Configurations side by side, for people and for scripts.

    Args:
        outcomes, configs: by the configuration's name.
        labels: people's verdicts, where there are any.
    """
    found: dict[str, Any] = {"configs": {}, "disagreements": {}}
    for name, rows in outcomes.items():
        verdicts = Counter(row.verdict if row.responses else "unjudged" for row in rows.values())
        entry: dict[str, Any] = {
            "config_id": configs[name].config_id,
            "axis_id": configs[name].axis_id,
            "deployments": sorted(configs[name].baselines),
            "conversations": len(rows),
            "responses": sum(row.responses for row in rows.values()),
            "verdicts": dict(sorted(verdicts.items())),
            "kinds": dict(sorted(Counter(kind for row in rows.values() for kind in row.kinds).items())),
        }
        if labels is not None:
            entry["scores"] = score(rows, labels)._asdict()
            entry["proposals"] = [proposal._asdict() for proposal in propose(rows, labels)]
        found["configs"][name] = entry
    for one, other in itertools.combinations(outcomes, 2):
        warned = [{id for id, row in outcomes[name].items() if row.first_turn is not None} for name in (one, other)]
        found["disagreements"][f"{one} | {other}"] = {
            "both": len(warned[0] & warned[1]),
            "first_only": sorted(warned[0] - warned[1])[:_LISTED],
            "second_only": sorted(warned[1] - warned[0])[:_LISTED],
            "first_only_count": len(warned[0] - warned[1]),
            "second_only_count": len(warned[1] - warned[0]),
        }
    return found


def print_compared(report: Mapping[str, Any], console: Console) -> None:
    """The report on a terminal."""

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    for name, row in report["configs"].items():
        verdicts = ", ".join(f"{count} {verdict}" for verdict, count in row["verdicts"].items())
        say(f"{name} (config {row['config_id'][:12]}): {row['conversations']} conversations: {verdicts or 'none'}")
        if row["conversations"] and not row["responses"]:
            say(
                f"  It judged nothing: it knows the deployments {', '.join(row['deployments'])}, of axis "
                f"{row['axis_id'][:12]}. Calibrate these conversations' own, or pass --deployment with one of them."
            )
        if row["kinds"]:
            say("  " + ", ".join(f"{kind} {count}" for kind, count in row["kinds"].items()))
        if scores := row.get("scores"):
            _print_scores(scores, say)
            for proposal in row["proposals"]:
                mark = "  <- proposed" if proposal["proposed"] else ""
                say(
                    f"    budget {proposal['budget']:.1%}: boundaries x {proposal['factor']:.2f}, detects "
                    f"{proposal['detection']:.0%}{mark}"
                )
            if not row["proposals"]:
                say("    too few conversations are labelled healthy to propose a budget")
    for pair, row in report["disagreements"].items():
        say(
            f"{pair}: both warn in {row['both']}, only the first in {row['first_only_count']}, only the second in "
            f"{row['second_only_count']}"
        )
        for which in ("first_only", "second_only"):
            if row[which]:
                say(f"  {which.replace('_', ' ')}: {', '.join(row[which][:10])}")


def _print_scores(scores: Mapping[str, Any], say: Callable[[str], None]) -> None:
    for count, of, interval, what in (
        ("detected", "drifting", "detection_interval", "of the drifting ones warned"),
        ("false_alarms", "healthy", "false_alarm_interval", "of the healthy ones warned (false alarms)"),
    ):
        if scores[of]:
            low, high = scores[interval]
            say(f"  {scores[count]} of {scores[of]} {what}: {scores[count] / scores[of]:.1%} [{low:.1%}, {high:.1%}]")
    if scores["auroc"] is not None:
        say(f"  AUROC {scores['auroc']:.3f}")
    if scores["delay"]:
        say(
            f"  delay: median {np.median(scores['delay']):+.0f} turns, 90th percentile "
            f"{np.percentile(scores['delay'], 90):+.0f}"
        )
    for what, text in (
        ("unlabelled", "conversations without a verdict"),
        ("unjudged", "labelled conversations of which nothing was judged"),
        ("unmatched", "verdicts on conversations that are not there"),
    ):
        if scores[what]:
            say(f"  {scores[what]} {text}")
