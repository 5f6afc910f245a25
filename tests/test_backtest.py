"""A backtest says what a configuration would have raised: the fold's own findings, scored against people's verdicts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from test_budget import DEPLOYMENT, Talk, calibrated, event, traffic

from monitor.axis.readout import Readout
from monitor.backtest import Label, Outcome, propose, read_verdicts, replay, score
from monitor.detect.baseline import DetectorConfig
from monitor.detect.conversation import ConversationState, step
from monitor.errors import ConfigurationError, EventError

HEALTHY = traffic(11, 60)
CONFIG = calibrated(traffic(1, 60), traffic(2, 120), 0.05)
STRICT = calibrated(traffic(1, 60), traffic(2, 120), 0.02)


def fallen(index: int) -> Talk:
    """A conversation that falls at its fifth turn."""
    return [event(f"fall.{index}", turn, 10.0 if turn < 4 else 3.0, 9.0 if turn < 4 else 2.0) for turn in range(8)]


DRIFTING = [fallen(index) for index in range(20)]
EVENTS = [response for talk in [*HEALTHY, *DRIFTING] for response in talk]
LABELS = {
    **{talk[0].conversation_id: Label(False) for talk in HEALTHY},
    **{talk[0].conversation_id: Label(True, 4) for talk in DRIFTING},
}


def test_it_raises_exactly_what_the_fold_raises() -> None:
    outcomes, strict = replay(EVENTS, [CONFIG, STRICT])
    for config, found in ((CONFIG, outcomes), (STRICT, strict)):
        for talk in [*HEALTHY, *DRIFTING]:
            state: ConversationState | None = None
            findings = []
            for response in talk:
                done = step(state, response, config)
                state = done.state
                findings += done.findings
            raised = [finding for finding in findings if finding.severity != "info"]
            outcome = found[talk[0].conversation_id]
            assert outcome.first_turn == (raised[0].turn if raised else None)
            assert outcome.kinds == tuple(sorted({finding.kind for finding in findings}))
            assert (outcome.verdict != "healthy") == bool(raised) == (outcome.peak >= 1.0)
            assert outcome.responses == len(talk)
    assert {outcome.verdict for outcome in outcomes.values()} == {"healthy", "warning", "critical"}


@given(st.randoms(use_true_random=False))
def test_how_conversations_are_interleaved_does_not_matter(random: object) -> None:
    queues = [list(talk) for talk in [*HEALTHY[:6], *DRIFTING[:3]]]
    mixed = []
    while queues:
        queue = random.choice(queues)  # type: ignore[attr-defined]
        mixed.append(queue.pop(0))
        queues = [queue for queue in queues if queue]
    plain = [response for talk in [*HEALTHY[:6], *DRIFTING[:3]] for response in talk]
    assert replay(mixed, [CONFIG]) == replay(plain, [CONFIG])


def test_scores_against_verdicts() -> None:
    (outcomes,) = replay(EVENTS, [CONFIG])
    found = score(outcomes, LABELS)
    alarms = sum(outcomes[talk[0].conversation_id].first_turn is not None for talk in HEALTHY)
    assert (found.healthy, found.drifting, found.false_alarms, found.detected) == (60, 20, alarms, 20)
    assert found.delay == (0,) * 20  # it warns at the turn that fell
    assert found.auroc is not None and found.auroc > 0.95
    assert found.detection_interval[0] == pytest.approx(0.025 ** (1 / 20))
    assert found.unlabelled == 0


def test_unsure_and_unknown_conversations_count_for_nothing() -> None:
    (outcomes,) = replay(EVENTS, [CONFIG])
    some: dict[str, Label | None] = {**LABELS, DRIFTING[0][0].conversation_id: None, "nobody": Label(True)}
    found = score(outcomes, some)
    assert (found.drifting, found.healthy, found.unlabelled) == (19, 60, 1)
    assert found.unmatched == 1
    assert score({}, some) == (0, 0, 0, 0, (0.0, 1.0), (0.0, 1.0), None, (), 0, 0, len(some))


def test_what_was_not_judged_is_neither_missed_nor_spared() -> None:
    moved = [replace(response, deployment="another") for response in EVENTS]
    (outcomes,) = replay(moved, [CONFIG])
    found = score(outcomes, LABELS)
    assert (found.healthy, found.drifting, found.unjudged) == (0, 0, 80)
    assert propose(outcomes, LABELS) == []


def test_the_delay_counts_from_the_labelled_turn_and_may_be_negative() -> None:
    outcomes = {"a": Outcome("warning", ("dip",), 5, 2.0, 9), "b": Outcome("warning", ("dip",), 1, 2.0, 9)}
    assert score(outcomes, {"a": Label(True, 3), "b": Label(True, 4)}).delay == (-3, 2)
    assert score(outcomes, {"a": Label(True), "b": Label(True)}).delay == (1, 5)


def test_it_proposes_the_smallest_budget_that_buys_most() -> None:
    (outcomes,) = replay([r for talk in [*traffic(12, 120), *DRIFTING] for r in talk], [CONFIG])
    labels: dict[str, Label | None] = {id: Label(id.startswith("fall")) for id in outcomes}
    rows = propose(outcomes, labels)
    assert [row.budget for row in rows] == [0.01, 0.02, 0.05, 0.1]  # 120 can't certify less
    assert [row.factor for row in rows] == sorted((row.factor for row in rows), reverse=True)
    assert [row.detection for row in rows] == sorted(row.detection for row in rows)
    (chosen,) = [row for row in rows if row.proposed]
    assert chosen.detection >= 0.9 * rows[-1].detection
    healthy = [outcomes[id].peak for id in outcomes if not id.startswith("fall")]
    for row in rows:
        assert np.mean([peak >= row.factor for peak in healthy]) <= row.budget


def test_nothing_is_proposed_where_nothing_can_be_certified() -> None:
    assert propose({}, {}) == []
    (outcomes,) = replay(EVENTS[:30], [CONFIG])
    assert propose(outcomes, {id: Label(False) for id in outcomes}) == []


def test_a_response_that_a_configuration_can_not_judge_is_told_and_the_rest_goes_on() -> None:
    other: DetectorConfig = replace(CONFIG, readout=Readout(coordinates={"b": 1.0}))
    with pytest.raises(EventError, match="b"):
        replay(EVENTS, [other])
    told: list[str] = []
    one, two = replay(EVENTS, [other, CONFIG], on_poison=lambda event, _error: told.append(event.id))
    assert len(told) == len(EVENTS)
    assert two == replay(EVENTS, [CONFIG])[0]
    assert {outcome.responses for outcome in one.values()} == {0}


def test_another_deployment_is_learning_and_raises_nothing() -> None:
    moved = [replace(response, deployment="another") for response in EVENTS]
    (outcomes,) = replay(moved, [CONFIG])
    assert {(outcome.verdict, outcome.responses) for outcome in outcomes.values()} == {("healthy", 0)}
    assert DEPLOYMENT not in {"another"}


# Verdicts


def verdicts(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "verdicts.csv"
    path.write_text(text)
    return path


def test_verdicts_are_read(tmp_path: Path) -> None:
    path = verdicts(
        tmp_path,
        'conversation_id,label,turn\na,drifting,3\nb,healthy,\nc,Unsure,\n"d, e",false alarm,\nf,true,\na,drifting,3\n',
    )
    assert read_verdicts(path) == {
        "a": Label(True, 3),
        "b": Label(False),
        "c": None,
        "d, e": Label(False),
        "f": Label(True),
    }
    assert read_verdicts(verdicts(tmp_path, "\ufeffconversation_id,label\na,1\n")) == {"a": Label(True)}


def test_every_wrong_line_is_told_at_once(tmp_path: Path) -> None:
    path = verdicts(tmp_path, "conversation_id,label,turn\na,bad,\n,healthy,\nb,true,soon\nc,true,\nc,false,\n")
    with pytest.raises(ConfigurationError) as caught:
        read_verdicts(path)
    for part in ("line 2: label 'bad'", "line 3: no conversation_id", "line 4: turn 'soon'", "line 6: 'c' already"):
        assert part in caught.value.problem
    assert caught.value.cure


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n"])
def test_a_file_without_the_columns_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigurationError, match="no column"):
        read_verdicts(verdicts(tmp_path, text))


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="can't be read"):
        read_verdicts(tmp_path / "none.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x00conversation")
    with pytest.raises(ConfigurationError, match="can't be read"):
        read_verdicts(tmp_path / "binary.csv")
