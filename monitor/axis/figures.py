"""The figures of an axis: how well it separates, at which layer, against which controls.

Pure functions of a bundle's tensors and of its *evidence*, the committed projections of every response outside the
making split, so that `axis show --verify` recomputes each figure that the bundle states. It knows no models.

The three-way split: roles and questions of "make" made the axis, "choose" picks the layer, "report" gives the figures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monitor.axis.geometry import auroc, persona_space, unit

__all__ = ["GROUPS", "SPLITS", "Evidence", "choose_layer", "figures", "separation_by_layer"]

GROUPS = ("default", "role", "style")
SPLITS = ("make", "choose", "report")

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]


@dataclass(frozen=True)
class Evidence:
    """Projections of the n responses of the choose and report splits; raw residual units.

    Attributes:
        group: index into `GROUPS`, [n].
        split: index into `SPLITS`, [n].
        name: index into the bundle's roles or styles, -1 for the default Assistant, [n].
        question: index into the catalogue's questions (or style requests), [n].
        axis: on each layer's unit Assistant Axis, [n, layers].
        persona_axis: on each layer's unit persona axis, [n, layers].
        random: report responses on covariance-matched random directions at the chosen layer, [n_report, controls].
        shuffled: report responses on axes made with shuffled labels, [n_report, controls].
        role_split: index into `SPLITS` of each of the bundle's roles, [roles].
        alignment: cosine of the axis with the first component of the roles that are not in the report split, [layers].
    """

    group: Ints
    split: Ints
    name: Ints
    question: Ints
    axis: Floats
    persona_axis: Floats
    random: Floats
    shuffled: Floats
    role_split: Ints
    alignment: Floats

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Evidence:
        """From the arrays of `responses.safetensors`."""
        return cls(**{name: arrays[name] for name in cls.__dataclass_fields__})

    def arrays(self) -> dict[str, NDArray[Any]]:
        """As the arrays of `responses.safetensors`."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def pick(self, group: str, split: str) -> NDArray[np.bool_]:
        """Mask [n] of one group's responses in one split."""
        return np.asarray((self.group == GROUPS.index(group)) & (self.split == SPLITS.index(split)))


def separation_by_layer(evidence: Evidence, split: str) -> dict[str, list[float]]:
    """Response-level AUROC at every layer: how often a healthy response projects higher than one in role.

    `axis`: default Assistant against in role, on the Assistant Axis. `persona_axis`: default Assistant *and* requested
    styles against in role, on the persona axis, which is the harder and the more useful question.
    """
    default, role, style = (evidence.pick(group, split) for group in GROUPS)
    layers = evidence.axis.shape[1]
    return {
        "axis": [auroc(evidence.axis[default, i], evidence.axis[role, i]) for i in range(layers)],
        "persona_axis": [
            auroc(evidence.persona_axis[default | style, i], evidence.persona_axis[role, i]) for i in range(layers)
        ],
    }


def choose_layer(evidence: Evidence) -> int:
    """Of the layers that separate as well as the best, the one where the axis is most nearly the first component.

    Separation is the mean of both AUROCs of `separation_by_layer` on the choose split. Neighbouring layers differ by
    less than the data can tell: all within one standard error of the best (Breiman et al. 1984; the standard error is
    Hanley and McNeil's, 1982) are as good. Of those, `alignment` decides: there the axis is what personas differ by
    most, as in the paper, and not one of several directions. No response or role of the report split has a say.
    """
    separation = separation_by_layer(evidence, "choose")
    mean = np.mean([separation["axis"], separation["persona_axis"]], axis=0)
    default, role, style = (int(evidence.pick(group, "choose").sum()) for group in GROUPS)
    best = int(np.argmax(mean))
    error = max(
        _standard_error(separation["axis"][best], default, role),
        _standard_error(separation["persona_axis"][best], default + style, role),
    )
    as_good = mean >= mean[best] - error
    return int(np.argmax(np.where(as_good, evidence.alignment, -np.inf)))


def _standard_error(area: float, high: int, low: int) -> float:
    """Of an AUROC with so many values on either side (Hanley and McNeil 1982, equation 1)."""
    first, second = area / (2 - area), 2 * area**2 / (1 + area)
    spread = area * (1 - area) + (high - 1) * (first - area**2) + (low - 1) * (second - area**2)
    return math.sqrt(max(spread, 0.0) / (high * low))


