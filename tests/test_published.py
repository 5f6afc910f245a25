"""Published files are read without running them, and turned into floors only where their sign is beyond doubt."""

from __future__ import annotations

import copy
import hashlib
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collectors.published import read_published
from monitor.axis.published import axis_from_published, capping_from_published
from monitor.errors import BundleCorrupt, BundleError, BundleMismatch

LAYERS, HIDDEN = 10, 16
EXPERIMENT = "layers_4:7-p0.25"


def an_axis(seed: int = 0) -> torch.Tensor:
    return torch.randn(LAYERS, HIDDEN, generator=torch.Generator().manual_seed(seed))


def a_config(axis: torch.Tensor, sign: float = -1.0, length: float = 3.0) -> dict[str, Any]:
    """A capping config as published: vectors away from the Assistant, not of unit length, unordered."""
    layers = [5, 4, 6, 9]
    return {
        "vectors": {
            f"layer_{layer}/axis": {"layer": layer, "vector": sign * length * axis[layer] / axis[layer].norm()}
            for layer in layers
        },
        "experiments": [
            {
                "id": EXPERIMENT,
                "interventions": [{"vector": f"layer_{layer}/axis", "cap": 0.5 + layer} for layer in layers[:3]],
            },
            {"id": "baseline", "interventions": []},
        ],
    }


def saved(directory: Path, content: object, **options: Any) -> Path:
    path = directory / "published.pt"
    torch.save(content, path, **options)
    return path


def refused(path: Path, match: str, **options: Any) -> BundleCorrupt:
    with pytest.raises(BundleCorrupt, match=match) as caught:
        read_published(path, **options)
    assert caught.value.cure
    return caught.value


# Reading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_an_axis_is_read_in_every_dtype_it_may_be_published_in(tmp_path: Path, dtype: torch.dtype) -> None:
    axis = an_axis().to(dtype)
    for content in (axis, {"axis": axis}, torch.nn.Parameter(axis), torch.stack([axis, axis], 1)[:, 1]):
        read = axis_from_published(read_published(saved(tmp_path, content)), (LAYERS, HIDDEN))
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, axis.to(torch.float32).numpy())


def test_a_capping_config_is_read_with_all_its_names_and_numbers(tmp_path: Path) -> None:
    config = a_config(an_axis())
    config["vectors"]["layer_4/axis"]["layer"] = torch.tensor(4)
    read = read_published(saved(tmp_path, config))
    assert isinstance(read, dict)
    assert read["experiments"] == config["experiments"]
    assert read["vectors"]["layer_4/axis"]["layer"] == 4
    np.testing.assert_array_equal(
        read["vectors"]["layer_9/axis"]["vector"], config["vectors"]["layer_9/axis"]["vector"]
    )


