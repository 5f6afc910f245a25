"""What is fitted to developed traffic: a readout that sees the persona and not the style, and boundaries that hold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from monitor.axis.geometry import auroc
from monitor.axis.readout import Readout
from monitor.detect.baseline import DetectorConfig
from monitor.detect.conversation import ConversationState, step
from monitor.detect.fit import Conversations, Group, calibrate, conversation_peaks, fit_direction, fit_readout
from monitor.errors import ConfigurationError
from monitor.events import Projection, Windows

NAMES = ("persona_axis", "style:poem")
Talks = list[list[Projection]]


def event(talk: str, turn: int, persona: float, style: float = 0.0, *, prompt: float = 0.0) -> Projection:
    """Style leans on the persona axis, as a poem does in real models: what is measured there is persona - style."""
    coordinates = {"persona_axis": persona - style, "style:poem": style}
    return Projection(
        id=f"{talk}#{turn}",
        time=f"2026-01-01T00:{turn:02}:00Z",
        source="/test",
        conversation_id=talk,
        turn=turn,
        model="toy",
        axis_id="axis",
        layer=1,
        deployment="shop",
        projection=persona,
        coordinates=coordinates,
        prompt={"persona_axis": prompt, "style:poem": 0.0},
        windows=Windows(lowest={**coordinates, "persona_axis": persona - style - 0.5}, last=coordinates),
        tokens=30,
    )


def kind(seed: int, count: int, persona: float, style: float, turns: int = 8) -> Talks:
    random = np.random.default_rng(seed)
    return [
        [
            event(f"{seed}.{i}", turn, persona + random.normal(), style + random.normal(), prompt=random.normal())
            for turn in range(turns)
        ]
        for i in range(count)
    ]


HEALTHY: Conversations = {"task": kind(1, 20, 0.0, 0.0), "poem": kind(2, 20, 0.0, 6.0)}
DRIFTING: Conversations = {"role_play": kind(3, 20, -4.0, 2.0), "jailbreak": kind(4, 20, -4.0, 4.0)}


def values(readout: Readout, kinds: Conversations) -> np.ndarray:
    return np.array(
        [readout.value(e.coordinates, e.prompt) for talks in kinds.values() for talk in talks for e in talk]
    )


# The readout


def test_the_readout_finds_the_persona_and_takes_the_style_back_out() -> None:
    readout = fit_readout(HEALTHY, DRIFTING, coordinates=NAMES, shrinkage=0.0)
    # What is planted is the sum of both coordinates: high for the Assistant, unmoved by a poem.
    ratio = readout.coordinates["style:poem"] / readout.coordinates["persona_axis"]
    assert readout.coordinates["persona_axis"] > 0
    assert ratio == pytest.approx(1.0, abs=0.1)
    assert auroc(values(readout, HEALTHY), values(readout, DRIFTING)) > 0.99
    poems, tasks = (values(readout, {name: HEALTHY[name]}) for name in ("poem", "task"))
    assert abs(poems.mean() - tasks.mean()) < 0.5


def test_the_axis_alone_takes_the_poem_for_a_persona() -> None:
    alone = fit_readout(HEALTHY, DRIFTING, coordinates=["persona_axis"])
    poems = values(alone, {"poem": HEALTHY["poem"]})
    assert auroc(poems, values(alone, DRIFTING)) < 0.75


def test_its_unit_is_the_scatter_within_a_kind() -> None:
    readout = fit_readout(HEALTHY, DRIFTING, coordinates=NAMES, shrinkage=0.0)
    scatter = [values(readout, {name: talks}).std() for name, talks in {**HEALTHY, **DRIFTING}.items()]
    assert np.sqrt(np.mean(np.square(scatter))) == pytest.approx(1.0, abs=1e-3)


def test_every_kind_weighs_the_same_however_much_there_is_of_it() -> None:
    few = fit_readout(HEALTHY, DRIFTING, coordinates=NAMES)
    many = fit_readout({**HEALTHY, "task": list(HEALTHY["task"]) * 10}, DRIFTING, coordinates=NAMES)
    assert many.coordinates == pytest.approx(few.coordinates, rel=1e-4)


def test_a_prompt_coordinate_that_tells_nothing_gets_little_weight() -> None:
    readout = fit_readout(HEALTHY, DRIFTING, coordinates=NAMES, prompt=["persona_axis"], shrinkage=0.0)
    assert set(readout.prompt) == {"persona_axis"}
    assert abs(readout.prompt["persona_axis"]) < 0.1 * readout.coordinates["persona_axis"]


@pytest.mark.parametrize(("healthy", "drifting"), [({}, DRIFTING), (HEALTHY, {})])
def test_a_readout_from_one_side_only_is_refused(healthy: Conversations, drifting: Conversations) -> None:
    with pytest.raises(ConfigurationError, match="healthy and drifting") as caught:
        fit_readout(healthy, drifting, coordinates=NAMES)
    assert caught.value.cure


def test_a_direction_along_which_nothing_varies_is_refused_by_name() -> None:
    still = [replace(e, coordinates={**e.coordinates, "still": 0.0}) for e in HEALTHY["task"][0]]
    with pytest.raises(ConfigurationError, match="still"):
        fit_readout({"task": [still]}, {"role_play": [still]}, coordinates=["persona_axis", "still"])


def test_a_group_weighs_as_it_is_told() -> None:
    random = np.random.default_rng(5)
    one, other, low = (random.normal(size=(50, 3)) + shift for shift in ([4, 0, 0], [0, 4, 0], [0, 0, 0]))
    drifting = [Group(low, 1.0)]
    even = fit_direction([Group(one, 1.0), Group(other, 1.0)], drifting, shrinkage=0.5)
    first = fit_direction([Group(one, 1.0), Group(other, 0.01)], drifting, shrinkage=0.5)
    assert abs(even[0] - even[1]) < 0.3 * abs(even[0])
    assert first[0] > 5 * abs(first[1])
    halves = [Group(one[:25], 0.5), Group(one[25:], 0.5), Group(other, 1.0)]
    assert fit_direction(halves, drifting, shrinkage=0.5) == pytest.approx(even)


def test_with_more_features_than_responses_the_diagonal_carries_it() -> None:
    random = np.random.default_rng(6)
    high, low = random.normal(size=(40, 300)), random.normal(size=(40, 300))
    high[:, 0] += 2.0
    weights = fit_direction([Group(high[:20], 1.0)], [Group(low[:20], 1.0)], shrinkage=0.9)
    assert np.argmax(np.abs(weights)) == 0 and weights[0] > 0
    assert auroc(high[20:] @ weights, low[20:] @ weights) > 0.7


@pytest.mark.parametrize("sides", [([], [1]), ([1], [])])
def test_a_direction_from_one_side_only_is_refused(sides: tuple[list[int], list[int]]) -> None:
    healthy, drifting = ([Group(np.random.default_rng(n).normal(size=(9, 2)), 1.0) for n in side] for side in sides)
    with pytest.raises(ConfigurationError, match="healthy and drifting"):
        fit_direction(healthy, drifting, shrinkage=0.1)


# Baseline and boundaries


def warned(talk: Sequence[Projection], config: DetectorConfig) -> bool:
    state: ConversationState | None = None
    for response in talk:
        result = step(state, response, config)
        state = result.state
        if any(finding.severity != "info" for finding in result.findings):
            return True
    return False


def calibrated(healthy: Conversations, share: float) -> DetectorConfig:
    readout = Readout({"persona_axis": 1.0, "style:poem": 1.0})
    talks = [talk for talks in healthy.values() for talk in talks]
    return calibrate(talks, talks, deployment="shop", axis_id="axis", readout=readout, budget=share)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(2, 40),
    st.integers(1, 10),
    st.floats(0.01, 0.5),
)
def test_at_most_the_asked_share_of_the_healthy_conversations_warns(
    seed: int, count: int, turns: int, share: float
) -> None:
    healthy = {"task": kind(seed, count, 0.0, 0.0, turns), "poem": kind(seed + 1, count, 0.3, 6.0, turns)}
    share = max(share, 1.01 / (2 * count + 1))
    config = calibrated(healthy, share)
    talks = [talk for talks in healthy.values() for talk in talks]
    assert sum(warned(talk, config) for talk in talks) <= share * len(talks)


def test_the_boundaries_are_no_higher_than_they_need_be() -> None:
    talks = [talk for talks in HEALTHY.values() for talk in talks]
    assert sum(warned(talk, calibrated(HEALTHY, 0.1)) for talk in talks) == 4 - 1  # ceil(41 x 0.9) = 37 of 40 stay


def test_drifting_conversations_cross_them() -> None:
    config = calibrated(HEALTHY, 0.05)
    assert all(warned(talk, config) for talks in DRIFTING.values() for talk in talks)


def test_a_smaller_share_is_a_higher_boundary() -> None:
    levels = [calibrated(HEALTHY, share).boundaries.level for share in (0.5, 0.2, 0.05)]
    assert levels == sorted(levels) and levels[0] < levels[-1]


def test_the_order_of_kinds_and_conversations_does_not_matter() -> None:
    turned: Conversations = {name: HEALTHY[name][::-1] for name in reversed(HEALTHY)}
    assert calibrated(turned, 0.05).config_id == calibrated(HEALTHY, 0.05).config_id


def test_the_peaks_are_the_worst_that_a_conversation_came_to() -> None:
    config = calibrated(HEALTHY, 0.05)
    quiet = conversation_peaks([event("q", turn, 0.0) for turn in range(5)], config)
    loud = conversation_peaks([event("l", turn, 0.0 if turn != 2 else -9.0) for turn in range(5)], config)
    assert all(worse > better for worse, better in zip(loud, quiet, strict=True))


@pytest.mark.parametrize(
    "change", [{"deployment": "another shop"}, {"axis_id": "another axis"}], ids=["deployment", "axis"]
)
def test_conversations_that_the_detector_would_not_judge_are_refused(change: dict[str, str]) -> None:
    others = {"task": [[replace(e, **change) for e in talk] for talk in HEALTHY["task"]]}
    with pytest.raises(ConfigurationError) as caught:
        calibrated(others, 0.05)
    assert caught.value.cure
