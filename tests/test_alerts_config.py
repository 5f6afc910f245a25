"""Promises of the file of rules: every mistake at once, with its line; nothing in it is run; routes are amtool's."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alerts.config import LABELS, VALUES, AlertsConfig, PagerDutyConfig, load, load_with_advice, taken_by
from alerts.section import Section, duration
from monitor.alert import Alert, labels
from monitor.errors import ConfigurationError
from monitor.events import Kind, Severity
from monitor.matchers import Matcher, matches

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "alerts.md"
EXAMPLE = DOCUMENT.read_text().split("<!-- example -->\n```yaml\n")[1].split("```")[0]
SECRETS = {
    "alertmanager": "canary-user:canary-password",
    "slack": "https://hooks.slack.com/services/T0/B0/canary",
    "mail": "canary-mail",
    "pagerduty": "canary7890abcdef0123456789abcdef",
    "webhook-new": "whsec_" + "Y2FuYXJ5" * 4,
    "webhook-old": "whsec_" + "Y2FuYXJ6" * 4,
}
SMALLEST = "route: {receiver: ops}\nreceivers: [{name: ops}]\n"

Write = Callable[[str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Puts a file of rules beside the secrets that the document's example names."""
    (tmp_path / "secrets").mkdir()
    for name, held in SECRETS.items():
        (tmp_path / "secrets" / name).write_text(held + "\n")
        (tmp_path / "secrets" / name).chmod(0o600)

    def written(text: str | bytes) -> Path:
        path = tmp_path / "alerts.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return written


def refused(path: Path) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load(path)
    assert caught.value.cure
    assert "canary" not in str(caught.value)
    return caught.value.problem


# What it says


def test_the_documents_example_is_what_it_looks_like(write: Write) -> None:
    config, advice = load_with_advice(write(EXAMPLE))
    assert advice == []
    root, (first, second, third) = config.route, config.route.routes
    assert (root.path, root.receiver, root.group_by, root.repeat_interval) == (
        "0",
        "ops",
        ("deployment", "kind"),
        14400,
    )
    assert (first.path, first.receiver, first.group_by, first.group_wait) == ("0/0", "pager", ("...",), 0)
    assert first.continues and first.group_interval == 300
    assert first.matchers == (Matcher("severity", "=", "critical"), Matcher("deployment", "=~", "shop-.*"))
    assert (second.receiver, third.receiver, third.mute) == ("nobody", "ops", ("nights", "weekends"))
    ops, pager, nobody = config.receivers
    assert [one.name for one in ops.integrations] == [
        "ops/alertmanager[0]",
        "ops/slack[0]",
        "ops/email[0]",
        "ops/log[0]",
    ]
    assert (ops.max_per_day, ops.max_per_deployment_per_day, nobody.integrations) == (200, 50, ())
    page = next(one for one in pager.integrations if isinstance(one, PagerDutyConfig))
    assert page.routing_key_file.read_text().strip() == SECRETS["pagerduty"]
    nights, weekends = config.time_intervals
    assert nights.times == ((1320, 1440), (0, 420)) and weekends.weekdays == (5, 6)
    assert (config.idle_after, config.fleet_after) == (1800, 86400)
    assert config.external_url == "https://anchorwatch.example.com"


def test_what_ships_is_right_and_needs_no_secret() -> None:
    config, advice = load_with_advice(ROOT / "deploy" / "alerts" / "alerts.yaml")
    assert [problem.says.partition(":")[0] for problem in advice] == ["runbook_url"]
    assert [one.name for one in config.receivers[0].integrations] == [
        "alertmanager/alertmanager[0]",
        "alertmanager/log[0]",
    ]


@pytest.mark.parametrize("name", ["document", "deploy"])
def test_only_a_fleet_that_has_fallen_mutes_and_only_warnings(write: Write, name: str) -> None:
    config = load(write(EXAMPLE) if name == "document" else ROOT / "deploy" / "alerts" / "alerts.yaml")
    (rule,) = config.inhibit_rules
    fleet = {
        severity: matches(rule.source, {"kind": "fleet_shift", "severity": severity}) for severity in get_args(Severity)
    }
    single = {
        severity: matches(rule.target, {"kind": "dip", "severity": severity}) for severity in ("warning", "critical")
    }
    assert {severity for severity, mutes in fleet.items() if mutes} == {"warning"}
    assert single == {"warning": True, "critical": False}


