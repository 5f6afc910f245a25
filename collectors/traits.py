"""Learns two directions from development traffic: what of a reply, and of the moment before it, tells an Assistant.

The Assistant Axis is where personas differ from the Assistant; a conversation can also leave the Assistant without
coming near any of them, and a poem comes near to all. So the discriminant is looked for in the whole residual stream at
the bundle's layer, of the reply's mean and of the last prompt token together, and its two halves become the bundle's
traits `anchored_reply` and `anchored_prompt`: high is the Assistant, low is drift.

It learns from what the *model* did, where labels say so: a reply that kept to the Assistant although the user pulled
is healthy. Without that, a detector learns to read the user (docs/detection.md).
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from collectors.traffic import DRIFTING, HEALTHY, SLOW_DRIFT_BEGINS
from collectors.witness import Residual
from monitor.axis.bundle import Bundle, with_traits
from monitor.axis.readout import Readout
from monitor.detect.fit import Group, fit_direction
from monitor.errors import CatalogueError

__all__ = [
    "ASSISTANT",
    "DRIFTED",
    "PROMPT",
    "REPLY",
    "Labels",
    "drifted_turns",
    "label_of",
    "learn_traits",
    "read_labels",
    "weights_of",
]

REPLY, PROMPT = "anchored_reply", "anchored_prompt"
# What a label of a reply says; in between (1) and can't tell (9) teach nothing.
ASSISTANT, DRIFTED = 0, 2
Labels = Mapping[tuple[str, int], int]
Turn = TypeVar("Turn")

# With 1,152 features and a few thousand replies, half of what the covariance says beyond its diagonal is believed:
# chosen on the development split, topic families held out (docs/detection.md).
SHRINKAGE = 0.5
# Replies that kept to the Assistant under pressure, beside those that nobody pulled at.
STEADFAST = 0.15
FOLDS = 5
# More replies of one kind than this make it no heavier.
LARGEST_GROUP = 60


def learn_traits(bundle: Bundle, residuals: Sequence[Residual], kinds: Mapping[str, str], labels: Labels) -> Bundle:
    """Put the two traits and the readout made of them into a bundle; its id changes.

    Args:
        residuals: of development conversations, measured with this bundle's layer.
        kinds: kind of conversation by conversation id.
        labels: by conversation id and turn: 0 the Assistant, 1 in between, 2 drifted, 9 can't tell. Conversations
            without labels count as their kind says: all of a healthy one as 0, all of a drifting one as 2, save the
            first turns of a slow drift.

    Raises:
        ConfigurationError: a side is empty.
    """
    weights = weights_of(
        [np.concatenate([one.reply, one.prompt]) for one in residuals],
        [(kinds[one.conversation_id], label_of(one, kinds, labels)) for one in residuals],
    )
    reply, prompt = np.split(weights, 2)
    readout = Readout(
        coordinates={f"trait:{REPLY}": float(f"{np.linalg.norm(reply):.6g}")},
        prompt={f"trait:{PROMPT}": float(f"{np.linalg.norm(prompt):.6g}")},
    )
    return with_traits(bundle, {REPLY: reply, PROMPT: prompt}, readout)


def held_out_values(
    residuals: Sequence[Residual], kinds: Mapping[str, str], families: Mapping[str, str], labels: Labels
) -> dict[str, list[float]]:
    """What a readout gives each reply that learned nothing from its topic family, five folds; by conversation.

    Raises:
        ConfigurationError: a side is empty in a fold.
    """
    rows = [np.concatenate([one.reply, one.prompt]) for one in residuals]
    known = [(kinds[one.conversation_id], label_of(one, kinds, labels)) for one in residuals]
    names = sorted(set(families.values()))
    np.random.default_rng(0).shuffle(names)
    fold_of = {name: place % FOLDS for place, name in enumerate(names)}
    folds = [fold_of[families[one.conversation_id]] for one in residuals]
    values: dict[str, list[float]] = {}
    weights = {}
    for fold in set(folds):
        train = [i for i, other in enumerate(folds) if other != fold]
        weights[fold] = weights_of([rows[i] for i in train], [known[i] for i in train])
    for one, row, fold in zip(residuals, rows, folds, strict=True):
        values.setdefault(one.conversation_id, []).append(float(row @ weights[fold]))
    return values


def label_of(residual: Residual, kinds: Mapping[str, str], labels: Labels) -> int | None:
    """The reply's label, or what its kind of conversation says."""
    labelled = labels.get((residual.conversation_id, residual.turn))
    if labelled is not None:
        return labelled
    kind = kinds[residual.conversation_id]
    if kind in HEALTHY:
        return ASSISTANT
    return DRIFTED if kind != "slow_drift" or residual.turn >= SLOW_DRIFT_BEGINS else None


def drifted_turns(kind: str, talk: Sequence[Turn]) -> Sequence[Turn]:
    """The turns of a drifting script in which its user pulls."""
    return talk[SLOW_DRIFT_BEGINS:] if kind == "slow_drift" else talk


def weights_of(
    features: Sequence[NDArray[np.floating]],
    known: Sequence[tuple[str, int | None]],
    *,
    shrinkage: float = SHRINKAGE,
    steadfast: float = STEADFAST,
) -> NDArray[np.floating]:
    """The discriminant [d] over replies, from their kinds and labels.

    Args:
        features: [d] each.
        known: kind of conversation and label of each.
        steadfast: weight of the Assistant's replies in drifting conversations.
    """
    groups: dict[tuple[str, int], list[NDArray[np.floating]]] = {}
    for row, (kind, label) in zip(features, known, strict=True):
        if label == ASSISTANT or (label == DRIFTED and kind in DRIFTING):
            groups.setdefault((kind, label), []).append(np.asarray(row, dtype=np.float64))
    sides: dict[int, list[Group]] = {ASSISTANT: [], DRIFTED: []}
    for (kind, label), rows in sorted(groups.items()):
        weight = min(len(rows), LARGEST_GROUP) * (steadfast if label == ASSISTANT and kind in DRIFTING else 1.0)
        if weight:
            sides[label].append(Group(np.stack(rows), weight))
    return fit_direction(sides[ASSISTANT], sides[DRIFTED], shrinkage=shrinkage)


def read_labels(path: Path) -> dict[tuple[str, int], int]:
    """Labels of replies from a CSV file with the columns `conversation_id`, `turn` and `label`.

    Raises:
        CatalogueError: it can't be read, or a line is wrong; all lines at once.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CatalogueError(f"labels {path} can't be read: {error}", cure="give a UTF-8 CSV file") from error
    labels, problems = {}, []
    for line, row in enumerate(rows, start=2):
        try:
            label = int(row["label"])
            if label not in (0, 1, 2, 9):
                raise ValueError
            labels[row["conversation_id"], int(row["turn"])] = label
        except (KeyError, TypeError, ValueError):
            problems.append(str(line))
    if problems or not labels:
        raise CatalogueError(
            f"labels {path}: " + (f"lines {', '.join(problems[:50])} are wrong" if problems else "it is empty"),
            cure="give a header line and rows of conversation_id,turn,label with label 0, 1, 2 or 9",
        )
    return labels
