"""Deployments calibrated on conversations of their own: one per user, enough of them, else nothing is promised."""

from __future__ import annotations

import io
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from rich.console import Console
from test_budget import DEPLOYMENT, calibrated, traffic, warns

from monitor.calibration import Calibrated, Gathering, Talk, calibrate_deployments, print_calibrated, report_of, units
from monitor.detect.budget import fewest

PARENT = calibrated(traffic(1, 60), traffic(2, 120), 0.05)


def healthy(seed: int, count: int, deployment: str = "bank", shift: float = 0.0) -> list[Talk]:
    talks = []
    for talk in traffic(seed, count):
        moved = [
            replace(
                response,
                deployment=deployment,
                coordinates={"a": response.coordinates["a"] + shift},
                windows=replace(response.windows, lowest={"a": response.windows.lowest["a"] + shift}),
            )
            for response in talk
        ]
        talks.append(Talk(moved[0].conversation_id, None, moved))
    return talks


def test_a_deployment_is_certified_on_its_own_conversations() -> None:
    found = calibrate_deployments(healthy(21, 200, shift=-7.0), PARENT, budget=0.05)
    own = found.config.boundaries_of("bank")
    assert (own.certification, own.budget, own.conversations) == ("certified", 0.05, 150)
    assert found.config.baselines["bank"].conversations == 50
    assert not found.refused
    # Judged by the parent's baseline nearly all of it would warn; by its own, about as many as the budget says.
    fresh = [talk.responses for talk in healthy(22, 400, shift=-7.0)]
    borrowed = replace(
        PARENT, baselines={**PARENT.baselines, "bank": replace(PARENT.baselines[DEPLOYMENT], deployment="bank")}
    )
    block = own.block_turns
    assert sum(warns(list(talk[:block]), found.config) for talk in fresh) / len(fresh) < 0.1
    assert sum(warns(list(talk[:block]), borrowed) for talk in fresh) / len(fresh) > 0.8


def test_the_parent_keeps_its_own() -> None:
    found = calibrate_deployments(healthy(21, 200), PARENT, budget=0.05)
    assert found.config.boundaries_of(DEPLOYMENT) == PARENT.boundaries
    assert found.config.baselines[DEPLOYMENT] == PARENT.baselines[DEPLOYMENT]
    assert found.config.config_id != PARENT.config_id
    ratio = found.config.boundaries_of("bank").level / PARENT.boundaries.level
    assert found.config.boundaries_of("bank").dip / PARENT.boundaries.dip == pytest.approx(ratio, rel=1e-3)


@pytest.mark.parametrize(("budget", "confidence"), [(0.05, None), (0.05, 0.9), (0.02, None)])
def test_too_few_are_refused_with_the_number_that_would_do(budget: float, confidence: float | None) -> None:
    needed = math.ceil(fewest(budget, confidence) * 4 / 3)
    found = calibrate_deployments(healthy(23, needed - 2), PARENT, budget=budget, confidence=confidence)
    assert found.config == PARENT
    assert f"at least {needed}" in found.refused["bank"].cure
    enough = calibrate_deployments(healthy(23, needed), PARENT, budget=budget, confidence=confidence)
    assert not enough.refused
    assert enough.config.boundaries_of("bank").certification == "certified"


def test_without_a_promise_where_one_asks_for_it() -> None:
    found = calibrate_deployments(healthy(24, 10, shift=-7.0), PARENT, budget=0.01, uncertified=True)
    own = found.config.boundaries_of("bank")
    assert own.certification == own.critical_certification == "uncertified"
    assert (own.conversations, own.probability_within) == (0, None)
    assert (own.level, own.dip) == (PARENT.boundaries.level, PARENT.boundaries.dip)
    assert found.config.baselines["bank"].conversations == 10
    certified = calibrate_deployments(healthy(24, 200), PARENT, budget=0.05, uncertified=True)
    assert certified.config.boundaries_of("bank").certification == "certified"  # there are enough: nothing is given up


def test_each_deployment_for_itself() -> None:
    talks = [*healthy(25, 60, "bank"), *healthy(26, 8, "shop two"), *healthy(27, 1, "one")]
    found = calibrate_deployments(talks, PARENT, budget=0.05)
    assert set(found.config.own_boundaries) == {"bank"}
    assert set(found.refused) == {"shop two", "one"}


def test_conversations_without_responses_count_for_nothing() -> None:
    found = calibrate_deployments([Talk("empty", None, []), *healthy(25, 60)], PARENT, budget=0.05)
    assert found.config.own_boundaries["bank"].conversations == 45
    assert calibrate_deployments([], PARENT, budget=0.05) == Calibrated(PARENT, {}, 0)


@given(st.permutations(range(40)), st.integers(1, 40))
def test_one_conversation_per_user_whatever_the_order(order: list[int], users: int) -> None:
    talks = [Talk(f"c{i}", f"u{i % users}", []) for i in range(40)]
    chosen, left_out = units(talks[i] for i in order)
    assert len(chosen) == len({talk.user for talk in chosen}) == users
    assert left_out == 40 - users
    assert chosen == units(talks)[0]


def test_who_is_not_named_is_somebody_else_each_time() -> None:
    talks = [Talk(f"c{i}", None, []) for i in range(5)] + [Talk("c9", "c1", [])]
    assert len(units(talks)[0]) == 6


# What is gathered


def test_it_takes_what_the_fold_would_take_and_says_what_it_leaves_out() -> None:
    why: list[str] = []
    gathering = Gathering(PARENT, None, why.append)
    good = traffic(31, 1)[0]
    for event in (*good, good[0], replace(good[0], id="x", axis_id="old"), replace(good[0], id="y", coordinates={})):
        gathering.add("c", None, event)
    (talk,) = gathering.talks()
    assert list(talk.responses) == good
    assert len(why) == 3 and not gathering.users_known
    moved = Gathering(PARENT, "bank", why.append)
    moved.add("c", "u", good[0])
    assert moved.users_known and moved.talks()[0].responses[0].deployment == "bank"


def test_a_conversation_that_changed_its_deployment_is_one_of_each() -> None:
    gathering = Gathering(PARENT, None, lambda _why: None)
    first, second = traffic(31, 1)[0][:2]
    gathering.add("c", None, first)
    gathering.add("c", None, replace(second, deployment="bank"))
    assert [talk.responses[0].deployment for talk in gathering.talks()] == [first.deployment, "bank"]


def test_the_report_says_what_a_day_is_like_and_what_is_not_known() -> None:
    found = calibrate_deployments(healthy(21, 200), PARENT, budget=0.05, critical_budget=0.001)
    report = report_of(found, traffic=1000, prevalence=0.1, detection=0.5, critical_budget=0.001, users_known=False)
    load = report["deployments"]["bank"]["expected_per_day"]
    assert (load["false_alarms"], load["true_alarms"]) == (pytest.approx(45.0), pytest.approx(50.0))
    console = Console(file=io.StringIO(), width=500)
    print_calibrated(report, console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("bank: CERTIFIED", "999 conversations", "nothing is promised", "45 false and 50 true"):
        assert part in said