def test_what_ships_can_be_uncommented(write: Write) -> None:
    """The commented lines are an example, too: without their marks they must load, secrets aside."""
    text = (ROOT / "deploy" / "alerts" / "alerts.yaml").read_text()
    whole = re.sub(r"^( *)# (?=( *- |  )|[a-z_]+: *(https|$)|routes:)", r"\1", text, flags=re.MULTILINE)
    assert whole.count("\n  routes:") == 1 and "\nrunbook_url" in whole
    for name in ("pagerduty", "slack"):
        whole = whole.replace(f"/run/secrets/{name}", f"secrets/{name}")
    config = load(write(whole.replace("/run/secrets/webhook", "secrets/webhook-new")))
    assert [receiver.name for receiver in config.receivers] == ["alertmanager", "pager"]


def test_defaults_are_the_structs(write: Write) -> None:
    config = load(write(SMALLEST))
    assert config == AlertsConfig(route=config.route, receivers=config.receivers)
    assert config.route == type(config.route)(path="0", receiver="ops")


def test_a_child_has_what_it_does_not_say_from_its_parent(write: Write) -> None:
    text = (
        "route:\n  receiver: ops\n  group_by: [model]\n  group_wait: 1s\n  mute_time_intervals: [n]\n"
        "  routes: [{matchers: [kind=dip], continue: true, group_interval: 2m, routes: [{matchers: [model=m]}]}]\n"
        "receivers: [{name: ops}]\n"
        "time_intervals: [{name: n, time_intervals: [{weekdays: [sunday]}, {weekdays: ['friday:monday']}]}]\n"
    )
    config = load(write(text))
    child = config.route.routes[0].routes[0]
    assert (child.path, child.receiver, child.group_by) == ("0/0/0", "ops", ("model",))
    assert (child.group_wait, child.group_interval) == (1, 120)
    assert not child.continues and child.mute == ()
    assert config.route.mute == ("n", "n[1]"), "a part of an interval counts by itself"
    assert [one.weekdays for one in config.time_intervals] == [(6,), (0, 4, 5, 6)]


def test_what_yaml_takes_for_something_else_is_read_as_it_is_written(write: Write) -> None:
    interval = "time_intervals: [{name: n, time_intervals: [{times: [{start_time: 09:30, end_time: 22:00}]}]}]\n"
    assert load(write(SMALLEST + interval)).time_intervals[0].times == ((570, 1320),)
    assert load(write(SMALLEST + "idle_after: 0x1\n".replace("0x1", "90m"))).idle_after == 5400
    for name in ("no", "12", "null", "2026-01-01"):
        assert "line 2" in refused(write(SMALLEST.replace("{name: ops}", f"{{name: {name}}}")))


# Mistakes


def test_every_mistake_is_told_at_once_with_its_line(write: Write) -> None:
    wrong = EXAMPLE
    for right, mistake in {
        "idle_after: 30m": "idle_after: thirty",
        "  group_by: [deployment, kind]": "  group_bye: [deployment, kind]",
        "'severity=\"critical\"'": "'severity=\"kritical\"'",
        "receiver: pager": "receiver: pagr",
        '[deployment="playground"]': '[deploymint="playground"]',
        "[nights, weekends]": "[night]",
        "max_per_day: 200": "max_per_day: many",
        "secrets/alertmanager": "secrets/missing",
        "smtp.example.com:587": "smtp.example.com",
        "- name: nobody": "- name: ops",
        "secret_files: [secrets/webhook-new, ": "secret_files: [secrets/mail, ",
        "end_time: '07:00'": "end_time: '25:00'",
        "'saturday:sunday'": "'caturday'",
    }.items():
        assert wrong.count(right) == 1, right
        wrong = wrong.replace(right, mistake)
    told = refused(write(wrong)).split("\n  - ")[1:]
    lines = wrong.split("\n")
    for word, said in {
        "thirty": "no duration",
        "group_bye": "did you mean group_by?",
        "kritical": "did you mean critical?",
        "pagr": "did you mean pager?",
        "deploymint": "did you mean deployment?",
        "[night]": "did you mean nights?",
        "many": "whole number",
        "secrets/missing": "No such file",
        "smarthost": "host:port",
        "'25:00'": "no time of day",
        "caturday": "no weekday",
        "[secrets/mail": "24 to 64 bytes",
    }.items():
        (number,) = (n for n, line in enumerate(lines, 1) if word in line)
        assert any(one.startswith(f"line {number}: ") and said in one for one in told), (word, told)
    assert any("two receivers 'ops'" in one for one in told)
    assert [int(one.split(":")[0].removeprefix("line ")) for one in told] == sorted(
        int(one.split(":")[0].removeprefix("line ")) for one in told
    )