class Bomb:
    """A pickle that runs a shell command when it is loaded in full."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("wrap", [lambda bomb: bomb, lambda bomb: {"axis": an_axis(), "note": [bomb]}])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_file_is_refused_and_does_not_run(
    tmp_path: Path, wrap: Callable[[Bomb], Any], zipped: bool
) -> None:
    witness = tmp_path / "it-ran"
    path = saved(tmp_path, wrap(Bomb(f"touch {witness}")), _use_new_zipfile_serialization=zipped)
    error = refused(path, r"\.system.*could run any code" if zipped else "not in torch's zip format")
    assert "weights_only" not in str(error)  # no advice on how to load it all the same
    assert not witness.exists()
    # The bomb is a real one: loaded the ordinary way it goes off. Elsewhere, so that nothing of it stays here.
    script = "import sys, torch; torch.load(sys.argv[1], weights_only=False)"
    subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, check=False)
    assert witness.exists()


def test_a_bomb_stays_unlit_even_where_the_environment_asks_torch_to_load_everything(tmp_path: Path) -> None:
    witness = tmp_path / "it-ran"
    path = saved(tmp_path, Bomb(f"touch {witness}"))
    script = (
        "import sys; from pathlib import Path; from collections import abc; from monitor.errors import BundleCorrupt\n"
        "from collectors.published import read_published\n"
        "try: read_published(Path(sys.argv[1]))\n"
        "except BundleCorrupt: print('refused')"
    )
    environment = {
        **os.environ,
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    command = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "refused"
    assert not witness.exists()


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    refused(saved(tmp_path, torch.nn.Linear(2, 2)), "could run any code")


def test_a_plain_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plain.pt"
    path.write_bytes(pickle.dumps({"axis": [[1.0]]}))
    refused(path, "not in torch's zip format")


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, an_axis())
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        refused(path, "truncated")


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_damaged_file_is_refused_or_still_holds_the_same_numbers(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = saved(tmp_path_factory.mktemp("damaged"), {"axis": an_axis()})
    whole = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(whole))
    try:
        axis = axis_from_published(read_published(path), (LAYERS, HIDDEN))
    except BundleError as error:
        assert error.cure
    else:  # a byte of padding, or a date
        np.testing.assert_array_equal(axis, an_axis().numpy())


def test_a_pinned_file_is_read_and_any_other_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, an_axis())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    np.testing.assert_array_equal(read_published(path, sha256=digest), an_axis().numpy())
    refused(saved(tmp_path, an_axis(1)), f"not the pinned {digest}", sha256=digest)


def test_too_large_missing_and_compressed_files_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, an_axis())
    refused(path, "more than 1000 bytes", max_bytes=1000)
    refused(tmp_path / "nothing.pt", "no file")
    refused(tmp_path, "no file")
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.namelist():
            target.writestr(entry, source.read(entry))
    refused(packed, "compressed entries")


def test_a_small_file_that_unfolds_without_end_is_refused(tmp_path: Path) -> None:
    refused(saved(tmp_path, torch.zeros(1).expand(1 << 40)), "unfolds to more")
    nested: list[Any] = [0]
    for _ in range(12):
        nested = [nested] * 10
    refused(saved(tmp_path, nested), "unfolds into too many")
    endless: list[Any] = []
    endless.append(endless)
    refused(saved(tmp_path, endless), "nests too deep")


@pytest.mark.parametrize(
    "tensor", [torch.eye(4).to_sparse(), torch.ones(4, dtype=torch.complex64), torch.ones(4, device="meta")]
)
def test_tensors_that_are_not_plain_numbers_are_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    refused(saved(tmp_path, {"axis": tensor}), "not of plain numbers|can't be read")


def test_what_is_neither_tensor_nor_plain_data_is_refused(tmp_path: Path) -> None:
    refused(saved(tmp_path, {"axis": {1, 2}}), "holds a set")


# The axis


@pytest.mark.parametrize(
    ("content", "error", "match"),
    [
        (np.ones((LAYERS, HIDDEN + 1)), BundleMismatch, r"\[10, 17\].*\[10, 16\]"),
        (np.ones((HIDDEN, LAYERS)), BundleMismatch, "shape"),
        (np.ones(HIDDEN), BundleMismatch, "shape"),
        (np.full((LAYERS, HIDDEN), np.nan), BundleCorrupt, "not finite"),
        (np.full((LAYERS, HIDDEN), 1e300), BundleCorrupt, "not finite"),
        (np.eye(LAYERS, HIDDEN) * (np.arange(LAYERS) != 3)[:, None], BundleCorrupt, r"zero at layers \[3\]"),
        ({"direction": np.ones((LAYERS, HIDDEN))}, BundleCorrupt, "'direction'"),
        ({"axis": "north"}, BundleCorrupt, "no array"),
        (np.array(["a"]), BundleCorrupt, "no array"),
        (None, BundleCorrupt, "no array"),
    ],
)
def test_a_wrong_axis_is_refused(content: object, error: type[BundleError], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        axis_from_published(content, (LAYERS, HIDDEN))
    assert caught.value.cure


def test_the_axis_keeps_its_length() -> None:
    axis = 7.0 * np.eye(LAYERS, HIDDEN)
    np.testing.assert_array_equal(axis_from_published(axis, (LAYERS, HIDDEN)), axis)


# Capping


def arrays(config: dict[str, Any]) -> dict[str, Any]:
    made = copy.deepcopy(config)
    for entry in made["vectors"].values():
        entry["vector"] = entry["vector"].numpy()
    return made


AXIS = an_axis()
UNIT = (AXIS / AXIS.norm(dim=1, keepdim=True)).numpy()


def test_published_caps_become_floors_towards_the_assistant(tmp_path: Path) -> None:
    read = read_published(saved(tmp_path, a_config(AXIS)))
    plan = capping_from_published(read, AXIS.numpy(), EXPERIMENT)
    assert plan.layers == (4, 5, 6)  # "4:7" is half open
    np.testing.assert_allclose(plan.vectors, UNIT[4:7], atol=1e-6)
    np.testing.assert_allclose(plan.floors, [-4.5, -5.5, -6.5])
    assert plan.vectors.dtype == plan.floors.dtype == np.float32


def floor(h: np.ndarray, v: np.ndarray, threshold: float) -> np.ndarray:
    """The paper's equation."""
    return h - v * min(float(h @ v) - threshold, 0.0)


