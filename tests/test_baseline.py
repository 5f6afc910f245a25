"""Promises of the frozen calibrations: what is read, how it is fitted, and that another config has another id."""

from __future__ import annotations

import json
import math
import statistics

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitor.detect.baseline import Baseline, Boundaries, DetectorConfig, PersonaSpace, Readout, fit_baseline
from monitor.errors import ConfigurationError, EventError
from monitor.events import Projection, Windows

READOUT = Readout(coordinates={"persona_axis": 1.0})


def projection(value: float, *, lowest: float = 0.0, axis_id: str = "axis") -> Projection:
    return Projection(
        id="r",
        time="2026-03-01T12:00:00Z",
        source="/test",
        conversation_id="c",
        turn=0,
        model="m",
        axis_id=axis_id,
        layer=18,
        deployment="d",
        projection=value,
        coordinates={"persona_axis": value},
        prompt={"persona_axis": 0.5},
        windows=Windows(lowest={"persona_axis": lowest}, last={"persona_axis": value}),
        tokens=40,
    )


def baseline(**changes: object) -> Baseline:
    good = Baseline("d", "axis", 10.0, 2.0, 8.0, 3.0, 20, 100)
    return msgspec.structs.replace(good, **changes)


def config(**changes: object) -> DetectorConfig:
    fields: dict[str, object] = {
        "axis_id": "axis",
        "readout": READOUT,
        "baselines": {"d": baseline()},
        "boundaries": Boundaries(level=2.0, drop=3.0, cusum=5.0, dip=4.0, budget=0.01, certification="certified"),
        "persona_space": PersonaSpace(["pc1", "pc2"], [0.0, 0.0], {"pirate": [1.0, 0.0]}),
    }
    return DetectorConfig(**(fields | changes))  # type: ignore[arg-type]


def test_the_readout_is_the_weighted_sum_of_response_and_prompt() -> None:
    readout = Readout(coordinates={"a": 2.0, "b": -1.0}, prompt={"a": -0.5})
    assert readout.value({"a": 3.0, "b": 1.0, "unread": 9.0}, {"a": 4.0}) == 3.0


def test_a_missing_coordinate_is_poison_and_named() -> None:
    readout = Readout(coordinates={"a": 1.0, "b": 1.0}, prompt={"c": 1.0})
    with pytest.raises(EventError, match=r"b, prompt\.c") as error:
        readout.value({"a": 1.0}, {})
    assert error.value.cure


@pytest.mark.parametrize("huge", [(1e308, 1e308), (1e308, -1e308)])
def test_a_readout_that_overflows_is_poison_not_infinity(huge: tuple[float, float]) -> None:
    readout = Readout(coordinates={"a": 10.0, "b": 10.0})
    with pytest.raises(EventError, match="not finite"):
        readout.value({"a": huge[0], "b": huge[1]}, {})


@given(st.dictionaries(st.text(max_size=3), st.floats(-1e6, 1e6), min_size=1, max_size=8), st.randoms())
def test_the_order_of_names_changes_no_bit_of_the_readout(weights: dict[str, float], random: object) -> None:
    names = list(weights)
    random.shuffle(names)  # type: ignore[attr-defined]
    coordinates = {name: 1.0 / (3.0 + i) for i, name in enumerate(weights)}
    shuffled = Readout(coordinates={name: weights[name] for name in names})
    assert shuffled.value(coordinates, {}) == Readout(coordinates=weights).value(coordinates, {})


def test_z_is_negative_below_the_mean_and_stays_finite() -> None:
    assert baseline().z(6.0) == -2.0
    assert baseline().window_z(14.0) == 2.0
    assert baseline(standard_deviation=5e-324).z(-1e300) == -1e6


def test_each_conversation_weighs_the_same() -> None:
    short = [projection(0.0, lowest=-3.0)]
    long = [projection(4.0, lowest=1.0)] * 99
    fitted = fit_baseline("d", "axis", [short, long], READOUT)
    assert (fitted.mean, fitted.standard_deviation) == (2.0, 2.0)
    assert (fitted.window_mean, fitted.window_standard_deviation) == (-1.0, 2.0)
    assert (fitted.conversations, fitted.responses) == (2, 100)


@settings(max_examples=50)
@given(st.lists(st.lists(st.floats(-100, 100), min_size=3, max_size=3), min_size=2, max_size=6), st.randoms())
def test_equal_lengths_give_the_textbook_moments_in_any_order(values: list[list[float]], random: object) -> None:
    flat = [v for talk in values for v in talk]
    if statistics.pstdev(flat) < 1e-6:
        return
    talks = [[projection(v, lowest=v - 1.0) for v in talk] for talk in values]
    fitted = fit_baseline("d", "axis", talks, READOUT)
    assert fitted.mean == pytest.approx(statistics.fmean(flat), abs=1e-9)
    assert fitted.standard_deviation == pytest.approx(statistics.pstdev(flat), rel=1e-9)
    random.shuffle(talks)  # type: ignore[attr-defined]
    assert fit_baseline("d", "axis", [list(reversed(talk)) for talk in talks], READOUT) == fitted


def test_the_fit_reads_the_prompt_through_the_readout() -> None:
    readout = Readout(coordinates={"persona_axis": 1.0}, prompt={"persona_axis": 2.0})
    talks = [[projection(0.0, lowest=-1.0)], [projection(2.0, lowest=1.0)]]
    fitted = fit_baseline("d", "axis", talks, readout)
    assert (fitted.mean, fitted.window_mean) == (2.0, 1.0)


