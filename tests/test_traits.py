"""The traits learn from what the model did, keep the user's pull out of it, and become measured directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import Built

from collectors.logs import Logged
from collectors.models import LoadedModel
from collectors.traits import PROMPT, REPLY, drifted_turns, label_of, learn_traits, read_labels, weights_of
from collectors.witness import Residual, Witness
from monitor.axis.geometry import auroc
from monitor.errors import CatalogueError, ConfigurationError
from monitor.origin import Origin

pytest_plugins = ["miniature"]

KINDS = {"task": "bounded_task", "poem": "creative_writing", "play": "role_play", "slow": "slow_drift"}


def residuals(
    hidden: int, count: int = 40, *, departs: bool = True
) -> tuple[list[Residual], dict[tuple[str, int], int]]:
    """Feature 0 of the reply: departed; feature 1 of the prompt: pulled at; feature 2 of the reply: a poem."""
    random = np.random.default_rng(3)
    found, labels = [], {}
    for kind in KINDS:
        for turn in range(count):
            reply, prompt = random.normal(size=(2, hidden)).astype(np.float32)
            pulled = kind in ("play", "slow")
            departed = pulled and turn % 2 == 0
            reply[0] -= 4.0 * departed
            prompt[1] -= 4.0 * pulled
            reply[2] += 5.0 * (kind == "poem")
            found.append(Residual(kind, turn, reply, prompt))
            labels[kind, turn] = 2 if departed else 0
    return found, labels


def test_with_labels_it_reads_the_reply_and_without_them_the_user(built: Built) -> None:
    seen, labels = residuals(built.bundle.info.model.hidden)
    labelled = learn_traits(built.bundle, seen, KINDS, labels)
    blind = learn_traits(built.bundle, seen, KINDS, {})
    shares = []
    for bundle in (labelled, blind):
        names, directions = bundle.directions()
        reply, prompt = (directions[:, names.index(f"trait:{name}")] for name in (REPLY, PROMPT))
        readout = bundle.info.readout
        assert readout is not None
        weights = readout.coordinates[f"trait:{REPLY}"], readout.prompt[f"trait:{PROMPT}"]
        assert min(*weights, reply[0], prompt[1]) > 0  # high is the Assistant
        shares.append(reply[0] * weights[0] / (prompt[1] * weights[1]))
        if bundle is labelled:
            assert abs(reply[2]) < 0.3 * reply[0]  # a poem is no evidence
    assert shares[0] > 1.5 * shares[1]


def test_the_bundle_measures_them_and_is_another_one(built: Built) -> None:
    learned = learn_traits(built.bundle, *_arguments(built))
    names, directions = learned.directions()
    assert {f"trait:{REPLY}", f"trait:{PROMPT}"} <= set(names)
    assert np.linalg.norm(directions, axis=0) == pytest.approx(1.0, abs=1e-5)
    assert learned.id != built.bundle.id
    assert learned.info.calibration is None
    again = learn_traits(learned, *_arguments(built))  # learning anew replaces them
    assert again.info.traits == [REPLY, PROMPT] and again.id == learned.id


def _arguments(built: Built) -> tuple[Any, Any, Any]:
    seen, labels = residuals(built.bundle.info.model.hidden)
    return seen, KINDS, labels


def test_in_between_and_unclear_replies_teach_nothing() -> None:
    random = np.random.default_rng(1)
    rows = list(random.normal(size=(60, 4)))
    known = [("bounded_task", 0)] * 20 + [("role_play", 2)] * 20 + [("role_play", 1)] * 10 + [("small_talk", 9)] * 10
    assert weights_of(rows, known) == pytest.approx(weights_of(rows[:40], known[:40]))
    healthy_departures = [*known, *[("bounded_task", 2)] * 5]
    assert weights_of([*rows, *rows[:5]], healthy_departures) == pytest.approx(weights_of(rows[:40], known[:40]))


def test_one_side_only_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="healthy and drifting"):
        weights_of(list(np.random.default_rng(1).normal(size=(10, 3))), [("role_play", 2)] * 10)


def test_without_labels_the_kind_decides_and_slow_drift_begins_late() -> None:
    def known(kind: str, turn: int, labels: Any = {}) -> int | None:  # noqa: B006
        return label_of(Residual(kind, turn, np.zeros(1), np.zeros(1)), KINDS, labels)

    assert [known("task", 0), known("play", 0), known("slow", 2), known("slow", 3)] == [0, 2, None, 2]
    assert known("slow", 0, {("slow", 0): 2}) == 2
    assert known("play", 1, {("play", 0): 0}) == 2
    assert drifted_turns("slow_drift", [1, 2, 3, 4]) == [4]
    assert drifted_turns("therapy", [1, 2]) == [1, 2]


# Residuals of real passes


def test_residuals_are_those_of_a_plain_pass_at_any_layer(loaded: LoadedModel, built: Built) -> None:
    answer = "Two ships, far out."
    messages = ({"role": "user", "content": "Count the ships."}, {"role": "assistant", "content": answer})
    talk = Logged(
        origin=Origin(conversation_id="a", deployment="d", source="s", record=1, turns=1), messages=messages, time=None
    )
    witness = Witness(loaded, built.bundle)
    tokenizer = loaded.tokenizer
    prompt = tokenizer.apply_chat_template(list(messages[:1]), tokenize=False, add_generation_prompt=True)
    start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    said = len(tokenizer(answer, add_special_tokens=False)["input_ids"])
    ids = tokenizer(prompt + answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states = loaded.model(ids, output_hidden_states=True).hidden_states
    for layer in (built.bundle.layer, 0):
        (found,) = witness.residuals([talk], layer)
        oracle = states[layer + 1][0].double().numpy()
        assert found.reply == pytest.approx(oracle[start : start + said].mean(axis=0), abs=1e-4)
        assert found.prompt == pytest.approx(oracle[start - 1], abs=1e-4)
    # And afterwards it measures as before.
    assert witness.score([talk]).projections == Witness(loaded, built.bundle).score([talk]).projections


def test_a_learned_trait_separates_fresh_replies(built: Built) -> None:
    seen, labels = residuals(built.bundle.info.model.hidden)
    learned = learn_traits(built.bundle, seen[::2] + seen[1::4], KINDS, labels)
    names, directions = learned.directions()
    column = directions[:, names.index(f"trait:{REPLY}")]
    fresh = [one for one in seen[3::4] if one.conversation_id in ("play", "slow")] or seen
    values = {0: [], 2: []}
    for one in [*fresh, *seen]:
        values[labels[one.conversation_id, one.turn]].append(float(one.reply @ column))
    assert auroc(np.array(values[0]), np.array(values[2])) > 0.8


# Label files


def test_labels_are_read(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("conversation_id,turn,label\na,0,0\na,1,2\nb,0,9\n")
    assert read_labels(path) == {("a", 0): 0, ("a", 1): 2, ("b", 0): 9}


@pytest.mark.parametrize(
    "text", ["", "conversation_id,turn,label\n", "a,b\n1,2\n", "conversation_id,turn,label\na,x,1\na,0,5\n"]
)
def test_a_wrong_file_is_refused_with_its_lines(tmp_path: Path, text: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(CatalogueError) as caught:
        read_labels(path)
    assert caught.value.cure
    if "5" in text:
        assert "lines 2, 3" in caught.value.problem
    with pytest.raises(CatalogueError, match="can't be read"):
        read_labels(tmp_path / "none.csv")
