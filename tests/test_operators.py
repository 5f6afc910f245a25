"""Promises of the operators' commands: each does what it says, now and after a wipe, and shows no content unasked."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog
import typer
from service import CONFIG, POISON, message, projection
from typer.testing import CliRunner, Result

from monitor import connect, telemetry
from monitor.actions import Acknowledgement, ActionsFold, Silence, append_action, body_of, read_actions
from monitor.backtest import read_verdicts
from monitor.database import sqlite_url
from monitor.deadletters import plain
from monitor.errors import AnchorwatchError
from monitor.operators import mount
from monitor.settings import PREFIX
from monitor.store.sqlite import SqliteStore
from monitor.stream.log import DEAD_LETTERS, PROJECTIONS, EmbeddedLog, Message
from monitor.worker import Worker

COMMANDS = [
    ["doctor"],
    ["forget"],
    ["acknowledge"],
    ["resolve"],
    ["verdict"],
    ["verdicts"],
    *(["silence", name] for name in ("add", "list", "end")),
    *(["dead-letters", name] for name in ("list", "show", "requeue")),
    *(["calibration", name] for name in ("show", "activate")),
]
ESCAPE = "\x1b[31mred"

app = typer.Typer()
mount(app)


class Installation:
    """Log and store in one folder, named by the environment, as the commands find them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.log = EmbeddedLog(folder / "log.db")
        self.store = SqliteStore(folder / "store.db")
        self._monkeypatch = monkeypatch
        monkeypatch.setenv("ANCHORWATCH_DATA_DIR", str(folder))

    def anchorwatch(self, *arguments: object) -> Result:
        return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})

    def says(self, *arguments: object) -> Any:
        """The JSON object that a command prints; it must not fail."""
        done = self.anchorwatch(*arguments, "--json")
        assert done.exit_code == 0, (done.output, done.exception)
        return json.loads(done.stdout)

    def refuses(self, *arguments: object) -> str:
        done = self.anchorwatch(*arguments)
        assert isinstance(done.exception, AnchorwatchError), done.output
        assert done.exception.cure
        return str(done.exception)

    def talk(self, conversation: str, *values: float, first: int = 0) -> None:
        events = [projection(conversation, first + number, value) for number, value in enumerate(values)]
        self.log.append(PROJECTIONS, [message(event) for event in events])

    def work(self) -> None:
        worker = Worker(self.log, self.store, CONFIG)
        while worker.run_once() or worker.run_once():
            pass

    def wipe(self) -> None:
        """The store begins anew, in another file."""
        self.store.close()
        path = self.folder / "anew.db"
        self.store = SqliteStore(path)
        self._monkeypatch.setenv("ANCHORWATCH_STORE_URL", sqlite_url(path))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installation]:
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)
    telemetry.configure_logging("error")  # as the front door does: log lines go to standard error
    made = Installation(tmp_path, monkeypatch)
    yield made
    structlog.reset_defaults()
    made.log.close()
    made.store.close()


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(command: list[str]) -> None:
    done = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200"})
    assert done.exit_code == 0 and "Usage:" in done.output


@pytest.mark.parametrize(
    "command",
    [
        ["forget", "c"],
        ["acknowledge", "f"],
        ["resolve", "a"],
        ["verdict", "c", "healthy"],
        ["silence", "add", "--for", "1h", "--everything"],
        ["silence", "end", "abc"],
        ["dead-letters", "requeue", "x/0/1"],
        ["calibration", "activate", "smollm2"],
    ],
    ids=" ".join,
)
def test_whoever_does_something_says_who_they_are(here: Installation, command: list[str]) -> None:
    done = here.anchorwatch(*command)
    assert done.exit_code == 2 and "--by" in done.output
    assert not read_actions(here.log)


# Conversations and findings


def test_a_conversation_is_forgotten_at_once_or_as_soon_as_it_is_folded(here: Installation) -> None:
    here.talk("c", 0.0, -5.0)
    here.work()
    assert here.says("forget", "c", "--by", "ann")["done"] is True
    assert here.store.session("c") is None
    here.talk("d", 0.0)
    done = here.says("forget", "d", "--by", "ann")
    assert (done["done"], done["partition"], done["offset"]) == (False, 0, 3)
    here.work()
    ActionsFold(here.log, here.store).run_once()
    assert here.store.session("d") is None


