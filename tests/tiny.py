"""What a build in miniature is made with: a small catalogue, small settings, short scripts, a clean environment."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from monitor.axis.bundle import Bundle
from monitor.axis.catalogue import Catalogue, Question, StyleRequest

HERE = Path(__file__).parent
IMPORTABLE = os.pathsep.join([str(HERE), str(HERE.parent)])  # for subprocesses
ROLES = ("ghost", "hermit", "keeper", "king", "pirate", "poet", "robot", "witch")


def environment(**more: str) -> dict[str, str]:
    """For a subprocess: this checkout, no hub, no terminal, and no setting but those given."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ANCHORWATCH_")}
    return {
        **kept,
        "PYTHONPATH": IMPORTABLE,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
        "TERM": "dumb",
        **more,
    }


def here(*arguments: object, **settings: str) -> subprocess.CompletedProcess[str]:
    """A command line in this process, which has torch already: one of its own takes seconds to import it.

    For what depends on no signal, no standard input and no error on the way out.
    """
    from typer.testing import CliRunner

    from monitor.__main__ import app

    words = [str(argument) for argument in arguments]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "200", "TERM": "dumb", **settings}, catch_exceptions=False)
    return subprocess.CompletedProcess(words, done.exit_code, done.stdout, done.stderr)


def small_catalogue() -> Catalogue:
    return Catalogue(
        roles={
            role: tuple(f"You are {start} {role}." for start in ("a", "the", "an old", "a young", "the last"))
            for role in ROLES
        },
        questions=(
            *(Question("sea", f"What of {thing}?") for thing in ("gulls", "ships", "hours", "lamps", "books", "nets")),
            *(Question("self", f"Do you {verb}?") for verb in ("sleep", "sing", "count", "fear", "know", "write")),
        ),
        styles=tuple(
            StyleRequest(style, f"{ask} {thing}.")
            for style, ask in (("poem", "A poem on"), ("chat", "Let us talk of"))
            for thing in ("rain", "tea", "cats", "snow")
        ),
        defaults=(None, "", "Be helpful."),
        version="tiny",
    )


@dataclass(frozen=True)
class Built:
    """A finished build: where its shards lie, what was collected, the bundle, its evidence, and where it was saved."""

    work: Path
    rollouts: Any
    bundle: Bundle
    responses: dict[str, np.ndarray]
    directory: Path


def small_settings(**changes: Any) -> Any:
    from collectors.build import BuildSettings

    return BuildSettings(
        **{
            "tokens": 8,
            "batch_size": 6,
            "round_rollouts": 2,
            "max_rollouts": 6,
            "default_repeats": 1,
            "style_repeats": 1,
            "settled": 0.9,
            **changes,
        }
    )


def small_scripts() -> list[Any]:
    from collectors.traffic import DRIFTING, HEALTHY, Script

    return [
        Script(id=f"{kind}-{n}", kind=kind, topic=f"{kind} {n}", turns=tuple(f"Turn {i} {kind}." for i in range(2 + n)))
        for kind in (*HEALTHY, *DRIFTING)
        for n in range(2 if kind == "slow_drift" else 1, 4 if kind == "slow_drift" else 3)
    ]
