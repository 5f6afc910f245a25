"""Whether an axis still measures the same: its canaries are projected again, and the answer is ok, shifted or stale."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from conftest import tiny_bundle, tiny_model
from tiny import Built

from collectors.check import OK_WITHIN, STALE_BEYOND, check_bundle
from collectors.models import LoadedModel, describe_model, load_model
from monitor.axis.bundle import Bundle, new_bundle
from monitor.errors import BundleError, BundleMismatch

pytest_plugins = ["miniature"]


def moved(bundle: Bundle, deviations: float) -> Bundle:
    """The bundle, had one of its canaries projected so many standard deviations lower when it was made."""
    first, *others = bundle.info.canaries
    unit = bundle.info.figures["default_standard_deviation"]
    lower = msgspec.structs.replace(first, projection=first.projection - deviations * unit)
    return new_bundle(bundle.tensors, msgspec.structs.replace(bundle.info, canaries=[lower, *others]))


def described(model: Any, loaded: LoadedModel) -> LoadedModel:
    return LoadedModel(model, loaded.tokenizer, describe_model(model, loaded.tokenizer, name="changed"))


def test_the_model_it_was_made_from_is_ok(loaded: LoadedModel, built: Built) -> None:
    report = check_bundle(loaded, built.bundle)
    assert report["verdict"] == "ok"
    assert report["largest_shift"] < 1e-4 and report["mismatch"] is None
    assert len(report["shifts"]) == len(built.bundle.info.canaries)
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize(
    ("deviations", "verdict"),
    [
        (OK_WITHIN * 0.9, "ok"),
        (-OK_WITHIN * 0.9, "ok"),
        (OK_WITHIN * 1.1, "shifted"),
        (-OK_WITHIN * 1.1, "shifted"),
        (STALE_BEYOND * 0.9, "shifted"),
        (STALE_BEYOND * 1.1, "stale"),
        (-STALE_BEYOND * 1.1, "stale"),
    ],
)
def test_the_worst_canary_decides(loaded: LoadedModel, built: Built, deviations: float, verdict: str) -> None:
    report = check_bundle(loaded, moved(built.bundle, deviations))
    assert report["verdict"] == verdict
    assert report["largest_shift"] == pytest.approx(abs(deviations), rel=1e-3)
    assert report["shifts"][0] == pytest.approx(deviations, rel=1e-3)


def test_the_same_weights_in_bfloat16_are_the_same_model_with_other_numbers(model_folder: Path, built: Built) -> None:
    report = check_bundle(load_model(str(model_folder), dtype="bfloat16", device="cpu"), built.bundle)
    assert report["mismatch"] is None
    assert report["largest_shift"] > 1e-4
    assert report["verdict"] == ("ok" if report["largest_shift"] <= OK_WITHIN else "shifted")


def test_one_changed_weight_is_stale_however_little_it_moves(loaded: LoadedModel, built: Built) -> None:
    model = tiny_model("llama", loaded.tokenizer)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1.0  # behind the tapped layer: no canary moves
    report = check_bundle(described(model, loaded), built.bundle)
    assert report["largest_shift"] < 1e-4
    assert report["verdict"] == "stale" and "weights" in report["mismatch"]


def test_other_weights_are_stale_and_the_canaries_show_it(loaded: LoadedModel, built: Built) -> None:
    report = check_bundle(described(tiny_model("llama", loaded.tokenizer, seed=5), loaded), built.bundle)
    assert report["verdict"] == "stale" and report["largest_shift"] > STALE_BEYOND
    assert "axis build" in report["says"]


def test_another_chat_template_is_stale(loaded: LoadedModel, built: Built) -> None:
    facts = msgspec.structs.replace(loaded.facts, chat_template_sha256="0" * 64)
    report = check_bundle(replace(loaded, facts=facts), built.bundle)
    assert report["verdict"] == "stale" and "chat template" in report["mismatch"]


def test_weights_that_are_not_finite_are_stale_and_still_json(loaded: LoadedModel, built: Built) -> None:
    model = tiny_model("llama", loaded.tokenizer)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(float("nan"))
    report = check_bundle(described(model, loaded), built.bundle)
    assert report["verdict"] == "stale" and report["largest_shift"] is None
    assert "NaN" not in json.dumps(report)


def test_a_model_of_another_shape_is_refused(loaded: LoadedModel, built: Built) -> None:
    with pytest.raises(BundleMismatch, match="layers") as caught:
        check_bundle(described(tiny_model("llama", loaded.tokenizer, layers=3), loaded), built.bundle)
    assert caught.value.cure


def test_a_bundle_without_canaries_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(BundleError, match="no canaries") as caught:
        check_bundle(loaded, tiny_bundle(loaded.model, loaded.tokenizer))
    assert caught.value.cure
