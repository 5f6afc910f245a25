"""What a bundle says of itself: figures that can be checked, a summary that can be read, a picture that can be seen."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from rich.console import Console
from tiny import ROLES, Built

from monitor.axis.bundle import Bundle, load_bundle, new_bundle, save_bundle
from monitor.axis.show import draw, show, summary, verify
from monitor.errors import BundleCorrupt, ConfigurationError

pytest_plugins = ["miniature"]


def restated(built: Built, directory: Path, **figures: Any) -> Bundle:
    """The same bundle and evidence, with other figures."""
    info = msgspec.structs.replace(built.bundle.info, figures={**built.bundle.info.figures, **figures})
    bundle = new_bundle(built.bundle.tensors, info, built.responses)
    save_bundle(bundle, directory, built.responses)
    return load_bundle(directory)


def printed(bundle: Bundle) -> str:
    out = io.StringIO()
    show(bundle, Console(file=out, width=200))
    return out.getvalue()


# Verifying


def test_honest_figures_verify(built: Built) -> None:
    assert verify(load_bundle(built.directory), built.directory) == []


@pytest.mark.parametrize("key", ["auroc_response", "auroc_role", "cosine_pc1", "auroc_style_against_role"])
@pytest.mark.parametrize("axis", ["assistant_axis", "persona_axis"])
def test_a_number_that_was_made_nicer_is_found(built: Built, tmp_path: Path, axis: str, key: str) -> None:
    stated = built.bundle.info.figures[axis]
    bundle = restated(built, tmp_path, **{axis: {**stated, key: stated[key] + 1e-4}})
    (found,) = verify(bundle, tmp_path)
    assert f"{axis}.{key}" in found


def test_a_changed_control_list_layer_or_role_is_found(built: Built, tmp_path: Path) -> None:
    stated = built.bundle.info.figures
    axis = stated["assistant_axis"]
    changes: list[tuple[str, dict[str, Any]]] = [
        ("lowest_roles", {"assistant_axis": {**axis, "lowest_roles": axis["lowest_roles"][::-1]}}),
        ("lowest_roles", {"assistant_axis": {**axis, "lowest_roles": axis["lowest_roles"][:-1]}}),
        (
            "shuffled.beyond",
            {
                "assistant_axis": {
                    **axis,
                    "controls": {
                        **axis["controls"],
                        "shuffled": {
                            **axis["controls"]["shuffled"],
                            "beyond": not axis["controls"]["shuffled"]["beyond"],
                        },
                    },
                }
            },
        ),
        ("layer", {"layer": (built.bundle.layer + 1) % 4}),
        ("default_standard_deviation", {"default_standard_deviation": None}),
        ("assistant_axis", {"assistant_axis": {"auroc_response": 1.0}}),
    ]
    for number, (where, change) in enumerate(changes):
        directory = tmp_path / str(number)
        assert any(where in line for line in verify(restated(built, directory, **change), directory)), where


def test_a_figure_left_out_is_found(built: Built, tmp_path: Path) -> None:
    figures = {k: v for k, v in built.bundle.info.figures.items() if k != "separation_by_layer"}
    info = msgspec.structs.replace(built.bundle.info, figures=figures)
    save_bundle(new_bundle(built.bundle.tensors, info, built.responses), tmp_path, built.responses)
    assert any("separation_by_layer" in line for line in verify(load_bundle(tmp_path), tmp_path))


def test_another_axis_does_not_fit_the_figures(built: Built, tmp_path: Path) -> None:
    flipped = {**built.bundle.tensors, "axis": -built.bundle.tensors["axis"]}
    save_bundle(new_bundle(flipped, built.bundle.info, built.responses), tmp_path, built.responses)
    assert verify(load_bundle(tmp_path), tmp_path)


def test_changed_evidence_is_refused(built: Built, tmp_path: Path) -> None:
    save_bundle(built.bundle, tmp_path, built.responses)
    path = tmp_path / "responses.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(BundleCorrupt):
        verify(load_bundle(tmp_path), tmp_path)


def test_a_bundle_without_figures_or_evidence_can_not_be_verified(built: Built, tmp_path: Path) -> None:
    plain = msgspec.structs.replace(built.bundle.info, figures={}, responses_sha256=None)
    save_bundle(new_bundle(built.bundle.tensors, plain), tmp_path / "plain")
    with pytest.raises(BundleCorrupt, match="no figures"):
        verify(load_bundle(tmp_path / "plain"), tmp_path / "plain")
    kept_none = msgspec.structs.replace(built.bundle.info, responses_sha256=None)
    save_bundle(new_bundle(built.bundle.tensors, kept_none), tmp_path / "none")
    with pytest.raises(BundleCorrupt, match="keeps no responses"):
        verify(load_bundle(tmp_path / "none"), tmp_path / "none")


# Showing


def test_the_json_has_the_figures_of_the_report_split(built: Built) -> None:
    said = json.loads(json.dumps(summary(built.bundle)))
    assert {"cosine_pc1", "auroc_response", "auroc_role", "controls", "layer", "persona_axis"} <= set(said)
    assert {"cosine_pc1", "auroc_response", "auroc_role", "controls"} <= set(said["persona_axis"])
    assert said["layer"] == built.bundle.layer and said["id"] == built.bundle.id
    assert said["auroc_response"] == built.bundle.info.figures["assistant_axis"]["auroc_response"]
    for control, count in (("random", 200), ("shuffled", 50)):
        assert said["controls"][control]["directions"] == count
        assert isinstance(said["controls"][control]["beyond"], bool)
    assert said["calibration"] is None and said["readout"] is None


def test_the_summary_reads_well_without_a_terminal(built: Built) -> None:
    text = printed(built.bundle)
    figures = built.bundle.info.figures
    assert built.bundle.id[:16] in text and built.bundle.info.model.name[-20:] in text
    for name in ("assistant_axis", "persona_axis"):
        assert f"{figures[name]['auroc_response']:.3f}" in text
        assert ", ".join(figures[name]["lowest_roles"][:12]) in text
    assert all(role in text for role in ROLES)
    assert "Not calibrated" in text
    assert "\x1b" not in text


def test_a_calibrated_bundle_explains_its_readout(calibrated: Path) -> None:
    bundle = load_bundle(calibrated)
    text = printed(bundle)
    assert bundle.info.readout is not None
    for name, weight in bundle.info.readout.coordinates.items():
        assert f"{weight:+.3g} {name}" in text
    assert "(certified)" in text and "Not calibrated" not in text
    said = json.loads(json.dumps(summary(bundle)))
    assert said["readout"]["coordinates"] == bundle.info.readout.coordinates
    assert said["calibration"]["boundaries"]["certification"] == "certified"
    assert verify(bundle, calibrated) == []


def test_an_imported_bundle_is_shown_without_figures(built: Built) -> None:
    info = msgspec.structs.replace(built.bundle.info, figures={"imported": "axis.pt"}, responses_sha256=None)
    assert "no figures to show" in printed(new_bundle(built.bundle.tensors, info))


# Drawing


@pytest.mark.parametrize(("suffix", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_the_picture_is_drawn(built: Built, tmp_path: Path, suffix: str, begins: bytes) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / f"axis.{suffix}"
    draw(load_bundle(built.directory), built.directory, target)
    data = target.read_bytes()
    assert data.startswith(begins) and len(data) > 10_000
    if suffix == "svg":
        assert all(f"<!-- {role} -->".encode() in data for role in ROLES)


@pytest.mark.parametrize("name", ["axis.nonsense", "nowhere/axis.png"])
def test_a_picture_that_can_not_be_written_is_told_with_the_cure(built: Built, tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigurationError) as caught:
        draw(load_bundle(built.directory), built.directory, tmp_path / name)
    assert ".svg" in caught.value.cure


def test_figures_need_no_model(built: Built) -> None:
    """Everything shown comes from the folder: tensors, record and evidence as they lie there."""
    bundle = load_bundle(built.directory)
    assert all(np.array_equal(bundle.tensors[name], built.bundle.tensors[name]) for name in built.bundle.tensors)
    assert summary(bundle) == summary(built.bundle)