def test_what_was_said_comes_back_after_a_wipe(here: Installation) -> None:
    here.talk("c", -5.0)
    here.work()
    (found,) = here.store.findings(9)
    here.anchorwatch("acknowledge", found.id, "--by", "ann", "--note", "seen")
    here.anchorwatch("verdict", "c", "drifting", "--turn", "0", "--by", "bob")
    before = here.store.actions("")
    here.wipe()
    ActionsFold(here.log, here.store).run_once()
    assert here.store.actions("") == before and len(before) == 2
    assert b'"by":"ann"' in before[f"acknowledge/{found.id}"]


def test_an_acknowledgement_of_what_nobody_knows_is_kept_and_told(here: Installation) -> None:
    done = here.anchorwatch("acknowledge", "typo", "--by", "ann")
    assert done.exit_code == 0 and "has this id" in done.stderr
    here.anchorwatch("acknowledge", "typo", "--by", "ann", "--withdraw")
    assert not read_actions(here.log)


def test_verdicts_are_printed_as_the_backtest_reads_them(here: Installation) -> None:
    here.anchorwatch("verdict", "a,1", "drifting", "--turn", "3", "--by", "ann")
    here.anchorwatch("verdict", "b", "healthy", "--by", "ann")
    here.anchorwatch("verdict", "c", "unsure", "--by", "ann")
    here.anchorwatch("verdict", "d", "healthy", "--by", "ann")
    here.anchorwatch("verdict", "d", "healthy", "--by", "ann", "--withdraw")
    done = here.anchorwatch("verdicts")
    assert [row[0] for row in csv.reader(io.StringIO(done.stdout))] == ["conversation_id", "a,1", "b", "c"]
    path = here.folder / "verdicts.csv"
    path.write_text(done.stdout)
    labels = read_verdicts(path)
    assert labels["c"] is None and labels["b"] is not None and not labels["b"].drifting
    assert labels["a,1"] is not None and (labels["a,1"].drifting, labels["a,1"].turn) == (True, 3)
    assert "--turn" in here.refuses("verdict", "c", "healthy", "--turn", "3", "--by", "ann")


def test_an_alert_is_resolved_and_a_typo_is_told(here: Installation) -> None:
    done = here.anchorwatch("resolve", "e1", "--by", "ann", "--note", "rolled back")
    assert done.exit_code == 0 and "no alert has this id" in done.stderr
    body = body_of("resolve/e1", here.store.actions("resolve/")["resolve/e1"])
    assert body == Acknowledgement("rolled back")


def test_a_silence_is_added_listed_and_ended(here: Installation) -> None:
    added = here.anchorwatch("silence", "add", "--for", "2h", "--deployment", "shop", "--by", "ann")
    name = added.stdout.strip()
    assert added.exit_code == 0 and f"silence end {name}" in added.stderr
    listed = here.says("silence", "list")
    assert listed[name]["deployment"] == "shop" and listed[name]["by"] == "ann"
    body = body_of(f"silence/{name}", here.store.actions("silence/")[f"silence/{name}"])
    assert isinstance(body, Silence) and body.kind is None
    append_action(here.log, "silence", "over", Silence("2026-01-01T00:00:00Z"), by="ann")
    assert list(here.says("silence", "list")) == [name]
    assert here.anchorwatch("silence", "end", name, "--by", "bob").exit_code == 0
    assert here.says("silence", "list") == {}
    assert here.says("silence", "list", "--all")[name]["by"] == "bob"
    assert "is over since" in here.refuses("silence", "end", name, "--by", "bob")
    assert "no silence" in here.refuses("silence", "end", "other", "--by", "bob")


def test_a_silence_speaks_alertmanagers_words(here: Installation) -> None:
    arguments = ["--match", 'model=~"llama.*",severity!=critical', "--match", "persona=pirate"]
    added = here.anchorwatch("silence", "add", "--for", "2h", "--by", "ann", "--note", "a test", *arguments)
    name = added.stdout.strip()
    body = body_of(f"silence/{name}", here.store.actions("silence/")[f"silence/{name}"])
    assert isinstance(body, Silence)
    matching = {"model": "llama-3", "severity": "warning", "persona": "pirate"}
    assert body.mutes(matching) and body.mutes({**matching, "deployment": "shop"})
    for other in ({"model": "a llama"}, {"severity": "critical"}, {"persona": ""}):
        assert not body.mutes({**matching, **other})
    shown = here.anchorwatch("silence", "list").stdout
    assert 'model=~"llama.*", severity!="critical", persona="pirate"' in shown and "ann  a test" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--for", "2h"], "not clear what"),
        (["--for", "2h", "--everything", "--kind", "dip"], "not clear what"),
        (["--for", "2h", "--kind", "dips"], "no finding is of kind"),
        (["--for", "2h", "--everything", "--match", "kind=dip"], "not clear what"),
        (["--for", "2h", "--match", "kind=~(dip"], "bad regular expression"),
        (["--for", "2h", "--match", "kind"], "no operator after"),
        (["--for", "two hours", "--everything"], "no length of time"),
        (["--for", "0m", "--everything"], "no length of time"),
    ],
)
def test_a_silence_that_is_not_clear_is_refused(here: Installation, arguments: list[str], said: str) -> None:
    assert said in here.refuses("silence", "add", "--by", "ann", *arguments)
    assert not read_actions(here.log)


