"""The commands `alerts status`, `enable` and `shadow`: whether anybody is told, and what to expect when they are."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, TypeVar

import msgspec
import typer

from alerts.config import load
from alerts.outlook import Outlook, Pages, outlook, pages
from monitor import connect
from monitor.actions import Paging, Silence, append_action, body_of, read_actions, recorded_calibrations
from monitor.alert import Alert, Notification
from monitor.axis.bundle import load_bundle, resolve_bundle
from monitor.desk import AsJson, By, Note, Rules, moment, open_log, say, stderr, taken_in
from monitor.detect.baseline import DetectorConfig
from monitor.detect.configure import detector_config
from monitor.errors import ConfigurationError
from monitor.settings import load_settings
from monitor.stream.log import PROJECTIONS, Log

__all__ = ["enable", "shadow", "status"]

MODE = "mode"

T = TypeVar("T")


def status(as_json: AsJson = False) -> None:
    """Say whether anybody is told, how many alerts fire, and what each integration was last sent."""
    now = moment(datetime.now(UTC))
    with open_log() as (settings, log):
        actions, rules = read_actions(log), settings.alerts_file
    mode, by, since = _mode(actions)
    fired = Counter(one.severity for one in _bodies(actions, "alert/", Alert) if one.firing)
    silences = sum(one.until > now for one in _bodies(actions, "silence/", Silence))
    sent: dict[str, str | None] = {}
    waiting: Counter[str] = Counter()
    for one in _bodies(actions, "notification/", Notification):
        waiting[one.integration] += not one.sent
        before = sent.setdefault(one.integration, None)
        if one.sent:
            sent[one.integration] = max(before or "", one.time)
    integrations = {name: {"last_sent": sent[name], "waiting": waiting[name]} for name in sorted(sent)}
    if as_json:
        found = {"mode": mode, "by": by, "since": since, "firing": fired, "silences": silences}
        print(json.dumps({**found, "integrations": integrations}))
        return
    told = f"by {by} since {since}" if by else "since it was installed: `anchorwatch alerts enable` goes live"
    say(f"mode       {mode}, {told}")
    if rules is None and mode == "shadow":
        say("           but there is no file of rules: every alert is a line of JSON, whatever the mode", stderr)
    say(f"firing     {fired['critical']} critical, {fired['warning']} warning, {fired['info']} info")
    say(f"silences   {silences} in force")
    for name, facts in integrations.items():
        say(f"{name}: last sent {facts['last_sent'] or 'nothing yet'}, {facts['waiting']} waiting")


def enable(
    by: By,
    conversations_per_day: Annotated[
        list[str],
        typer.Option(help="Traffic to expect: a number, or deployment=number, once for each deployment."),
    ],
    prevalence: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of conversations that drift.")] = 0.001,
    detection: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Share of drifting conversations that warn. [default: the bundle's]"),
    ] = None,
    bundle: Annotated[str, typer.Option(help="The axis bundle in use: a shipped one's name, or a folder.")] = "smollm2",
    config: Rules = None,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    note: Note = "",
    as_json: AsJson = False,
) -> None:
    """Go live: from now on people are told. Says first how many warnings a day to expect, and how many are true.

    Alerts that fire already, and that nobody was told of, are told then.
    """
    if as_json and not yes:
        raise ConfigurationError("--json can't ask", cure="give --yes with it; without, look at the figures first")
    path = config or load_settings().alerts_file
    rules = None if path is None else load(path)
    with open_log() as (settings, log):
        judging = _in_force(log)
        detector = judging or connect.calibration(bundle)
        traffic = _traffic(conversations_per_day, detector)
        if detection is None:
            detection = _detection(bundle, detector)
        actions = read_actions(log)
        found = outlook(detector, traffic, prevalence=prevalence, detection=detection)
        reach = [] if rules is None else pages(rules, found)
        lately = _lately(actions)
        if not as_json:
            if judging is None:
                say(f"note: no worker has judged anything yet; these are the figures of {bundle!r}.", stderr)
            _print_outlook(found, reach, lately, prevalence=prevalence, detection=detection)
            if rules is None:
                say("note: without a file of rules, alerts go to the dispatcher's standard output.", stderr)
        if not (yes or typer.confirm("Go live?", err=True)):
            say("Nothing has changed.", stderr)
            raise typer.Exit(1)
        append_action(log, "paging", MODE, Paging("live", note), by=by)
        taken_in(settings, log)
    if as_json:
        print(
            json.dumps(
                {
                    "mode": "live",
                    "assumed": {"prevalence": prevalence, "detection": detection},
                    "deployments": msgspec.to_builtins(found),
                    "receivers": msgspec.to_builtins(reach),
                    "last_24_hours": lately,
                }
            )
        )
    else:
        say("Live. To go back: anchorwatch alerts shadow --by ...")


def shadow(by: By, note: Note = "") -> None:
    """Go back into shadow: alerts are made and shown, and nobody is told."""
    with open_log() as (settings, log):
        append_action(log, "paging", MODE, Paging("shadow", note), by=by)
        taken_in(settings, log)
    say("In shadow. Alerts are made and shown; nobody is told.")


def _print_outlook(
    found: Sequence[Outlook],
    reach: Sequence[Pages],
    lately: Mapping[str, int],
    *,
    prevalence: float,
    detection: float | None,
) -> None:
    for one in found:
        say(f"{one.deployment}, at {one.conversations:,.0f} conversations a day, {prevalence:.2%} of them drifting:")
        if not one.calibrated:
            say("  it has no baseline: it is learning, and nobody is told of its conversations")
        elif one.budget is None or one.false_warnings is None or one.true_warnings is None:
            why = "the share of drift that warns is not known" if detection is None else "no budget is certified"
            say(f"  how many warnings to expect, nobody can say: {why}")
        else:
            precise = "" if one.precision is None else f", precision {one.precision:.0%}"
            say(
                f"  at most {one.false_warnings:,.1f} false warnings a day (budget {one.budget:.2%} of healthy "
                f"conversations) and {one.true_warnings:,.1f} true ones{precise}"
            )
            critical = (
                "critical has no certified budget of its own: it is a part of these"
                if one.false_criticals is None
                else f"at most {one.false_criticals:,.1f} false ones a day are critical"
            )
            say(f"  {critical}")
    if detection is not None:
        say(f"if {detection:.0%} of what drifts warns: so many of the scripts that the bundle learned from do.")
    for page in reach:
        count = "nobody can say how many" if page.alerts is None else f"at most {page.alerts:,.1f}"
        cap = "" if page.cap is None else f", and at most {page.cap} messages by its cap"
        say(f"{page.receiver} is told of {' and '.join(page.severities)}: {count} alerts a day{cap}")
    say(f"in the last 24 hours {lately['alerts']} alerts were made, {lately['critical']} of them critical.")


def _bodies(actions: Mapping[str, bytes], prefix: str, of: type[T]) -> list[T]:
    """What the actions of one kind are about."""
    bodies = (body_of(key, value) for key, value in actions.items() if key.startswith(prefix))
    return [body for body in bodies if isinstance(body, of)]


def _mode(actions: Mapping[str, bytes]) -> tuple[str, str, str]:
    """The mode, by whom, and since when."""
    value = actions.get(f"paging/{MODE}")
    if value is None:
        return "shadow", "", ""
    action = msgspec.json.decode(value)
    return action["body"]["mode"], action["by"], action["time"]


def _in_force(log: Log) -> DetectorConfig | None:
    return recorded_calibrations(log)(0, log.span(PROJECTIONS, 0).end)


def _detection(bundle: str, detector: DetectorConfig) -> float | None:
    """The share of the drifting scripts it was made with that warn; None where the bundle is of another axis."""
    axis = load_bundle(resolve_bundle(bundle))
    if detector_config(axis).axis_id != detector.axis_id:
        return None
    share = (axis.info.calibration or {}).get("source", {}).get("share_of_these_that_warn")
    return share if isinstance(share, float) else None


def _traffic(given: Sequence[str], detector: DetectorConfig) -> dict[str, float]:
    """Deployment → conversations a day."""
    known = sorted(detector.baselines)
    traffic: dict[str, float] = {}
    for text in given:
        name, equals, number = text.rpartition("=")
        if not equals and len(known) != 1:
            raise ConfigurationError(
                f"{text!r} does not say of which deployment",
                cure=f"write it as deployment=number, for {', '.join(known)}",
            )
        try:
            count = float(number)
        except ValueError:
            count = -1.0
        if not 0 <= count <= 1e12:
            raise ConfigurationError(f"{text!r} is no number of conversations", cure="write it as 10000 or shop=10000")
        traffic[name if equals else known[0]] = count
    return traffic


def _lately(actions: Mapping[str, bytes]) -> dict[str, int]:
    """What was seen, for whoever doubts what was computed."""
    begin = (datetime.now(UTC) - timedelta(days=1)).timestamp()
    found = [one for one in _bodies(actions, "alert/", Alert) if one.accepted >= begin]
    return {"alerts": len(found), "critical": sum(one.severity == "critical" for one in found)}