def clamp_from_above(h: np.ndarray, vector: np.ndarray, cap: float) -> np.ndarray:
    """What the published code does with a published vector."""
    w = vector / np.linalg.norm(vector)
    return h - w * max(float(h @ w) - cap, 0.0)


@given(seed=st.integers(0, 2**32 - 1), length=st.floats(0.01, 100.0), scale=st.floats(0.1, 100.0))
@settings(deadline=None)
def test_the_floors_do_to_a_model_what_the_published_clamp_does(seed: int, length: float, scale: float) -> None:
    config = arrays(a_config(AXIS, length=length))
    plan = capping_from_published(config, AXIS.numpy(), EXPERIMENT)
    h = np.random.default_rng(seed).standard_normal(HIDDEN) * scale
    for layer, vector, threshold in zip(plan.layers, plan.vectors, plan.floors, strict=True):
        published = config["vectors"][f"layer_{layer}/axis"]["vector"]
        expected = clamp_from_above(h, published.astype(np.float64), 0.5 + layer)
        held = floor(h, vector.astype(np.float64), float(threshold))
        np.testing.assert_allclose(held, expected, atol=1e-4)
        assert held @ vector >= h @ vector - 1e-4  # never away from the Assistant


def test_vectors_that_point_towards_the_assistant_are_refused_unless_the_caller_knows_they_are_floors() -> None:
    config = arrays(a_config(AXIS, sign=1.0))
    with pytest.raises(BundleMismatch, match="push the model off it") as caught:
        capping_from_published(config, AXIS.numpy(), EXPERIMENT)
    assert "'towards'" in caught.value.cure
    plan = capping_from_published(config, AXIS.numpy(), EXPERIMENT, stored="towards")
    np.testing.assert_allclose(plan.vectors, UNIT[4:7], atol=1e-6)
    np.testing.assert_allclose(plan.floors, [4.5, 5.5, 6.5])


def test_a_stated_sign_that_the_axis_contradicts_is_refused() -> None:
    for sign, stored in [(-1.0, "towards"), (1.0, "away")]:
        with pytest.raises(BundleMismatch, match=f"not {stored}"):
            capping_from_published(arrays(a_config(AXIS, sign)), AXIS.numpy(), EXPERIMENT, stored=stored)  # type: ignore[arg-type]


