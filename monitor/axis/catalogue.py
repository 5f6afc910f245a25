"""The catalogue: who the model is asked to be, what it is asked, and how both are divided so that no figure flatters.

It knows nothing of models or activations. One directory of four JSON files:

::

    roles.json        {role: [five system prompts]}
    questions.json    [{"topic", "text"}], asked of every role and of the default Assistant
    styles.json       [{"style", "text"}], healthy requests that move a response without moving the persona
    defaults.json     [neutral system prompts]

Roles, number of prompts and number of questions follow arXiv 2601.10387; every word here is our own.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import Struct

from monitor.errors import CatalogueError

__all__ = ["Catalogue", "Part", "Question", "StyleRequest", "load_catalogue", "split"]

PROMPTS_PER_ROLE = 5
FEWEST = 3  # of roles and of questions: one for each part of a split
SHIPPED = Path(__file__).parent / "data" / "catalogue"
CURE = "mend the files in the catalogue's directory; monitor/axis/data/catalogue is one that is right"

T = TypeVar("T")
Part = Literal["make", "choose", "report"]
PARTS: tuple[Part, Part, Part] = ("make", "choose", "report")


class Question(Struct, frozen=True):
    """A question that every role answers."""

    topic: str
    text: str


class StyleRequest(Struct, frozen=True):
    """A request that the default Assistant answers, as itself, in some style."""

    style: str
    text: str


class Catalogue(Struct, frozen=True, kw_only=True):
    """Roles, questions and requests, checked.

    Attributes:
        roles: five system prompts by role.
        questions: asked of every role and of the default Assistant.
        styles: requests by style.
        defaults: system prompts under which the model is the default Assistant: None is no system message at all, ""
            an empty one. They are two cases: some chat templates put a system message of their own where there is
            none (SmolLM2's says "You are a helpful AI assistant named SmolLM"), and an empty one prevents that.
        version: first 16 hex digits of the sha256 over the content; the order of roles does not matter to it.
    """

    roles: dict[str, tuple[str, ...]]
    questions: tuple[Question, ...]
    styles: tuple[StyleRequest, ...]
    defaults: tuple[str | None, ...]
    version: str


def load_catalogue(directory: Path | None = None) -> Catalogue:
    """Read and check a catalogue; without a directory, the one that comes with Anchorwatch.

    Raises:
        CatalogueError: a file is missing or malformed, or a prompt is missing or repeated; all problems at once.
    """
    root = SHIPPED if directory is None else directory
    problems: list[str] = []
    roles = _read(root / "roles.json", dict[str, tuple[str, ...]], problems)
    questions = _read(root / "questions.json", tuple[Question, ...], problems)
    styles = _read(root / "styles.json", tuple[StyleRequest, ...], problems)
    neutral = _read(root / "defaults.json", tuple[str, ...], problems)
    problems += _problems(roles, questions, styles, neutral)
    if problems or roles is None or questions is None or styles is None or neutral is None:
        raise CatalogueError(f"the catalogue in {root} is not right: " + "; ".join(problems), cure=CURE)
    roles = {role: roles[role] for role in sorted(roles)}
    content = {"roles": roles, "questions": questions, "styles": styles, "defaults": neutral}
    version = hashlib.sha256(msgspec.json.encode(content, order="sorted")).hexdigest()[:16]
    return Catalogue(roles=roles, questions=questions, styles=styles, defaults=(None, "", *neutral), version=version)


def split(names: Iterable[str], seed: int, shares: tuple[int, int, int] = (2, 1, 1)) -> dict[str, Part]:
    """Divide names: an axis is made on the first part, its layer chosen on the second, figures reported on the third.

    Names are ranked by the sha256 of seed and name and cut at the exact shares, so the answer depends on the set of
    names and the seed alone. Sorted by name.

    Raises:
        CatalogueError: a name repeats, or a part with a share would be empty.
    """
    listed = list(names)
    if repeated := _repeated(listed):
        raise CatalogueError(f"can't split names that repeat: {', '.join(repeated)}", cure="name each one once")
    ranked = sorted(listed, key=lambda name: hashlib.sha256(f"{seed}\x1f{name}".encode()).digest())
    cuts = [0, *(len(ranked) * share // sum(shares) for share in accumulate(shares))]
    parts = {part: ranked[start:end] for part, start, end in zip(PARTS, cuts, cuts[1:], strict=False)}
    if empty := [part for part, share in zip(PARTS, shares, strict=True) if share and not parts[part]]:
        raise CatalogueError(
            f"{len(ranked)} names are too few for shares {shares}: nothing to {' or '.join(empty)}",
            cure="give more names, or shares that are nearer to each other",
        )
    return dict(sorted((name, part) for part in PARTS for name in parts[part]))


def _read(path: Path, kind: type[T], problems: list[str]) -> T | None:
    """The file's content, or None with the reason added to `problems`."""
    repeated: list[str] = []

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated.extend(_repeated(key for key, _ in pairs))
        return dict(pairs)

    try:
        content = msgspec.convert(json.loads(path.read_bytes(), object_pairs_hook=once), kind)
    except OSError as error:
        problems.append(f"can't read {path.name}: {error.strerror}")
        return None
    except (ValueError, RecursionError) as error:  # a msgspec.ValidationError is a ValueError
        problems.append(f"{path.name}: {error}")
        return None
    # JSON readers keep the last of two equal keys: a role pasted twice would lose its first prompts in silence.
    problems.extend(f"{path.name} names {key!r} twice" for key in repeated)
    return content


def _problems(
    roles: Mapping[str, tuple[str, ...]] | None,
    questions: tuple[Question, ...] | None,
    styles: tuple[StyleRequest, ...] | None,
    neutral: tuple[str, ...] | None,
) -> list[str]:
    """What is wrong with the files that could be read; None is one that could not."""
    problems = [
        f"{what}: {len(found)}, needed are at least {fewest}"
        for what, found, fewest in [
            ("roles", roles, FEWEST),
            ("questions", questions, FEWEST),
            ("style requests", styles, 1),
            ("defaults", neutral, 1),
        ]
        if found is not None and len(found) < fewest
    ]
    problems += [
        f"role {role!r} has {len(prompts)} prompts, not {PROMPTS_PER_ROLE}"
        for role, prompts in (roles or {}).items()
        if len(prompts) != PROMPTS_PER_ROLE
    ]
    prompts = [prompt for several in (roles or {}).values() for prompt in several]
    # Together: a request that were both would stand on both sides of what the style directions tell apart.
    asked = [question.text for question in questions or ()] + [request.text for request in styles or ()]
    labels = [*(roles or {}), *(q.topic for q in questions or ()), *(r.style for r in styles or ())]
    for what, texts in [("prompts", prompts), ("questions and style requests", asked), ("defaults", neutral or ())]:
        problems += [f"{what} repeat {text!r}" for text in _repeated(_plain(text) for text in texts)]
    if not all(_plain(text) for text in (*prompts, *asked, *(neutral or ()), *labels)):
        problems.append("a name, prompt or question is empty")
    return problems


def _plain(text: str) -> str:
    """Text as it is compared: two prompts that differ in case or white space are one prompt."""
    return " ".join(text.casefold().split())


def _repeated(items: Iterable[str]) -> list[str]:
    return sorted(item for item, count in Counter(items).items() if count > 1)
