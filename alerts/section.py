"""One mapping of a YAML file, asked for what it may hold. It knows values and their lines, and no rule and no route.

Mistakes are gathered, so that all are told at once: what is asked for and wrong gives its default, and the reading goes
on. What a mapping holds beside what it was asked for is a mistake too, as is a key given twice.
"""

from __future__ import annotations

import difflib
import re
import string
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import yaml

from alerts.document import Problem, Problems

__all__ = ["Section", "duration", "near", "url_problem"]

MAX_SECRET = 16 * 1024
MAX_SECONDS = 366 * 86_400.0

T = TypeVar("T")

_UNITS = {"y": 365 * 86_400.0, "w": 7 * 86_400.0, "d": 86_400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_DURATION = re.compile("".join(rf"(?:([0-9]{{1,9}}){unit})?" for unit in _UNITS))
_TRUTH = {"true": True, "false": False}


class Section:
    """One mapping. Each method takes a key that it may hold; `finish` tells of those that were never asked for.

    Attributes:
        where: its place in words, such as `receivers[0]`; empty for the whole file.
        line: where it begins, from 1.
    """

    def __init__(self, node: yaml.MappingNode, where: str, problems: Problems) -> None:
        self.where = where
        self.line = node.start_mark.line + 1
        self.problems = problems
        self._asked: set[str] = set()
        self._values: dict[str, yaml.Node] = {}
        self._lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                problems.add(line, f"{self._at('')}: a name must be a plain word")
            elif key.value in self._values:
                problems.add(line, f"{self._at(key.value)}: given twice, first in line {self._lines[key.value]}")
            else:
                self._values[key.value], self._lines[key.value] = value, line

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def wrong(self, key: str, says: str) -> None:
        """Tell that a key's value is a mistake."""
        self.problems.add(self._lines.get(key, self.line), f"{self._at(key)}: {says}")

    def advise(self, key: str, says: str) -> None:
        """Tell of what is no mistake, and yet may not be meant."""
        self.problems.advice.append(Problem(self._lines.get(key, self.line), f"{self._at(key)}: {says}"))

    def finish(self) -> None:
        """Tell of every key that nobody has asked for."""
        for key in self._values:
            if key not in self._asked:
                found = difflib.get_close_matches(key, sorted(self._asked), n=1)
                hint = f"did you mean {found[0]}?" if found else f"there are {', '.join(sorted(self._asked))}"
                self.wrong(key, f"no such key; {hint}")

    def text(self, key: str, default: str | None = None) -> str:
        """A text; without a default it must be given."""
        node = self._scalar(key, required=default is None)
        if node is None:
            return default or ""
        return self._text_of(node, key) or default or ""

    def texts(self, key: str, default: tuple[str, ...] = ()) -> tuple[str, ...]:
        """A list of texts; one alone may go without the list."""
        node = self._value(key)
        if node is None:
            return default
        if not isinstance(node, yaml.SequenceNode):
            return tuple(filter(None, [self._text_of(node, key)]))
        return tuple(filter(None, (self._text_of(one, key) for one in node.value)))

    def choice(self, key: str, options: Sequence[str], default: str) -> str:
        """One of a few words."""
        found = self.text(key, default)
        if found not in options:
            self.wrong(key, f"{found!r} is none of {', '.join(options)}{near(found, options)}")
            return default
        return found

    def written(self, key: str, default: str) -> str:
        """A plain value as it is written, whatever YAML takes it for: 22:00 is a number of base 60."""
        node = self._scalar(key)
        return default if node is None else str(node.value)

    def truth(self, key: str, default: bool) -> bool:
        """True or false."""
        node = self._scalar(key)
        if node is None:
            return default
        if node.tag != "tag:yaml.org,2002:bool" or node.value.lower() not in _TRUTH:
            self.wrong(key, "must be true or false")
            return default
        return _TRUTH[node.value.lower()]

    def whole(self, key: str, default: T, least: int, most: int) -> int | T:
        """A whole number."""
        node = self._scalar(key)
        if node is None:
            return default
        if re.fullmatch(r"[0-9]{1,12}", node.value) is None or not least <= int(node.value) <= most:
            self.wrong(key, f"must be a whole number from {least} to {most}")
            return default
        return int(node.value)

    def seconds(self, key: str, default: float, least: float = 0.0, most: float = MAX_SECONDS) -> float:
        """A duration."""
        node = self._scalar(key)
        if node is None:
            return default
        found = duration(node.value)
        if found is None:
            self.wrong(key, f"{node.value[:40]!r} is no duration: write it as 30s, 5m, 4h or 1h30m")
            return default
        if not least <= found <= most:
            self.wrong(key, f"must be from {least:g} to {most:g} seconds")
            return default
        return found

    def url(self, key: str, default: str | None = None) -> str:
        """The address of something that speaks HTTP, without credentials: those belong in files."""
        found = self.text(key, default)
        if found and (problem := url_problem(found)):
            self.wrong(key, problem)
            return default or ""
        return found

    def template(self, key: str, field: str, default: str) -> str:
        """An HTTP address with `{field}` in it."""
        found = self.text(key, default)
        if not found or found == default:
            return default
        try:
            fields = [part[1:] for part in string.Formatter().parse(found) if part[1] is not None]
        except ValueError:
            fields = [("", "", "")]
        if not fields or any(one != (field, "", None) for one in fields):
            self.wrong(key, f"must hold {{{field}}}, and no other braces")
            return default
        if problem := url_problem(found.replace(f"{{{field}}}", field)):
            self.wrong(key, problem)
            return default
        return found

    def file(self, key: str) -> Path | None:
        """A path, relative to the folder of this file."""
        found = self.text(key, "")
        return self._path(found) if found else None

    def secret(
        self, key: str, check: Callable[[str], str | None] | None = None, *, required: bool = False
    ) -> Path | None:
        """The file of one secret; see `secrets`. None where it is left out."""
        found = self.secrets(key, check)
        if len(found) > 1:
            self.wrong(key, "must be one file")
        if required and key not in self:
            self.wrong(key, "is missing: name the file that holds it")
        return found[0] if found else None

    def secrets(self, key: str, check: Callable[[str], str | None] | None = None) -> tuple[Path, ...]:
        """Files of secrets, each of which must be there, readable, not empty, and written by nobody else.

        `check` is given what a file holds, and says what is wrong with it, without quoting it.
        """
        paths = tuple(self._path(name) for name in self.texts(key))
        for path in paths:
            try:
                with path.open("rb") as file:
                    data = file.read(MAX_SECRET + 1)
                mode = path.stat().st_mode
                held = data.decode("utf-8").strip()
            except OSError as error:
                self.wrong(key, f"{path} can't be read: {error.strerror}")
                continue
            except UnicodeDecodeError:
                held = ""
            if not held or len(data) > MAX_SECRET or not held.isprintable():
                self.wrong(key, f"{path} must hold the secret in one line of text, and nothing else")
            elif mode & 0o022:
                self.wrong(key, f"other users can write {path}: chmod 600 it")
            elif check is not None and (problem := check(held)):
                self.wrong(key, f"{path} {problem}")
            if mode & 0o004:
                self.advise(key, f"other users can read {path}, unless its folder keeps them out")
        return paths

    def section(self, key: str, *, required: bool = False) -> Section | None:
        """A mapping."""
        node = self._value(key, required=required)
        if node is None:
            return None
        if not isinstance(node, yaml.MappingNode):
            self.wrong(key, "must hold `name: value` lines")
            return None
        return Section(node, self._at(key), self.problems)

    def sections(self, key: str) -> list[Section]:
        """A list of mappings."""
        node = self._value(key)
        if node is None:
            return []
        if not isinstance(node, yaml.SequenceNode):
            self.wrong(key, "must be a list: begin each entry with `- `")
            return []
        found = []
        for place, one in enumerate(node.value):
            where = f"{self._at(key)}[{place}]"
            if isinstance(one, yaml.MappingNode):
                found.append(Section(one, where, self.problems))
            else:
                self.problems.add(one.start_mark.line + 1, f"{where}: must hold `name: value` lines")
        return found

    def _at(self, key: str) -> str:
        return ".".join(filter(None, (self.where, key))) or "the file"

    def _path(self, name: str) -> Path:
        return (self.problems.path.absolute().parent / name).absolute()

    def _value(self, key: str, *, required: bool = False) -> yaml.Node | None:
        self._asked.add(key)
        node = self._values.get(key)
        if node is None and required:
            self.wrong(key, "is missing")
        if node is not None and node.tag == "tag:yaml.org,2002:null":
            self.wrong(key, "has no value: give one, or leave the line out")
            return None
        return node

    def _scalar(self, key: str, *, required: bool = False) -> yaml.ScalarNode | None:
        node = self._value(key, required=required)
        if node is not None and not isinstance(node, yaml.ScalarNode):
            self.wrong(key, "must be one plain value")
            return None
        return node

    def _text_of(self, node: yaml.Node, key: str) -> str | None:
        line = node.start_mark.line + 1
        if not isinstance(node, yaml.ScalarNode) or node.tag != "tag:yaml.org,2002:str":
            kind = node.tag.rpartition(":")[2]
            self.problems.add(line, f"{self._at(key)}: YAML takes it for a {kind}: write a text, in quotes")
            return None
        if not node.value or not node.value.isprintable():
            self.problems.add(line, f"{self._at(key)}: must be one line of printable text, and not empty")
            return None
        return str(node.value)


def duration(text: str) -> float | None:
    """Seconds, from Prometheus's way of writing them: `30s`, `5m`, `1h30m`, `0`. None where it is none."""
    if text == "0":
        return 0.0
    found = _DURATION.fullmatch(text)
    if found is None or not text:
        return None
    return sum(int(count) * seconds for count, seconds in zip(found.groups(), _UNITS.values(), strict=True) if count)


def url_problem(text: str) -> str | None:
    """What is wrong with an HTTP address; None where nothing is. It is not quoted: it may hold a secret."""
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        return "is no URL"
    if parts.scheme not in ("http", "https"):
        return "must begin with https:// or http://"
    if not host or port == 0 or any(letter.isspace() for letter in text):
        return "is no URL"
    if parts.username is not None or parts.password is not None:
        return "holds credentials: keep those in files"
    return "holds a fragment (#), which is never sent" if parts.fragment else None


def near(word: str, options: Iterable[str]) -> str:
    """The option that was probably meant, as the end of a sentence; empty where none is near."""
    found = difflib.get_close_matches(word, sorted(options), n=1)
    return f"; did you mean {found[0]}?" if found else ""
