"""The geometry of personas: the axis, the persona axis, persona space, and how well a direction separates.

Pure numpy on arrays of activations; it knows nothing of models, files or conversations. "Layer output" is the residual
stream after a decoder layer; a "role vector" is the mean of it over all response tokens of one role's rollouts
(arXiv 2601.10387, "Mapping persona space"). The axis points towards the Assistant.
"""

from __future__ import annotations

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
]

Floats = NDArray[np.floating]


def unit(vectors: Floats) -> Floats:
    """Scale vectors [..., hidden] to length 1; a zero vector stays zero."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.where(lengths > 0, lengths, 1.0))


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
        basis = np.linalg.qr(span.T)[0]  # [hidden, n], orthonormal columns
        result[layer] = vector - basis @ (basis.T @ vector)
    return result


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


def covariance_matched_directions(responses: Floats, count: int, seed: int) -> Floats:
    """Random unit directions [count, hidden] drawn from the covariance of `responses` [n, hidden].

    A control that shares the activations' own shape: an isotropic random direction would be too easy to beat.
    """
    centred = responses - responses.mean(axis=0)
    weights = np.random.default_rng(seed).standard_normal((count, len(responses)))
    return unit(weights @ centred)
