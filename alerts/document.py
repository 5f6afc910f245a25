"""A YAML file, read as if an enemy had written it, and its mistakes, each with its line. It knows no key by name.

Nothing in the file is run or expanded: tags, anchors and aliases are refused, as is what is large or deep.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from monitor.errors import ConfigurationError

__all__ = ["Problem", "Problems", "read_document"]

MAX_BYTES = 128 * 1024
MAX_DEPTH = 32
MOST_TOLD = 50  # mistakes

# libyaml reads ten times as fast; it is part of PyYAML's wheels, and not of every build.
Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Problem(NamedTuple):
    """A mistake and its line, from 1; 0 is the file as a whole."""

    line: int
    says: str


class Problems(list[Problem]):
    """All mistakes of a file, and what is no mistake but worth a word."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.advice: list[Problem] = []

    def add(self, line: int, says: str) -> None:
        """One more mistake."""
        self.append(Problem(line, says))

    def refuse(self) -> None:
        """Raises:
        ConfigurationError: if there is any; it tells them all, in order.
        """
        if self:
            told = [f"line {line}: {says}" if line else says for line, says in sorted(set(self))]
            many = f"{len(told)} mistakes" if len(told) > 1 else "a mistake"
            if len(told) > MOST_TOLD:
                told[MOST_TOLD:] = [f"and {len(told) - MOST_TOLD} more"]
            raise ConfigurationError(
                f"{self.path} has {many}:\n  - " + "\n  - ".join(told),
                cure="correct the lines named above; `anchorwatch alerts check FILE` tells when it is right",
            )


def read_document(path: Path) -> tuple[yaml.MappingNode, Problems]:
    """The file's one mapping, and where to tell of its mistakes.

    Raises:
        ConfigurationError: it can't be read, or is no YAML mapping that is plain and small.
    """
    problems = Problems(path)
    root: yaml.Node | None = None
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            problems.add(0, f"it has more than {MAX_BYTES // 1024} KiB")
        else:
            text = data.decode("utf-8-sig")
            _inspect(text, problems)
            if not problems:
                root = yaml.compose(text, Loader=Loader)
    except OSError as error:
        raise ConfigurationError(
            f"{path} can't be read: {error.strerror}", cure="name a YAML file that this user may read"
        ) from error
    except UnicodeDecodeError as error:
        problems.add(data[: error.start].count(b"\n") + 1, "it is not UTF-8")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problems.add(mark.line + 1 if mark else 0, f"no YAML: {error.problem or error.context}")
    except yaml.reader.ReaderError as error:
        problems.add(text[: error.position].count("\n") + 1, "it holds control characters")
    problems.refuse()
    if not isinstance(root, yaml.MappingNode):
        problems.add(root.start_mark.line + 1 if root else 0, "it must hold `name: value` lines, at least a route")
        problems.refuse()
    assert isinstance(root, yaml.MappingNode)
    return root, problems


def _inspect(text: str, problems: Problems) -> None:
    """What no tree is built of."""
    depth = documents = 0
    for event in yaml.parse(text, Loader=Loader):
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents == 2:
                problems.add(line, "a second document: put everything into one")
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            problems.add(line, "anchors (&) and aliases (*) are not taken: write it out, or in quotes")
        elif getattr(event, "tag", None) is not None:
            problems.add(line, "tags (!) are not taken: write a plain value, or in quotes")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                problems.add(line, f"nested more than {MAX_DEPTH} deep")
                return
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
