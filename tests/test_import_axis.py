"""An axis from published files: projected and held with at once, and nothing that a file may carry is ever run."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import environment

from collectors.check import check_bundle
from collectors.import_axis import import_bundle
from collectors.models import LoadedModel
from collectors.watch import watch
from monitor.axis.bundle import load_bundle, save_bundle
from monitor.axis.geometry import unit
from monitor.detect.configure import detector_config, persona_space_of
from monitor.errors import BundleCorrupt, BundleMismatch, ConfigurationError
from monitor.events import Projection

pytest_plugins = ["miniature"]

LAYERS, HIDDEN = 4, 32


@pytest.fixture(scope="module")
def axis() -> torch.Tensor:
    return torch.randn(LAYERS, HIDDEN, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, axis: torch.Tensor) -> tuple[Path, Path]:
    """The two files as published: the capping vectors point away from the Assistant, the axis towards it."""
    folder = tmp_path_factory.mktemp("published")
    torch.save({"axis": axis, "model": "tiny"}, folder / "assistant_axis.pt")
    config = {
        "vectors": {f"layer_{i}/axis": {"layer": i, "vector": -2.0 * axis[i] / axis[i].norm()} for i in range(LAYERS)},
        "experiments": [
            {
                "id": "layers_2:4-p0.25",
                "interventions": [{"vector": f"layer_{i}/axis", "cap": 1.5 + i} for i in (2, 3)],
            },
            {"id": "first and last", "interventions": [{"vector": f"layer_{i}/axis", "cap": 0.0} for i in (0, 3)]},
        ],
    }
    torch.save(config, folder / "capping_config.pt")
    return folder / "assistant_axis.pt", folder / "capping_config.pt"


@pytest.fixture(scope="module")
def imported(loaded: LoadedModel, files: tuple[Path, Path]) -> Any:
    return import_bundle(loaded, files[0], licence="MIT")


def test_the_axis_is_the_published_one(imported: Any, axis: torch.Tensor) -> None:
    np.testing.assert_array_equal(imported.tensors["axis"], axis.numpy())
    np.testing.assert_array_equal(imported.tensors["persona_axis"], axis.numpy())
    assert imported.layer == 2 and imported.info.licence == "MIT"
    assert imported.info.roles == [] and imported.info.styles == []


def test_it_is_saved_loaded_and_checked_like_any_other(imported: Any, loaded: LoadedModel, tmp_path: Path) -> None:
    again = load_bundle(save_bundle(imported, tmp_path))
    assert again == imported and len(again.info.canaries) == 6
    assert check_bundle(loaded, again)["verdict"] == "ok"


def test_without_a_capping_config_the_floors_are_percentiles_of_the_default_assistant(imported: Any) -> None:
    means = imported.tensors["default_mean"]
    along = np.einsum("lh,lh->l", means, unit(imported.tensors["axis"]))
    assert (imported.tensors["floors"] < along + 1e-4).mean() >= 0.5
    assert imported.info.hold_layers == (2, 3)


def test_published_caps_become_floors_with_their_sign_turned(loaded: LoadedModel, files: tuple[Path, Path]) -> None:
    bundle = import_bundle(loaded, files[0], capping=files[1], experiment="layers_2:4-p0.25", layer=1)
    assert bundle.layer == 1 and bundle.info.hold_layers == (2, 4)
    np.testing.assert_allclose(bundle.tensors["floors"][2:4], [-3.5, -4.5], rtol=1e-6)


def test_a_model_is_watched_with_it_but_nothing_is_judged(
    imported: Any, loaded: LoadedModel, axis: torch.Tensor, prompts: Any, collected: Any
) -> None:
    ids = torch.tensor(prompts(1))
    with (
        watch(loaded.model, loaded.tokenizer, imported, collected) as watched,
        watched.identify(conversation_id="c", turn=0),
    ):
        loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    (projection,) = collected.projections
    assert isinstance(projection, Projection)
    assert projection.coordinates["assistant_axis"] == pytest.approx(projection.coordinates["persona_axis"])
    assert persona_space_of(imported) is None
    with pytest.raises(ConfigurationError, match="not calibrated"):
        detector_config(imported)


@pytest.mark.parametrize("layer", [-1, 4])
def test_a_layer_that_the_model_lacks_is_refused(loaded: LoadedModel, files: tuple[Path, Path], layer: int) -> None:
    with pytest.raises(ConfigurationError, match="layers 0 to 3") as caught:
        import_bundle(loaded, files[0], layer=layer)
    assert caught.value.cure


def test_layers_that_are_not_adjacent_are_refused(loaded: LoadedModel, files: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigurationError, match="not adjacent"):
        import_bundle(loaded, files[0], capping=files[1], experiment="first and last")


def test_the_axis_of_another_model_is_refused(loaded: LoadedModel, tmp_path: Path) -> None:
    torch.save(torch.randn(LAYERS, HIDDEN + 1), tmp_path / "other.pt")
    with pytest.raises(BundleMismatch, match="shape"):
        import_bundle(loaded, tmp_path / "other.pt")


def test_a_pinned_digest_is_kept(loaded: LoadedModel, files: tuple[Path, Path]) -> None:
    digest = hashlib.sha256(files[0].read_bytes()).hexdigest()
    assert import_bundle(loaded, files[0], sha256=digest).info.figures["imported"] == "assistant_axis.pt"
    with pytest.raises(BundleCorrupt, match="pinned"):
        import_bundle(loaded, files[0], sha256="0" * 64)


class Payload:
    """What a malicious file does when it is loaded the ordinary way."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def test_a_malicious_pickle_is_refused_and_not_run(model_folder: Path, axis: torch.Tensor, tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    torch.save({"axis": axis, "extra": Payload(marker)}, tmp_path / "axis.pt")
    torch.load(tmp_path / "axis.pt", weights_only=False)
    assert marker.exists()  # the trap works …
    marker.unlink()
    command = [
        sys.executable,
        "-m",
        "monitor",
        "axis",
        "import",
        str(tmp_path / "axis.pt"),
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        [*command, "--model", str(model_folder)], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert "unsafe" in done.stderr and "cure:" in done.stderr and "Traceback" not in done.stderr
    assert not marker.exists() and not (tmp_path / "out").exists()
