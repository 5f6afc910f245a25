"""Promises of what is measured: labels stay bounded whatever comes, the busiest keep theirs, the alarm rate counts each
unit once, the worst conversations are never missed, and a real Prometheus sees all of it in a real run."""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from service import CONFIG, projection

from monitor import telemetry
from monitor.ages import show_axis_age, show_calibration_age
from monitor.axis.bundle import load_bundle, resolve_bundle
from monitor.busiest import ELECTION, OTHER, Busiest
from monitor.detect.baseline import DetectorConfig
from monitor.detect.conversation import ConversationState, Step, step
from monitor.errors import ConfigurationError
from monitor.events import Projection
from monitor.standing import Standings
from monitor.store.sqlite import SqliteStore
from monitor.tally import Tally

if TYPE_CHECKING:
    from observed import Observed

pytest_plugins = ["miniature", "observed"]

ROOT = Path(__file__).parent.parent


def value(name: str, **labels: str) -> float | None:
    return telemetry.REGISTRY.get_sample_value(name, labels)


def series(name: str) -> dict[tuple[str, ...], float]:
    """Label values → value, of every series of that name."""
    return {
        tuple(sample.labels.values()): sample.value
        for family in telemetry.REGISTRY.collect()
        for sample in family.samples
        if sample.name == name
    }


def fold(events: list[Projection], config: DetectorConfig = CONFIG) -> list[tuple[Projection, Step]]:
    states: dict[str, ConversationState] = {}
    steps = []
    for event in events:
        done = step(states.get(event.conversation_id), event, config)
        states[event.conversation_id] = done.state
        steps.append((event, done))
    return steps


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    """What one test has counted is not the next one's."""
    instruments = [
        *(telemetry.RESPONSES, telemetry.TOKENS, telemetry.PROJECTION, telemetry.Z, telemetry.FINDINGS),
        *(telemetry.BUDGET_UNITS, telemetry.BUDGET_UNITS_WARNED, telemetry.ALARM_BUDGET),
        *(telemetry.OPEN_EPISODES, telemetry.RISKIEST),
    ]
    for instrument in instruments:
        instrument.clear()
    yield
    for instrument in instruments:
        instrument.clear()


# The busiest.


@given(
    st.lists(st.tuples(st.sampled_from([f"d{n}" for n in range(30)]), st.integers(1, 900)), max_size=200),
    st.integers(1, 6),
)
def test_there_are_never_more_labels_than_asked_for(names: list[tuple[str, int]], most: int) -> None:
    busiest, shown = Busiest(most), set[str]()
    for name, times in names:
        for lost in busiest.elect():
            shown.discard(lost)  # who got a label and was not seen again has no series
        label = busiest.count(name, times)
        assert label in (name, OTHER) and busiest.label(name) == label
        if label != OTHER:
            shown.add(label)
        assert len(shown) <= most
    assert len(busiest._seen) <= 4 * most


def test_while_there_are_few_each_has_its_own() -> None:
    busiest = Busiest(50)
    assert [busiest.count(f"d{n}") for n in range(60)] == [f"d{n}" for n in range(50)] + [OTHER] * 10


def test_who_becomes_busiest_gets_a_label_and_the_quietest_loses_it() -> None:
    busiest = Busiest(3)
    for name, times in [("a", 50), ("b", 400), ("c", 300), ("late", ELECTION)]:
        busiest.count(name, times)
    assert busiest.label("late") == OTHER
    assert busiest.elect() == {"a"}
    assert [busiest.label(name) for name in ("a", "b", "c", "late")] == [OTHER, "b", "c", "late"]


def test_equals_do_not_take_the_label_from_each_other() -> None:
    busiest = Busiest(2)
    lost = 0
    for _ in range(100):
        for name in ("a", "b", "c"):
            busiest.count(name, 50)
        lost += len(busiest.elect())
    assert lost == 0


def test_a_storm_of_names_that_come_once_takes_no_label() -> None:
    busiest, chance = Busiest(5), random.Random(0)
    for number in range(30_000):
        assert busiest.elect() == set()
        busiest.count(f"d{number % 5}" if chance.random() < 0.05 or number < 5 else f"noise{number}")
    assert {busiest.label(f"d{n}") for n in range(5)} == {f"d{n}" for n in range(5)}