def test_while_the_store_is_away_what_is_done_is_written_and_told(
    here: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANCHORWATCH_STORE_URL", "sqlite:///dev/null/store.db")
    done = here.anchorwatch("verdict", "c", "healthy", "--by", "ann")
    assert done.exit_code == 0 and "takes effect when" in done.stderr
    done = here.anchorwatch("forget", "c", "--by", "ann")
    assert done.exit_code == 0 and "Written." in done.stdout
    assert {key.partition("/")[0] for key in read_actions(here.log)} == {"verdict", "forget"}


# Dead letters


def poisoned(here: Installation, conversation: str = "c") -> str:
    """A response that a broken release can't fold; its error quotes the record."""
    here.talk(conversation, 0.0)

    def broken(*arguments: object) -> None:
        raise ValueError("SECRET")

    Worker(here.log, here.store, CONFIG, fold=broken).run_once()  # type: ignore[arg-type]
    return f"{PROJECTIONS}/0/0"


def test_letters_are_listed_shown_and_sent_again(here: Installation) -> None:
    letter = poisoned(here)
    listed = here.says("dead-letters", "list")
    assert listed["reasons"] == {"fold_failed": 1} and listed["letters"][0]["letter"] == letter
    assert here.says("dead-letters", "list", "--reason", "other")["letters"] == []
    assert here.says("dead-letters", "requeue", letter, "--by", "ann") == {"requeued": [letter], "refused": {}}
    assert here.says("dead-letters", "show", letter)["requeued"]["by"] == "ann"
    again = here.anchorwatch("dead-letters", "requeue", letter, "--by", "bob")
    assert again.exit_code == 1 and "ann" in again.stderr and "--again" in again.stderr
    assert here.says("dead-letters", "requeue", "--reason", "fold_failed", "--by", "bob")["requeued"] == []
    here.work()
    session = here.store.session("c")
    assert session and session.responses == 1


def test_content_is_shown_on_demand_only(here: Installation) -> None:
    letter = poisoned(here)
    for arguments in (["list"], ["list", "--json"], ["show", letter], ["show", letter, "--json"]):
        done = here.anchorwatch("dead-letters", *arguments)
        assert "SECRET" not in done.output and "assistant_axis" not in done.output
    raw = here.says("dead-letters", "show", letter, "--raw")
    assert "SECRET" in raw["detail"] and "assistant_axis" in raw["value"]


def test_nothing_from_outside_reaches_the_terminal_unescaped(here: Installation) -> None:
    bad = f"{ESCAPE}/0/7"
    here.log.append(
        DEAD_LETTERS,
        [
            Message(
                bad,
                ESCAPE.encode() + b"\xff\n",
                tuple((name, ESCAPE.encode()) for name in ("reason", "detail", "key")),
            )
        ],
    )
    for arguments in (
        ["dead-letters", "list"],
        ["dead-letters", "show", bad],
        ["dead-letters", "show", bad, "--raw"],
        ["dead-letters", "requeue", bad, "--by", "ann"],
    ):
        done = here.anchorwatch(*arguments)
        assert done.exit_code == 0 and "\x1b" not in done.output, arguments
        assert "\\x1b[31mred" in done.output or "requeue" in arguments
    assert "\x1b" not in here.refuses("dead-letters", "show", "\x1b[1m")


def test_the_bytes_go_into_a_new_file_as_they_are(here: Installation) -> None:
    value = bytes(range(256))
    here.log.append(DEAD_LETTERS, [Message("t/0/1", value, (("reason", b"undecodable"), ("key", b"c")))])
    path = here.folder / "bytes"
    assert here.anchorwatch("dead-letters", "show", "t/0/1", "--out", path).exit_code == 0
    assert path.read_bytes() == value and path.stat().st_mode & 0o777 == 0o600
    assert "File exists" in here.refuses("dead-letters", "show", "t/0/1", "--out", path)


def test_letters_that_are_not_there_are_told_before_anything_is_sent(here: Installation) -> None:
    letter = poisoned(here)
    assert "t/0/9" in here.refuses("dead-letters", "requeue", letter, "t/0/9", "--by", "ann")
    assert "not clear" in here.refuses("dead-letters", "requeue", "--by", "ann")
    assert "not clear" in here.refuses("dead-letters", "requeue", letter, "--reason", "x", "--by", "ann")
    assert here.log.span(PROJECTIONS, 0).end == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [("é ü 漢 🙂", "é ü 漢 🙂"), ("a\nb", "a\\nb"), ("\x1b]0;x\x07", "\\x1b]0;x\\x07"), ("\u202eabc", "\\u202eabc")],
)
def test_plain_text_has_no_control_characters(text: str, expected: str) -> None:
    assert plain(text) == expected


