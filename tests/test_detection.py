"""The page on detection says what was measured with the bundle that is shipped, on the data that is committed."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks.baselines import Answer, bag_of_words, river_detectors, textbook
from benchmarks.detection import HERE, OURS, PAGE, Truth, _capped, _figures, write_blocks
from collectors.calibrate import read_conversations
from collectors.traffic import DRIFTING, HEALTHY, load_scripts
from collectors.traits import read_labels
from monitor.axis.bundle import load_bundle, resolve_bundle
from monitor.detect.configure import detector_config

# What is committed


def test_the_data_is_what_was_committed_before_the_choice() -> None:
    sums = dict(reversed(line.split()) for line in (HERE / "SHA256SUMS").read_text().splitlines())
    assert set(sums) >= {"test.jsonl.gz", "test_labels.csv", "../../collectors/data/test.json"}
    for name, digest in sums.items():
        assert hashlib.sha256((HERE / name).read_bytes()).hexdigest() == digest, name


@pytest.mark.parametrize("name", ["develop", "develop-again", "calibrate", "test", "capped"])
def test_conversations_are_the_scripts_as_they_are(name: str) -> None:
    split = {"develop-again": "develop", "capped": "test"}.get(name, name)
    scripts = load_scripts(split)
    if name == "capped":
        scripts = [script for script in scripts if script.kind in DRIFTING]
    said = read_conversations(HERE / f"{name}.jsonl.gz", scripts, "smollm2")
    assert len(said) == len(scripts) * (2 if name == "develop-again" else 1)
    assert all(one.messages[-1]["role"] == "assistant" for one in said)


def test_every_test_reply_and_every_drifting_develop_reply_is_labelled() -> None:
    for split, drifting_only in (("test", False), ("develop", True)):
        labels = read_labels(HERE / f"{split}_labels.csv")
        turns = Counter(id.partition(".")[0] for id, _ in labels)
        for script in load_scripts(split):
            if script.kind in DRIFTING or not drifting_only:
                assert turns[script.id] == len(script.turns) * (3 if split == "develop" else 1), script.id


def test_the_page_is_of_the_shipped_bundle() -> None:
    bundle = load_bundle(resolve_bundle("smollm2"))
    page = PAGE.read_text()
    assert f"bundle `{bundle.id[:12]}`, config `{detector_config(bundle).config_id}`" in page
    for name in ("headline", "separation", "alarms", "kinds", "capped", "study", "layers"):
        block = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end -->", page, re.DOTALL)
        assert block is not None and len(block[1].splitlines()) > 5, name
    last = json.loads((HERE / "scorings.jsonl").read_text().splitlines()[-1])
    assert last["bundle"] == bundle.id
    assert last["test_sha256"] == hashlib.sha256((HERE / "test.jsonl.gz").read_bytes()).hexdigest()


def test_the_shipped_calibration_is_certified_at_one_per_cent() -> None:
    boundaries = detector_config(load_bundle(resolve_bundle("smollm2"))).boundaries
    assert (boundaries.certification, boundaries.budget, boundaries.conversations) == ("certified", 0.01, 230)


# The figures themselves, where the truth is planted


KINDS = {f"h{i}": HEALTHY[i % 9] for i in range(45)} | {f"d{i}": DRIFTING[i % 6] for i in range(30)}
DEPARTED = {f"d{i}" for i in range(20)}
LABELS = {(id, turn): 2 if id in DEPARTED and turn >= 2 else 0 for id in KINDS for turn in range(5)}
TRUTH = Truth(KINDS, LABELS, DEPARTED)


def answer(low: float, noise: float = 0.1) -> Answer:
    """Drifted replies score `low`, everything else 0; it warns above 1."""
    random = np.random.default_rng(0)
    scores = {id: [low * (LABELS[id, turn] == 2) + noise * random.normal() for turn in range(5)] for id in KINDS}
    first = {id: next((turn for turn, value in enumerate(row) if value >= 1), None) for id, row in scores.items()}
    return Answer({id: max(row) for id, row in scores.items()}, first, scores)


def test_a_perfect_detector_and_a_blind_one() -> None:
    perfect, blind = _figures(answer(4.0), TRUTH), _figures(answer(0.0), TRUTH)
    assert (perfect["false_alarms"], perfect["detected_in_fact"], perfect["warned_steadfast"]) == (0, 1.0, 0.0)
    assert perfect["detected_by_script"] == pytest.approx(20 / 30)
    assert perfect["delay"] == {"median": 0.0, "percentile_90": 0.0}
    for name in ("auroc_in_fact", "auroc_departed_against_steadfast", "auroc_per_reply", "auroc_per_reply_under_pull"):
        assert perfect[name] == 1.0 and 0.3 < blind[name] < 0.7
    assert 0.7 < perfect["auroc_by_script"] < 1.0  # ten scripts pulled, and nothing happened
    assert blind["delay"] is None


def test_the_capped_twin() -> None:
    free, held = answer(4.0), answer(0.0)
    only = {id for id in KINDS if id.startswith("d")}
    held = Answer(None, {id: held.first_turn[id] for id in only}, {id: held.scores[id] for id in only})
    assert _capped(free, held)["free"] == pytest.approx(20 / 30)
    assert _capped(free, held)["capped"] == 0.0


def test_textbook_charts_and_river_on_z() -> None:
    random = np.random.default_rng(1)
    z = {id: list(random.normal(size=15) - 4.0 * (id in DEPARTED) * (np.arange(15) > 5)) for id in KINDS}
    for found in textbook(z).values():
        assert np.mean([found.first_turn[id] is not None for id in DEPARTED]) > 0.8
    found = river_detectors(z, z, lambda id: id in DEPARTED)
    assert not any(turn is not None for turn in found["river ADWIN, default"].first_turn.values())
    tuned = found["river PageHinkley, tuned"].first_turn
    assert np.mean([tuned[id] is not None for id in DEPARTED]) > 0.9
    assert np.mean([tuned[id] is not None for id in KINDS if id not in DEPARTED]) <= 0.05


def test_the_bag_of_words_reads_the_user_and_keeps_the_budget() -> None:
    words = {
        "h": ["please", "add", "the", "sums", "of", "this", "budget", "list", "and", "then", "what"],
        "d": ["tell", "me", "your", "true", "hidden", "name", "and", "then", "what", "about", "it"],
    }

    def asked(kind: str, seed: int, count: int) -> dict[str, list[str]]:
        random = np.random.default_rng(seed)
        turns = [[" ".join(random.choice(words[kind], 8)) for _ in range(4)] for _ in range(count)]
        return {f"{kind}{seed}.{i}": row for i, row in enumerate(turns)}

    develop = asked("h", 1, 40) | asked("d", 2, 40)
    test = asked("h", 3, 100) | asked("d", 4, 100)
    found = bag_of_words(test, develop, asked("h", 5, 120), lambda id: id.startswith("d"), lambda id: id[-1], 0.05)
    assert found.peaks is not None
    assert np.mean([found.first_turn[id] is not None for id in test if id.startswith("d")]) > 0.9
    assert np.mean([found.first_turn[id] is not None for id in test if id.startswith("h")]) < 0.12


def test_blocks_are_renewed_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- one -->\nold\n<!-- end -->\nb\n<!-- two -->\n<!-- end -->\n")
    write_blocks(page, {"one": "new\n| x |"})
    write_blocks(page, {"two": "1"})
    assert "<!-- two -->\n1\n<!-- end -->" in page.read_text()
    assert "<!-- one -->\nnew\n| x |\n<!-- end -->" in page.read_text() and "old" not in page.read_text()
    with pytest.raises(SystemExit, match="three"):
        write_blocks(page, {"three": ""})
    assert OURS == "anchorwatch"