def test_who_was_busy_long_ago_makes_room() -> None:
    busiest = Busiest(1)
    busiest.count("old", 10_000)
    rounds = 0
    while busiest.label("new") == OTHER:
        busiest.elect()
        busiest.count("new", 1_000)
        rounds += 1
        assert rounds < 200
    assert 20 <= rounds <= 25, "twice as busy over time"


# What a batch adds.


def test_a_batch_is_counted_once_by_deployment_and_outcome() -> None:
    events = [projection(f"c{n}", turn, -0.8 * turn * (n % 2)) for turn in range(6) for n in range(20)]
    others = [projection("x", turn, deployment="new") for turn in range(3)]
    steps = fold([*events, *events[:5], *others])
    tally = Tally()
    for start in range(0, len(steps), 7):
        tally.add(steps[start : start + 7], CONFIG)
    outcomes = Counter((event.deployment, done.outcome) for event, done in steps)
    assert series("anchorwatch_responses_total") == dict(outcomes)
    assert series("anchorwatch_tokens_total") == {("shop",): 20.0 * len(events), ("new",): 60.0}
    found = Counter(("shop", one.kind, one.severity) for _, done in steps for one in done.findings)
    assert {key: count for key, count in series("anchorwatch_findings_total").items() if count} == dict(found)
    assert series("anchorwatch_findings_total")["new", "fleet_shift", "warning"] == 0, "there from the start"
    z = [done.z for _, done in steps if done.z is not None]
    assert value("anchorwatch_z_count", deployment="shop") == len(z) == len(events)
    assert value("anchorwatch_z_bucket", deployment="shop", le="-1.0") == sum(one <= -1.0 for one in z)
    assert value("anchorwatch_projection_count", deployment="new") == 3
    assert value("anchorwatch_z_sum", deployment="shop") is None, "a sum that falls would be taken for a restart"


def test_a_unit_is_counted_when_it_begins_and_once_when_it_warns() -> None:
    """Against the definition: a conversation, and every further block of a long one; each warns or does not."""
    config = replace(CONFIG, boundaries=replace(CONFIG.boundaries, block_turns=16, budget=0.05))
    chance = random.Random(3)
    events = [projection(f"c{n}", turn, chance.gauss(0.0, 1.6)) for n in range(30) for turn in range(48)]
    steps = fold(events, config)
    units, warned, unit = 0, set[tuple[str, int]](), dict[str, int]()
    for event, done in steps:
        if done.state.block == 1:
            units += 1
            unit[event.conversation_id] = unit.get(event.conversation_id, 0) + 1
        if any(one.kind != "recovered" for one in done.findings):
            warned.add((event.conversation_id, unit[event.conversation_id]))
    opened = sum(one.kind != "recovered" for _, done in steps for one in done.findings)
    assert opened > len(warned) > 5, "some unit warned twice, or this shows nothing"
    tally = Tally()
    for start in range(0, len(steps), 11):
        tally.add(steps[start : start + 11], config)
    assert value("anchorwatch_budget_units_total", deployment="shop") == units
    assert value("anchorwatch_budget_units_warned_total", deployment="shop") == len(warned)


def test_the_budget_in_force_is_shown_for_whom_it_holds() -> None:
    boundaries = replace(CONFIG.boundaries, budget=0.01, certification="certified")
    config = replace(CONFIG, own_boundaries={"shop": boundaries})
    tally = Tally()
    tally.add(fold([projection("a", 0), projection("b", 0, deployment="new")], config), CONFIG)
    assert series("anchorwatch_alarm_budget_ratio") == {}, "nobody has asked for a budget"
    tally.add(fold([projection("c", 0)], config), config)
    assert series("anchorwatch_alarm_budget_ratio") == {("shop", "certified"): 0.01}
    tally.add(fold([projection("d", 0)], config), replace(config, own_boundaries={}))
    assert series("anchorwatch_alarm_budget_ratio") == {}


