"""Promises of paging: the young page at once, the old only where they still matter, and none is part of two alerts."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitor.events import Finding
from monitor.paging import Known, decide
from monitor.store.store import Pending, Session

NOW = 1_800_000_000.0
HOUR = 3600.0


def moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def finding(conversation: str, turn: int, kind: str = "dip", *, age: float = 10.0, **changes: Any) -> Finding:
    return Finding(
        **{
            "id": f"{conversation}-{turn}-{kind}",
            "time": moment(NOW - age),
            "conversation_id": conversation,
            "turn": turn,
            "deployment": "shop",
            "axis_id": "axis-1",
            "kind": kind,
            "severity": "info" if kind == "recovered" else "warning",
            "statistic": "dip",
            "value": 4.0,
            "boundary": 3.0,
            "risk": 1.3,
            "budget": None,
            "certification": "uncertified",
            "config_id": "k",
            "episode_id": f"{conversation}-episode",
            **changes,
        }
    )


def session(conversation: str, *, episode: str | None, age: float = 10.0) -> Session:
    return Session(
        conversation_id=conversation,
        deployment="shop",
        model="toy",
        axis_id="axis-1",
        turn=1,
        projection=0.0,
        outcome="folded",
        time=NOW - age,
        started=NOW - age,
        responses=1,
        z=0.0,
        risk=0.0,
        episode_id=episode,
    )


def known(**changes: Any) -> Known:
    return Known(
        **{
            "now": NOW,
            "max_age": HOUR,
            "taken": lambda id: False,
            "episodes": set(),
            "forgetting": set(),
            "behind": lambda conversation: False,
            "session": lambda conversation: None,
            **changes,
        }
    )


def reasons(findings: list[Finding], **changes: Any) -> list[str]:
    pending = [Pending(str(number), one, NOW) for number, one in enumerate(findings)]
    return [f"{one.act}: {one.reason}" for one in decide(pending, known(**changes))]


def still_open(conversation: str) -> Session:
    return session(conversation, episode=f"{conversation}-episode")


def closed(conversation: str) -> Session:
    return session(conversation, episode=None)


def test_a_young_finding_is_taken_at_once_also_while_catching_up() -> None:
    assert reasons([finding("c", 1)], behind=lambda _: True) == ["take: new"]


@pytest.mark.parametrize(("age", "expected"), [(HOUR, "take: new"), (HOUR + 1, "keep: over"), (-HOUR, "take: new")])
def test_old_is_what_is_older_than_the_bound(age: float, expected: str) -> None:
    assert reasons([finding("c", 1, age=age)], session=closed) == [expected]


def test_an_old_one_whose_episode_is_open_waits_for_the_end_of_the_backlog_and_is_then_taken() -> None:
    old = [finding("c", 1, age=2 * HOUR)]
    assert reasons(old, behind=lambda _: True, session=still_open) == ["wait: catching_up"]
    assert reasons(old, behind=lambda _: False, session=still_open) == ["take: still_open"]
    assert reasons(old, behind=lambda _: True, session=closed) == ["keep: over"]


def test_another_episode_that_is_open_does_not_count() -> None:
    assert reasons([finding("c", 1, age=2 * HOUR)], session=lambda c: session(c, episode="later")) == ["keep: over"]


def test_an_episode_in_a_conversation_that_was_left_is_over() -> None:
    left = lambda c: session(c, episode=f"{c}-episode", age=HOUR + 1)  # noqa: E731
    old = [finding("c", 1, age=2 * HOUR)]
    assert reasons(old, session=left) == ["keep: over"]
    # While the worker catches up nobody knows whether it was left: the backlog may hold the rest of it.
    assert reasons(old, session=left, behind=lambda _: True) == ["wait: catching_up"]


def test_an_old_shift_of_a_whole_deployment_is_only_kept() -> None:
    def never(conversation: str) -> Session | None:
        raise AssertionError("it has no conversation")

    shift = finding("", 0, "fleet_shift", age=2 * HOUR)
    assert reasons([shift], session=never) == ["keep: over"]
    assert reasons([finding("", 0, "fleet_shift")], session=never) == ["take: new"]


@pytest.mark.parametrize("identity", ["weak", "unlinked"])
def test_a_weak_identity_pages_nobody_neither_at_its_end(identity: str) -> None:
    both = [finding("c", 1, identity=identity), finding("c", 3, "recovered", identity=identity)]
    assert reasons(both) == ["keep: weak_identity"] * 2
    assert reasons([finding("c", 3, "recovered")]) == ["keep: never_alerted"]


@pytest.mark.parametrize("identity", ["", "given", "derived"])
def test_other_identities_do(identity: str) -> None:
    assert reasons([finding("c", 1, identity=identity)]) == ["take: new"]


def test_what_follows_in_an_episode_that_has_an_alert_is_part_of_it_however_old_it_is() -> None:
    end, worse = finding("c", 3, "recovered", age=5 * HOUR), finding("c", 2, severity="critical", age=5 * HOUR)
    assert reasons([end]) == ["keep: never_alerted"]
    assert reasons([worse], session=closed) == ["keep: over"]
    assert reasons([worse, end], episodes={"c-episode"}) == ["take: same_episode"] * 2
    assert reasons([finding("c", 1), worse, end]) == ["take: new", "take: same_episode", "take: same_episode"]


def test_a_recovery_of_an_episode_that_was_only_kept_is_kept_too() -> None:
    pair = [finding("c", 1, age=2 * HOUR), finding("c", 3, "recovered", age=10)]
    assert reasons(pair, session=closed) == ["keep: over", "keep: never_alerted"]


def test_what_is_part_of_an_alert_already_is_not_taken_again_but_what_follows_is() -> None:
    pair = [finding("c", 1), finding("c", 2, severity="critical")]
    known_one = {"taken": lambda id: id == "c-1-dip", "episodes": {"c-episode"}}
    assert reasons(pair, **known_one) == ["keep: known", "take: same_episode"]


def test_what_is_about_to_be_forgotten_waits_for_that() -> None:
    both = [finding("c", 1), finding("d", 1)]
    assert reasons(both, forgetting={"c"}, taken=lambda id: id == "c-1-dip") == ["wait: forgetting", "take: new"]


@given(
    findings=st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.sampled_from(["dip", "recovered"]),
            st.floats(0, 3 * HOUR),
            st.sampled_from(["", "weak"]),
        ),
        max_size=12,
    ),
    open_ones=st.sets(st.sampled_from("abc")),
    behind=st.sets(st.sampled_from("abc")),
    told=st.sets(st.integers(0, 11)),
)
def test_nothing_is_taken_twice_and_no_end_without_a_beginning(
    findings: list[tuple[str, str, float, str]], open_ones: set[str], behind: set[str], told: set[int]
) -> None:
    made = [
        finding(conversation, number, kind, age=age, identity=identity)
        for number, (conversation, kind, age, identity) in enumerate(findings)
    ]
    told_ids = {one.id for number, one in enumerate(made) if number in told}
    episodes = {one.episode_id for one in made if one.id in told_ids}
    pending = [Pending(str(number), one, NOW) for number, one in enumerate(made)]
    state = known(
        taken=told_ids.__contains__,
        episodes=episodes,
        behind=lambda conversation: conversation in behind,
        session=lambda conversation: session(
            conversation, episode=f"{conversation}-episode" if conversation in open_ones else None
        ),
    )
    decisions = decide(pending, state)
    assert [one.pending for one in decisions] == pending
    begun = set(episodes)
    for decision in decisions:
        one = decision.pending.finding
        if decision.act == "take":
            assert one.id not in told_ids and one.identity != "weak"
            assert one.kind != "recovered" or one.episode_id in begun
            begun.add(one.episode_id)
        if decision.act == "wait":
            assert one.conversation_id in behind & open_ones