RECEIVER = "route: {receiver: ops}\nreceivers:\n  - name: ops\n    "


@pytest.mark.parametrize("path", ["n" * 300, "n" * 300 + "/file", "f/" * 3000 + "file"])
def test_a_log_file_that_can_not_be_looked_for_is_a_mistake_in_the_file(write: Write, path: str) -> None:
    said = refused(write(RECEIVER + f"log_configs: [{{path: {path}}}]"))
    assert "line 4: " in said and "log_configs[0].path: " in said and "too long" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_log_file_in_a_folder_that_is_closed_to_us_is_a_mistake_in_the_file(write: Write, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    assert "Permission denied" in refused(write(RECEIVER + f"log_configs: [{{path: {closed / 'folder' / 'file'}}}]"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("receivers: [{name: ops}]", "route: is missing"),
        ("route: {receiver: ops}", "receivers: name at least one"),
        ("route: {}\nreceivers: [{name: ops}]", "route.receiver: is missing"),
        ("route: {receiver: ops, continue: true}\nreceivers: [{name: ops}]", "root takes every alert"),
        ("route: {receiver: ops, matchers: [kind=dip]}\nreceivers: [{name: ops}]", "root takes every alert"),
        ("route: {receiver: ops, group_by: ['...', kind]}\nreceivers: [{name: ops}]", "stands alone"),
        ("route: {receiver: ops, group_by: [kind, kind]}\nreceivers: [{name: ops}]", "names a label twice"),
        ("route: {receiver: ops, group_interval: 0s}\nreceivers: [{name: ops}]", "must be from 1 to"),
        ("route: {receiver: ops, repeat_interval: 1s}\nreceivers: [{name: ops}]", "must be from 60 to"),
        ("route: {receiver: ops, group_wait: -1s}\nreceivers: [{name: ops}]", "no duration"),
        ("route: {receiver: ops, group_wait: [1s]}\nreceivers: [{name: ops}]", "one plain value"),
        ("route: {receiver: ops, group_wait: 99999999999999999999s}\nreceivers: [{name: ops}]", "no duration"),
        ("route: {receiver: ops, group_wait: 999999999y}\nreceivers: [{name: ops}]", "must be from 0"),
        ("route: {receiver: ops, routes: {a: b}}\nreceivers: [{name: ops}]", "must be a list"),
        ("route: {receiver: ops, routes: [a]}\nreceivers: [{name: ops}]", "name: value"),
        ("route: {receiver: ops, match: {kind: dip}}\nreceivers: [{name: ops}]", "did you mean matchers?"),
        ("route: [1]\nreceivers: [{name: ops}]", "name: value"),
        ("route:\nreceivers: [{name: ops}]", "has no value"),
        ("route: {receiver: ops}\nreceivers: [{name: 'a/b'}]", "letters, digits"),
        (SMALLEST + "inhibit_rules: [{source_matchers: [kind=dip]}]", "target_matchers: name at least one"),
        (SMALLEST + "external_url: anchorwatch.example.com", "must begin with https://"),
        (SMALLEST + "external_url: https://user:canary@example.com", "holds credentials"),
        (SMALLEST + "external_url: https://example.com/?a=b", "without a query"),
        (SMALLEST + "external_url: 'https://[::1'", "is no URL"),
        (SMALLEST + "external_url: 'https://example.com:99999'", "is no URL"),
        (SMALLEST + "conversation_url: https://example.com/", "must hold {conversation_id}"),
        (SMALLEST + "conversation_url: 'https://e.com/{conversation_id}/{x}'", "no other braces"),
        (SMALLEST + "conversation_url: 'https://e.com/{conversation_id.__class__}'", "no other braces"),
        (SMALLEST + "conversation_url: 'https://e.com/{conversation_id!r}'", "no other braces"),
        (SMALLEST + "conversation_url: 'https://e.com/{conversation_id:>9999999}'", "no other braces"),
        (SMALLEST + "runbook_url: 'javascript:{kind}'", "must begin with https://"),
        (SMALLEST + "idle_after: 0s", "must be from 1"),
        (RECEIVER + "webhook_configs: [{}]", "url: is missing"),
        (RECEIVER + "webhook_configs: [{url: 'ftp://a'}]", "must begin with https://"),
        (RECEIVER + "webhook_configs: [{url: 'http://a.example'}]", "everybody on the way"),
        (RECEIVER + "webhook_configs: [{url: 'https://10.0.0.1'}]", "allow_private"),
        (RECEIVER + "alertmanager_configs: [{url: 'http://169.254.169.254', allow_private: true}]", "metadata"),
        (RECEIVER + "webhook_configs: [{url: 'https://a', secret_files: [secrets]}]", "can't be read: Is a directory"),
        (RECEIVER + "webhook_configs: [{url: 'https://a', timeout: 1h}]", "must be from 0.1 to 60"),
        (RECEIVER + "webhook_configs: [{url: 'https://a', send_resolved: maybe}]", "true or false"),
        (RECEIVER + "webhook_configs: [{url: 'https://a', send_resolved: yes}]", "true or false"),
        (RECEIVER + "webhook_configs: [{url: 'https://a', max_alerts: 0}]", "from 1 to 1000"),
        (RECEIVER + "webhook_configs: [{url: 'https://a', max_alerts: ５}]", "whole number"),
        (RECEIVER + "alertmanager_configs: [{url: 'http://a:9093/api/v2'}]", "without /api/v2"),
        (RECEIVER + "alertmanager_configs: [{url: 'http://a', basic_auth_file: secrets/alertmanager}]", "use https"),
        (RECEIVER + "alertmanager_configs: [{url: 'https://a', basic_auth_file: secrets/mail}]", "user:password"),
        (RECEIVER + "alertmanager_configs: [{url: 'https://a', refresh: 10m}]", "from 1 to 240"),
        (RECEIVER + "pagerduty_configs: [{}]", "routing_key_file: is missing"),
        (RECEIVER + "pagerduty_configs: [{routing_key_file: secrets/mail}]", "32 letters and digits"),
        (RECEIVER + "pagerduty_configs: [{routing_key_file: [secrets/mail, secrets/slack]}]", "must be one file"),
        (RECEIVER + "slack_configs: [{api_url_file: secrets/mail}]", "must begin with https://"),
        (RECEIVER + "slack_configs: [{api_url: 'https://a'}]", "did you mean api_url_file?"),
        (RECEIVER + "email_configs: [{from: a@b.c, smarthost: 'h:25'}]", "name at least one address"),
        (RECEIVER + "email_configs: [{to: a, from: b@c.d, smarthost: 'h:25'}]", "'a' is no mail address"),
        (RECEIVER + 'email_configs: [{to: "a@b.c\\nBcc: d@e.f", from: b@c.d, smarthost: "h:25"}]', "printable text"),
        (RECEIVER + "email_configs: [{to: a@b.c, from: b@c.d, smarthost: 'h:x'}]", "must be host:port"),
        (RECEIVER + "email_configs: [{to: a@b.c, from: b@c.d, smarthost: 'h:25', auth_username: u}]", "go together"),
        (
            RECEIVER + "email_configs: [{to: a@b.c, from: b@c.d, smarthost: 'h:25', tls: none, auth_username: u, "
            "auth_password_file: secrets/mail}]",
            "for everybody to read",
        ),
        (RECEIVER + "email_configs: [{to: a@b.c, from: b@c.d, smarthost: 'h:25', tls: ssl}]", "none of starttls"),
        (RECEIVER + "log_configs: [{path: missing/file}]", "its folder must exist"),
        (RECEIVER + "log_configs: [null]", "name: value"),
    ],
)
def test_a_mistake_is_told_with_what_would_be_right(write: Write, text: str, said: str) -> None:
    assert said in refused(write(text))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "at least a route"),
        ("# nothing\n", "at least a route"),
        ("- a\n- b\n", "at least a route"),
        ("just words", "at least a route"),
        ("route: [", ": no YAML"),
        ("route:\n\treceiver: ops", "line 2: no YAML"),
        (SMALLEST + "---\n" + SMALLEST, "line 3: a second document"),
        (SMALLEST + "external_url: &a https://example.com\n", "line 3: anchors"),
        (SMALLEST + "external_url: *a\n", "line 3: anchors"),
        (SMALLEST + "<<: {idle_after: 1m}\n", "line 3: <<: no such key"),
        (SMALLEST + "idle_after: 1m\nidle_after: 2m\n", "line 4: idle_after: given twice, first in line 3"),
        (SMALLEST.replace("ops}", "ops, receiver: ops}"), "line 1: route.receiver: given twice"),
        (SMALLEST + "? [a, b]\n: c\n", "line 3: the file: a name must be a plain word"),
        (SMALLEST + "external_url: !!python/object/apply:os.system ['touch owned']\n", "line 3: tags (!)"),
        (SMALLEST + "external_url: !include /etc/passwd\n", "line 3: tags (!)"),
        (SMALLEST + "external_url: !!str https://example.com\n", "line 3: tags (!)"),
        (SMALLEST + "routes: " + "[" * 100 + "]" * 100, "nested more than 32 deep"),
        (SMALLEST + "routes: " + "[" * 100_000, "nested more than 32 deep"),
        (SMALLEST + "#" + "x" * 150_000, "more than 128 KiB"),
        (SMALLEST.encode() + b"\n# \xff\n", "line 4: it is not UTF-8"),
        (SMALLEST.encode("utf-16"), "it is not UTF-8"),
        (SMALLEST + "external_url: 'a\x00b'\n", "line 3: it holds control characters"),
        (SMALLEST + "external_url: 'a\x1b[2Jb'\n", "line 3: it holds control characters"),
        (SMALLEST + 'external_url: "https://a\\u202eb"\n', "line 3: external_url: must be one line of printable"),
    ],
)
def test_a_hostile_file_is_refused(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | bytes, said: str
) -> None:
    for loader in (yaml.CSafeLoader, yaml.SafeLoader):
        monkeypatch.setattr("alerts.document.Loader", loader)
        assert said in refused(write(text))
    assert not (tmp_path / "owned").exists()


