"""What the page's tests share: a real log and store with sessions of every sort, and the page served from them."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from msgspec.structs import replace
from service import CONFIG, message, projection

from monitor.actions import Acknowledgement, ActionsFold, Body, Kind, Silence, append_action, body_of, read_actions
from monitor.alert import Alert
from monitor.api.app import create_app
from monitor.api.auth import Keys, create_key
from monitor.api.page import Links, mount_page
from monitor.api.server import listen, serving
from monitor.api.views import address, moment
from monitor.events import Finding, Projection
from monitor.store import Backend
from monitor.store.sqlite import SqliteStore
from monitor.store.store import ClosedMinutes, Session
from monitor.stream.log import PROJECTIONS, EmbeddedLog
from monitor.worker import Worker

START = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
NOW = START + 600.0
SECRET = b"the same in every replica"
LINKS = Links(
    conversation_url="https://logs.example/c/{conversation_id}", runbook_url="https://runbooks.example/{kind}"
)
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "javascript:alert(1)",
    "</style><style>*{display:none}</style>",
    "\u202egnp.exe\u202c שלום عربى",
    "bell\x07 \x1b[31mred\x1b[0m\nline\u2028\u0000",
    "zero\u200bwidth\ufeff\u2066isolate",
    "a/b/../c",
    "/v1/sessions//x/",
    "per%2Fcent%25 +&?#;=",
    "?done=acknowledged#top",
    ".",
    "..",
    "x" * 256,
    "字" * 256,
    "🏴‍☠️ pirate नमस्ते",
)


def drifting(name: str, turns: int = 8, slope: float = -0.8, **changes: Any) -> list[Projection]:
    """A conversation that falls, by as much each turn."""
    return [_reply(name, turn, slope * turn, changes) for turn in range(turns)]


def steady(name: str, value: float = 0.0, turns: int = 4, **changes: Any) -> list[Projection]:
    """One that stays where it is."""
    return [_reply(name, turn, value, changes) for turn in range(turns)]


def _reply(name: str, turn: int, value: float, changes: dict[str, Any]) -> Projection:
    made = projection(name, turn, value, resent=f"{hashlib.sha256(name.encode()).hexdigest()}#{turn}")
    return replace(made, **changes)


class Desk:
    """Log, store, keys and the page's address; the clock stands at `now`."""

    def __init__(self, folder: Path, store: Backend | None = None) -> None:
        self.folder = folder
        self.log = EmbeddedLog(folder / "log.db")
        self.store = store or SqliteStore(folder / "store.db")
        self.now = NOW
        self.url = ""
        self.tokens: dict[str, str] = {}

    def fold(self, events: list[Projection]) -> None:
        """Through the log, by a real worker."""
        self.log.append(PROJECTIONS, [message(event) for event in events])
        worker = Worker(self.log, self.store, CONFIG, wall_clock=lambda: self.now)
        while worker.run_once():
            pass

    def act(self, kind: Kind, name: str, body: Body, by: str = "ana") -> None:
        append_action(self.log, kind, name, body, by=by)
        while ActionsFold(self.log, self.store).run_once():
            pass

    def acted(self) -> dict[str, Body]:
        """Every action that is in the log, by key."""
        return {key: body_of(key, value) for key, value in read_actions(self.log).items()}

    def session(self, name: str) -> Session:
        found = self.store.session(name)
        assert found is not None
        return found

    def alert(self, name: str, **changes: Any) -> Alert:
        """The alert of a session's open episode, as a dispatcher writes it down."""
        session = self.session(name)
        assert session.episode_id and session.kind and session.severity
        made = Alert(
            id=session.episode_id,
            conversation_id=name,
            deployment=session.deployment,
            model=session.model,
            axis_id=session.axis_id,
            config_id=CONFIG.config_id,
            kind=session.kind,
            persona="ghost",
            severity=session.severity,
            starts_at=moment(START),
            accepted=START,
            changed=START,
            finding_ids=("f",),
            turn=session.turn,
            statistic="level",
            value=2.5,
            boundary=2.0,
            risk=session.risk or 0.0,
            certification="certified",
            nearest_roles=("ghost", "hermit", "<b>bard</b>", "leviathan"),
        )
        return replace(made, **changes)

    @contextmanager
    def visitor(self, scope: str | None = None) -> Iterator[httpx.Client]:
        """A browser that has shown a key, or none where keys are not asked for."""
        with httpx.Client(base_url=self.url, timeout=30) as client:
            if scope is not None:
                answer = client.post("/login", data={"key": self.tokens[scope], "next": "/"})
                assert answer.status_code == 303, answer.text
            yield client


@contextmanager
def served(folder: Path, *, keys: bool, store: Backend | None = None, links: Links = LINKS) -> Iterator[Desk]:
    """The page over an empty log and store."""
    desk = Desk(folder, store)
    file = folder / "api-keys.json"
    if keys:
        scopes = {"read": ["read"], "act": ["read", "act"], "ingest": ["ingest"]}
        desk.tokens = {name: create_key(file, f"{name}'s key", some) for name, some in scopes.items()}
    app = create_app(desk.log, desk.store, Keys(file, open_without=True))
    mount_page(app, desk.log, desk.store, secret=SECRET, links=links, clock=lambda: desk.now)
    listener = listen("127.0.0.1", 0)
    desk.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        with serving(app, listener, threading.Event()):
            yield desk
    finally:
        desk.log.close()
        desk.store.close()


def furnish(desk: Desk) -> None:
    """Sessions of every sort, an alert, a verdict's worth of hostile names, and silences."""
    desk.fold(
        drifting("falls-far", 10)
        + drifting("falls", 6)
        + drifting("seen", 7)
        + drifting("resolved", 7)
        + steady("calm")
        + steady("close", -1.0)
        + steady("learning", deployment="new", model="other")
        + [one for name in HOSTILE for one in drifting(name, 5)]
        + steady("hostile deployment", deployment=HOSTILE[1], model=HOSTILE[6])
    )
    desk.act(
        "alert", desk.session("falls-far").episode_id or "", desk.alert("falls-far", told={"ops/slack[0]": "critical"})
    )
    desk.act("acknowledge", desk.session("seen").episode_id or "", Acknowledgement("on it"))
    desk.act("resolve", desk.session("resolved").episode_id or "", Acknowledgement())
    shift = projection("x", 10)
    found = Finding(
        id="shift",
        time=shift.time,
        conversation_id="",
        turn=0,
        deployment=HOSTILE[1],
        axis_id=shift.axis_id,
        kind="fleet_shift",
        severity="warning",
        statistic="mean",
        value=-1.0,
        boundary=0.2,
        risk=5.0,
        budget=None,
        certification="uncertified",
        config_id=CONFIG.config_id,
        episode_id="shift",
    )
    desk.store.close_minutes(None, ClosedMinutes(1, [], {}), [found])
    desk.act("silence", "quiet", Silence(moment(NOW + 3600), deployment="shop", note=HOSTILE[0]))


__all__ = ["BROWSER", "FLAGS", "HOSTILE", "NOW", "Desk", "address", "drifting", "furnish", "served", "steady"]
