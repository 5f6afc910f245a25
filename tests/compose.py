"""What the tests know of docker-compose.yml and the Dockerfile: where they are, and what an image starts with."""

from __future__ import annotations

import json
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
COMPOSE_FILE = ROOT / "docker-compose.yml"
_CONFIGURATION = {"ENTRYPOINT", "CMD", "USER", "STOPSIGNAL", "WORKDIR"}


class Dockerfile(NamedTuple):
    """Attributes:
    bases: each stage and what it begins from, in order; build arguments filled in.
    stages: what each stage says of the image: ENTRYPOINT, CMD, USER, STOPSIGNAL, WORKDIR, and ENV as a dict.
    runs: the RUN lines.
    copied: what is copied from the build's context.
    """

    bases: list[tuple[str, str]]
    stages: dict[str, dict[str, Any]]
    runs: list[str]
    copied: list[str]


@cache
def dockerfile() -> Dockerfile:
    """The Dockerfile, read: only the forms that it uses."""
    text = "\n".join(line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    read = Dockerfile([], {}, [], [])
    arguments: dict[str, str] = {}
    name = ""
    for line in text.replace("\\\n", " ").splitlines():
        word, _, rest = line.partition(" ")
        rest = " ".join(rest.split())
        if word == "ARG":
            arguments.setdefault(*rest.partition("=")[::2])
        elif word == "FROM":
            image, _, name = rest.partition(" AS ")
            image = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], image)
            read.bases.append((name, image))
            read.stages[name] = {"ENV": {}}
        elif word == "ENV":
            read.stages[name]["ENV"] |= dict(pair.split("=", 1) for pair in shlex.split(rest))
        elif word == "RUN":
            read.runs.append(rest)
        elif word == "COPY" and not rest.startswith("--from="):
            read.copied.extend(rest.split()[:-1])
        elif word in _CONFIGURATION:
            read.stages[name][word] = json.loads(rest) if rest.startswith("[") else rest
    return read


def stage(name: str) -> dict[str, Any]:
    """What a stage's image starts with, its base stages' own included."""
    base = dict(dockerfile().bases)[name]
    below = stage(base) if base in dockerfile().stages else {"ENV": {}}
    own = dockerfile().stages[name]
    return {**below, **own, "ENV": {**below["ENV"], **own["ENV"]}}
