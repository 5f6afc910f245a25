"""The geometry of personas: the axis, the persona axis, persona space, and how well a direction separates.

Pure numpy on arrays of activations; it knows nothing of models, files or conversations. "Layer output" is the residual
stream after a decoder layer; a "role vector" is the mean of it over all response tokens of one role's rollouts
(arXiv 2601.10387, "Mapping persona space"). The axis points towards the Assistant.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "PersonaSpace",
    "assistant_axis",
    "auroc",
    "covariance_matched_directions",
    "persona_space",
    "project_out",
    "split_half_cosine",
    "unit",
    "without_question_effects",
]

Floats = NDArray[np.floating]


def unit(vectors: Floats) -> Floats:
    """Scale vectors [..., hidden] to length 1; a zero vector stays zero."""
    # By a power of two first, which is exact: the squares of very small or large numbers would lose their digits.
    _, exponents = np.frexp(np.abs(vectors).max(axis=-1, keepdims=True))
    scaled = np.ldexp(vectors, -exponents)
    lengths = np.linalg.norm(scaled, axis=-1, keepdims=True)
    return np.asarray(scaled / np.where(lengths > 0, lengths, 1.0))


def assistant_axis(default_mean: Floats, role_vectors: Floats) -> Floats:
    """mean(default Assistant) - mean(role vectors).

    Args:
        default_mean: [layers, hidden].
        role_vectors: [roles, layers, hidden]; every role weighs the same.

    Returns:
        [layers, hidden], not normalised; pointing towards the Assistant.
    """
    return np.asarray(default_mean - role_vectors.mean(axis=0))


def project_out(vectors: Floats, directions: Floats) -> Floats:
    """Remove from each vector what lies in the span of `directions`, layer by layer.

    Args:
        vectors: [layers, hidden].
        directions: [layers, n, hidden].
    """
    result = np.empty_like(vectors)
    for layer, (vector, span) in enumerate(zip(vectors, directions, strict=True)):
        basis = _orthonormal(span)
        result[layer] = vector - (vector @ basis.T) @ basis
    return result


def _orthonormal(rows: Floats) -> Floats:
    """Orthonormal rows [rank, hidden] with the span of `rows` [n, hidden]: fewer than n where some depend on others."""
    if len(rows) == 0:
        return rows
    _, lengths, basis = np.linalg.svd(rows.astype(np.float64), full_matrices=False)
    # What float32 directions can't tell from zero is rounding, and would point anywhere.
    return np.asarray(basis[lengths > lengths[0] * np.finfo(np.float32).eps * max(rows.shape)])


@dataclass(frozen=True)
class PersonaSpace:
    """Principal components of mean-centred role vectors at one layer.

    Attributes:
        mean: [hidden].
        basis: [components, hidden], orthonormal rows, largest variance first.
        singular_values: [min(roles, hidden)]; their squares are proportional to variance.
    """

    mean: Floats
    basis: Floats
    singular_values: Floats

    def components_for(self, share: float) -> int:
        """How many components hold `share` of the variance."""
        variance = np.cumsum(self.singular_values**2)
        return int(np.searchsorted(variance / variance[-1], share) + 1)


def persona_space(role_vectors: Floats, components: int, towards: Floats) -> PersonaSpace:
    """PCA of role vectors [roles, hidden]; the sign of each component agrees with `towards` [hidden]."""
    mean = role_vectors.mean(axis=0)
    _, singular_values, rows = np.linalg.svd(role_vectors - mean, full_matrices=False)
    basis = rows[:components] * np.where(rows[:components] @ towards < 0, -1.0, 1.0)[:, None]
    return PersonaSpace(mean, basis, singular_values)


def auroc(high: Floats, low: Floats) -> float:
    """P(a value of `high` exceeds one of `low`), ties counting half: the area under the ROC curve."""
    ordered = np.sort(low)
    below = np.searchsorted(ordered, high, side="left")
    below_or_equal = np.searchsorted(ordered, high, side="right")
    return float((below + below_or_equal).mean() / (2 * len(low)))


def split_half_cosine(responses: Floats, origin: Floats, seed: int = 0, splits: int = 8) -> float:
    """How settled a mean of responses is: the cosine of two half means, seen from `origin`, averaged over splits.

    Args:
        responses: [n, hidden], n >= 2.
        origin: [hidden], the default Assistant's mean; without it the large common part would hide the noise.

    Returns:
        The Spearman-Brown corrected cosine 2c / (1 + c): the reliability of the mean of all n, at most 1.
    """
    random = np.random.default_rng(seed)
    cosines = []
    for _ in range(splits):
        order = random.permutation(len(responses))
        half = len(responses) // 2
        first = unit(responses[order[:half]].mean(axis=0) - origin)
        second = unit(responses[order[half:]].mean(axis=0) - origin)
        cosines.append(float(first @ second))
    cosine = max(float(np.mean(cosines)), 0.0)
    return 2 * cosine / (1 + cosine)


def without_question_effects(
    responses: Floats, personas: Sequence[Hashable], questions: Sequence[Hashable], rounds: int = 3
) -> Floats:
    """Remove from each response what its question adds, whoever answers it.

    A role answers a handful of the questions, so the mean of its responses holds what those questions are about; two
    roles would differ because one was asked about pancakes. An additive model, response = mean + persona + question +
    noise, is fitted by alternation (backfitting; Hastie and Tibshirani 1990), the question's part shrunk as if two more
    responses lay at the mean. Where every persona answers every question, as in the paper, this changes no difference.

    Args:
        responses: [n, ...].
        personas, questions: who answered what, [n] each.

    Returns:
        The responses less their question's part, [n, ...].
    """
    who, what = _groups(personas), _groups(questions)
    centred = np.asarray(responses, dtype=np.float64) - np.mean(responses, axis=0, dtype=np.float64)
    of_question, of_persona = np.zeros_like(centred), np.zeros_like(centred)
    for _ in range(rounds):
        for rows in what:
            of_question[rows] = (centred[rows] - of_persona[rows]).sum(axis=0) / (len(rows) + 2)
        for rows in who:
            of_persona[rows] = (centred[rows] - of_question[rows]).mean(axis=0)
    return np.asarray(responses - of_question)


def _groups(labels: Sequence[Hashable]) -> list[NDArray[np.intp]]:
    places: dict[Hashable, list[int]] = {}
    for place, label in enumerate(labels):
        places.setdefault(label, []).append(place)
    return [np.array(rows) for rows in places.values()]


def covariance_matched_directions(responses: Floats, count: int, seed: int) -> Floats:
    """Random unit directions [count, hidden] drawn from the covariance of `responses` [n, hidden].

    A control that shares the activations' own shape: an isotropic random direction would be too easy to beat.
    """
    centred = responses - responses.mean(axis=0)
    weights = np.random.default_rng(seed).standard_normal((count, len(responses)))
    return unit(weights @ centred)
