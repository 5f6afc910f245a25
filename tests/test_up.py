"""Promises of `anchorwatch up`: one command, one process, and none of its parts dies alone."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from service import message, projection
from tiny import environment

from monitor.store.sqlite import SqliteStore
from monitor.stream.log import PROJECTIONS, EmbeddedLog

ROOT = Path(__file__).parent.parent


@contextmanager
def up(folder: Path, **settings: str) -> Iterator[subprocess.Popen[str]]:
    given = {"DATA_DIR": str(folder), "API_PORT": "0", **settings}
    process = subprocess.Popen(
        [sys.executable, "-m", "monitor", "up"],
        cwd=ROOT,
        env=environment(**{f"ANCHORWATCH_{name}": value for name, value in given.items()}),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def page_of(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("The page:"):
            return line.split()[-1]
    raise AssertionError("it has ended")


def told(process: subprocess.Popen[str]) -> str:
    """All that it says, once it has ended by itself."""
    assert process.stderr is not None
    text = process.stderr.read()
    assert process.wait(30) == 2
    return text


def eventually(done: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not done():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.1)


def shown(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return "harbour" in answer.read().decode()
    except urllib.error.HTTPError:
        return False


def test_what_is_published_is_on_the_page_and_sigterm_ends_it_all(tmp_path: Path) -> None:
    with up(tmp_path) as process:
        page = page_of(process)
        log = EmbeddedLog(tmp_path / "log.db")
        log.append(PROJECTIONS, [message(projection("harbour", turn)) for turn in range(3)])
        eventually(lambda: shown(page + "sessions/harbour"))
        log.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    store = SqliteStore(tmp_path / "store.db")
    assert sum(store.counts().values()) == 3
    store.close()


def test_when_one_part_ends_all_do_and_its_error_is_told(tmp_path: Path) -> None:
    for name in ("one", "other"):
        with up(tmp_path / name) as process:
            page_of(process)
            log = EmbeddedLog(tmp_path / name / "log.db")
            log.append(PROJECTIONS, [message(projection("harbour", turn)) for turn in range(3)])
            log.close()
            store = SqliteStore(tmp_path / name / "store.db")
            eventually(lambda store=store: sum(store.counts().values()) == 3)
            store.close()
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
    # A store that was folded from another log: the worker refuses it, and must not leave the page behind.
    (tmp_path / "other" / "store.db").replace(tmp_path / "one" / "store.db")
    with up(tmp_path / "one") as process:
        text = told(process)
    assert "another log" in text and "cure:" in text and "Traceback" not in text


def test_wrong_rules_and_a_port_that_is_taken_are_told_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "alerts.yaml").write_text("route: {receiver: nobody}\nreceivers: []\n")
    with up(tmp_path, ALERTS_FILE=str(tmp_path / "alerts.yaml")) as process:
        text = told(process)
    assert "nobody" in text and "cure:" in text and "Traceback" not in text
    with socket.create_server(("127.0.0.1", 0)) as taken, up(tmp_path, API_PORT=str(taken.getsockname()[1])) as process:
        text = told(process)
    assert "can't listen" in text and "cure:" in text


def test_without_keys_only_this_machine_is_served(tmp_path: Path) -> None:
    with up(tmp_path, API_HOST="0.0.0.0") as process:
        text = told(process)
    assert "there are no keys" in text and "cure:" in text