# Calibrations


def test_a_calibration_is_activated_and_shown_before_and_after_it_is_folded(here: Installation) -> None:
    other = msgspec.structs.replace(CONFIG, release_turns=3)
    file = here.folder / "other.json"
    file.write_bytes(other.to_json())
    here.talk("c", 0.0)
    here.work()
    done = here.says("calibration", "activate", file, "--by", "ann")
    assert done == {"config_id": other.config_id, "offsets": {"0": 1}}
    (row,) = here.says("calibration", "show")
    assert row == {"partition": 0, "in_force": CONFIG.config_id, "offset": 1, "ahead": {"1": other.config_id}}
    here.talk("c", 0.0, first=1)
    here.work()
    (row,) = here.says("calibration", "show")
    assert row == {"partition": 0, "in_force": other.config_id, "offset": 3, "ahead": {}}
    assert other.config_id in here.anchorwatch("calibration", "show").stdout


def test_a_calibration_of_another_axis_is_refused_unless_it_is_meant(here: Installation) -> None:
    """Responses of the old axis would be stored unjudged: detection would end without a word."""
    here.says("calibration", "activate", "smollm2", "--by", "ann")
    shipped = connect.calibration("smollm2")
    baselines = {name: msgspec.structs.replace(one, axis_id="another") for name, one in shipped.baselines.items()}
    file = here.folder / "another.json"
    file.write_bytes(msgspec.structs.replace(shipped, axis_id="another", baselines=baselines).to_json())
    end = here.log.span(PROJECTIONS, 0).end
    assert "another axis" in here.refuses("calibration", "activate", file, "--by", "ann")
    assert here.log.span(PROJECTIONS, 0).end == end
    assert here.says("calibration", "activate", file, "--by", "ann", "--new-axis")["offsets"] == {"0": end}


def test_a_calibration_that_is_not_there_changes_nothing(here: Installation) -> None:
    assert "can't be read" in here.refuses("calibration", "activate", here.folder / "no.json", "--by", "ann")
    assert not read_actions(here.log) and here.log.span(PROJECTIONS, 0).end == 0


# The doctor


def checks(here: Installation, *arguments: object, code: int | None = None) -> dict[str, list[tuple[str, str, str]]]:
    """Check name → status, what it says and the cure."""
    done = here.anchorwatch("doctor", "--patience", "0.05", *arguments, "--json")
    told = json.loads(done.stdout)
    assert done.exit_code == (1 if told["status"] == "broken" else 0) and (code is None or done.exit_code == code)
    found: dict[str, list[tuple[str, str, str]]] = {}
    for one in told["checks"]:
        assert one["status"] == "ok" or one["cure"], one
        found.setdefault(one["name"], []).append((one["status"], one["says"], one["cure"]))
    return found


def calibrated(here: Installation) -> str:
    file = here.folder / "calibration.json"
    file.write_bytes(CONFIG.to_json())
    return str(file)


def status(found: dict[str, list[tuple[str, str, str]]], name: str) -> str:
    return next((one for one in ("broken", "advice") if any(row[0] == one for row in found[name])), "ok")


def test_a_healthy_installation_is_all_ok_but_for_what_was_never_set_up(here: Installation) -> None:
    here.talk("c", 0.0, 0.0)
    here.work()
    found = checks(here, "--bundle", calibrated(here), code=0)
    assert {name for name in found if status(found, name) != "ok"} == {"secrets", "bundle"}
    assert "uncertified" in found["bundle"][0][1] or "no budget" in found["bundle"][0][1]
    text = here.anchorwatch("doctor", "--bundle", calibrated(here)).stdout
    assert "ok" in text and "cure:" in text


def test_the_shipped_bundle_is_ok(here: Installation) -> None:
    assert status(checks(here), "bundle") == "ok"


