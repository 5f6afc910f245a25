"""The judge, against a real HTTP server: its labels are kept, its troubles are told, and it is never asked twice."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tiny import small_catalogue

from collectors.build import Rollout
from collectors.judge import ATTEMPTS, Judge
from monitor.errors import ModelError

Answer = tuple[int, Any]
CATALOGUE = small_catalogue()


def completion(text: Any) -> Answer:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


def by_digit(prompt: str) -> Answer:
    """Labels a response with the digit that it ends in."""
    return completion(prompt.split("Answer to grade:\n")[1].split("\n")[0][-1])


class Endpoint:
    """A chat completion server that notes what it was asked; `answer` may be changed while it runs."""

    def __init__(self) -> None:
        self.answer: Callable[[str], Answer] = by_digit
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.asked.append({"path": self.path, **body})
                endpoint.headers.append(dict(self.headers))
                status, content = endpoint.answer(body["messages"][-1]["content"])
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    running = Endpoint()
    yield running
    running.close()


def responses(*texts: str, role: str = "pirate") -> list[tuple[Rollout, str]]:
    return [(Rollout("role", role, "make", i % 5, i), text) for i, text in enumerate(texts)]


def judge(endpoint: Endpoint | str, work: Path, **options: Any) -> tuple[Judge, list[float]]:
    """A judge that notes its pauses instead of making them."""
    pauses: list[float] = []
    url = endpoint if isinstance(endpoint, str) else endpoint.url
    return Judge(url, "grader", CATALOGUE, work, pause=pauses.append, **options), pauses


def test_each_response_gets_its_own_label_in_order(endpoint: Endpoint, tmp_path: Path) -> None:
    labels = judge(endpoint, tmp_path)[0].label(responses("arr 3", "no 0", "hm 2", "well 1", "ahoy 3"))
    assert labels == [3, 0, 2, 1, 3]
    (first, *_) = sorted(endpoint.asked, key=lambda body: str(body["messages"][-1]["content"]))
    assert first["path"] == "/v1/chat/completions"
    assert first["model"] == "grader" and first["temperature"] == 0


def test_it_is_told_role_instruction_question_and_answer(endpoint: Endpoint, tmp_path: Path) -> None:
    judge(endpoint, tmp_path)[0].label([(Rollout("role", "witch", "make", 2, 1), "cackle 3")])
    asked = endpoint.asked[0]["messages"][-1]["content"]
    assert CATALOGUE.roles["witch"][2] in asked and CATALOGUE.questions[1].text in asked and "cackle 3" in asked


def test_responses_in_role_are_kept_and_roles_with_fewer_than_three_lost(endpoint: Endpoint, tmp_path: Path) -> None:
    pirates = responses("a 3", "b 2", "c 1", "d 3", "e 0")
    witches = responses("a 3", "b 3", "c 1", role="witch")
    assert judge(endpoint, tmp_path)[0].keep([*pirates, *witches]) == [
        *(True, True, False, True, False),
        *(False, False, False),
    ]


@pytest.mark.parametrize(
    ("said", "label"), [("3", 3), (" 2\n", 2), ("Digit: 1", 1), ("0.", 0), ("**3** - fully", 3), ("2 (of 3)", 2)]
)
def test_a_label_is_found_in_what_a_judge_may_say(endpoint: Endpoint, tmp_path: Path, said: str, label: int) -> None:
    endpoint.answer = lambda _: completion(said)
    assert judge(endpoint, tmp_path)[0].label(responses("x")) == [label]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_endpoint_is_asked_again_after_a_growing_pause(endpoint: Endpoint, tmp_path: Path, status: int) -> None:
    answers = iter([(status, {}), (status, {}), completion("3")])
    endpoint.answer = lambda _: next(answers)
    asking, pauses = judge(endpoint, tmp_path)
    assert asking.label(responses("x")) == [3]
    assert len(endpoint.asked) == 3
    assert pauses == sorted(pauses) and len(pauses) == 2 and 0 < pauses[0] < pauses[1]


@pytest.mark.parametrize("said", ["no idea", "7", "10", "2.5", "", None])
def test_what_is_no_label_is_never_taken_for_one(endpoint: Endpoint, tmp_path: Path, said: str | None) -> None:
    endpoint.answer = lambda _: completion(said)
    with pytest.raises(ModelError, match="no label") as caught:
        judge(endpoint, tmp_path)[0].label(responses("x"))
    assert len(endpoint.asked) == ATTEMPTS
    assert "run the same command again" in caught.value.cure


@pytest.mark.parametrize(
    "answer",
    [
        (200, b"<html>not JSON</html>"),
        (200, {"choices": []}),
        (200, {"error": "x"}),
        (200, ["x"]),
        (401, {}),
        (404, {}),
    ],
)
def test_something_else_than_a_chat_completion_is_told_at_once(
    endpoint: Endpoint, tmp_path: Path, answer: Answer
) -> None:
    endpoint.answer = lambda _: answer
    with pytest.raises(ModelError, match="no chat completion") as caught:
        judge(endpoint, tmp_path)[0].label(responses("x"))
    assert len(endpoint.asked) == 1
    assert "OPENAI_API_KEY" in caught.value.cure


def test_an_endpoint_that_is_down_is_told_with_the_cure(tmp_path: Path) -> None:
    gone = Endpoint()
    gone.close()
    asking, pauses = judge(gone, tmp_path)
    with pytest.raises(ModelError, match="ConnectError") as caught:
        asking.label(responses("x"))
    assert len(pauses) == ATTEMPTS - 1
    assert "running" in caught.value.cure


def test_what_was_labelled_is_never_asked_again(endpoint: Endpoint, tmp_path: Path) -> None:
    all_of_them = responses(*(f"text {i} {i % 4}" for i in range(10)))
    judge(endpoint, tmp_path)[0].label(all_of_them[:6])
    assert len(endpoint.asked) == 6
    assert judge(endpoint, tmp_path)[0].label(all_of_them) == [i % 4 for i in range(10)]
    assert len(endpoint.asked) == 10
    endpoint.close()
    assert judge(endpoint, tmp_path)[0].label(all_of_them) == [i % 4 for i in range(10)]


def test_labels_survive_an_endpoint_that_dies_on_the_way(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.answer = lambda prompt: (400, {}) if "text 5" in prompt else by_digit(prompt)
    all_of_them = responses(*(f"text {i} {i % 4}" for i in range(8)))
    with pytest.raises(ModelError):
        judge(endpoint, tmp_path, concurrency=1)[0].label(all_of_them)
    before = len(endpoint.asked)
    endpoint.answer = by_digit
    assert judge(endpoint, tmp_path, concurrency=1)[0].label(all_of_them) == [i % 4 for i in range(8)]
    assert {body["messages"][-1]["content"] for body in endpoint.asked[before:]}.isdisjoint(
        body["messages"][-1]["content"] for body in endpoint.asked[:5]
    )


def test_a_torn_or_foreign_line_costs_one_label_and_no_other(endpoint: Endpoint, tmp_path: Path) -> None:
    asked = responses("a 1", "b 2", "c 3")
    judge(endpoint, tmp_path)[0].label(asked)
    path = tmp_path / "labels.jsonl"
    path.write_bytes(b"[1]\nnull\n" + path.read_bytes()[:-9])  # the last line was being written when it was killed
    assert judge(endpoint, tmp_path)[0].label(asked) == [1, 2, 3]
    assert len(endpoint.asked) == 4
    assert judge(endpoint, tmp_path)[0].label(asked) == [1, 2, 3]
    assert len(endpoint.asked) == 4  # and what was asked anew did not vanish behind the torn line


def test_another_judge_gives_its_own_labels(endpoint: Endpoint, tmp_path: Path) -> None:
    judge(endpoint, tmp_path)[0].label(responses("a 1"))
    Judge(endpoint.url, "another", CATALOGUE, tmp_path).label(responses("a 1"))
    assert [body["model"] for body in endpoint.asked] == ["grader", "another"]


def test_the_key_is_sent_as_a_bearer_token_and_only_where_there_is_one(endpoint: Endpoint, tmp_path: Path) -> None:
    judge(endpoint, tmp_path, api_key="sk-secret")[0].label(responses("a 1"))
    judge(endpoint, tmp_path)[0].label(responses("b 1"))
    assert [headers.get("Authorization") for headers in endpoint.headers] == ["Bearer sk-secret", None]
    assert "sk-secret" not in (tmp_path / "labels.jsonl").read_text()


def test_progress_is_told_label_by_label(endpoint: Endpoint, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    judge(endpoint, tmp_path, progress=lambda done, total: seen.append((done, total)))[0].label(
        responses("a 1", "b 2", "c 3")
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_calls_are_made_at_the_same_time_up_to_the_limit(endpoint: Endpoint, tmp_path: Path) -> None:
    """All four callers must be waiting at once, or none of them gets on."""
    together = threading.Barrier(4, timeout=30)

    def answer(prompt: str) -> Answer:
        together.wait()
        return by_digit(prompt)

    endpoint.answer = answer
    assert judge(endpoint, tmp_path, concurrency=4)[0].label(responses("a 1", "b 2", "c 3", "d 0")) == [1, 2, 3, 0]
