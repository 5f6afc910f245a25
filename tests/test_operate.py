"""The promise of docs/operate.md: every command in it runs as it stands there, and prints what stands there."""

from __future__ import annotations

import re
import secrets
import shlex
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from service import CONFIG, POISON, message
from test_operators import Installation, here, poisoned  # noqa: F401
from typer.testing import CliRunner

from benchmarks.load import Traffic
from monitor.__main__ import app
from monitor.actions import ActionsFold, Verdict, append_action
from monitor.stream.log import PROJECTIONS, Message
from monitor.worker import Worker

DOCUMENT = Path(__file__).parent.parent / "docs" / "operate.md"
SCENES = re.findall(r"<!-- scene: ([\w-]+) -->\n```console\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
ANYTHING = "…"


def well(house: Installation) -> None:
    key = house.folder / "installation.key"
    key.write_text(secrets.token_hex(32))
    key.chmod(0o600)
    traffic = Traffic(3, findings=0.0)
    house.log.append(PROJECTIONS, [message(event) for event in traffic.responses()])
    Worker(house.log, house.store, traffic.config).run_once()


def lag(house: Installation) -> None:
    house.talk("c-17", 0.0, 0.0, 0.0)


def paused(house: Installation) -> None:
    house.talk("c-17", 0.0, 0.0, 0.0)
    house.log.append(PROJECTIONS, [Message("c-17", POISON)] * 40)
    Worker(house.log, house.store, CONFIG).run_once()


def requeue(house: Installation) -> None:
    poisoned(house, conversation="c-17")


def wiped(house: Installation) -> None:
    house.talk("c-17", 0.0, 0.0, 0.0)
    house.work()
    for name in ("c-1", "c-2"):
        append_action(house.log, "verdict", name, Verdict("healthy"), by="ann")
    house.wipe()


def rebuilt(house: Installation) -> None:
    wiped(house)
    house.work()
    ActionsFold(house.log, house.store).run_once()


def calibration(house: Installation) -> None:
    house.talk("c-17", 0.0, 0.0, 0.0)
    house.work()
    (house.folder / "new.json").write_bytes(msgspec.structs.replace(CONFIG, release_turns=3).to_json())


def folded(house: Installation) -> None:
    lag(house)
    house.work()


def rules(house: Installation) -> None:
    (house.folder / "alerts.yaml").write_text(
        "route: {receiver: ops, routes: [{matchers: [severity=critical], receiver: pager}]}\n"
        "receivers: [{name: ops}, {name: pager, log_configs: [{path: told.jsonl}]}]\n"
    )


def nothing(house: Installation) -> None:
    pass


PREPARED: dict[str, Callable[[Installation], None]] = {
    "well": well,
    "lag": lag,
    "paused": paused,
    "requeue": requeue,
    "wiped": wiped,
    "rebuilt": rebuilt,
    "status": rules,
    "silence": nothing,
    "seen": nothing,
    "calibration": calibration,
    "forget": folded,
    "forget-later": lag,
}


def agrees(expected: str, printed: str) -> bool:
    """Whether the lines are those expected, however wide a table is; the dots stand for anything, also for lines."""
    lines = []
    for line in expected.strip().split("\n"):
        if line == ANYTHING:
            lines.append(r"(?:.*\n)*?")
        else:
            words = (re.escape(word).replace(re.escape(ANYTHING), ".*") for word in line.split())
            lines.append(r"\s*" + r"\s+".join(words) + r"[ \t]*\n")
    return re.fullmatch("".join(lines), printed) is not None


def test_every_scene_of_the_document_is_played() -> None:
    assert [name for name, _ in SCENES] == list(PREPARED)
    assert DOCUMENT.read_text().count("```console") == len(SCENES)


@pytest.mark.parametrize(("name", "text"), SCENES, ids=[name for name, _ in SCENES])
def test_every_command_prints_what_the_document_says(
    name: str,
    text: str,
    here: Installation,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    PREPARED[name](here)
    monkeypatch.chdir(here.folder)
    for part in text.split("$ anchorwatch ")[1:]:
        command, _, expected = part.partition("\n")
        words = shlex.split(command, comments=True)
        if words[0] == "doctor":
            words += ["--patience", "0.05"]
        done = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
        assert agrees(expected, done.output), f"$ anchorwatch {command}\n{done.output}\n{done.exception!r}"
        broken = "broken" in expected or "exit 1" in command
        assert done.exit_code == (1 if broken else 0), (command, done.output)