def test_every_wrong_setting_is_told_at_once(here: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANCHORWATCH_BATCH_SIZE", "0")
    monkeypatch.setenv("ANCHORWATCH_LOG_URL", "ftp://x")
    monkeypatch.setenv("ANCHORWATCH_TYPO", "1")
    ((told, says, _),) = checks(here, code=1)["settings"]
    assert told == "broken" and all(name in says for name in ("BATCH_SIZE", "LOG_URL", "TYPO"))


def lags(here: Installation) -> None:
    here.talk("c", 0.0, 0.0, 0.0)


def paused(here: Installation) -> None:
    here.log.append(PROJECTIONS, [Message("c", POISON)] * 40)
    worker = Worker(here.log, here.store, CONFIG)
    worker.run_once()
    assert worker.paused


def overtaken(here: Installation) -> None:
    here.talk("c", 0.0)
    here.work()
    here.talk("c", 0.0, 0.0, 0.0, first=1)
    here.log.retain(PROJECTIONS, records=1)


def other_axis(here: Installation) -> None:
    event = msgspec.structs.replace(projection("c", 0), axis_id="another")
    here.log.append(PROJECTIONS, [message(event)])
    here.work()


def from_the_future(here: Installation) -> None:
    here.log.append(PROJECTIONS, [message(msgspec.structs.replace(projection("c", 0), time="2099-01-01T00:00:00Z"))])
    here.work()


def key_for_all(here: Installation) -> None:
    path = here.folder / "installation.key"
    path.write_text("0" * 64)
    path.chmod(0o644)


def untold(here: Installation) -> None:
    here.talk("c", -9.0)
    store, here.store = here.store, SqliteStore(here.folder / "store.db", clock=lambda: 1000.0)
    here.work()
    here.store.close()
    here.store = store


def not_taken_in(here: Installation) -> None:
    from monitor.actions import Acknowledgement, append_action

    append_action(here.log, "acknowledge", "f", Acknowledgement(), by="ann")


def still_to_forget(here: Installation) -> None:
    here.talk("c", 0.0)
    here.anchorwatch("forget", "c", "--by", "ann")


@pytest.mark.parametrize(
    ("fault", "name", "expected", "said"),
    [
        (lags, "partitions", "broken", "start a worker"),
        (paused, "partitions", "broken", "poison"),
        (paused, "dead letters", "advice", "undecodable"),
        (overtaken, "partitions", "broken", "retention has overtaken"),
        (other_axis, "traffic", "advice", "another axis"),
        (from_the_future, "clock", "advice", "in the future"),
        (key_for_all, "secrets", "broken", "chmod 600"),
        (untold, "outbox", "advice", "dispatch"),
        (not_taken_in, "actions", "advice", "not in the store yet"),
        (still_to_forget, "actions", "advice", "to be forgotten"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_each_fault_is_found_and_has_a_cure(
    here: Installation, fault: Callable[[Installation], None], name: str, expected: str, said: str
) -> None:
    fault(here)
    found = checks(here, "--bundle", calibrated(here))
    assert status(found, name) == expected, found[name]
    assert any(said in says + cure for told, says, cure in found[name] if told == expected), found[name]


def test_a_store_that_is_away_hides_nothing_else(here: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    key_for_all(here)
    path = here.folder / "garbage.db"
    path.write_bytes(b"no database" * 100)
    monkeypatch.setenv("ANCHORWATCH_STORE_URL", sqlite_url(path))
    found = checks(here, code=1)
    assert status(found, "store") == status(found, "secrets") == "broken" and status(found, "log") == "ok"


def test_where_nothing_was_ever_started_nothing_is_made(
    here: Installation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ANCHORWATCH_DATA_DIR", str(tmp_path / "new"))
    found = checks(here, code=0)
    assert status(found, "log") == status(found, "store") == "advice" and not (tmp_path / "new").exists()


def test_a_bundle_that_is_not_there_is_told(here: Installation) -> None:
    assert status(checks(here, "--bundle", here.folder / "none", code=1), "bundle") == "broken"


def test_another_calibration_than_the_given_one_is_told(here: Installation) -> None:
    here.talk("c", 0.0)
    here.work()
    found = checks(here)
    assert status(found, "calibration") == "advice" and CONFIG.config_id in found["calibration"][0][1]


def test_the_doctor_changes_nothing(here: Installation) -> None:
    paused(here)
    before = {path.name: path.read_bytes() for path in here.folder.glob("*.db")}
    checks(here)
    assert {path.name: path.read_bytes() for path in here.folder.glob("*.db")} == before
    assert not (here.folder / "installation.key").exists()


def test_a_check_that_fails_itself_is_told_and_hides_no_other(
    here: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    from monitor import doctor

    def fails(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(doctor, "_spool", fails)
    found = checks(here, code=1)
    assert "ZeroDivisionError" in found["spool"][0][1] and "store" in found
