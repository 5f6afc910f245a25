"""Names that strangers gave, made harmless for the place where they are shown: text, Slack, a line of JSON.

A conversation's id, a deployment or a role may hold anything: markup, a line break, an escape sequence of a terminal, a
mark that turns the text behind it round. What can't be seen is written out as `\\u202e`; letters of every script stay
what they are, and what is written from right to left is isolated, so that it moves nothing beside it (Unicode Standard
Annex #9, §2.4.2). HTML is escaped by the library that makes it; it knows nothing of alerts.
"""

from __future__ import annotations

import re
import unicodedata

__all__ = ["code_span", "cut", "json_line", "mrkdwn", "shown"]

MOST_CHARACTERS = 256
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
# Letters by name, and nothing to see: Hangul fillers, the empty Braille pattern, the grapheme joiner.
_BLANK = {"\u034f", "\u115f", "\u1160", "\u2800", "\u3164", "\uffa0"}
_JOINERS = {"\u200c", "\u200d"}  # Persian, the scripts of India, and emoji are not written without them
# Signs that stand before the digits they embrace: they are seen, though Unicode counts them among the formats.
_EMBRACING = {*map(chr, range(0x600, 0x606)), *"\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"}
_RIGHT_TO_LEFT = {"R", "AL", "AN"}
_ISOLATE, _END = "\u2068", "\u2069"
# What JSON lets pass, and a terminal or a viewer obeys: C1 controls, line separators, marks of direction, what is no
# character.
_UNSAFE = re.compile(
    "[\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def shown(text: str, most: int = MOST_CHARACTERS) -> str:
    """The name on one line, in at most `most` characters of its own, every one of which can be seen."""
    seen = "".join(character if _visible(character) else _written_out(character) for character in cut(text, most))
    if seen != seen.strip():
        start, end = len(seen) - len(seen.lstrip()), len(seen.rstrip())
        seen = "".join(
            _written_out(character) if i < start or i >= end else character for i, character in enumerate(seen)
        )
    if any(unicodedata.bidirectional(character) in _RIGHT_TO_LEFT for character in seen):
        return f"{_ISOLATE}{seen}{_END}"
    return seen


def cut(text: str, most: int) -> str:
    """The text, or its beginning and its end with an ellipsis between, in at most `most` characters.

    The end stays, since ids often begin alike.
    """
    if len(text) <= most:
        return text
    tail = (most - 1) // 3
    return f"{text[: most - 1 - tail]}…{text[len(text) - tail :]}"


def mrkdwn(text: str) -> str:
    """Text for Slack's mrkdwn: the three characters that begin a mention, a channel or a link are escaped.

    Source: docs.slack.dev, "Formatting message text", "Escaping text".
    """
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def code_span(text: str, most: int = MOST_CHARACTERS) -> str:
    """A name for Slack, as code: no emphasis, no emoji and no link is made of it. A backtick is shown as an accent."""
    return f"`{mrkdwn(shown(text, most).replace('`', 'ˋ'))}`"


def json_line(encoded: bytes) -> bytes:
    """JSON that says the same, without a character that a terminal obeys: those become escapes of JSON's own."""
    text = encoded.decode()
    return _UNSAFE.sub(lambda match: _json_escape(match.group()), text).encode()


def _visible(character: str) -> bool:
    if character in _JOINERS or character in _EMBRACING:
        return True
    return unicodedata.category(character) not in _HIDDEN and character not in _BLANK


def _written_out(character: str) -> str:
    number = ord(character)
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def _json_escape(character: str) -> str:
    units = character.encode("utf-16-be")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))