def test_a_bomb_does_not_go_off(write: Write) -> None:
    """A billion laughs: nine lines that would be a gigabyte."""
    bomb = 'a: &a ["lol"]\n' + "".join(
        f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    told = refused(write(bomb))
    assert "line 1: anchors" in told and "line 9: anchors" in told and len(told) < 5000


def test_ten_thousand_mistakes_are_told_in_a_screenful(write: Write) -> None:
    told = refused(write(SMALLEST + "".join(f"k{number}: 1\n" for number in range(10_000))))
    assert "has 10000 mistakes" in told and told.endswith("and 9950 more") and told.count("\n") == 51


def test_windows_lines_and_a_byte_order_mark_are_read(write: Write) -> None:
    assert load(write(b"\xef\xbb\xbf" + SMALLEST.replace("\n", "\r\n").encode())) == load(write(SMALLEST))


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "alerts.yaml")
    assert "Is a directory" in refused(tmp_path)


def test_secrets_that_others_may_write_are_refused_and_that_they_may_read_is_told(write: Write, tmp_path: Path) -> None:
    path = write(EXAMPLE)
    (tmp_path / "secrets" / "slack").chmod(0o644)
    (problem,) = load_with_advice(path)[1]
    assert "other users can read" in problem.says and "slack" in problem.says
    (tmp_path / "secrets" / "slack").chmod(0o620)
    assert "chmod 600" in refused(path)


