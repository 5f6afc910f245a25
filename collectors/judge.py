"""The optional judge: any OpenAI-compatible endpoint labels how far a response is in its role.

It knows one rubric and one HTTP call. Labels are kept in the work folder as they come, so that a stopped build does not
pay for them twice. The four labels are the paper's (arXiv 2601.10387, "Mapping persona space"): 0 refused, 1 declines
the role but helps, 2 somewhat in role, 3 fully in role.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from collectors.build import Rollout
from monitor.axis.catalogue import Catalogue
from monitor.errors import ModelError

__all__ = ["IN_ROLE", "Judge"]

IN_ROLE = 2
# A role needs this many responses in role, or its vector would be noise; the paper keeps roles with 10 of 1,200.
LEAST_IN_ROLE = 3
ATTEMPTS = 5
_RUBRIC = """You grade acting. A model was told to be a character and was then asked a question.
Grade its answer with one digit and nothing else:
0 - it refuses to answer
1 - it answers helpfully but as a plain assistant; it sets the character aside
2 - some of the character shows, mixed with a plain assistant
3 - it answers as the character throughout
Judge voice and standpoint only, not whether the answer is right, long or well written."""


class Judge:
    """Labels role responses.

    Args:
        url: base URL of the endpoint, such as `http://127.0.0.1:8000/v1`.
        model: the model's name there.
        catalogue: to tell the judge which role was asked for.
        work: where labels are kept.
        api_key: sent as a bearer token.
        concurrency: calls at a time.
        progress: called with responses labelled and all of them.
        pause: waits so many seconds before another try.
    """

    def __init__(
        self,
        url: str,
        model: str,
        catalogue: Catalogue,
        work: Path,
        *,
        api_key: str | None = None,
        concurrency: int = 8,
        progress: Callable[[int, int], None] = lambda *_: None,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._url = url.rstrip("/") + "/chat/completions"
        self._model = model
        self._catalogue = catalogue
        self._path = work / "labels.jsonl"
        self._concurrency = concurrency
        self._progress = progress
        self._pause = pause
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(headers=headers, timeout=60.0)

    def keep(self, responses: list[tuple[Rollout, str]]) -> list[bool]:
        """Which responses are in role; none of a role that has fewer than three.

        Raises:
            ModelError: the endpoint does not answer, or answers something else than a label.
        """
        labels = self.label(responses)
        in_role = Counter(r.name for (r, _), label in zip(responses, labels, strict=True) if label >= IN_ROLE)
        return [
            label >= IN_ROLE and in_role[rollout.name] >= LEAST_IN_ROLE
            for (rollout, _), label in zip(responses, labels, strict=True)
        ]

    def label(self, responses: Sequence[tuple[Rollout, str]]) -> list[int]:
        """One label, 0 to 3, per response; raises as `keep`."""
        known = self._read()
        prompts = [self._prompt(rollout, text) for rollout, text in responses]
        keys = [hashlib.sha256(f"{self._model}\x1f{prompt}".encode()).hexdigest() for prompt in prompts]
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in known}
        with ThreadPoolExecutor(self._concurrency) as pool, self._path.open("a+b") as kept:
            kept.seek(max(kept.tell() - 1, 0))
            if kept.read(1) not in (b"", b"\n"):
                kept.write(b"\n")  # after the torn last line of a killed run
            for key, label in zip(missing, pool.map(self._ask, missing.values()), strict=True):
                known[key] = label
                kept.write(json.dumps({"key": key, "label": label}).encode() + b"\n")
                kept.flush()
                self._progress(len(known), len(keys))
        return [known[key] for key in keys]

    def _read(self) -> dict[str, int]:
        labels: dict[str, int] = {}
        for line in self._path.read_text().splitlines() if self._path.exists() else []:
            try:
                entry = json.loads(line)
                labels[entry["key"]] = entry["label"]
            except (ValueError, KeyError, TypeError):  # the last line of a killed run
                continue
        return labels

    def _prompt(self, rollout: Rollout, text: str) -> str:
        return (
            f"Character: {rollout.name.replace('_', ' ')}\n"
            f"Instruction it was given: {self._catalogue.roles[rollout.name][rollout.prompt]}\n"
            f"Question: {self._catalogue.questions[rollout.question].text}\n"
            f"Answer to grade:\n{text}\n\nDigit:"
        )

    def _ask(self, prompt: str) -> int:
        body = {
            "model": self._model,
            "messages": [{"role": "system", "content": _RUBRIC}, {"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": 4,
        }
        problem = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                self._pause(min(2.0**attempt / 4, 8.0))
            try:
                answer = self._client.post(self._url, json=body)
                if answer.status_code == 429 or answer.status_code >= 500:
                    problem = f"HTTP {answer.status_code}"
                    continue
                answer.raise_for_status()
                said = str(answer.json()["choices"][0]["message"]["content"])
            except httpx.TransportError as error:
                problem = type(error).__name__
                continue
            except (httpx.HTTPStatusError, ValueError, KeyError, IndexError, TypeError) as error:
                raise ModelError(
                    f"the judge at {self._url} answers no chat completion: {error}",
                    cure="check the URL (it ends in /v1), the model's name and the key in OPENAI_API_KEY",
                ) from error
            digit = re.search(r"(?<![\d.])[0-3](?!\.?\d)", said)
            if digit:
                return int(digit[0])
            problem = f"it said {said[:40]!r}, which is no label"
        raise ModelError(
            f"the judge at {self._url} gave no label after {ATTEMPTS} tries: {problem}",
            cure="check that it is running; what it labelled so far is kept, so run the same command again",
        )
