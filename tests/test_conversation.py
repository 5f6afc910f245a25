"""Promises of the fold: what alarms, what does not, what is skipped, and that a replay says the same to the letter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from monitor.detect.baseline import Baseline, Boundaries, DetectorConfig, PersonaSpace, Readout
from monitor.detect.conversation import ConversationState, Step, step
from monitor.errors import EventError
from monitor.events import Finding, Projection, Windows, decode_finding, encode, episode_id

FAR = 1e5  # a boundary that nothing here reaches
BOUNDARIES = Boundaries(level=2.0, drop=3.0, cusum=5.0, dip=4.0, budget=0.01, certification="certified")
CONFIG = DetectorConfig(
    axis_id="axis",
    readout=Readout(coordinates={"persona_axis": 1.0}, prompt={"persona_axis": 0.5}),
    baselines={"d": Baseline("d", "axis", 10.0, 2.0, 8.0, 4.0, 20, 100)},
    boundaries=BOUNDARIES,
    persona_space=PersonaSpace(["pc1", "pc2"], [0.0, 0.0], {"pirate": [1.0, 0.0], "ghost": [0.0, 1.0]}),
)


def only(**boundaries: float) -> DetectorConfig:
    """The same detector with one statistic awake."""
    return replace(
        CONFIG, boundaries=Boundaries(**({"level": FAR, "drop": FAR, "cusum": FAR, "dip": FAR} | boundaries))
    )


def response(
    turn: int, z: float, *, dip: float = 0.0, id: str | None = None, seconds: int = 0, **changes: object
) -> Projection:
    """A response whose readout lies z standard deviations above the mean, and its lowest window -dip of its own."""
    event = Projection(
        id=id or f"r{turn}",
        time=f"2026-03-{1 + seconds // 86400:02}T{seconds // 3600 % 24:02}:{seconds // 60 % 60:02}:{seconds % 60:02}Z",
        source="/test",
        conversation_id="c",
        turn=turn,
        model="m",
        axis_id="axis",
        layer=18,
        deployment="d",
        projection=0.0,
        coordinates={"persona_axis": 9.0 + 2.0 * z, "pc1": 0.1, "pc2": 1.0},
        prompt={"persona_axis": 2.0},
        windows=Windows(lowest={"persona_axis": 7.0 - 4.0 * dip}, last={"persona_axis": 7.0}),
        tokens=40,
    )
    return replace(event, **changes)


def fold(
    events: Iterable[Projection], config: DetectorConfig = CONFIG, state: ConversationState | None = None
) -> list[Step]:
    steps = []
    for event in events:
        steps.append(step(state, event, config))
        state = steps[-1].state
    return steps


def talk(values: Sequence[float], config: DetectorConfig = CONFIG) -> list[Step]:
    return fold([response(turn, z) for turn, z in enumerate(values)], config)


def findings(steps: Iterable[Step]) -> list[Finding]:
    return [finding for each in steps for finding in each.findings]


def told(steps: Iterable[Step]) -> list[tuple[int, str, str, str]]:
    return [(f.turn, f.kind, f.severity, f.statistic) for f in findings(steps)]


# --- what alarms ------------------------------------------------------------------------------------------------------


def test_the_statistics_are_what_they_say() -> None:
    steps = fold([response(0, 1.0, dip=0.5), response(1, -1.0, dip=2.0), response(2, 0.0)])
    assert [each.z for each in steps] == [1.0, -1.0, 0.0]
    assert steps[0].statistics == (-1.0, 0.0, 0.0, 0.5)
    assert steps[1].statistics == pytest.approx((-0.2, 0.8, 0.5, 2.0))
    assert steps[2].statistics == pytest.approx((-0.12, 0.88, 0.0, 0.0))
    assert steps[1].risk == pytest.approx(2.0 / 4.0)
    assert steps[2].risk == pytest.approx(0.88 / 3.0)


def test_a_conversation_at_the_healthy_mean_never_fires() -> None:
    steps = talk([0.0] * 300)
    assert findings(steps) == []
    assert {each.risk for each in steps} == {0.0}


@given(st.lists(st.floats(0.0, 50.0), max_size=40))
def test_above_the_healthy_mean_only_a_fall_from_its_own_start_can_fire(values: list[float]) -> None:
    assert {f.statistic for f in findings(talk(values)) if f.kind != "recovered"} <= {"drop"}
    assert findings(talk(values, replace(CONFIG, boundaries=replace(BOUNDARIES, drop=FAR)))) == []


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([-2.0], (0, "low_start", "warning", "level")),
        ([-4.0], (0, "low_start", "critical", "level")),
        ([3.0, -4.6], (1, "sudden_drop", "warning", "drop")),
        ([0.0, -3.0, -3.0, -3.0], (2, "sustained_drop", "warning", "cusum")),
        ([0.0, -1.0, *[-1.0] * 9], (10, "sustained_drop", "warning", "cusum")),
    ],
)
def test_each_kind_of_drift_is_called_by_its_name(values: list[float], expected: tuple[int, str, str, str]) -> None:
    assert told(talk(values))[0] == expected


def test_a_sunken_level_is_a_sustained_drop_after_the_first_turn() -> None:
    assert told(talk([0.0, -2.5, -2.5, -2.5, -2.5], only(level=2.0))) == [(4, "sustained_drop", "warning", "level")]


def test_a_first_response_that_only_the_cusum_catches_is_a_low_start_too() -> None:
    assert told(talk([-2.0], only(cusum=1.0))) == [(0, "low_start", "warning", "cusum")]


def test_a_dip_inside_one_response_is_seen_though_its_mean_is_healthy() -> None:
    assert told(fold([response(0, 0.0), response(1, 0.0, dip=4.0)])) == [(1, "dip", "warning", "dip")]


def test_equal_ratios_are_named_in_a_fixed_order() -> None:
    tied = replace(CONFIG, boundaries=Boundaries(level=2.0, drop=2.0, cusum=1.5, dip=2.0), ewma_weight=1.0)
    assert told(fold([response(0, 0.0), response(1, -2.0, dip=2.0)], tied)) == [
        (1, "sustained_drop", "warning", "level")
    ]


def test_a_finding_carries_all_that_the_reader_needs() -> None:
    (finding,) = findings(talk([-2.5]))
    assert finding.value == 2.5
    assert finding.boundary == 2.0
    assert finding.risk == 1.25
    assert (finding.budget, finding.certification) == (0.01, "certified")
    assert finding.config_id == CONFIG.config_id
    assert finding.episode_id == episode_id("c", "r0")
    assert finding.nearest_roles == ["ghost", "pirate"]
    assert (finding.conversation_id, finding.deployment, finding.axis_id) == ("c", "d", "axis")
    assert finding.time == "2026-03-01T00:00:00Z"
    assert decode_finding(encode(finding)) == finding


def test_a_finding_says_how_sure_the_collector_was_whose_conversation_it_is() -> None:
    weak = replace(response(0, -2.5), attributes={"identity": "weak", "finish_reason": "stop"})
    (finding,) = fold([weak])[0].findings
    assert finding.identity == "weak"
    assert findings(talk([-2.5]))[0].identity == ""


def test_the_boundary_itself_alarms_and_just_inside_it_does_not() -> None:
    assert len(findings(talk([-2.0]))) == 1
    assert findings(talk([-1.999999])) == []


def test_a_warning_that_becomes_critical_is_told_once_more_and_never_again() -> None:
    steps = talk([0.0, -3.0, -3.0, -8.0, -9.0, -9.0, -0.9, -9.0, -9.0])
    assert told(steps) == [(2, "sustained_drop", "warning", "cusum"), (3, "sustained_drop", "critical", "level")]
    first, second = findings(steps)
    assert first.episode_id == second.episode_id
    assert first.id != second.id
    assert (steps[1].state.episode, steps[-1].state.episode.severity) == (None, "critical")


def test_an_episode_that_opens_critical_is_told_once() -> None:
    assert told(talk([-9.0] * 20)) == [(0, "low_start", "critical", "level")]


# --- recovery ---------------------------------------------------------------------------------------------------------


def test_an_episode_ends_after_two_responses_back_inside() -> None:
    steps = talk([-3.0, -3.0, -1.0, -3.0, -1.0, -1.0, -1.0], only(level=2.0))
    assert told(steps) == [(0, "low_start", "warning", "level"), (5, "recovered", "info", "level")]
    opened, ended = findings(steps)
    assert ended.episode_id == opened.episode_id
    assert (ended.value, ended.boundary, ended.risk) == (1.0, 2.0, 0.5)
    assert steps[-1].state.episode is None


def test_between_release_and_boundary_nothing_ends_and_nothing_opens() -> None:
    assert told(talk([-3.0, *[-1.5] * 30], only(level=2.0))) == [(0, "low_start", "warning", "level")]
    assert told(talk([-1.5] * 30, only(level=2.0))) == []


def test_a_fall_from_its_own_start_lasts_until_it_has_climbed_back() -> None:
    steps = talk([4.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.0, 3.0], only(drop=3.0))
    assert told(steps) == [(3, "sudden_drop", "warning", "drop"), (7, "recovered", "info", "drop")]


def test_a_dip_ends_only_when_the_lowest_windows_are_back_inside() -> None:
    dips = [4.5, 3.0, 3.0, 3.0, 2.0, 1.0]
    steps = fold(response(turn, 0.0, dip=dip) for turn, dip in enumerate(dips))
    assert told(steps) == [(0, "dip", "warning", "dip"), (5, "recovered", "info", "dip")]


def test_a_long_excursion_does_not_outlive_itself() -> None:
    """Two hundred turns at -10 leave a mountain in the CUSUM and a low EWMA: neither holds nor reopens the episode."""
    steps = talk([0.0] * 3 + [-10.0] * 200 + [0.0] * 50)
    assert [kind for _, kind, _, _ in told(steps)].count("recovered") == 1
    assert told(steps)[-1][:3] == (204, "recovered", "info")
    assert steps[204].state.cusum == 0.0
    assert steps[-1].state.episode is None


def test_a_slow_drift_stays_open_while_it_goes_on_though_each_response_is_harmless() -> None:
    steps = talk([-1.0] * 60, only(level=2.0, cusum=5.0))
    assert told(steps) == [(9, "sustained_drop", "warning", "cusum"), (19, "sustained_drop", "critical", "cusum")]


def test_the_cusum_has_a_ceiling_so_risk_does_not_grow_with_age() -> None:
    steps = talk([-1.0] * 500, only(cusum=5.0))
    assert steps[-1].state.cusum == 10.0
    assert steps[-1].risk == 2.0


@given(
    healthy=st.integers(0, 5),
    depth=st.floats(0.1, 12.0),
    length=st.integers(1, 60),
    rest=st.integers(0, 30),
    slack=st.floats(0.0, 1.0),
    boundary=st.floats(0.5, 8.0),
)
def test_one_excursion_is_one_episode(
    healthy: int, depth: float, length: int, rest: int, slack: float, boundary: float
) -> None:
    config = replace(CONFIG, boundaries=Boundaries(2.0, 3.0, boundary, 4.0), cusum_slack=slack)
    steps = talk([0.0] * healthy + [-depth] * length + [0.0] * rest, config)
    opened = [f for f in findings(steps) if f.kind != "recovered"]
    assert len({f.episode_id for f in opened}) <= 1
    assert len({f.severity for f in opened}) == len(opened)
    assert all(f.turn >= healthy + length for f in findings(steps) if f.kind == "recovered")


def test_a_held_response_never_counts_towards_recovery_and_takes_nothing_from_it() -> None:
    held = [response(turn, 0.0, held=0.2) for turn in range(1, 40)]
    steps = fold([response(0, -3.0), *held])
    assert told(steps) == [(0, "low_start", "warning", "level")]
    assert steps[-1].state.folded == 40
    free = fold([response(0, -3.0), response(1, 0.0), *held[1:], response(40, 0.0)], only(level=2.0))
    assert told(free)[-1] == (40, "recovered", "info", "level")


def test_a_held_response_is_judged_like_any_other() -> None:
    assert told(fold([response(0, -3.0, held=1.0)])) == [(0, "low_start", "warning", "level")]


# --- order, duplicates, segments --------------------------------------------------------------------------------------


def test_a_known_id_changes_nothing_but_its_counter() -> None:
    before = talk([0.0, -1.0])[-1].state
    again = step(before, response(0, -9.0, id="r1", seconds=500), CONFIG)
    assert (again.outcome, again.findings, again.z, again.risk) == ("duplicate", [], None, None)
    assert again.state == replace(before, duplicates=1)


def test_thirty_two_ids_are_remembered() -> None:
    state = talk([0.0] * 33)[-1].state
    assert step(state, response(40, 0.0, id="r1"), CONFIG).outcome == "duplicate"
    assert step(state, response(40, 0.0, id="r0"), CONFIG).outcome == "folded"


@pytest.mark.parametrize("turn", [0, 5, 31])
def test_a_turn_told_twice_under_two_ids_is_a_branch(turn: int) -> None:
    state = talk([0.0] * 32)[-1].state
    again = step(state, response(turn, -9.0, id="other"), CONFIG)
    assert (again.outcome, again.findings) == ("branch", [])
    assert (again.state.branches, again.state.folded) == (1, 32)
    assert (again.state.ewma, again.state.cusum) == (state.ewma, state.cusum)
    assert step(again.state, response(turn, -9.0, id="other"), CONFIG).outcome == "duplicate"


def test_a_turn_thirty_two_behind_is_late_and_thirty_one_behind_is_not() -> None:
    state = fold([response(40, 0.0)])[-1].state
    late = step(state, response(8, -9.0), CONFIG)
    assert (late.outcome, late.findings, late.state.late, late.state.folded) == ("late", [], 1, 1)
    assert step(state, response(9, 0.0), CONFIG).outcome == "folded"


def test_a_turn_that_comes_behind_is_folded_where_it_stands_in_the_log() -> None:
    steps = fold([response(0, 0.0), response(2, 0.0), response(1, -6.0), response(1, 0.0, id="again")])
    assert [each.outcome for each in steps] == ["folded", "folded", "folded", "branch"]
    assert steps[2].state.last_turn == 2
    assert steps[2].state.ewma == pytest.approx(-2.4)
    assert findings(steps)[0].episode_id == episode_id("c", "r1")


def test_a_leap_of_turns_costs_no_memory() -> None:
    steps = fold([response(0, 0.0), response(10**15, 0.0), response(10**15 - 1, 0.0), response(3, 0.0)])
    assert [each.outcome for each in steps] == ["folded", "folded", "folded", "late"]
    assert steps[-1].state.turns == 0b11


@given(st.permutations(range(24)), st.lists(st.integers(0, 40), max_size=20))
def test_every_turn_is_folded_once_in_whatever_order(order: list[int], extra: list[int]) -> None:
    events = [response(turn, 0.0, id=f"{i}") for i, turn in enumerate([*order, *extra])]
    steps = fold(events)
    seen: set[int] = set()
    for event, each in zip(events, steps, strict=True):
        newest = max(seen, default=-1)
        expected = "late" if newest - event.turn >= 32 else "branch" if event.turn in seen else "folded"
        assert each.outcome == expected
        seen |= {event.turn} if expected == "folded" else set()
    last = steps[-1].state
    assert (last.folded, last.branches + last.late) == (len(seen), len(events) - len(seen))


def test_a_gap_starts_a_new_segment_and_forgets_the_old_statistics() -> None:
    steps = fold([response(0, 0.0), response(1, -9.0), response(2, -3.0, seconds=86401)])
    assert (steps[1].state.segment, steps[2].state.segment) == (0, 1)
    assert told(steps)[-1] == (2, "low_start", "warning", "level")
    assert findings(steps)[-1].episode_id == episode_id("c", "r2")
    assert (steps[2].state.lapsed, steps[2].state.first_turn, steps[2].state.start) == (1, 2, -3.0)
    assert not [f for f in findings(steps) if f.kind == "recovered"]


def test_a_gap_that_is_just_not_too_long_goes_on() -> None:
    steps = fold([response(0, 0.0), response(1, 0.0, seconds=86400)])
    assert steps[1].state.segment == 0


def test_a_caller_who_starts_again_under_an_old_id_is_watched() -> None:
    old = [response(turn, 0.0) for turn in range(50)]
    steps = fold([*old, response(0, -3.0, id="new", seconds=90000), response(0, 0.0, id="branch", seconds=90001)])
    assert [each.outcome for each in steps[-2:]] == ["folded", "branch"]
    assert told(steps) == [(0, "low_start", "warning", "level")]


def test_ids_and_counters_outlive_a_segment() -> None:
    steps = fold([response(0, 0.0), response(0, 0.0, id="b"), response(1, 0.0, seconds=90000)])
    assert step(steps[-1].state, response(0, 0.0), CONFIG).outcome == "duplicate"
    assert (steps[-1].state.folded, steps[-1].state.branches) == (2, 1)


def test_a_changed_axis_is_never_compared() -> None:
    state = talk([0.0, 0.0])[-1].state
    foreign = step(state, response(2, -9.0, axis_id="new"), CONFIG)
    assert (foreign.outcome, foreign.findings, foreign.z, foreign.risk) == ("unjudged", [], None, None)
    assert (foreign.state.unjudged, foreign.state.segment, foreign.state.folded) == (1, 0, 2)
    moved = replace(CONFIG, axis_id="new", baselines={"d": replace(CONFIG.baselines["d"], axis_id="new")})
    steps = fold([response(3, -3.0, axis_id="new"), response(4, -3.0, axis_id="axis")], moved, foreign.state)
    assert [each.outcome for each in steps] == ["folded", "unjudged"]
    assert (steps[0].state.segment, steps[0].state.axis_id) == (1, "new")
    assert told(steps) == [(3, "low_start", "warning", "level")]


def test_a_deployment_without_a_baseline_is_learning_and_never_told() -> None:
    steps = fold([response(turn, -9.0, deployment="new") for turn in range(5)])
    assert {(each.outcome, each.z, each.risk, *each.findings) for each in steps} == {("learning", None, None)}
    assert (steps[-1].state.learning, steps[-1].state.deployment) == (5, "new")
    later = replace(CONFIG, baselines={"new": replace(CONFIG.baselines["d"], deployment="new")})
    first = step(steps[-1].state, response(5, -3.0, deployment="new"), later)
    assert [f.kind for f in first.findings] == ["low_start"]
    assert first.state.segment == 0


def test_each_deployment_is_judged_by_its_own_baseline() -> None:
    pirate = replace(CONFIG.baselines["d"], deployment="pirate", mean=2.0, window_mean=2.0)
    both = replace(CONFIG, baselines={**CONFIG.baselines, "pirate": pirate})
    assert [f.kind for f in step(None, response(0, -4.0), both).findings] == ["low_start"]
    assert step(None, response(0, -4.0, deployment="pirate"), both).findings == []


def test_a_date_that_is_none_is_poison() -> None:
    with pytest.raises(EventError, match="no date"):
        step(None, response(0, 0.0, time="2026-02-30T00:00:00Z"), CONFIG)


def test_a_missing_coordinate_is_poison() -> None:
    with pytest.raises(EventError, match="persona_axis"):
        step(None, response(0, 0.0, coordinates={"other": 1.0}), CONFIG)


# --- the algebra ------------------------------------------------------------------------------------------------------

zs = st.floats(-8.0, 4.0, width=32)


@st.composite
def logs(draw: st.DrawFn) -> list[Projection]:
    """A conversation as a log may hold it: drifting, held, out of order, re-sent, branched, interrupted."""
    events, seconds = [], 0
    for i in range(draw(st.integers(1, 40))):
        seconds += draw(st.sampled_from([30, 30, 30, 90000]))
        turn = max(0, i + draw(st.sampled_from([0, 0, 0, 0, -1, -3, 2, 40])))
        events.append(
            response(
                turn,
                draw(zs),
                dip=draw(st.floats(-2.0, 9.0, width=32)),
                id=f"r{draw(st.sampled_from([i, i, i, max(0, i - 1)]))}",
                seconds=min(seconds, 30 * 86400),
                held=draw(st.sampled_from([0.0, 0.0, 0.5])),
                axis_id=draw(st.sampled_from(["axis"] * 9 + ["other"])),
                deployment=draw(st.sampled_from(["d"] * 9 + ["new"])),
            )
        )
    return events


@given(logs())
def test_a_replay_through_the_store_says_the_same_to_the_byte(events: list[Projection]) -> None:
    stored: bytes | None = None
    again = DetectorConfig.from_json(CONFIG.to_json())
    for live, event in zip(fold(events), events, strict=True):
        before = None if stored is None else msgspec.json.decode(stored, type=ConversationState)
        untouched = stored
        replayed = step(before, event, again)
        assert before is None or msgspec.json.encode(before) == untouched
        assert [encode(f) for f in replayed.findings] == [encode(f) for f in live.findings]
        assert replayed == live
        stored = msgspec.json.encode(replayed.state)


@given(logs(), st.data())
def test_a_resend_within_thirty_two_records_changes_no_finding(events: list[Projection], data: st.DataObject) -> None:
    resent: list[Projection] = []
    seen: list[Projection] = []
    for event in events:
        resent.append(event)
        if event.id not in {old.id for old in seen}:
            seen.append(event)
        resent += data.draw(st.lists(st.sampled_from(seen[-32:]), max_size=2))
    once, more = fold(events), fold(resent)
    assert findings(more) == findings(once)
    assert more[-1].state.duplicates - once[-1].state.duplicates == len(resent) - len(events)
    assert replace(more[-1].state, duplicates=0) == replace(once[-1].state, duplicates=0)


@given(logs())
def test_every_episode_is_a_story_with_one_beginning_and_at_most_one_end(events: list[Projection]) -> None:
    stories: dict[str, list[Finding]] = {}
    steps = fold(events)
    for finding in findings(steps):
        stories.setdefault(finding.episode_id, []).append(finding)
    for story in stories.values():
        shape = [f.severity for f in story]
        assert shape[0] != "info"
        assert shape in (
            *(["warning"], ["critical"], ["warning", "critical"]),
            *(["warning", "info"], ["critical", "info"], ["warning", "critical", "info"]),
        )
        assert [f.kind == "recovered" for f in story] == [f.severity == "info" for f in story]
    last = steps[-1].state
    ended = sum(story[-1].kind == "recovered" for story in stories.values())
    assert len(stories) == ended + last.lapsed + (last.episode is not None)
    ids = [f.id for f in findings(steps)]
    assert len(set(ids)) == len(ids)


@given(logs())
def test_every_record_is_counted_once(events: list[Projection]) -> None:
    last = fold(events)[-1].state
    counters = last.folded, last.duplicates, last.branches, last.late, last.unjudged, last.learning
    assert sum(counters) == len(events)


@given(st.floats(-1e300, 1e300), st.floats(-1e300, 1e300))
def test_whatever_a_collector_sends_the_state_stays_finite(one: float, two: float) -> None:
    events = [response(0, 0.0, coordinates={"persona_axis": one}), response(1, 0.0, coordinates={"persona_axis": two})]
    state = fold(events)[-1].state
    assert msgspec.json.decode(msgspec.json.encode(state), type=ConversationState) == state


def test_a_state_stays_small_after_ten_thousand_turns() -> None:
    axis = "0123456789abcdef" * 4
    config = replace(CONFIG, axis_id=axis, baselines={"d": replace(CONFIG.baselines["d"], axis_id=axis)})
    events = (response(turn, -1.0 / (1 + turn % 7) - 2.1 * (turn % 100 > 50), axis_id=axis) for turn in range(10_000))
    state, largest = None, 0
    for event in events:
        state = step(state, event, config).state
        largest = max(largest, len(msgspec.json.encode(state)))
    assert state is not None
    assert state.folded == 10_000
    assert largest < 768


def test_a_state_written_by_the_first_release_is_still_read() -> None:
    """An array has no names: a field that is moved or inserted would be read as its neighbour."""
    written = (
        b'[1,"axis","d",3,0.5,-0.25,1.5,9,1772323200.0,1772323260.0,127,"AAAAAAAABBBBBBBB",-1.0,0.75,"branch",'
        b'["e",4,"warning","dip",1],12,1,2,3,4,5,6]'
    )
    state = msgspec.json.decode(written, type=ConversationState)
    assert (state.segment, state.axis_id, state.deployment, state.first_turn) == (1, "axis", "d", 3)
    assert (state.start, state.ewma, state.cusum, state.last_turn) == (0.5, -0.25, 1.5, 9)
    assert (state.folded_time, state.seen_time, state.turns) == (1772323200.0, 1772323260.0, 127)
    assert (state.z, state.risk, state.outcome) == (-1.0, 0.75, "branch")
    assert state.episode is not None
    assert (state.episode.id, state.episode.first_turn, state.episode.inside) == ("e", 4, 1)
    assert (state.folded, state.duplicates, state.branches, state.late) == (12, 1, 2, 3)
    assert (state.unjudged, state.learning, state.lapsed) == (4, 5, 6)
    assert (state.block, state.started, state.truncated) == (0, 0.0, False)  # came later
    assert (state.lowest_z, state.highest_risk) == (None, None)
    assert msgspec.json.encode(state) == written[:-1] + b",0,0.0,false,null,null]"