@pytest.mark.parametrize(
    ("talks", "message"),
    [
        ([[projection(1.0)]], "at least 2 conversations"),
        ([[projection(1.0)], []], "no responses"),
        ([[projection(1.0)], [projection(1.0, lowest=3.0)]], "responses .* standard deviation 0.0"),
        ([[projection(1.0)], [projection(2.0)]], "lowest windows .* standard deviation 0.0"),
        ([[projection(1.0)], [projection(2.0, lowest=1.0, axis_id="other")]], "other"),
    ],
)
def test_a_baseline_that_says_nothing_is_refused(talks: list[list[Projection]], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as error:
        fit_baseline("d", "axis", talks, READOUT)
    assert error.value.cure


def test_a_wrong_config_lists_every_problem_at_once() -> None:
    with pytest.raises(ConfigurationError) as error:
        config(
            readout=Readout({"a": 0.0}),
            baselines={"d": baseline(axis_id="old", standard_deviation=0.0), "e": baseline()},
            boundaries=Boundaries(-1.0, 0.0, math.inf, math.nan, critical_factor=1.0, certification="certified"),
            persona_space=PersonaSpace(["pc1"], [0.0], {"pirate": [1.0, math.nan]}),
            ewma_weight=0.0,
            cusum_slack=-1.0,
            release_fraction=1.0,
            release_turns=0,
            session_gap_seconds=0.0,
        )
    for name in (
        *("readout", "for axis old", "standard deviation", "baseline of 'd'", "certification", "critical_factor"),
        *("boundaries.level", "boundaries.drop", "boundaries.cusum", "boundaries.dip", "has 2 numbers", "not finite"),
        *("ewma_weight", "cusum_slack", "release_fraction", "release_turns", "session_gap_seconds"),
    ):
        assert name in str(error.value)


@pytest.mark.parametrize("budget", [0.0, 1.0, -0.5, math.nan])
def test_a_budget_is_a_share(budget: float) -> None:
    with pytest.raises(ConfigurationError, match="budget"):
        config(boundaries=Boundaries(1.0, 1.0, 1.0, 1.0, budget=budget))


def test_a_config_read_back_is_the_same_and_has_the_same_id() -> None:
    written = config()
    read = DetectorConfig.from_json(written.to_json())
    assert read == written
    assert read.config_id == written.config_id
    assert len(written.config_id) == 32


def test_neither_key_order_nor_ints_change_the_id() -> None:
    one = config(readout=Readout({"a": 1.0, "b": 2.0}), boundaries=Boundaries(2.0, 3.0, 5.0, 4.0))
    two = config(readout=Readout({"b": 2, "a": 1}), boundaries=Boundaries(2, 3, 5, 4))
    assert one.config_id == two.config_id


@pytest.mark.parametrize(
    "change",
    [
        {"ewma_weight": 0.5},
        {"cusum_slack": 0.4},
        {"release_fraction": 0.5},
        {"release_turns": 3},
        {"session_gap_seconds": 1.0},
        {"persona_space": None},
        {"readout": Readout({"persona_axis": 1.5})},
        {"baselines": {"d": baseline(mean=10.5)}},
        {"boundaries": Boundaries(2.0, 3.0, 5.0, 4.0)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_the_fold_reads_changes_the_id(change: dict[str, object]) -> None:
    assert config(**change).config_id != config().config_id


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[]", b'{"axis_id": "a"}'])
def test_what_is_no_config_is_refused(data: bytes) -> None:
    with pytest.raises(ConfigurationError, match="not a detector configuration"):
        DetectorConfig.from_json(data)


def test_a_stored_config_with_a_wrong_value_is_refused_like_a_built_one() -> None:
    stored = json.loads(config().to_json())
    stored["boundaries"]["level"] = 0
    with pytest.raises(ConfigurationError, match=r"boundaries\.level"):
        DetectorConfig.from_json(json.dumps(stored))


SPACE = PersonaSpace(
    components=["pc1", "pc2"],
    centre=[10.0, 10.0],
    roles={"witch": [10.0, 11.0], "editor": [12.0, 10.0], "clerk": [15.0, 10.0], "void": [10.0, 10.0]},
)


def test_the_nearest_roles_are_those_in_the_same_direction_from_the_centre() -> None:
    assert SPACE.nearest({"pc1": 10.5, "pc2": 13.0}) == ["witch", "clerk", "editor"]
    assert SPACE.nearest({"pc1": 10.5, "pc2": 13.0}, count=1) == ["witch"]


def test_equally_near_roles_come_by_name_in_any_order_of_the_map() -> None:
    turned = PersonaSpace(SPACE.components, SPACE.centre, dict(reversed(SPACE.roles.items())))
    assert SPACE.nearest({"pc1": 11.0, "pc2": 10.0}) == ["clerk", "editor", "witch"]
    assert turned.nearest({"pc1": 11.0, "pc2": 10.0}) == ["clerk", "editor", "witch"]


def test_without_a_component_or_a_direction_nothing_is_near() -> None:
    assert SPACE.nearest({"pc1": 1.0}) == []
    assert SPACE.nearest({"pc1": 10.0, "pc2": 10.0}) == []
