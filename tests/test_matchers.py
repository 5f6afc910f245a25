"""Promises of matchers: they mean what Alertmanager's mean, by Alertmanager's own word, and nothing hangs on one."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitor.errors import ConfigurationError
from monitor.matchers import Matcher, matches, parse_matchers

AMTOOL = "/usr/bin/amtool"

# Each is read alike by all of Alertmanager's releases.
TEXTS = [
    "a=b",
    'a="b"',
    '{a="b"}',
    '{a="b",b!="c"}',
    '{ a = "b" , b =~ "c|d" , }',
    'a=~"shop-.*"',
    "a=~shop-.*",
    'a!~"x{2,3}"',
    'a=""',
    'a!=""',
    'a=~""',
    'a!~".+"',
    r'a="say \"b\""',
    r'a="back\\slash"',
    r'a=~"shop\.eu"',
    r'a=~"\\d+"',
    r'a="two\nlines"',
    'a="b,c"',
    'a="{}"',
    'a="Ω漢é"',
    "a=Ω",
    'a=~"(?i)B"',
    'a=~"b|c$"',
    'a=~"^b"',
    'a="x=y"',
    'a="b c"',
]
LABELS = [
    {},
    {"a": ""},
    {"a": "b"},
    {"a": "B"},
    {"a": "b", "b": "c"},
    {"a": "b", "b": "dd"},
    {"a": "shop-eu"},
    {"a": "my shop-eu"},
    {"a": "shop.eu"},
    {"a": "shop_eu"},
    {"a": "xx"},
    {"a": 'say "b"'},
    {"a": "back\\slash"},
    {"a": "two\nlines"},
    {"a": "17"},
    {"a": "b,c"},
    {"a": "{}"},
    {"a": "Ω漢é"},
    {"a": "Ω"},
    {"a": "x=y"},
    {"a": "b c"},
]


def quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def test_they_mean_what_amtool_says_they_mean(tmp_path: Path) -> None:
    """The routing tree of a real Alertmanager's tool: an alert goes to `r3` where the third matchers hold."""
    file = tmp_path / "alertmanager.yml"
    routes = "".join(
        f"    - {{receiver: r{number}, continue: true, matchers: [{quoted(text)}]}}\n"
        for number, text in enumerate(TEXTS)
    )
    receivers = "".join(f"  - name: r{number}\n" for number in range(len(TEXTS)))
    file.write_text(f"route:\n  receiver: 'none'\n  routes:\n{routes}receivers:\n  - name: 'none'\n{receivers}")
    for labels in LABELS:
        if "\n" in labels.get("a", ""):
            continue  # its command line takes none
        words = [f"{name}={msgspec.json.encode(value).decode()}" for name, value in labels.items()]
        done = subprocess.run(
            [AMTOOL, "config", "routes", "test", "--config.file", file, *words], capture_output=True, text=True
        )
        assert done.returncode == 0, (labels, done.stderr)
        ours = [f"r{number}" for number, text in enumerate(TEXTS) if matches(parse_matchers(text), labels)]
        assert ours == [name for name in done.stdout.strip().split(",") if name != "none"], labels


def test_a_newline_is_one() -> None:
    (matcher,) = parse_matchers(r'a="two\nlines"')
    assert matcher.value == "two\nlines" and matcher.matches({"a": "two\nlines"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no label name"),
        ("{}", "no label name"),
        ("a", "no operator"),
        ("a==b", "no value"),
        ("a=", "no value"),
        ("=b", "no label name"),
        ("1a=b", "no label name"),
        ("a-b=c", "no operator"),
        ("a~b", "no operator"),
        ('a="b', "never closed"),
        ('a="b\\', "never closed"),
        ('a="b"c', "left over"),
        ('a="b" b="c"', "left over"),
        ("a=b c", "left over"),
        ("{a=b", "no label name"),
        ("a=b}", "left over"),
        ("a='b'", "no value"),
        ("a=b,,b=c", "no label name"),
        (r'a=~"\bword"', "read \\b differently"),
        (r'a="\t"', "read \\t differently"),
        ('a=~"("', "bad regular expression"),
        ('a=~"*"', "bad regular expression"),
        ('a=~"(?=b)"', "bad regular expression"),
        (r'a=~"(b)\\1"', "bad regular expression"),
        ('a=~"((b{1000}){1000}){1000}"', "bad regular expression"),
        (r'a=~"\pL{100}"', "too large"),
        ('a="' + "b" * 1001 + '"', "1001 characters"),
        ("a=" + "b" * 5000, "5002 characters"),
        (",".join(["a=b"] * 33), "33 matchers"),
        ("a=\udcff", "not valid Unicode"),
    ],
)
def test_what_is_no_matcher_is_refused_with_the_cure(text: str, said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_matchers(text)
    assert said in caught.value.problem and caught.value.cure
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b", "(a*)*b", "(.*)*x", "(a|aa)+$", "a?" * 300 + "a" * 300])
def test_no_expression_takes_for_ever(pattern: str) -> None:
    """What takes a backtracking engine longer than the universe has been there."""
    matcher = Matcher("a", "=~", pattern)
    done = threading.Thread(target=lambda: matcher.matches({"a": "a" * 100_000 + "!"}), daemon=True)
    done.start()
    done.join(60)
    assert not done.is_alive()


texts = st.text(st.characters(codec="utf-8"), max_size=40)


@given(st.from_regex(r"[a-z_][a-z0-9_]{0,9}", fullmatch=True), st.sampled_from(["=", "!="]), texts)
def test_what_is_shown_is_read_again(label: str, operator: str, value: str) -> None:
    matcher = Matcher(label, operator, value)  # type: ignore[arg-type]
    assert parse_matchers(str(matcher)) == (matcher,)
    assert parse_matchers(f"{{{matcher},{matcher}}}") == (matcher, matcher)


@given(texts)
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        found = parse_matchers(text)
    except ConfigurationError:
        return
    assert parse_matchers(",".join(map(str, found))) == found


@given(texts, texts)
def test_the_opposite_is_the_opposite(value: str, actual: str) -> None:
    for yes, no in (("=", "!="), ("=~", "!~")):
        try:
            pair = Matcher("a", yes, value), Matcher("a", no, value)  # type: ignore[arg-type]
        except ValueError:
            continue
        assert pair[0].matches({"a": actual}) is not pair[1].matches({"a": actual})


def test_a_record_with_a_bad_expression_is_refused_when_it_is_read() -> None:
    good = msgspec.json.encode(Matcher("a", "=~", "b.*"))
    assert msgspec.json.decode(good, type=Matcher) == Matcher("a", "=~", "b.*")
    with pytest.raises(msgspec.ValidationError, match="bad regular expression"):
        msgspec.json.decode(good.replace(b"b.*", b"b("), type=Matcher)