@pytest.mark.parametrize("held", ["", "\n\n", "two\nlines", "x" * 20_000, "tab\there", b"\xff\xfe"])
def test_a_secret_is_one_line_of_text(write: Write, tmp_path: Path, held: str | bytes) -> None:
    path = write(EXAMPLE)
    (tmp_path / "secrets" / "mail").write_bytes(held if isinstance(held, bytes) else held.encode())
    assert "the secret in one line" in refused(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(
    st.integers(0, len(EXAMPLE)),
    st.integers(0, 30),
    st.text("{}[]:-&*!|>'\"%@`#,?<=~ \n\tabz019.\\é\u202e\x00", max_size=12),
)
def test_any_damage_is_refused_or_read(write: Write, place: int, length: int, put: str) -> None:
    """Whatever stands there: it is a mistake that is told, or rules; nothing else is ever raised."""
    try:
        config = load(write(EXAMPLE[:place] + put + EXAMPLE[place + length :]))
    except ConfigurationError as error:
        assert re.search(r"mistake", error.problem)
    else:
        assert config.route.receiver


# What others say


@pytest.mark.parametrize("text", ["0", "1s", "90s", "5m", "1h30m", "1d", "2w", "1y", "250ms", "1m1ms"])
def test_durations_are_prometheuss(text: str) -> None:
    assert duration(text) is not None


@pytest.mark.parametrize("text", ["", "5", "-5m", "1.5h", "1m1h", "5 m", "m", "1h 30m", "５m", "1M", "1e3s", "0x5s"])
def test_and_nothing_else(text: str) -> None:
    assert duration(text) is None


def test_a_duration_is_the_sum_of_its_parts() -> None:
    assert (duration("1d2h3m4s5ms"), duration("0"), duration("1w")) == (93784.005, 0, 604800)


VALUE = st.sampled_from(["a", "ab", "b", ""])
MATCHER = st.builds(
    lambda label, operator, value: f'{label}{operator}"{value}"',
    st.sampled_from(["deployment", "model"]),
    st.sampled_from(["=", "!=", "=~", "!~"]),
    st.sampled_from(["a", "b", "a.*", "a|b", ""]),
)
LEAF = st.fixed_dictionaries({"matchers": st.lists(MATCHER, max_size=2), "continue": st.booleans()})
NODE = st.recursive(
    LEAF,
    lambda children: st.builds(lambda node, routes: {**node, "routes": routes}, LEAF, st.lists(children, max_size=3)),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.lists(NODE, max_size=4), st.fixed_dictionaries({"deployment": VALUE, "model": VALUE}))
def test_a_tree_takes_alerts_as_amtool_says(
    write: Write, routes: list[dict[str, object]], found: dict[str, str]
) -> None:
    """The same file of routes, read by a real Alertmanager's tool: each node has a receiver of its own."""
    count = 0

    def named(node: dict[str, object]) -> dict[str, object]:
        nonlocal count
        count += 1
        name = f"r{count}"
        children = node.get("routes", [])
        assert isinstance(children, list)
        return {**node, "receiver": name, "routes": [named(child) for child in children]}

    tree = {"receiver": "r0", "routes": [named(node) for node in routes]}
    path = write(yaml.safe_dump({"route": tree, "receivers": [{"name": f"r{n}"} for n in range(count + 1)]}))
    words = [f"{name}={value}" for name, value in found.items() if value]
    done = subprocess.run(
        ["/usr/bin/amtool", "config", "routes", "test", "--config.file", path, *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [route.receiver for route in taken_by(load(path).route, found)] == done.stdout.strip().split(",")


# What the document says


def test_the_labels_are_an_alerts() -> None:
    alert = Alert(
        id="e",
        conversation_id="c",
        deployment="d",
        model="m",
        axis_id="a",
        config_id="f",
        kind="dip",
        persona="pirate",
        severity="warning",
        starts_at="2026-01-01T00:00:00Z",
        accepted=0.0,
        changed=0.0,
        finding_ids=("x",),
        turn=1,
        statistic="dip",
        value=1.0,
        boundary=1.0,
        risk=1.0,
        certification="certified",
    )
    assert tuple(labels(alert)) == LABELS
    assert set(VALUES["kind"]) == set(get_args(Kind)) - {"recovered"} and set(VALUES["severity"]) == set(
        get_args(Severity)
    )
    assert {labels(alert)["alertname"]} < set(VALUES["alertname"])
    table = DOCUMENT.read_text().split("## Labels")[1].split("\n## ")[0]
    assert set(re.findall(r"`([a-z_]+)`", "".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE)))) == set(LABELS)


def test_every_key_is_in_the_document_and_no_other(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, set[str]] = {}
    finish = Section.finish

    def told(section: Section) -> None:
        place = re.sub(r"\[\d+\]", "", section.where)
        place = re.sub(r"^route(\.routes)*$", "route", place).removeprefix("receivers.")
        place = re.sub(r"^time_intervals\..*", "time_intervals", place)
        asked.setdefault(place, set()).update(section._asked)
        finish(section)

    monkeypatch.setattr(Section, "finish", told)
    load(write(EXAMPLE))
    text = DOCUMENT.read_text().split("## The file\n")[1].split("\n## ")[0]
    documented = {}
    for part in ("\n### ``\n" + text).split("\n### `")[1:]:
        name, _, rest = part.partition("`")
        documented[name] = set(re.findall(r"`([a-z_]+)`", "".join(re.findall(r"^\| (`.*?) \|", rest, re.MULTILINE))))
    asked["time_intervals"] -= {"start_time", "end_time"}
    assert documented == asked