@given(cosine=st.floats(-1.0, 1.0))
@settings(deadline=None)
def test_a_vector_off_the_axis_is_refused_whatever_the_caller_says(cosine: float) -> None:
    if abs(abs(cosine) - 0.5) < 1e-3:
        return
    config = arrays(a_config(AXIS))
    along = UNIT[5].astype(np.float64)
    across = np.eye(HIDDEN)[0] - along[0] * along
    across /= np.linalg.norm(across)
    config["vectors"]["layer_5/axis"]["vector"] = cosine * along + np.sqrt(1 - cosine**2) * across
    if cosine < -0.5:
        assert capping_from_published(config, AXIS.numpy(), EXPERIMENT).vectors[1] @ along == pytest.approx(-cosine)
        return
    with pytest.raises(BundleMismatch, match="ambiguous" if cosine < 0.5 else "push the model off it"):
        capping_from_published(config, AXIS.numpy(), EXPERIMENT)
    if cosine < 0.5:
        for vector in config["vectors"].values():
            vector["vector"] = vector["vector"] if vector["layer"] == 5 else -vector["vector"]
        with pytest.raises(BundleMismatch, match="ambiguous"):
            capping_from_published(config, AXIS.numpy(), EXPERIMENT, stored="towards")


def test_an_unknown_experiment_lists_those_there_are() -> None:
    with pytest.raises(BundleError, match="no capping experiment 'layers_1:2'") as caught:
        capping_from_published(arrays(a_config(AXIS)), AXIS.numpy(), "layers_1:2")
    assert EXPERIMENT in caught.value.cure and "baseline" in caught.value.cure


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(config: dict[str, Any]) -> None:
        *way, last = path.split(".")
        place: Any = config
        for step in way:
            place = place[int(step) if isinstance(place, list) else step]
        place[int(last) if isinstance(place, list) else last] = value

    return apply


VECTOR, FIRST = "vectors.layer_5/axis", "experiments.0.interventions.0"


@pytest.mark.parametrize(
    ("damage", "error", "match"),
    [
        (change(f"{VECTOR}.vector", np.full(HIDDEN, np.nan)), BundleCorrupt, "not finite"),
        (change(f"{VECTOR}.vector", np.zeros(HIDDEN)), BundleCorrupt, "is zero"),
        (change(f"{VECTOR}.vector", np.ones(HIDDEN + 1)), BundleMismatch, "does not fit"),
        (change(f"{VECTOR}.vector", [1.0] * HIDDEN), BundleCorrupt, "no array"),
        (change(f"{VECTOR}.layer", LAYERS), BundleMismatch, "does not fit"),
        (change(f"{VECTOR}.layer", -1), BundleMismatch, "does not fit"),
        (change(f"{VECTOR}.layer", "5"), BundleCorrupt, "not a published capping config"),
        (change(f"{FIRST}.cap", float("nan")), BundleCorrupt, "not finite"),
        (change(f"{FIRST}.cap", None), BundleCorrupt, "missing"),
        (change(f"{FIRST}.vector", "layer_8/axis"), BundleCorrupt, "no vector 'layer_8/axis'"),
        (change(f"{FIRST}.vector", "layer_4/axis"), BundleCorrupt, "a layer twice"),
        (change(f"{FIRST}.vector", "layer_9/axis"), BundleCorrupt, r"layers 4 to 6, holds \[4, 6, 9\]"),
        (change("experiments.0.interventions", []), BundleCorrupt, "holds nothing"),
        (change("experiments", {}), BundleCorrupt, "not a published capping config"),
    ],
)
def test_a_wrong_capping_config_is_refused(
    damage: Callable[[dict[str, Any]], None], error: type[BundleError], match: str
) -> None:
    config = arrays(a_config(AXIS))
    damage(config)
    with pytest.raises(error, match=match) as caught:
        capping_from_published(config, AXIS.numpy(), EXPERIMENT)
    assert caught.value.cure


@pytest.mark.parametrize("end", [6, 8])
def test_a_range_that_is_read_as_closed_or_cut_short_is_noticed(end: int) -> None:
    config = arrays(a_config(AXIS))
    config["experiments"][0]["id"] = f"layers_4:{end}-p0.25"
    with pytest.raises(BundleCorrupt, match=f"says layers 4 to {end - 1}"):
        capping_from_published(config, AXIS.numpy(), f"layers_4:{end}-p0.25")
