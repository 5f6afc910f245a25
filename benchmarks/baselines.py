"""What a monitor could be without this project: detectors to compare with, each given its best fair chance.

Every one answers per conversation: a peak (large is drift), and the turn of its first warning. Those with a threshold
to choose get it as Anchorwatch does, from the calibrate split at the same budget; textbook ones keep the textbook's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from river.drift import ADWIN, KSWIN, PageHinkley
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline

from monitor.axis.geometry import auroc
from monitor.detect.budget import limit

__all__ = ["Answer", "Series", "bag_of_words", "river_detectors", "textbook"]

# Per conversation its turns' numbers; low is drift.
Series = Mapping[str, Sequence[float]]


class Answer(NamedTuple):
    """One detector's word on some conversations.

    Attributes:
        peaks: by conversation; None where the detector only says yes or no.
        first_turn: index of the first warning, or None, by conversation.
        scores: per turn, large is drift; empty where it has none.
    """

    peaks: dict[str, float] | None
    first_turn: dict[str, int | None]
    scores: dict[str, list[float]]


def textbook(z: Series) -> dict[str, Answer]:
    """A fixed threshold at three sigma, and EWMA (0.2, 3 sigma) with CUSUM (0.5, 5), as the books have them."""
    fixed = {id: [-value for value in values] for id, values in z.items()}
    both = {id: _ewma_cusum(values) for id, values in z.items()}
    return {
        "fixed threshold, z < -3": _answer(fixed, 3.0),
        "EWMA + CUSUM, textbook": _answer(both, 1.0),
    }


def _ewma_cusum(values: Sequence[float]) -> list[float]:
    """The larger of both charts' statistics over its limit, per turn."""
    weight, ewma, cusum, found = 0.2, 0.0, 0.0, []
    for turn, value in enumerate(values, start=1):
        ewma = weight * value + (1 - weight) * ewma
        cusum = max(0.0, cusum - value - 0.5)
        sigma = (weight / (2 - weight) * (1 - (1 - weight) ** (2 * turn))) ** 0.5
        found.append(max(-ewma / (3 * sigma), cusum / 5))
    return found


def river_detectors(z: Series, develop: Series, drifting: Callable[[str], bool]) -> dict[str, Answer]:
    """ADWIN, Page-Hinkley and KSWIN, at defaults and tuned: the setting that detects most of the drifting development
    conversations while warning in at most 1 % of the healthy ones (two of 150).
    """
    grids: dict[str, tuple[Callable[..., Any], list[dict[str, Any]]]] = {
        "ADWIN": (
            ADWIN,
            _grid(delta=[0.002, 0.05, 0.2, 0.5, 0.9], clock=[1], min_window_length=[1, 2], grace_period=[1, 2]),
        ),
        "PageHinkley": (
            PageHinkley,
            _grid(
                min_instances=[1, 2, 3],
                threshold=[1, 2, 3, 4, 6, 8, 10, 14],
                delta=[0.0, 0.25, 0.5, 1.0],
                mode=["down"],
            ),
        ),
        "KSWIN": (KSWIN, _grid(alpha=[0.005, 0.05, 0.2], window_size=[6, 8], stat_size=[2, 3], seed=[0])),
    }
    defaults = {"ADWIN": {}, "PageHinkley": {}, "KSWIN": {"seed": 0}}
    answers = {}
    for name, (make, grid) in grids.items():
        answers[f"river {name}, default"] = _run(make, defaults[name], z)
        best, most = grid[0], -1.0
        for setting in grid:
            said = _run(make, setting, develop).first_turn
            alarms = np.mean([turn is not None for id, turn in said.items() if not drifting(id)])
            found = float(np.mean([turn is not None for id, turn in said.items() if drifting(id)]))
            if alarms <= 2 / 150 and found > most:
                best, most = setting, found
        answers[f"river {name}, tuned"] = _run(make, best, z)
    return answers


def _run(make: Callable[..., Any], setting: Mapping[str, Any], series: Series) -> Answer:
    first: dict[str, int | None] = {}
    for id, values in series.items():
        detector, first[id] = make(**setting), None
        for turn, value in enumerate(values):
            detector.update(value)
            if detector.drift_detected:
                first[id] = turn
                break
    return Answer(None, first, {})


def bag_of_words(
    asked: Mapping[str, Sequence[str]],
    develop: Mapping[str, Sequence[str]],
    calibrate: Mapping[str, Sequence[str]],
    drifting: Callable[[str], bool],
    family: Callable[[str], str],
    budget: float,
) -> Answer:
    """Logistic regression on TF-IDF of the user's turns: it reads what was asked, and nothing of the answers.

    Its strength is chosen on the development split, topic families held out; a conversation's score is the EWMA of its
    turns, as in Anchorwatch.
    """
    rows = [(id, turn) for id, turns in develop.items() for turn in turns]
    texts, truth = [turn for _, turn in rows], np.array([drifting(id) for id, _ in rows])
    groups = [family(id) for id, _ in rows]

    def made(strength: float) -> Any:
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
        return make_pipeline(words, LogisticRegression(C=strength, class_weight="balanced", max_iter=2000))

    def held_out(strength: float) -> float:
        scores = np.zeros(len(texts))
        for train, held in GroupKFold(5).split(texts, truth, groups):
            model = made(strength).fit([texts[i] for i in train], truth[train])
            scores[held] = model.decision_function([texts[i] for i in held])
        return float(auroc(-scores[~truth], -scores[truth]))

    model = made(max([0.1, 1.0, 10.0, 100.0], key=held_out)).fit(texts, truth)

    def series(conversations: Mapping[str, Sequence[str]]) -> dict[str, list[float]]:
        found = {}
        for id, turns in conversations.items():
            level, values = None, []
            for value in model.decision_function(list(turns)):
                level = float(value) if level is None else 0.4 * float(value) + 0.6 * level
                values.append(level)
            found[id] = values
        return found

    healthy = [max(values) for values in series(calibrate).values()]
    # Logits may be negative; a boundary must not be, so they are moved by a constant first.
    shift = -min(healthy)
    boundary = limit([value + shift for value in healthy], budget).value - shift
    return _answer(series(asked), boundary)


def _answer(scores: Mapping[str, Sequence[float]], boundary: float) -> Answer:
    first = {id: next((i for i, value in enumerate(row) if value >= boundary), None) for id, row in scores.items()}
    peaks = {id: max(row, default=-np.inf) for id, row in scores.items()}
    return Answer(peaks, first, {id: list(row) for id, row in scores.items()})


def _grid(**choices: Sequence[Any]) -> list[dict[str, Any]]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