def figures(tensors: Mapping[str, Floats], evidence: Evidence, roles: Sequence[str], layer: int) -> dict[str, Any]:
    """Every figure that a bundle states, all on the report split unless its name says otherwise."""
    axis, persona_axis = unit(tensors["axis"]), unit(tensors["persona_axis"])
    role_vectors = tensors["role_vectors"]
    report_roles = role_vectors[evidence.role_split == SPLITS.index("report")]
    held_out_roles = role_vectors[evidence.role_split != SPLITS.index("make")]
    report_space = persona_space(report_roles, 2, axis[layer])
    held_out_pc1 = persona_space(held_out_roles, 1, axis[layer]).basis[0]
    first_component = unit(tensors["first_component"])
    all_roles = persona_space(role_vectors, 1, axis[layer])
    report = {
        "assistant_axis": _report(evidence, evidence.axis[:, layer]),
        "persona_axis": _report(evidence, evidence.persona_axis[:, layer]),
    }
    for name, vector in (("assistant_axis", axis[layer]), ("persona_axis", persona_axis[layer])):
        along = role_vectors @ vector
        order = np.argsort(along, kind="stable")
        report[name] |= {
            # with the first component of the report split's roles, of all roles that did not make the axis, and of all
            "cosine_pc1": float(vector @ report_space.basis[0]),
            "cosine_pc1_held_out": float(vector @ held_out_pc1),
            "cosine_pc1_all_roles": float(vector @ all_roles.basis[0]),
            # length of its shadow on the plane of the report roles' first two components
            "cosine_pc1_pc2_plane": float(np.linalg.norm(report_space.basis @ vector)),
            "lowest_roles": [roles[i] for i in order[:20]],
            "highest_roles": [roles[i] for i in order[::-1][:20]],
        }
    return {
        "layer": layer,
        **report,
        # the unit in which `axis check` tells how far a canary has moved
        "default_standard_deviation": float(evidence.axis[evidence.pick("default", "report"), layer].std()),
        "cosine_pc1_all_roles_by_layer": [float(a @ b) for a, b in zip(axis, first_component, strict=True)],
        "cosine_axis_persona_axis": float(axis[layer] @ persona_axis[layer]),
        "variance_of_first_components": _variance(all_roles.singular_values),
        "components_for_variance": {str(share): all_roles.components_for(share) for share in (0.5, 0.7, 0.9)},
        "separation_by_layer": {
            "choose": separation_by_layer(evidence, "choose"),
            "report": separation_by_layer(evidence, "report"),
        },
    }


def _variance(singular_values: Floats) -> list[float]:
    variance = singular_values.astype(np.float64) ** 2
    return [float(share) for share in (variance / variance.sum())[:8]]


def _report(evidence: Evidence, projection: Floats) -> dict[str, Any]:
    """Figures of one direction, whose projections of all responses are `projection` [n]."""
    default, role, style = (evidence.pick(group, "report") for group in GROUPS)
    names = np.unique(evidence.name[role])
    role_means = np.array([projection[role & (evidence.name == name)].mean() for name in names])
    observed = auroc(projection[default], projection[role])
    in_report = evidence.split == SPLITS.index("report")
    return {
        # default Assistant's responses against responses in role
        "auroc_response": observed,
        # the same default responses against the mean of each role
        "auroc_role": auroc(projection[default], role_means),
        "auroc_style_against_role": auroc(projection[style], projection[role]),
        "auroc_healthy_against_role": auroc(projection[default | style], projection[role]),
        "auroc_default_against_style": auroc(projection[default], projection[style]),
        "controls": {
            name: _control(observed, controls, default[in_report], role[in_report])
            for name, controls in (("random", evidence.random), ("shuffled", evidence.shuffled))
        },
        "responses": {"default": int(default.sum()), "role": int(role.sum()), "style": int(style.sum())},
        "roles": len(names),
    }


def _control(observed: float, controls: Floats, default: NDArray[np.bool_], role: NDArray[np.bool_]) -> dict[str, Any]:
    distances = [abs(auroc(column[default], column[role]) - 0.5) for column in np.asarray(controls, np.float64).T]
    percentile = float(np.percentile(distances, 99))
    return {
        "directions": len(distances),
        "distance": abs(observed - 0.5),
        "percentile_99": percentile,
        "largest": float(max(distances)),
        "beyond": bool(abs(observed - 0.5) > percentile),
    }
