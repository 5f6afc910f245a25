r"""Alertmanager's matchers: `severity="critical"`, `deployment=~"shop-.*"`. Pure.

They know no label by name. Regular expressions are RE2's, as in Alertmanager: they match whole values, and take time in
proportion to the value's length, whatever the expression is.

Alertmanager has read matchers in two ways over the years. This one reads what both read alike, and refuses the rest
with the way to say it: an unquoted value holds no spaces, quotes, braces, commas or operators, and within quotes `\\`,
`\"`, `\n` are escapes; before any other letter that is none in Go either, as in `"shop\.eu"`, a backslash is itself.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any, Literal, cast

import re2
from msgspec import Struct

from monitor.errors import ConfigurationError

__all__ = ["Matcher", "matches", "parse_matchers"]

MAX_TEXT = 4096  # characters of what is parsed at once
MAX_VALUE = 1000
MAX_MATCHERS = 32
MAX_MEMORY = 2**20  # bytes that a compiled expression may take, and as much for what it remembers while it matches

Operator = Literal["=", "!=", "=~", "!~"]

_LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_OPERATOR = re.compile(r"=~|!~|!=|=")
_BARE = re.compile(r"[^\s{}!=~,\\\"'`]+")
_AMBIGUOUS = frozenset("abfrtvxuU01234567")  # escapes of Go, of which older Alertmanagers know nothing
_SHOWN = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})


class Matcher(Struct, frozen=True):
    """One condition on one label. A missing label counts as empty; regular expressions match the whole value.

    Raises:
        ValueError: the regular expression is none of RE2's, or too large.
    """

    label: str
    operator: Operator
    value: str

    def __post_init__(self) -> None:
        if self.operator in ("=~", "!~"):
            _expression(self.value)

    def __str__(self) -> str:
        """As `parse_matchers` reads it."""
        return f'{self.label}{self.operator}"{self.value.translate(_SHOWN)}"'

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether it holds."""
        value = labels.get(self.label, "")
        match self.operator:
            case "=":
                return value == self.value
            case "!=":
                return value != self.value
            case "=~":
                return _expression(self.value).fullmatch(value) is not None
            case "!~":
                return _expression(self.value).fullmatch(value) is None


def matches(matchers: tuple[Matcher, ...], labels: Mapping[str, str]) -> bool:
    """Whether all of them hold."""
    return all(matcher.matches(labels) for matcher in matchers)


def parse_matchers(text: str) -> tuple[Matcher, ...]:
    """One matcher or several between commas, with or without braces around them.

    Raises:
        ConfigurationError: it is none. Says where, and how to write it.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigurationError("the matcher is not valid Unicode", cure="write it in UTF-8") from None
    if len(text) > MAX_TEXT:
        raise ConfigurationError(f"matchers of {len(text)} characters", cure=f"use at most {MAX_TEXT}")
    inside = text.strip()
    if inside.startswith("{") and inside.endswith("}"):
        inside = inside[1:-1]
    found: list[Matcher] = []
    rest = inside.strip()
    while rest or not found:
        matcher, rest = _one(rest, text)
        found.append(matcher)
        if rest and not rest.startswith(","):
            raise _wrong(
                text, f"{rest[:20]!r} is left over after {matcher.label!r}", 'write label="value", and a comma'
            )
        rest = rest[1:].strip()
    if len(found) > MAX_MATCHERS:
        raise ConfigurationError(f"{len(found)} matchers at once", cure=f"use at most {MAX_MATCHERS}")
    return tuple(found)


def _one(text: str, whole: str) -> tuple[Matcher, str]:
    """The first matcher, and what comes after it."""
    label = _LABEL.match(text)
    if label is None:
        raise _wrong(whole, "no label name where one should be", 'write it as severity="critical"')
    rest = text[label.end() :].lstrip()
    operator = _OPERATOR.match(rest)
    if operator is None:
        raise _wrong(whole, f"no operator after {label[0]!r}", "write one of = != =~ !~ there")
    rest = rest[operator.end() :].lstrip()
    value, rest = _quoted(rest, whole) if rest.startswith('"') else _bare(rest, whole)
    if len(value) > MAX_VALUE:
        raise ConfigurationError(f"a matcher's value of {len(value)} characters", cure=f"use at most {MAX_VALUE}")
    try:
        return Matcher(label[0], cast(Operator, operator[0]), value), rest.lstrip()
    except ValueError as error:
        raise _wrong(whole, str(error), "write it as RE2 has it: no look-around, no back-references") from None


def _bare(text: str, whole: str) -> tuple[str, str]:
    value = _BARE.match(text)
    if value is None:
        raise _wrong(whole, "no value after the operator", 'write it in double quotes; an empty one as ""')
    return value[0], text[value.end() :]


def _quoted(text: str, whole: str) -> tuple[str, str]:
    value: list[str] = []
    letters = iter(enumerate(text[1:], 1))
    for place, letter in letters:
        if letter == '"':
            return "".join(value), text[place + 1 :]
        if letter != "\\":
            value.append(letter)
            continue
        _, escaped = next(letters, (0, ""))
        if escaped in _AMBIGUOUS:
            raise _wrong(whole, f"Alertmanager's releases read \\{escaped} differently", f"write \\\\{escaped}")
        value.append({"n": "\n", '"': '"', "\\": "\\"}.get(escaped, "\\" + escaped))
    raise _wrong(whole, "a quote is never closed", 'end the value with "')


def _wrong(text: str, problem: str, cure: str) -> ConfigurationError:
    shown = text if len(text) <= 80 else text[:77] + "..."
    return ConfigurationError(f"{shown!r} is no matcher: {problem}", cure=cure)


@functools.lru_cache(maxsize=1024)
def _expression(pattern: str) -> Any:
    """The compiled expression; its `fullmatch` is safe from any thread."""
    options = re2.Options()
    options.max_mem = MAX_MEMORY
    options.log_errors = False
    if len(pattern) > MAX_VALUE:
        raise ValueError(f"a regular expression of {len(pattern)} characters, more than {MAX_VALUE}")
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        said = error.args[0] if error.args else b""
        raise ValueError(f"bad regular expression: {said.decode(errors='replace')}") from None