def test_ten_thousand_deployments_are_fifty_and_the_rest() -> None:
    tally, chance = Tally(), random.Random(1)
    for number in range(300):
        events = [
            projection(f"c{number}-{n}", 0, deployment=f"d{chance.randrange(10_000)}" if n % 2 else "busy")
            for n in range(40)
        ]
        tally.add(fold(events), CONFIG)
    for name in ("anchorwatch_tokens_total", "anchorwatch_budget_units_total", "anchorwatch_projection_count"):
        assert len(series(name)) <= 51
    assert value("anchorwatch_tokens_total", deployment="busy") == 300 * 20 * 20.0
    assert (value("anchorwatch_tokens_total", deployment=OTHER) or 0) > 100_000


def test_what_is_counted_beyond_a_label_lost_goes_to_the_others_and_nothing_falls() -> None:
    """A counter that Prometheus sees falling is taken for a restart."""
    tally = Tally(deployments=2)
    seen: dict[tuple[str, ...], float] = {}
    for number in range(200):
        names = ["a", "b"] if number < 20 else ["b", "c", "c", "c"]
        events = [projection(f"{number}-{at}", 0, deployment=name) for at, name in enumerate(names * 10)]
        tally.add(fold(events), CONFIG)
        now = series("anchorwatch_tokens_total")
        assert all(now[key] >= before for key, before in seen.items() if key in now)
        seen = now
    assert ("c",) in seen and ("a",) not in seen, "the busiest has the label of the one that has gone"


# Who stands worst.


def states(count: int, seed: int = 0) -> list[tuple[str, ConversationState]]:
    chance = random.Random(seed)
    found = []
    for number in range(count):
        events = [projection(f"c{number}", turn, chance.gauss(-0.3 * turn * (number % 9), 0.8)) for turn in range(4)]
        found.append((f"c{number}", fold(events)[-1][1].state))
    return found


def test_the_worst_are_here_however_many_there_are() -> None:
    everybody = states(600)
    standings = Standings(most=100)
    for at, (name, state) in enumerate(everybody):
        standings.see(at % 3, name, state)
        assert len(standings) <= 100
    worst = sorted(everybody, key=lambda one: (-one[1].risk, one[0]))[:20]
    assert [one.conversation_id for one in standings.riskiest(20)] == [name for name, _ in worst]


def test_open_episodes_are_counted_until_they_end_or_fall_silent() -> None:
    standings, everybody = Standings(), states(90)
    for at, (name, state) in enumerate(everybody):
        standings.see(at % 2, name, state)
    expected = Counter(("shop", state.episode.severity) for _, state in everybody if state.episode)
    assert standings.open_episodes() == expected and len(expected) == 2
    standings.leave(1)  # another worker has it now, and counts it
    mine = Counter(("shop", state.episode.severity) for _, state in everybody[0::2] if state.episode)
    assert standings.open_episodes() == mine
    standings.forget_before(everybody[0][1].folded_time + 1)
    assert not standings.open_episodes() and len(standings) == 0


def test_the_gauges_show_the_riskiest_by_name_and_no_more_than_asked_for() -> None:
    events = [projection(f"c{n}", turn, -0.1 * n * turn) for turn in range(4) for n in range(40)]
    steps = fold(events)
    now = steps[-1][1].state.folded_time
    last = {event.conversation_id: done.state for event, done in steps}
    tally = Tally(sessions=20)
    tally.add(steps, CONFIG)
    tally.show(now)
    worst = sorted(last.items(), key=lambda one: -one[1].risk)[:20]
    assert series("anchorwatch_session_risk") == {(name, "shop"): pytest.approx(state.risk) for name, state in worst}
    counted = Counter(("shop", state.episode.severity) for state in last.values() if state.episode)
    assert series("anchorwatch_open_episodes") == dict(counted)
    tally.show(now + 3600.0)
    assert series("anchorwatch_session_risk") == series("anchorwatch_open_episodes") == {}
    silent = Tally(sessions=0)
    silent.add(steps, CONFIG)
    silent.show(now)
    assert series("anchorwatch_session_risk") == {} and series("anchorwatch_open_episodes")


# How old the instrument is.


