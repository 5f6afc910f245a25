"""Promises of what alerts say: everything in one glance, in plain words, and no name does anything but stand there."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from urllib.parse import unquote, urlsplit

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from notices import HOSTILE, NAMES, RULES, alert, hostile, notification, over, texts

from alerts.config import EmailConfig
from alerts.email import mail
from alerts.escape import code_span, cut, json_line, shown
from alerts.jsonl import line
from alerts.message import annotations_of, headline, links, plain, sentence, title
from alerts.pagerduty import event
from alerts.slack import body
from alerts.story import BLOCKS, signed, sparkline, story
from monitor.alert import Notification
from monitor.events import Finding
from monitor.store.store import TrajectoryPoint

MAIL = EmailConfig(receiver="ops", to=("oncall@example.com",), sender="aw@example.com", host="mail.example.com")


def html_of(told: Notification) -> str:
    part = mail(told, RULES, MAIL).get_body(("html",))
    assert part is not None
    return str(part.get_content())


TARGETS: dict[str, Callable[[Notification], str]] = {
    "text": lambda told: plain(told, RULES),
    "json": lambda told: line(told, RULES).decode(),
    "slack": lambda told: body(told, RULES, 10).decode(),
    "pagerduty": lambda told: event(told, RULES, "k" * 32).decode(),
    "html": html_of,
}


def points(*readings: float | None, held: float = 0.0, start: int = 0) -> list[TrajectoryPoint]:
    return [
        TrajectoryPoint(
            number=place + 1,
            time=1.78e9 + 60.0 * place,
            turn=start + place,
            projection=0.0,
            held=held,
            outcome="unjudged" if z is None else "folded",
            z=z,
            risk=None,
            place=None,
        )
        for place, z in enumerate(readings)
    ]


def finding(**changes: object) -> Finding:
    known = {
        "id": "f",
        "time": "2026-06-01T12:00:00Z",
        "conversation_id": "c",
        "turn": 3,
        "deployment": "d",
        "axis_id": "a",
        "kind": "dip",
        "severity": "warning",
        "statistic": "dip",
        "value": 6.1,
        "boundary": 5.0,
        "risk": 1.22,
        "budget": None,
        "certification": "uncertified",
        "config_id": "k",
        "episode_id": "e",
    }
    return msgspec.convert(known | changes, Finding)


# Everything in one glance.


@pytest.mark.parametrize("target", TARGETS)
def test_every_message_says_who_how_far_towards_what_and_where_to_go_on(target: str) -> None:
    told = TARGETS[target](notification(alert()))
    for word in (
        "c-17",
        "critical",
        "sudden drop",
        "support-bot",
        "llama-3-70b",
        "fell from +0.3 to −4.2",
        "▇▇▇▂▁",
        "4.2",
        "3.02",
        "1 % of healthy conversations",
        "pirate",
        "https://watch.example/sessions/c-17",
        "https://logs.example/c/c-17?tab=all",
        "https://docs.example/runbooks/sudden_drop.md",
    ):
        assert word in told, word


@pytest.mark.parametrize("target", TARGETS)
def test_every_message_counts_what_it_does_not_show(target: str) -> None:
    told = TARGETS[target](notification(*(alert(f"e{i}") for i in range(3)), truncated=1234))
    assert "1234" in told.replace(",", "")


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (notification(alert()), "Critical: sudden drop in support-bot, conversation c-17, towards pirate"),
        (notification(over()), "Resolved: sudden drop in support-bot, conversation c-17"),
        (
            notification(alert(severity="warning"), reason="repeat"),
            "Warning: sudden drop (still firing) in support-bot",
        ),
        (notification(alert(), reason="escalated"), "Critical: sudden drop (now worse) in support-bot"),
        (
            notification(alert("1"), alert("2", kind="dip"), alert("3", kind="dip"), over("4")),
            "Critical: 2 dips, 1 sudden drop, 1 resolved in support-bot",
        ),
        (notification(alert("1"), alert("2", deployment="b")), "Critical: 2 sudden drops in 2 deployments"),
        (notification(alert("1", severity="info"), alert("2", severity="warning")), "Warning: 2 sudden drops"),
        (
            notification(alert(kind="fleet_shift", conversation_id="", severity="warning", nearest_roles=())),
            "Warning: fleet shift in support-bot",
        ),
        (notification(alert("1"), alert("2"), truncated=9998), "Critical: 2 sudden drops, 9,998 more in support-bot"),
        (notification(reason="digest"), "Anchorwatch: digest"),
        (notification(reason="test"), "Anchorwatch: test"),
    ],
)
def test_a_title_tells_it_in_a_few_words(told: Notification, expected: str) -> None:
    assert title(told).startswith(expected)


def test_a_headline_has_no_name_that_strangers_gave() -> None:
    for name in HOSTILE:
        assert headline(notification(hostile(name))) == "Critical: sudden drop"


@pytest.mark.parametrize(
    ("resolution", "words"),
    [
        ("recovered", "it came back inside its boundary"),
        ("ended", "fell silent, and nobody measured that it recovered"),
        ("resolved", "somebody resolved it"),
        ("forgotten", "its conversation was deleted"),
        ("expired", "nobody measured that it went back"),
    ],
)
def test_what_is_over_says_why_and_claims_no_recovery_that_nobody_measured(resolution: str, words: str) -> None:
    assert words in sentence(over(resolution=resolution))


def test_a_boundary_without_a_promise_makes_none() -> None:
    assert annotations_of(alert(), RULES)["budget"] == "1 % of healthy conversations may warn"
    assert annotations_of(alert(certification="uncertified"), RULES)["budget"].endswith(", uncertified")
    assert annotations_of(alert(budget=None, certification="uncertified"), RULES)["budget"].startswith("uncertified")


def test_a_fleet_shift_is_told_of_a_deployment_and_links_to_its_sessions() -> None:
    shift = alert(kind="fleet_shift", conversation_id="", model="", value=0.62, boundary=0.3, deployment="a b")
    assert "fell by 0.6 standard deviations" in sentence(shift)
    assert "rose by" in sentence(replace(shift, value=-0.62))
    assert [link.name for link in links(shift, RULES)] == ["Sessions", "Runbook"]
    assert annotations_of(shift, RULES)["session_url"] == "https://watch.example/?deployment=a%20b"


# Links.


@pytest.mark.parametrize("name", [*HOSTILE, *NAMES, "a/b", "a%2Fb", ".", ".."])
def test_a_link_leads_to_that_conversation_and_nowhere_else(name: str) -> None:
    found = {link.name: link.url for link in links(alert(conversation_id=name), RULES)}
    assert all(url.isascii() and url.isprintable() and " " not in url for url in found.values())
    session, viewer = urlsplit(found["Session"]), urlsplit(found["Log viewer"])
    assert (session.scheme, session.netloc, session.query, session.fragment) == ("https", "watch.example", "", "")
    assert unquote(session.path.removeprefix("/sessions/")) == name and session.path.count("/") == 2
    assert (viewer.netloc, viewer.query) == ("logs.example", "tab=all")
    assert unquote(viewer.path.removeprefix("/c/")) == name


def test_without_addresses_there_are_no_links_to_them() -> None:
    assert [link.name for link in links(alert(), replace(RULES, external_url="", conversation_url=""))] == ["Runbook"]


# Names.


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_any_script_is_shown_as_it_is(name: str) -> None:
    assert shown(name).strip("\u2068\u2069") == name


@pytest.mark.parametrize("name", ["דוד", "مستخدم ١٢٣", "a דוד"])
def test_a_name_from_right_to_left_moves_nothing_beside_it(name: str) -> None:
    assert shown(name) == f"\u2068{name}\u2069"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a\nb", r"a\u000ab"),
        ("\x1b[31m", r"\u001b[31m"),
        ("\u202egnp", r"\u202egnp"),
        ("\u2068x", r"\u2068x"),
        ("\U000e0041", r"\U000e0041"),
        ("\u3164", r"\u3164"),
        (" a ", r"\u0020a\u0020"),
        ("\u00a0a", r"\u00a0a"),
        ("a b", "a b"),
        ("", ""),
    ],
)
def test_what_cannot_be_seen_is_written_out(name: str, expected: str) -> None:
    assert shown(name) == expected


@given(texts)
def test_a_shown_name_is_one_line_of_what_can_be_seen(name: str) -> None:
    seen = shown(name)
    inner = seen[1:-1] if seen.startswith("\u2068") else seen
    assert seen.count("\u2068") == seen.count("\u2069") <= 1
    assert len(seen.splitlines()) == 1
    assert inner == inner.strip() != ""
    assert not {unicodedata.category(character) for character in inner} & {"Cc", "Zl", "Zp", "Cs", "Co", "Cn"}
    assert not set(inner) & set("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff\u200b")


@given(texts, st.integers(4, 300))
def test_what_is_cut_keeps_its_beginning_and_its_end(text: str, most: int) -> None:
    short = cut(text, most)
    assert len(short) <= most
    if short != text:
        kept = (most - 1) - (most - 1) // 3
        assert short[:kept] == text[:kept] and short[kept] == "…"
        assert len(short) == most and text.endswith(short[kept + 1 :])


@given(texts)
def test_a_code_span_ends_where_it_is_meant_to(name: str) -> None:
    span = code_span(name, 48)
    assert span[0] == span[-1] == "`" and "`" not in span[1:-1]
    assert not set(span) & set("<>\n")
    assert len(span) <= 500


@given(st.dictionaries(texts, st.lists(texts, max_size=3), max_size=3))
def test_a_line_of_json_says_the_same_and_moves_no_terminal(value: object) -> None:
    safe = json_line(msgspec.json.encode(value))
    assert json.loads(safe) == value
    text = safe.decode()
    assert len(text.splitlines()) == 1
    assert not {unicodedata.category(character) for character in text} & {"Cc", "Zl", "Zp"}
    assert not set(text) & set("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff")


@given(texts)
def test_in_plain_text_no_name_makes_a_line(name: str) -> None:
    tame = plain(notification(replace(hostile("x"), story="")), RULES)
    wild = plain(notification(replace(hostile(name), story="")), RULES)
    assert len(wild.splitlines()) == len(tame.splitlines())
    assert [row[:17] for row in wild.splitlines() if row.startswith("  ")] == [
        row[:17] for row in tame.splitlines() if row.startswith("  ")
    ]


# The trajectory in words.


MEAN = ", where 0 is this deployment's healthy mean."


@pytest.mark.parametrize(
    ("readings", "line", "words"),
    [
        ((), "", "No response of this conversation has been judged."),
        ((None, None), "", "No response of this conversation has been judged."),
        ((-4.1,), "▁", f"The only judged response, turn 0, reads −4.1 standard deviations{MEAN}"),
        (
            (0.2, 0.1, 0.3, -3.1, -3.3),
            "▇▇▇▂▂",
            "Over 5 judged responses, turns 0 to 4, the reading fell from +0.3 to −3.1 standard deviations between "
            f"turns 2 and 3, and is lowest now at −3.3{MEAN}",
        ),
        (
            (0.2, -0.4, -1.0, -1.8, -2.2, -3.0),
            "▇▆▅▄▄▂",
            "Over 6 judged responses, turns 0 to 5, the reading sank from +0.2 to −3.0 standard deviations between "
            f"turns 0 and 5{MEAN}",
        ),
        (
            (0.2, 0.1, -4.0, 0.1),
            "▇▇▁▇",
            "Over 4 judged responses, turns 0 to 3, the reading fell from +0.1 to −4.0 standard deviations between "
            f"turns 1 and 2, and came back to +0.1{MEAN}",
        ),
        (
            (0.5, -3.0, -3.1, -6.0, -5.5),
            "▇▄▄▁▁",
            "Over 5 judged responses, turns 0 to 4, the reading sank from +0.5 to −6.0 standard deviations between "
            f"turns 0 and 3, and stands at −5.5{MEAN}",
        ),
        (
            (-4.0, None, -3.9, -4.2),
            "▁▁▁",
            "Over 3 judged responses, turns 0 to 3, the reading stayed between −4.2 and −3.9 standard deviations"
            + MEAN,
        ),
        (
            (-4.0, -2.0, -1.0),
            "▁▄▅",
            f"Over 3 judged responses, turns 0 to 2, the reading rose from −4.0 to −1.0 standard deviations{MEAN}",
        ),
        (
            (0.0, 0.0),
            "▇▇",
            f"Over 2 judged responses, turns 0 to 1, the reading stayed at 0.0 standard deviations{MEAN}",
        ),
    ],
)
def test_a_trajectory_in_letters_and_in_words(readings: tuple[float | None, ...], line: str, words: str) -> None:
    assert sparkline(points(*readings)) == line
    assert story(points(*readings)) == words


def test_only_what_came_since_the_last_beginning_is_told() -> None:
    both = [*points(0.5, 0.4, 0.6), *points(-4.0, -3.9)]
    assert story(both) == story(points(-4.0, -3.9))
    assert sparkline(both) == sparkline(points(-4.0, -3.9))


def test_a_dip_that_no_mean_shows_is_told_and_so_is_what_capping_moved() -> None:
    assert "; one passage of turn 3 reads −6.1." in story(points(0.1, 0.2, 0.1, 0.0), finding())
    assert story(points(0.1, 0.2, held=0.4)).endswith("; capping moved 40 % of the last response's tokens.")


def test_a_fleet_shift_needs_no_points() -> None:
    shift = finding(kind="fleet_shift", statistic="adwin", value=0.62, conversation_id="")
    assert story([], shift).startswith("The mean of all responses of this deployment fell by 0.6")


readings = st.floats(-1e6, 1e6) | st.floats(-8.0, 3.0)


@given(st.lists(readings | st.none(), max_size=400))
def test_every_trajectory_has_one_short_sentence_and_one_short_line(found: list[float | None]) -> None:
    said = story(points(*found), finding())
    assert said.endswith(".") and len(said) < 400 and "\n" not in said and "nan" not in said
    drawn = sparkline(points(*found))
    judged = [z for z in found if z is not None]
    assert len(drawn) == min(24, len(judged)) and set(drawn) <= set(BLOCKS)


@given(st.lists(st.floats(-8.0, 3.0), min_size=1, max_size=24))
def test_lower_is_never_drawn_higher(found: list[float]) -> None:
    drawn = [BLOCKS.index(letter) for letter in sparkline(points(*found))]
    order = sorted(range(len(found)), key=lambda i: found[i])
    assert [drawn[i] for i in order] == sorted(drawn)


def test_one_bad_response_in_thousands_is_seen() -> None:
    assert sparkline(points(*[0.0] * 5003, -6.0, *[0.0] * 5000)).count("▁") == 1


@pytest.mark.parametrize(
    ("value", "text"), [(-0.04, "0.0"), (0.04, "0.0"), (-4.26, "−4.3"), (1.0, "+1.0"), (10.0, "+10.0")]
)
def test_numbers_have_a_sign_and_one_decimal(value: float, text: str) -> None:
    assert signed(value) == text
