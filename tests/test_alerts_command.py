"""Promises of `anchorwatch alerts`: it says what the rules do, tries real receivers; nobody goes live by surprise."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import standardwebhooks
from msgspec.structs import replace
from receiver import Answer, Receiver
from service import CONFIG
from test_operators import Installation
from test_operators import here as installation  # noqa: F401
from typer.testing import CliRunner, Result

from alerts.command import alerts_app
from alerts.config import load
from alerts.outlook import outlook, pages
from monitor import connect
from monitor.actions import ActionsFold, Paging, activate_calibration, append_action, body_of, read_actions
from monitor.alert import Alert, Notification
from monitor.detect.baseline import Boundaries
from monitor.detect.budget import expected_load
from monitor.errors import AnchorwatchError

SECRET = "whsec_" + "c2VjcmV0" * 4
ESCAPE = "\x1b[31mred"


class Here:
    """An installation with a file of rules and a receiver that listens."""

    def __init__(self, installed: Installation, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
        self.installed, self.receiver = installed, receiver
        self.log, self.store, self.folder = installed.log, installed.store, installed.folder
        self.rules = self.folder / "alerts.yaml"
        (self.folder / "secret").write_text(SECRET)
        (self.folder / "secret").chmod(0o600)
        self.rules.write_text(
            f"""
            external_url: https://anchorwatch.example.com
            runbook_url: https://wiki.example.com/{{kind}}
            route:
              receiver: ops
              routes:
                - {{matchers: [severity="critical"], receiver: pager, continue: true}}
                - {{matchers: [deployment="playground"], receiver: nobody}}
                - {{receiver: ops}}
            receivers:
              - name: ops
                max_per_day: 7
                webhook_configs:
                  - {{url: '{receiver.url}/ops', secret_files: secret, allow_private: true}}
                log_configs: [{{path: notifications.jsonl}}]
              - name: pager
                webhook_configs:
                  - {{url: '{receiver.url}/pager', allow_private: true, send_resolved: false}}
              - name: nobody
            """
        )
        monkeypatch.setenv("ANCHORWATCH_ALERTS_FILE", str(self.rules))

    def run(self, *arguments: object, answer: str | None = None) -> Result:
        return CliRunner().invoke(alerts_app, list(map(str, arguments)), env={"COLUMNS": "300"}, input=answer)

    def says(self, *arguments: object) -> Any:
        done = self.run(*arguments, "--json")
        assert done.exit_code == 0, (done.output, done.exception)
        return json.loads(done.stdout)

    def refuses(self, *arguments: object) -> str:
        done = self.run(*arguments)
        assert isinstance(done.exception, AnchorwatchError), done.output
        assert done.exception.cure
        return str(done.exception)

    def mode(self) -> str | None:
        value = read_actions(self.log).get("paging/mode")
        if value is None:
            return None
        body = body_of("paging/mode", value)
        assert isinstance(body, Paging)
        return body.mode


@pytest.fixture
def here(
    installation: Installation,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Here]:
    receiver = Receiver()
    yield Here(installation, receiver, monkeypatch)
    receiver.close()


def alert(id: str, **changes: Any) -> Alert:
    made = Alert(
        id=id,
        conversation_id=f"c-{id}",
        deployment="shop",
        model="toy",
        axis_id="axis-1",
        config_id="f",
        kind="dip",
        persona="pirate",
        severity="warning",
        starts_at="2026-01-01T00:00:00Z",
        accepted=0.0,
        changed=0.0,
        finding_ids=(f"f-{id}",),
        turn=1,
        statistic="dip",
        value=4.0,
        boundary=3.0,
        risk=1.3,
        certification="certified",
    )
    return replace(made, **changes)


# The rules


def test_check_prints_the_routes_and_who_is_there(here: Here) -> None:
    done = here.run("check")
    assert done.exit_code == 0 and "The rules are right." in done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("0  every alert  ->  ops  (by deployment, kind; wait 10s, interval 5m, repeat 4h")
    assert lines[1].startswith('    0/0  severity="critical"  ->  pager') and "continue" in lines[1]
    assert "receiver ops: ops/webhook[0], ops/log[0]" in lines
    assert "receiver nobody: nobody: it has no integrations" in lines
    assert "can't tell who is speaking" in done.stderr, "the pager's webhook is not signed"
    assert not here.receiver.received, "nothing is sent"


@pytest.mark.parametrize(
    ("labels", "reached"),
    [
        ({}, ["ops"]),
        ({"severity": "critical"}, ["pager", "ops"]),
        ({"deployment": "playground"}, ["nobody"]),
        ({"deployment": "playground", "severity": "critical"}, ["pager", "nobody"]),
        ({"severity": '"warning"'}, ["ops"]),
    ],
)
def test_check_says_whom_an_alert_reaches(here: Here, labels: dict[str, str], reached: list[str]) -> None:
    words = [word for name, value in (labels or {"kind": "dip"}).items() for word in ("--match", f"{name}={value}")]
    assert here.says("check", *words)["receivers"] == reached
    assert here.run("check", *words, "--expect", ",".join(reached)).exit_code == 0
    done = here.run("check", *words, "--expect", "pager, ops, nobody")
    assert done.exit_code == 1 and "It reaches" in done.stderr


def test_what_is_asked_wrongly_is_refused(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "did you mean severity?" in here.refuses("check", "--match", "severty=critical")
    assert "is no label" in here.refuses("check", "--match", "severity")
    assert "no receiver 'opz'" in here.refuses("check", "--match", "kind=dip", "--expect", "opz")
    assert "--match" in here.refuses("check", "--expect", "ops")
    assert "did you mean ops?" in here.refuses("test", "opsy")
    assert "nothing to send to" in here.refuses("test", "nobody")
    here.rules.write_text("route: {receiver: x}\nreceivers: []\n")
    assert "line 1: route.receiver" in here.refuses("check")
    assert "line 1: route.receiver" in here.refuses("test")
    monkeypatch.delenv("ANCHORWATCH_ALERTS_FILE")
    assert "ANCHORWATCH_ALERTS_FILE" in here.refuses("check")


# The receivers


def test_a_test_goes_through_the_real_channels_and_ends_what_it_began(here: Here) -> None:
    assert here.mode() is None, "also in shadow"
    done = here.says("test")
    assert done == {
        name: {"taken": True, "problem": ""} for name in ("ops/webhook[0]", "ops/log[0]", "pager/webhook[0]")
    }
    ops = [one for one in here.receiver.received if one.path == "/ops"]
    assert [one.json["status"] for one in ops] == ["firing", "resolved"]
    for one in ops:
        standardwebhooks.Webhook(SECRET).verify(one.body, one.headers)
        assert "test" in one.body.decode() and one.json["alerts"][0]["labels"]["deployment"] == "anchorwatch-test"
    assert len({one.json["groupKey"] for one in ops}) == 1 and len({one.headers["webhook-id"] for one in ops}) == 2
    assert [one.json["status"] for one in here.receiver.received if one.path == "/pager"] == ["firing"]
    lines = (here.folder / "notifications.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"] for line in lines] == ["test", "test"]
    assert not read_actions(here.log), "nothing is left of it"


def test_a_test_may_fire_for_a_while(here: Here) -> None:
    assert here.run("test", "ops/webhook[0]", "--seconds", "0.5").exit_code == 0
    first, end = here.receiver.received
    assert end.at - first.at >= 0.5


def test_one_that_fails_does_not_keep_the_others_from_being_tried(here: Here) -> None:
    here.receiver.answer = lambda request: Answer(401 if request.path == "/ops" else 200)
    done = here.run("test")
    assert done.exit_code == 1
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line and "[0]" in line)
    assert said["ops/log[0]"] == said["pager/webhook[0]"] == "taken" and "401" in said["ops/webhook[0]"]
    assert SECRET not in done.output
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        here.rules.write_text(
            here.rules.read_text().replace(here.receiver.url, f"http://127.0.0.1:{free.getsockname()[1]}")
        )
        assert here.run("test", "pager/webhook[0]").exit_code == 1
    assert here.run("test", "ops/log[0]").exit_code == 0


# Live, or in shadow


def test_nobody_goes_live_without_having_seen_what_comes(here: Here) -> None:
    activate_calibration(here.log, CERTIFIED, by="ann")
    asked = ["enable", "--by", "ann", "--conversations-per-day", "10000", "--detection", "0.8"]
    for answer in ("n\n", "\n", ""):
        done = here.run(*asked, answer=answer)
        assert done.exit_code == 1 and here.mode() is None
        assert "Go live?" in done.stderr
    expected = expected_load(0.01, detection=0.8, conversations_per_day=10_000, prevalence=0.001)
    assert f"{expected.false_alarms:,.1f} false warnings a day" in done.stdout
    assert f"{expected.true_alarms:,.1f} true ones, precision 7%" in done.stdout
    assert "at most 10.0 false ones a day are critical" in done.stdout
    assert "ops is told of warning and critical: at most 107.9 alerts a day, and at most 7 messages" in done.stdout
    assert "pager is told of critical" in done.stdout
    assert "0 alerts were made" in done.stdout
    assert here.run(*asked, answer="y\n").exit_code == 0
    assert here.mode() == "live" and here.says("status")["by"] == "ann"
    assert here.store.actions("paging/"), "the store knows it at once"
    assert here.run("shadow", "--by", "bob", "--note", "too many").exit_code == 0
    assert here.mode() == "shadow"
    status = here.says("status")
    assert (status["mode"], status["by"]) == ("shadow", "bob")


CERTIFIED = replace(
    CONFIG,
    boundaries=Boundaries(
        level=2.0,
        drop=2.5,
        cusum=4.0,
        dip=3.0,
        budget=0.01,
        certification="certified",
        critical_budget=0.001,
        critical_certification="certified",
        block_turns=10,
        conversations=1500,
    ),
)


def test_there_is_no_figure_where_nobody_can_know_one(here: Here) -> None:
    activate_calibration(here.log, CONFIG, by="ann")  # nothing is certified
    found = here.says("enable", "--by", "ann", "--conversations-per-day", "100", "--detection", "0.5", "--yes")
    (shop,) = found["deployments"]
    assert (shop["calibrated"], shop["budget"], shop["false_warnings"], shop["precision"]) == (True, None, None, None)
    assert all(one["alerts"] is None for one in found["receivers"])
    broken = replace(CERTIFIED, boundaries=replace(CERTIFIED.boundaries, certification="uncertified"))
    assert outlook(broken, {"shop": 1.0}, prevalence=0.0, detection=1.0)[0].budget is None
    activate_calibration(here.log, CERTIFIED, by="ann")
    done = here.run("enable", "--by", "ann", "--conversations-per-day", "100", "--yes")
    assert "share of drift that warns is not known" in done.stdout, "the bundle is of another axis"
    done = here.run("enable", "--by", "ann", "--conversations-per-day", "other=5", "--detection", "1", "--yes")
    assert "nobody is told of its conversations" in done.stdout


def test_before_any_worker_the_bundles_own_figures_are_shown_and_said_to_be(here: Here) -> None:
    done = here.run("enable", "--by", "ann", "--conversations-per-day", "20000", answer="n\n")
    assert "no worker has judged anything yet" in done.stderr
    shipped = connect.calibration("smollm2")
    assert shipped.boundaries.budget is not None and f"budget {shipped.boundaries.budget:.2%}" in done.stdout


@pytest.mark.parametrize("traffic", ["many", "shop=", "-1", "nan", "inf", "shop=x"])
def test_traffic_is_a_number(here: Here, traffic: str) -> None:
    assert "no number of conversations" in here.refuses(
        "enable", "--by", "a", "--conversations-per-day", traffic, "--yes"
    )
    assert here.mode() is None


def test_of_several_deployments_each_has_its_traffic(here: Here) -> None:
    baseline = CONFIG.baselines["shop"]
    both = replace(CERTIFIED, baselines={"shop": baseline, "web": replace(baseline, deployment="web")})
    activate_calibration(here.log, both, by="ann")
    arguments = ["enable", "--by", "ann", "--detection", "1", "--yes"]
    assert "of which deployment" in here.refuses(*arguments, "--conversations-per-day", "100")
    each = ["--conversations-per-day", "shop=100", "--conversations-per-day", "web=300"]
    found = here.says(*arguments, *each)
    assert [one["false_warnings"] for one in found["deployments"]] == [pytest.approx(0.999), pytest.approx(2.997)]


def test_json_does_not_ask(here: Here) -> None:
    assert "--yes" in here.refuses("enable", "--by", "a", "--conversations-per-day", "1", "--json")
    assert here.mode() is None


def test_what_reaches_whom_follows_the_routes(here: Here) -> None:
    rules = load(here.rules)
    found = outlook(CERTIFIED, {"shop": 1000.0}, prevalence=0.0, detection=1.0)
    ops, pager = pages(rules, found)
    assert (ops.receiver, ops.severities, ops.cap) == ("ops", ("warning", "critical"), 7)
    assert ops.alerts == pytest.approx(10.0)
    assert (pager.receiver, pager.severities) == ("pager", ("critical",))
    playground = replace(
        CERTIFIED, baselines={"playground": replace(CONFIG.baselines["shop"], deployment="playground")}
    )
    pager, nobody = pages(rules, outlook(playground, {"playground": 1.0}, prevalence=0.0, detection=1.0))
    assert (pager.receiver, nobody.receiver, nobody.severities) == ("pager", "nobody", ("warning", "critical"))


# What there is


def test_alerts_are_shown_the_worst_first_and_no_name_reaches_the_terminal_as_it_is(here: Here) -> None:
    for one in (
        alert("a", risk=9.0, ends_at="2026-01-01T01:00:00Z", resolution="recovered"),
        alert("b", risk=1.1, deployment=ESCAPE),
        alert("c", severity="critical", acknowledged_by="ann", told={"ops/webhook[0]": "critical"}),
    ):
        append_action(here.log, "alert", one.id, one, by="dispatcher")
    assert here.run("status").stdout.splitlines()[1].startswith("firing     1 critical, 1 warning")
    ActionsFold(here.log, here.store).run_once()
    assert [one["id"] for one in here.says("show")] == ["c", "b"]
    assert [one["id"] for one in here.says("show", "--all")] == ["c", "b", "a"]
    done = here.run("show", "--all")
    first, second, third = done.stdout.splitlines()
    assert "critical" in first and "told: ops/webhook[0]" in first and "seen by ann" in first
    assert "\\x1b[31mred" in second and "told: nobody" in second and "recovered" in third
    for arguments in (["show", "--all"], ["show", "b"], ["status"]):
        assert "\x1b" not in here.run(*arguments).output
    assert here.says("show", "b")["deployment"] == ESCAPE
    assert "no alert" in here.refuses("show", "nothing")


def test_the_status_says_what_waits(here: Here) -> None:
    assert here.run("status").stdout.startswith("mode       shadow, since it was installed")
    for group, sent, time in (("g", True, "2026-01-02T00:00:00Z"), ("h", False, "2026-01-03T00:00:00Z")):
        one = Notification(
            id=group,
            integration="ops/webhook[0]",
            group=group,
            labels={},
            reason="first",
            time=time,
            sequence=0,
            alerts=(alert("a"),),
            covered={"a": "warning"},
            sent=sent,
        )
        append_action(here.log, "notification", f"ops/webhook[0]/{group}", one, by="dispatcher")
    assert here.says("status")["integrations"] == {
        "ops/webhook[0]": {"last_sent": "2026-01-02T00:00:00Z", "waiting": 1}
    }


def test_every_command_has_help_and_stands_in_the_document() -> None:
    document = (Path(__file__).parent.parent / "docs" / "alerts.md").read_text()
    for command in alerts_app.registered_commands:
        name = command.name or command.callback.__name__  # type: ignore[union-attr]
        assert CliRunner().invoke(alerts_app, [name, "--help"]).exit_code == 0
        assert f"alerts {name}" in document
