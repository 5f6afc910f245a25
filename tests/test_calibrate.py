"""What a bundle is calibrated on: exactly the scripts' conversations, and a baseline that does not flatter itself."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_budget import AXIS, DEPLOYMENT, traffic

from collectors.calibrate import calibrate_bundle, played, read_conversations, script_id, talks_of, write_conversations
from collectors.traffic import Script
from collectors.traits import held_out_values
from collectors.witness import Residual
from monitor.axis.readout import Readout
from monitor.detect.baseline import fit_baseline, moved
from monitor.errors import CatalogueError, ConfigurationError

pytest_plugins = ["miniature"]

SCRIPTS = [
    Script(id="a", kind="small_talk", topic="tea", turns=("Hi", "And you?"), family="tea"),
    Script(id="b", kind="role_play", topic="sea", turns=("Be the sea.",), family="sea"),
]
SAID = {
    "a": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "And you?"},
        {"role": "assistant", "content": "Fine."},
    ],
    "b": [{"role": "user", "content": "Be the sea."}, {"role": "assistant", "content": "I am deep."}],
    "b.1": [{"role": "user", "content": "Be the sea."}, {"role": "assistant", "content": "Waves."}],
}


def test_conversations_are_kept_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "said.jsonl.gz"
    write_conversations(path, SCRIPTS, SAID, "model")
    read = read_conversations(path, SCRIPTS, "model")
    assert {one.origin.conversation_id: list(one.messages) for one in read} == SAID
    assert {one.origin.deployment for one in read} == {"model"}
    before = path.read_bytes()
    write_conversations(path, SCRIPTS, SAID, "model")
    assert path.read_bytes() == before
    rows = [json.loads(line) for line in gzip.decompress(before).splitlines()]
    assert [(row["kind"], row["family"]) for row in rows] == [(s.kind, s.family) for s in (*SCRIPTS, SCRIPTS[1])]


def test_an_empty_reply_is_no_other_script(tmp_path: Path) -> None:
    said = {**SAID, "a": [*SAID["a"][:1], {"role": "assistant", "content": ""}, *SAID["a"][2:]]}
    write_conversations(tmp_path / "said.jsonl.gz", SCRIPTS, said, "model")
    assert len(read_conversations(tmp_path / "said.jsonl.gz", SCRIPTS, "model")) == 3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"b": None, "b.1": None}, "b"),
        ({"a": [{"role": "user", "content": "Hello"}, *SAID["a"][1:]]}, "a"),
        ({"c": SAID["b"]}, "c"),
    ],
    ids=["missing", "other words", "unknown"],
)
def test_what_is_not_the_scripts_is_refused(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    said = {id: messages for id, messages in {**SAID, **change}.items() if messages is not None}
    unknown = Script(id="c", kind="small_talk", topic="", turns=("x",))
    write_conversations(tmp_path / "said.jsonl.gz", [*SCRIPTS, unknown], said, "model")
    with pytest.raises(CatalogueError, match=rf"as they are: {named}") as caught:
        read_conversations(tmp_path / "said.jsonl.gz", SCRIPTS, "model")
    assert caught.value.cure


@given(st.text(min_size=1, max_size=8), st.integers(1, 9))
def test_a_sample_knows_its_script(name: str, sample: int) -> None:
    assert script_id(name, {name}) == name
    assert script_id(f"{name}.{sample}", {name}) == name


def test_plays_of_one_script_differ_and_repeat(loaded: Any) -> None:
    said = played(loaded, SCRIPTS, samples=2, tokens=6)
    assert set(said) == {"a", "a.1", "b", "b.1"}
    assert said["a"] != said["a.1"]
    assert played(loaded, SCRIPTS, samples=2, tokens=6) == said
    assert {id: said[id] for id in ("a", "b")} == played(loaded, SCRIPTS, tokens=6)


# The baseline


def test_a_readout_flatters_what_it_learned_from_and_held_out_values_do_not() -> None:
    random = np.random.default_rng(2)
    ids = [f"{kind}{n}" for kind in ("task", "play") for n in range(20)]
    residuals = [Residual(id, turn, *random.normal(size=(2, 150))) for id in ids for turn in range(2)]
    kinds = {id: "bounded_task" if id.startswith("task") else "role_play" for id in ids}
    families = {id: f"family {i % 10}" for i, id in enumerate(ids)}
    values = held_out_values(residuals, kinds, families, {})
    assert set(values) == set(ids) and all(len(row) == 2 for row in values.values())
    # Pure noise: what did not learn from a reply sees no difference; what did sees one.
    healthy, drifting = (
        np.concatenate([values[id] for id in ids if kinds[id] == k]) for k in ("bounded_task", "role_play")
    )
    assert abs(healthy.mean() - drifting.mean()) < 3 * np.hypot(healthy.std(), drifting.std()) / np.sqrt(40)


@given(st.floats(-5, 5), st.floats(0.2, 5))
def test_a_moved_baseline_moves_its_windows_with_it(shift: float, stretch: float) -> None:
    talks = traffic(1, 30)
    fitted = fit_baseline(DEPLOYMENT, AXIS, talks, Readout(coordinates={"a": 1.0}))
    unseen = [[stretch * event.projection + shift for event in talk] for talk in talks]
    found = moved(fitted, unseen)
    assert found.mean == pytest.approx(stretch * fitted.mean + shift)
    assert found.standard_deviation == pytest.approx(stretch * fitted.standard_deviation)
    assert found.window_mean - found.mean == pytest.approx(stretch * (fitted.window_mean - fitted.mean), abs=1e-9)
    assert found.window_standard_deviation == pytest.approx(stretch * fitted.window_standard_deviation)
    same = moved(fitted, [[event.projection for event in talk] for talk in talks])
    assert same.mean == pytest.approx(fitted.mean) and same.window_mean == pytest.approx(fitted.window_mean)


def test_a_bundle_without_a_readout_or_conversations_is_refused(built: Any) -> None:
    talks = talks_of([event for talk in traffic(1, 4) for event in talk])
    assert len(talks) == 4
    with pytest.raises(ConfigurationError, match="no readout"):
        calibrate_bundle(built.bundle, {"small_talk": talks}, talks)
