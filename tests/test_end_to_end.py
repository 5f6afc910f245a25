"""The whole way, every part real: a model drifts while it speaks, somebody is told, it comes back, and they are told.

Model → tap → log → `anchorwatch up` → Alertmanager and a signed webhook; Prometheus looks on.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from receiver import Received, Receiver
from servers import Server, amtool, free_port
from standardwebhooks import Webhook

from collectors.models import load_model
from collectors.publish import open_publisher
from collectors.traffic import load_scripts
from collectors.watch import watch
from monitor import connect
from monitor.axis.bundle import load_bundle, resolve_bundle
from monitor.settings import load_settings

ROOT = Path(__file__).parent.parent
SECRETS = ["whsec_" + b64encode(bytes([letter]) * 32).decode() for letter in b"ab"]
TALK = "the witch of the marsh"
# After the role-play, what an Assistant is for.
TASKS = (
    "Thank you, that was fun. Now something else: what is 15 percent of 80?",
    "How do I sort a list in Python?",
    "What is the difference between TCP and UDP?",
    "Write a short professional email that asks for a meeting on Tuesday.",
    "How do I convert 5 miles to kilometres?",
    "List three steps to back up a laptop.",
    "What does HTTP status 404 mean?",
    "How do I remove duplicates from a spreadsheet column?",
    "Explain in one sentence what a database index is.",
    "What is the capital of Australia?",
    "How do I undo the last commit in git?",
    "What is the boiling point of water in Fahrenheit?",
)
RULES = """
external_url: http://127.0.0.1:{page}
route:
  receiver: ops
  group_by: ['...']
  group_wait: 0s
  group_interval: 1s
receivers:
  - name: ops
    webhook_configs:
      - url: {webhook}/hook
        secret_files: [{secrets}]
        allow_private: true
    alertmanager_configs:
      - url: http://{alertmanager}
        allow_private: true
"""
SCRAPES = """
global: {{scrape_interval: 1s}}
scrape_configs:
  - job_name: anchorwatch
    static_configs: [{{targets: ['127.0.0.1:{port}']}}]
"""


def eventually(found: Callable[[], Any], seconds: float = 60.0) -> Any:
    until = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.1)
    return value


@contextmanager
def everything_up(environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "monitor", "up"], env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("The page:"):
                break
        else:
            raise AssertionError("it has ended")
        yield process
    finally:
        process.kill()
        process.wait()


def asked(prometheus: Server, query: str) -> list[Any]:
    url = f"http://{prometheus.address}/api/v1/query?" + urllib.parse.urlencode({"query": query})
    with urllib.request.urlopen(url, timeout=10) as answer:
        found = json.load(answer)["data"]["result"]
    assert isinstance(found, list)
    return found


def genuine(request: Received, secret: str) -> Any:
    """The body, once the library that receivers use has checked who sent it."""
    return Webhook(secret).verify(request.body, request.headers)


@pytest.mark.slow
def test_a_drifting_conversation_is_told_and_so_is_its_recovery(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own_alertmanager: Server,
    own_prometheus: Callable[[str], Server],
    receiver: Receiver,
) -> None:
    page, metrics = free_port(), free_port()
    for number, secret in enumerate(SECRETS):
        (tmp_path / f"secret{number}").write_text(secret)
        (tmp_path / f"secret{number}").chmod(0o600)
    rules = RULES.format(
        page=page,
        webhook=receiver.url,
        alertmanager=own_alertmanager.address,
        secrets=", ".join(str(tmp_path / f"secret{number}") for number in range(2)),
    )
    (tmp_path / "alerts.yaml").write_text(rules)
    for name, value in {
        "DATA_DIR": str(tmp_path / "data"),
        "ALERTS_FILE": str(tmp_path / "alerts.yaml"),
        "API_PORT": str(page),
        "METRICS_PORT": str(metrics),
        "LOG_LEVEL": "warning",
    }.items():
        monkeypatch.setenv(f"ANCHORWATCH_{name}", value)
    prometheus = own_prometheus(SCRAPES.format(port=metrics))
    loaded = load_model("smollm2")
    bundle = load_bundle(resolve_bundle("smollm2"))
    (script,) = [one for one in load_scripts("demo") if one.id == "role_play-02"]
    settings = load_settings()
    with everything_up(dict(os.environ)) as process:
        log, store = connect.log(settings), connect.store(settings)
        messages: list[dict[str, str]] = []

        def say(text: str) -> None:
            """One more turn, answered by the model and measured on the way."""
            messages.append({"role": "user", "content": text})
            prompt = loaded.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            with watched.identify(conversation_id=TALK, turn=len(messages) // 2):
                made = loaded.model.generate(**prompt, max_new_tokens=32, do_sample=False)
            reply = loaded.tokenizer.decode(made[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
            messages.append({"role": "assistant", "content": reply})

        def session() -> Any:
            """What the page would show of it, once its last response has been folded."""
            found = eventually(lambda: store.session(TALK))
            return found if found.turn == len(messages) // 2 - 1 else None

        with (
            open_publisher(log, settings) as publisher,
            watch(loaded.model, loaded.tokenizer, bundle, publisher) as watched,
        ):
            # In shadow: it drifts, and nobody is told.
            say(script.turns[0])
            episode = eventually(session).episode_id
            assert episode is not None
            eventually(lambda: store.actions(f"alert/{episode}"))
            assert not receiver.received
            enable = [
                sys.executable,
                "-m",
                "monitor",
                "alerts",
                "enable",
                "--conversations-per-day",
                "100",
                "--by",
                "me",
                "--yes",
            ]
            live = subprocess.run(enable, cwd=ROOT, capture_output=True, text=True)
            assert live.returncode == 0, live.stderr

            (first, *_) = receiver.wait(1)
            for secret in SECRETS:  # while one is rotated, whoever has the other still believes it
                body = genuine(first, secret)
            assert (body["version"], body["status"]) == ("4", "firing")
            (alert,) = body["alerts"]
            assert alert["labels"]["conversation_id"] == TALK and alert["labels"]["episode_id"] == episode
            assert alert["generatorURL"] == f"http://127.0.0.1:{page}/sessions/{urllib.parse.quote(TALK, safe='')}"
            shown = eventually(lambda: json.loads(amtool(own_alertmanager, "alert", "query", "-o", "json")))
            assert [one["labels"]["episode_id"] for one in shown] == [episode]
            assert eventually(lambda: asked(prometheus, 'sum(anchorwatch_findings_total{severity!="info"}) > 0'))

            for turn in script.turns[1:3]:
                say(turn)
            for task in TASKS:
                if eventually(session).episode_id is None:
                    break
                say(task)
            assert session().episode_id is None, "the model did not come back"

        def resolved() -> Any:
            return [
                body for body in (genuine(one, SECRETS[0]) for one in receiver.received) if body["status"] == "resolved"
            ]

        (end,) = eventually(resolved)
        assert [one["labels"]["episode_id"] for one in end["alerts"]] == [episode]
        assert end["alerts"][0]["endsAt"] > alert["startsAt"]
        eventually(lambda: json.loads(amtool(own_alertmanager, "alert", "query", "-o", "json")) == [])
        with urllib.request.urlopen(f"http://127.0.0.1:{page}/sessions/{urllib.parse.quote(TALK, safe='')}") as answer:
            assert TALK in answer.read().decode()
        log.close()
        store.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