def test_the_age_of_the_axis_is_the_bundles_and_only_of_the_axis_in_use() -> None:
    telemetry.AXIS_CREATED.clear()
    bundle = load_bundle(resolve_bundle("smollm2"))
    show_axis_age("smollm2", "another axis")
    show_axis_age("no such bundle", bundle.id)
    assert series("anchorwatch_axis_created_timestamp_seconds") == {}
    show_axis_age("smollm2", bundle.id)
    (created,) = series("anchorwatch_axis_created_timestamp_seconds").values()
    assert time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(created)) == bundle.info.created[:19]


def test_the_age_of_the_calibration_is_the_oldest_in_force(tmp_path: Path) -> None:
    def action(when: str) -> bytes:
        return b'{"by":"test","time":"%s","body":{"topic_id":"t","config_id":"c"}}' % when.encode()

    store = SqliteStore(tmp_path / "store.db")
    telemetry.CALIBRATION_ACTIVATED.set(0)
    show_calibration_age(store)
    assert value("anchorwatch_calibration_activated_timestamp_seconds") == 0
    place = "calibration/anchorwatch.projections"
    store.fold_actions(
        "t",
        0,
        4,
        {
            f"{place}/0/0": action("2026-01-01T00:00:00Z"),  # no longer in force
            f"{place}/0/900": action("2026-03-01T00:00:00Z"),
            f"{place}/1/0": action("2026-02-01T00:00:00Z"),
            f"{place}/2/0": b"damaged",
        },
    )
    show_calibration_age(store)
    store.close()
    assert value("anchorwatch_calibration_activated_timestamp_seconds") == 1_769_904_000  # the first of February


def test_what_runs_now_and_then_writes_a_file_whole_or_not_at_all(tmp_path: Path) -> None:
    telemetry.CANARY_SHIFT.set(0.125)
    path = tmp_path / "anchorwatch.prom"
    telemetry.write_metrics(path, ["anchorwatch_canary_shift"])
    samples = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert samples == ["anchorwatch_canary_shift 0.125"]
    with pytest.raises(ConfigurationError) as error:
        telemetry.write_metrics(tmp_path / "none" / "a.prom", ["anchorwatch_canary_shift"])
    assert "metrics" in error.value.problem and [one.name for one in tmp_path.iterdir()] == ["anchorwatch.prom"]


# The real run.

# What this run has no reason to show; each is in a process' page with its help all the same.
NOT_IN_THIS_RUN = {
    "anchorwatch_axis_created_timestamp_seconds",
    "anchorwatch_worker_paused",
    "anchorwatch_fleet_z_error",
    "anchorwatch_fleet_late_responses",
    "anchorwatch_alarm_budget_ratio",
}


def test_a_real_prometheus_sees_every_documented_metric(observed: Observed) -> None:
    documented = re.findall(r"^\| `(anchorwatch_\w+)` \| (\w+)", (ROOT / "docs" / "metrics.md").read_text(), re.M)
    wanted = {name + ("_count" if kind == "histogram" else "") for name, kind in documented} - NOT_IN_THIS_RUN
    assert len(documented) > 55
    deadline = time.monotonic() + 120
    while (missing := wanted - names(observed)) and time.monotonic() < deadline and observed.running():
        time.sleep(0.5)
    assert not missing, f"{missing}\n{observed.said()}"


def test_it_records_what_the_rules_say_and_alarms_on_what_this_run_does(observed: Observed) -> None:
    """Records that nobody can read, and a receiver that refuses: both alarm. Everything runs, so nothing is down."""
    groups = yaml.safe_load((ROOT / "deploy" / "prometheus" / "recording.rules.yml").read_text())["groups"]
    recorded = {rule["record"] for group in groups for rule in group["rules"]} - {
        "deployment:anchorwatch_alarm_budget:ratio"
    }
    wanted = recorded | {"AnchorwatchDeadLetters", "AnchorwatchDeliveryRefused"}
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and observed.running():
        firing = {one["metric"]["alertname"] for one in observed.query('ALERTS{alertstate="firing"}')}
        if not (missing := wanted - names(observed) - firing):
            break
        time.sleep(0.5)
    assert not missing, f"{missing}\n{observed.said()}"
    assert not {name for name in firing if name.endswith(("Down", "Stuck", "Waiting"))}


def names(observed: Observed) -> set[str]:
    return {one["metric"]["__name__"] for one in observed.query('count by (__name__) ({__name__=~".*anchorwatch.*"})')}
