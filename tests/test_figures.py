"""Figures of an axis in a world where the truth is planted: what is there is found, what is not is not."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from monitor.axis.figures import GROUPS, SPLITS, Evidence, choose_layer, figures, separation_by_layer
from monitor.axis.geometry import (
    assistant_axis,
    covariance_matched_directions,
    persona_space,
    project_out,
    unit,
)

LAYERS, HIDDEN, BEST = 5, 24, 3
# How far apart the Assistant and the roles lie at each layer, in standard deviations of a response.
STRENGTH = (0.0, 0.5, 1.2, 2.5, 1.5)
ROLES = [f"role{i:02}" for i in range(16)]
ROLE_SPLIT = np.array([0] * 8 + [1] * 4 + [2] * 4)


class World:
    """Responses of a default Assistant, of roles and of one requested style, and the axis made from the make split.

    Direction 0 is the persona, direction 1 the style (which, as in real models, leans a little on the persona); the
    roles differ among themselves mostly along the persona, by how far they are from the Assistant.
    """

    def __init__(self, seed: int = 0, *, strength: tuple[float, ...] = STRENGTH, shuffle: bool = False) -> None:
        random = np.random.default_rng(seed)
        rows: list[tuple[int, int, int]] = []  # group, split, name
        for split in range(3):
            rows += [(0, split, -1)] * 60 + [(2, split, 0)] * 40
        rows += [(1, int(ROLE_SPLIT[role]), role) for role in range(len(ROLES)) for _ in range(12)]
        self.group, self.split, self.name = np.array(rows, dtype=np.int16).T
        distance = np.linspace(0.4, 1.6, len(ROLES))[random.permutation(len(ROLES))]
        shift = np.where(self.group == 1, -distance[self.name], 0.0)[:, None] * np.array(strength)
        shift = shift - 0.4 * np.where(self.group == 2, 1.0, 0.0)[:, None] * np.array(strength)
        self.means = random.standard_normal((len(rows), LAYERS, HIDDEN))
        self.means[:, :, 0] += shift
        self.means[:, :, 1] += 3.0 * (self.group == 2)[:, None]
        if shuffle:  # who is the Assistant and who plays a role is drawn by lot
            either = np.flatnonzero(self.group != 2)
            for split in range(3):
                mine = either[self.split[either] == split]
                self.means[mine] = self.means[random.permutation(mine)]
        vectors = np.stack([self.means[(self.group == 1) & (self.name == i)].mean(axis=0) for i in range(len(ROLES))])
        default = self.means[(self.group == 0) & (self.split == 0)].mean(axis=0)
        style = self.means[(self.group == 2) & (self.split == 0)].mean(axis=0) - default
        self.axis = assistant_axis(default, vectors[ROLE_SPLIT == 0])
        self.persona_axis = project_out(self.axis, style[:, None])
        self.vectors = vectors

    def evidence(self, layer: int, sign: float = 1.0) -> Evidence:
        kept = self.split != 0
        random = np.random.default_rng(1)
        made = (self.split == 0) & (self.group != 2)
        shuffled = []
        for _ in range(50):
            label = random.permutation(self.group[made] == 0)
            shuffled.append(self.means[made][label, layer].mean(axis=0) - self.means[made][~label, layer].mean(axis=0))
        report = self.means[self.split == 2][:, layer]
        return Evidence(
            group=self.group[kept],
            split=self.split[kept],
            name=self.name[kept],
            question=np.zeros(kept.sum(), dtype=np.int16),
            axis=np.einsum("nlh,lh->nl", self.means[kept], unit(sign * self.axis)),
            persona_axis=np.einsum("nlh,lh->nl", self.means[kept], unit(sign * self.persona_axis)),
            random=report @ covariance_matched_directions(self.means[made][:, layer], 200, 2).T,
            shuffled=report @ unit(np.stack(shuffled)).T,
            role_split=ROLE_SPLIT.astype(np.int16),
            alignment=np.array(
                [
                    unit(sign * axis) @ persona_space(self.vectors[ROLE_SPLIT != 2, i], 1, sign * axis).basis[0]
                    for i, axis in enumerate(self.axis)
                ]
            ),
        )

    def figures(self, layer: int = BEST, sign: float = 1.0) -> dict[str, Any]:
        tensors = {
            "axis": sign * self.axis,
            "persona_axis": sign * self.persona_axis,
            "role_vectors": self.vectors[:, layer],
            "first_component": np.stack(
                [persona_space(self.vectors[:, i], 1, sign * self.axis[i]).basis[0] for i in range(LAYERS)]
            ),
        }
        return figures(tensors, self.evidence(layer, sign), ROLES, layer)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def found(world: World) -> dict[str, Any]:
    return world.figures()


def test_the_layer_where_the_persona_shows_most_is_chosen(world: World) -> None:
    assert choose_layer(world.evidence(0)) == BEST


@pytest.mark.parametrize("best", range(LAYERS))
def test_it_is_found_wherever_it_is(best: int) -> None:
    strength = tuple(3.0 if layer == best else 0.3 for layer in range(LAYERS))
    assert choose_layer(World(7, strength=strength).evidence(0)) == best


def test_of_layers_that_separate_alike_the_one_most_like_the_first_component_is_chosen() -> None:
    evidence = World().evidence(0)
    same = [0, BEST, BEST, 1, BEST]  # three layers that are equally good, and two worse ones
    evidence = replace(evidence, axis=evidence.axis[:, same], persona_axis=evidence.persona_axis[:, same])
    for aligned in (1, 2, 4):
        alignment = np.full(LAYERS, 0.6)
        alignment[aligned] = 0.7
        alignment[[0, 3]] = 0.9  # but not one that separates worse, however well aligned
        assert choose_layer(replace(evidence, alignment=alignment)) == aligned


def test_the_report_split_has_no_part_in_choosing(world: World) -> None:
    evidence = world.evidence(0)
    report = evidence.split == SPLITS.index("report")
    garbled = np.where(report[:, None], -100.0 * evidence.axis, evidence.axis)
    assert choose_layer(replace(evidence, axis=garbled)) == BEST


def test_a_planted_axis_separates_and_lies_beyond_its_controls(found: dict[str, Any]) -> None:
    for name in ("assistant_axis", "persona_axis"):
        figure = found[name]
        assert figure["auroc_response"] > 0.9 and figure["auroc_role"] > 0.9
        for control, count in (("random", 200), ("shuffled", 50)):
            assert figure["controls"][control]["directions"] == count
            assert figure["controls"][control]["beyond"]
        for cosine in ("cosine_pc1", "cosine_pc1_held_out", "cosine_pc1_all_roles"):
            assert 0.6 < figure[cosine] <= 1.0
        assert figure["cosine_pc1"] <= figure["cosine_pc1_pc2_plane"] <= 1.0 + 1e-6
        assert figure["responses"] == {"default": 60, "role": 48, "style": 40}
        assert figure["roles"] == 4


@pytest.mark.parametrize("seed", range(4))
def test_labels_drawn_by_lot_are_not_beyond_the_controls(seed: int) -> None:
    figure = World(seed, shuffle=True).figures()["assistant_axis"]
    assert not (figure["controls"]["random"]["beyond"] and figure["controls"]["shuffled"]["beyond"])
    assert 0.3 < figure["auroc_response"] < 0.7


def test_an_axis_that_points_away_from_the_assistant_is_seen_at_once(world: World, found: dict[str, Any]) -> None:
    flipped = world.figures(sign=-1.0)
    for name in ("assistant_axis", "persona_axis"):
        assert flipped[name]["auroc_response"] == pytest.approx(1.0 - found[name]["auroc_response"])
        assert flipped[name]["auroc_response"] < 0.1
        assert flipped[name]["lowest_roles"] == found[name]["highest_roles"]


def test_the_persona_axis_does_not_take_the_style_for_a_persona(found: dict[str, Any]) -> None:
    plain, persona = found["assistant_axis"], found["persona_axis"]
    assert abs(persona["auroc_default_against_style"] - 0.5) < abs(plain["auroc_default_against_style"] - 0.5)
    assert abs(persona["auroc_default_against_style"] - 0.5) < 0.15
    assert persona["auroc_healthy_against_role"] > plain["auroc_healthy_against_role"]


def test_the_extremes_are_the_roles_that_lie_farthest_out(world: World, found: dict[str, Any]) -> None:
    along = world.vectors[:, BEST] @ unit(world.axis)[BEST]
    ordered = [ROLES[i] for i in np.argsort(along)]
    assert found["assistant_axis"]["lowest_roles"] == ordered
    assert found["assistant_axis"]["highest_roles"] == ordered[::-1]


def test_separation_by_layer_is_the_share_of_pairs_in_order(world: World) -> None:
    evidence = world.evidence(0)
    separation = separation_by_layer(evidence, "choose")
    for layer in range(LAYERS):
        default = evidence.axis[evidence.pick("default", "choose"), layer]
        role = evidence.axis[evidence.pick("role", "choose"), layer]
        pairs = np.mean([[(d > r) + 0.5 * (d == r) for r in role] for d in default])
        assert separation["axis"][layer] == pytest.approx(pairs)


def test_auroc_per_role_sets_the_means_of_the_roles_against_the_default_responses(
    world: World, found: dict[str, Any]
) -> None:
    evidence = world.evidence(BEST)
    along = evidence.axis[:, BEST]
    default = along[evidence.pick("default", "report")]
    means = [
        along[evidence.pick("role", "report") & (evidence.name == i)].mean() for i in np.flatnonzero(ROLE_SPLIT == 2)
    ]
    assert found["assistant_axis"]["auroc_role"] == pytest.approx(np.mean([[d > m for m in means] for d in default]))


def test_figures_are_plain_json_and_the_same_each_time(world: World, found: dict[str, Any]) -> None:
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(world.figures()))


def test_evidence_comes_back_from_its_arrays(world: World) -> None:
    evidence = world.evidence(BEST)
    arrays = evidence.arrays()
    again = Evidence.from_arrays(arrays)
    assert arrays.keys() == again.arrays().keys()
    assert all(np.array_equal(array, again.arrays()[name]) for name, array in arrays.items())
    assert [int(again.pick(group, "report").sum()) for group in GROUPS] == [60, 48, 40]
