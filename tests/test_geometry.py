"""The geometry of personas against oracles that are slow and plain: counting pairs, eigenvalues, least squares."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from monitor.axis.geometry import (
    assistant_axis,
    auroc,
    covariance_matched_directions,
    persona_space,
    project_out,
    split_half_cosine,
    unit,
    without_question_effects,
)

# A few values only, so that ties are the rule.
SAMPLES = st.lists(st.integers(-3, 3), min_size=1, max_size=12).map(lambda values: np.array(values, dtype=np.float64))


def draws(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


# Separation


@given(SAMPLES, SAMPLES)
def test_auroc_is_the_share_of_pairs_in_order_with_ties_counting_half(high: np.ndarray, low: np.ndarray) -> None:
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in high for b in low]
    assert auroc(high, low) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


@given(SAMPLES, SAMPLES)
def test_auroc_of_the_other_way_round_is_the_complement(high: np.ndarray, low: np.ndarray) -> None:
    assert auroc(high, low) == pytest.approx(1.0 - auroc(low, high), abs=1e-12)


@given(SAMPLES, SAMPLES)
def test_auroc_asks_for_ranks_only(high: np.ndarray, low: np.ndarray) -> None:
    assert auroc(np.exp(high) - 7.0, np.exp(low) - 7.0) == auroc(high, low)


# The axis and what is projected out of it


def test_the_axis_points_from_the_roles_to_the_assistant_and_every_role_weighs_the_same() -> None:
    default, roles = draws(0, 3, 5), draws(1, 4, 3, 5)
    axis = assistant_axis(default, roles)
    np.testing.assert_allclose(axis, default - (roles[0] + roles[1] + roles[2] + roles[3]) / 4)
    for layer in range(3):
        assert default[layer] @ axis[layer] > roles.mean(axis=0)[layer] @ axis[layer]


@given(st.integers(0, 10_000), st.integers(0, 6), st.sampled_from([np.float32, np.float64]))
def test_what_is_projected_out_is_gone_and_nothing_else(seed: int, count: int, dtype: type) -> None:
    layers, hidden = 3, 12
    vectors = (100 * draws(seed, layers, hidden)).astype(dtype)
    directions = draws(seed + 1, layers, count, hidden).astype(dtype)
    result = project_out(vectors, directions)
    assert result.dtype == dtype and result.shape == vectors.shape
    for layer in range(layers):
        np.testing.assert_allclose(unit(directions[layer]) @ unit(result[layer]), 0.0, atol=1e-5)
        if count:  # the oracle: the residual of a least-squares fit by the directions
            span = directions[layer].T.astype(np.float64)
            weights = np.linalg.lstsq(span, vectors[layer].astype(np.float64), rcond=None)[0]
            np.testing.assert_allclose(result[layer], vectors[layer] - span @ weights, atol=1e-3)
        else:
            np.testing.assert_array_equal(result[layer], vectors[layer])


def test_a_direction_given_twice_or_one_of_length_zero_takes_nothing_more_away() -> None:
    vectors, direction = draws(0, 1, 8), draws(1, 1, 1, 8)
    once = project_out(vectors, direction)
    twice = project_out(vectors, np.concatenate([direction, -2.0 * direction, np.zeros((1, 1, 8))], axis=1))
    np.testing.assert_allclose(twice, once, atol=1e-9)


def test_projecting_out_twice_changes_nothing() -> None:
    vectors, directions = draws(0, 4, 10), draws(1, 4, 3, 10)
    once = project_out(vectors, directions)
    np.testing.assert_allclose(project_out(once, directions), once, atol=1e-12)


@given(arrays.arrays(np.float64, (3, 4), elements=st.floats(allow_nan=False, allow_infinity=False)))
@example(np.full((3, 4), 2.2e-162))
@example(np.full((3, 4), 5e-324))
@example(np.full((3, 4), 1.7e308))
def test_unit_vectors_have_length_one_and_zero_stays_zero(vectors: np.ndarray) -> None:
    lengths = np.linalg.norm(unit(vectors), axis=-1)
    for length, vector in zip(lengths, vectors, strict=True):
        assert length == (pytest.approx(1.0) if vector.any() else 0.0)


# Persona space


def test_persona_space_is_the_eigenspace_of_the_covariance() -> None:
    roles = draws(0, 30, 6) @ np.diag([5.0, 4.0, 3.0, 2.0, 1.0, 0.5])
    space = persona_space(roles, 4, np.ones(6))
    np.testing.assert_allclose(space.mean, roles.mean(axis=0))
    values, vectors = np.linalg.eigh(np.cov(roles, rowvar=False, bias=True))
    np.testing.assert_allclose(space.singular_values**2 / 30, values[::-1], rtol=1e-9)
    np.testing.assert_allclose(np.abs(np.sum(space.basis * vectors[:, ::-1].T[:4], axis=1)), 1.0, rtol=1e-9)
    np.testing.assert_allclose(space.basis @ space.basis.T, np.eye(4), atol=1e-12)


@given(st.integers(0, 1000))
def test_every_component_is_signed_like_the_axis(seed: int) -> None:
    towards = draws(seed, 5)
    assert (persona_space(draws(seed + 1, 8, 5), 5, towards).basis @ towards >= 0).all()
    flipped = persona_space(draws(seed + 1, 8, 5), 5, -towards).basis
    assert (flipped @ towards <= 0).all()


def test_components_for_a_share_of_variance_are_the_fewest_that_hold_it() -> None:
    space = persona_space(draws(0, 40, 6) @ np.diag([5.0, 3.0, 2.0, 1.0, 1.0, 0.1]), 2, np.ones(6))
    shares = np.cumsum(space.singular_values**2) / np.sum(space.singular_values**2)
    for share in (0.1, 0.5, 0.7, 0.9, 0.999):
        count = space.components_for(share)
        assert shares[count - 1] >= share and (count == 1 or shares[count - 2] < share)


# Questions


def grid(personas: int, questions: int) -> tuple[list[str], list[int]]:
    """Everybody answers everything."""
    return [f"p{p}" for p in range(personas) for _ in range(questions)], list(range(questions)) * personas


def persona_means(responses: np.ndarray, personas: list[str]) -> np.ndarray:
    return np.stack(
        [responses[[name == persona for name in personas]].mean(axis=0) for persona in sorted(set(personas))]
    )


def test_what_two_questions_add_no_longer_parts_two_roles() -> None:
    persona, question = draws(0, 40, 6), 5.0 * draws(1, 12, 6)
    who = [f"p{p:02}" for p in range(40) for _ in range(4)]
    what = [int(q) for p in range(40) for q in np.random.default_rng(p).permutation(12)[:4]]
    responses = np.stack([persona[int(p[1:])] + question[q] for p, q in zip(who, what, strict=True)])

    def error(means: np.ndarray) -> float:
        return float(np.linalg.norm((means - means.mean(axis=0)) - (persona - persona.mean(axis=0))))

    assert error(persona_means(without_question_effects(responses, who, what), who)) < 0.4 * error(
        persona_means(responses, who)
    )


@given(st.integers(0, 1000))
def test_where_everybody_answers_everything_no_difference_between_personas_changes(seed: int) -> None:
    who, what = grid(4, 5)
    responses = draws(seed, len(who), 3)
    before, after = (persona_means(each, who) for each in (responses, without_question_effects(responses, who, what)))
    np.testing.assert_allclose(after - after[0], before - before[0], atol=1e-9)


def test_the_order_of_responses_and_the_names_of_questions_do_not_matter() -> None:
    who, what = grid(4, 5)
    responses, order = draws(0, len(who), 3), np.random.default_rng(1).permutation(len(who))
    straight = without_question_effects(responses, who, what)
    turned = without_question_effects(responses[order], [who[i] for i in order], [f"q{what[i]}" for i in order])
    np.testing.assert_allclose(turned, straight[order], atol=1e-9)


# Settling


@given(st.integers(0, 1000))
def test_two_responses_settle_by_their_own_cosine_spearman_brown_corrected(seed: int) -> None:
    responses, origin = draws(seed, 2, 4), draws(seed + 1, 4)
    a, b = responses - origin
    cosine = max(float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))), 0.0)
    assert split_half_cosine(responses, origin) == pytest.approx(2 * cosine / (1 + cosine), abs=1e-9)


def test_equal_responses_have_settled_and_noise_about_the_origin_never_does() -> None:
    origin = draws(0, 200)
    assert split_half_cosine(np.tile(draws(1, 200), (6, 1)), origin) == pytest.approx(1.0)
    assert split_half_cosine(origin + draws(2, 40, 200), origin) < 0.3


def test_a_part_that_all_share_does_not_pass_for_having_settled() -> None:
    common = 1000 * draws(0, 200)
    noise = draws(1, 10, 200)
    assert split_half_cosine(common + noise, common) < 0.5
    assert split_half_cosine(common + noise, np.zeros(200)) > 0.99  # what the origin is there to prevent


def test_more_responses_settle_better() -> None:
    origin, role = np.zeros(100), draws(0, 100)
    few, some, many = (split_half_cosine(role + 2 * draws(1, n, 100), origin) for n in (4, 16, 256))
    assert few < some < many < 1.0


# Controls


def test_matched_directions_share_the_covariance_of_the_responses() -> None:
    responses = 50.0 + draws(0, 400, 5) @ np.diag([8.0, 4.0, 2.0, 1.0, 0.0])
    directions = covariance_matched_directions(responses, 4000, seed=1)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1.0)
    np.testing.assert_allclose(directions[:, 4], 0.0, atol=1e-9)  # where nothing varies, nothing is drawn
    spread = directions.std(axis=0)
    assert spread[0] > spread[1] > spread[2] > spread[3]
    np.testing.assert_array_equal(directions, covariance_matched_directions(responses, 4000, seed=1))
    assert not np.allclose(directions, covariance_matched_directions(responses, 4000, seed=2))
