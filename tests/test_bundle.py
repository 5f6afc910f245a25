"""A bundle is loaded exactly as it was made, or refused with a cure: never used damaged, nor with another model."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from monitor.axis.bundle import (
    Bundle,
    BundleInfo,
    Canary,
    ModelFacts,
    Readout,
    check_model,
    load_bundle,
    load_responses,
    new_bundle,
    resolve_bundle,
    save_bundle,
    shipped_bundles,
    with_calibration,
)
from monitor.errors import BundleCorrupt, BundleError, BundleMismatch

LAYERS, HIDDEN, LAYER = 4, 12, 2
IMPORTABLE = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])  # for subprocesses


def facts(**changes: Any) -> ModelFacts:
    made = ModelFacts(
        name="tiny",
        weights_sha256="a" * 64,
        tokenizer_sha256="b" * 64,
        chat_template_sha256="c" * 64,
        layers=LAYERS,
        hidden=HIDDEN,
        dtype="float32",
    )
    return msgspec.structs.replace(made, **changes)


def info(**changes: Any) -> BundleInfo:
    made = BundleInfo(
        model=facts(),
        layer=LAYER,
        hold_layers=(1, 3),
        styles=["poem", "chat"],
        traits=["blunt"],
        roles=["ghost", "hermit", "pirate"],
        engine={"torch": "2.13.0"},
        catalogue_version="0123456789abcdef",
        counts={"roles": 3},
        generation={"max_new_tokens": 40},
        figures={"separation": [0.5, 0.6, 0.75, 0.7]},
        canaries=[
            Canary(
                messages=[{"role": "user", "content": "Who are you?"}], text="An assistant.", projection=1.5, tokens=3
            )
        ],
        created="2026-01-02T03:04:05Z",
        licence="Apache-2.0",
        seed=7,
    )
    return msgspec.structs.replace(made, **changes)


def tensors(seed: int = 0, components: int = 2, layers: int = LAYERS, hidden: int = HIDDEN) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed).standard_normal
    basis = np.linalg.qr(draw((hidden, components)))[0].T
    return {
        "axis": draw((layers, hidden)),
        "persona_axis": draw((layers, hidden)),
        "styles": draw((layers, 2, hidden)),
        "default_mean": draw((layers, hidden)),
        "first_component": draw((layers, hidden)),
        "role_vectors": draw((3, hidden)),
        "basis": basis,
        "role_mean": draw(hidden),
        "singular_values": np.linspace(2.0, 1.0, components),
        "floors": draw(layers),
        "residual_norm": np.full(layers, 5.0),
        "traits": draw((1, hidden)),
    }


def bundle(seed: int = 0, **changes: Any) -> Bundle:
    return new_bundle(tensors(seed), info(**changes))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_bundle(bundle(), tmp_path / "bundle")


def refused(directory: Path, match: str | None = None) -> None:
    with pytest.raises(BundleCorrupt, match=match) as caught:
        load_bundle(directory)
    assert caught.value.cure


# What is saved comes back


def test_a_bundle_comes_back_as_it_was_made(tmp_path: Path) -> None:
    made = bundle()
    loaded = load_bundle(save_bundle(made, tmp_path))
    assert loaded == made
    assert loaded.info == made.info
    assert loaded.tensors.keys() == tensors().keys()
    for name, tensor in tensors().items():
        np.testing.assert_array_equal(loaded.tensors[name], tensor.astype(np.float32))


def test_the_id_is_the_digest_of_the_two_files(saved: Path) -> None:
    both = (saved / "bundle.safetensors").read_bytes() + (saved / "bundle.json").read_bytes()
    assert load_bundle(saved).id == bundle().id == hashlib.sha256(both).hexdigest()


def test_equal_bundles_are_equal_bytes_in_every_process(saved: Path) -> None:
    script = "from test_bundle import bundle; print(bundle().id)"
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": IMPORTABLE}
    command = [sys.executable, "-c", script]
    other = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == load_bundle(saved).id


def test_a_copy_of_a_loaded_bundle_is_the_same_bundle(saved: Path, tmp_path: Path) -> None:
    copy = save_bundle(load_bundle(saved), tmp_path / "copy")
    for name in ("bundle.safetensors", "bundle.json"):
        assert (copy / name).read_bytes() == (saved / name).read_bytes()


@given(seed=st.integers(0, 2**32), layers=st.integers(1, 5), hidden=st.integers(4, 40), components=st.integers(0, 4))
@settings(max_examples=25, deadline=None)
def test_any_shape_comes_back(
    tmp_path_factory: pytest.TempPathFactory, seed: int, layers: int, hidden: int, components: int
) -> None:
    described = info(model=facts(layers=layers, hidden=hidden), layer=layers - 1, hold_layers=(0, layers))
    made = new_bundle(tensors(seed, components, layers, hidden), described)
    loaded = load_bundle(save_bundle(made, tmp_path_factory.mktemp("any")))
    assert loaded == made
    names, matrix = loaded.directions()
    assert matrix.shape == (hidden, len(names))


def test_what_is_loaded_can_not_be_changed_in_place(saved: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        load_bundle(saved).tensors["axis"][0, 0] = 1.0


def test_fields_of_a_newer_minor_version_are_ignored_and_survive_a_copy(saved: Path, tmp_path: Path) -> None:
    rewrite(saved, lambda record: record | {"schema": "1.9", "smell": ["of", "rain"]})
    loaded = load_bundle(saved)
    assert loaded.info.model == facts()
    assert load_bundle(save_bundle(loaded, tmp_path / "copy")) == loaded
    assert b"rain" in (tmp_path / "copy" / "bundle.json").read_bytes()


def test_figures_may_come_straight_from_numpy() -> None:
    made = bundle(figures={"auroc": np.float32(0.5), "by_layer": np.arange(3), "best": np.float64(0.25)})
    assert made.info.figures == {"auroc": 0.5, "by_layer": [0, 1, 2], "best": 0.25}


def test_evidence_is_kept_beside_the_bundle_and_checked_when_read(tmp_path: Path) -> None:
    responses = {"default": np.ones((3, HIDDEN), np.float16), "ghost": np.zeros((2, HIDDEN), np.float16)}
    made = new_bundle(tensors(), info(), responses)
    loaded = load_bundle(save_bundle(made, tmp_path, responses))
    np.testing.assert_array_equal(load_responses(loaded, tmp_path)["default"], responses["default"])
    damage(tmp_path / "responses.safetensors", -1)
    with pytest.raises(BundleCorrupt, match=r"responses\.safetensors is damaged"):
        load_responses(loaded, tmp_path)
    (tmp_path / "responses.safetensors").unlink()
    assert load_bundle(tmp_path) == made
    with pytest.raises(BundleCorrupt, match="no file"):
        load_responses(loaded, tmp_path)
    with pytest.raises(BundleCorrupt, match="not the bundle's evidence"):
        save_bundle(made, tmp_path, {"default": np.zeros(3)})


# Directions


def test_directions_are_named_unit_columns_in_a_fixed_order() -> None:
    made = bundle()
    names, matrix = made.directions()
    assert names == ["assistant_axis", "persona_axis", "style:poem", "style:chat", "trait:blunt", "pc1", "pc2"]
    assert matrix.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(matrix, axis=0), 1.0, atol=1e-6)
    rows = [
        made.tensors["axis"][LAYER],
        made.tensors["persona_axis"][LAYER],
        *made.tensors["styles"][LAYER],
        *made.tensors["traits"],
        *made.tensors["basis"],
    ]
    for column, row in zip(matrix.T, rows, strict=True):
        np.testing.assert_allclose(column, row / np.linalg.norm(row), atol=1e-6)
    np.testing.assert_array_equal(matrix[:, 0], made.unit_axis())


def test_the_unit_axis_points_the_way_the_axis_does() -> None:
    made = bundle()
    for layer in range(LAYERS):
        assert made.unit_axis(layer) @ made.tensors["axis"][layer] > 0


def test_other_layers_have_no_traits_and_no_components() -> None:
    names, matrix = bundle().directions(0)
    assert names == ["assistant_axis", "persona_axis", "style:poem", "style:chat"]
    np.testing.assert_array_equal(matrix[:, 0], bundle().unit_axis(0))


def test_never_more_directions_than_an_event_may_carry() -> None:
    many = [f"t{i:02}" for i in range(26)]
    full = tensors(components=8) | {"traits": np.random.default_rng(1).standard_normal((26, HIDDEN))}
    names, matrix = new_bundle(full, info(traits=many)).directions()
    assert len(names) == matrix.shape[1] == 32
    assert names[-2:] == ["pc1", "pc2"]
    with pytest.raises(BundleCorrupt, match="33 directions"):
        new_bundle(full | {"traits": np.ones((29, HIDDEN))}, info(traits=[f"t{i:02}" for i in range(29)]))


def test_a_layer_that_the_model_lacks_is_refused() -> None:
    for layer in (-1, LAYERS):
        with pytest.raises(BundleMismatch, match=f"layer {layer} is outside"):
            bundle().directions(layer)


# Damage


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def rewrite(directory: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Edit bundle.json as a careful forger would: canonical form and checksum made good again."""
    path = directory / "bundle.json"
    record = change(json.loads(path.read_bytes()))
    record.pop("checksum", None)

    def form() -> bytes:
        return msgspec.json.format(msgspec.json.encode(record, order="sorted"), indent=1) + b"\n"

    record["checksum"] = hashlib.sha256(form()).hexdigest()
    path.write_bytes(form())


@pytest.mark.parametrize("name", ["bundle.safetensors", "bundle.json"])
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_truncated_or_altered_byte_goes_unseen(name: str, saved: Path, data: st.DataObject) -> None:
    path = saved / name
    whole = path.read_bytes()
    try:
        at = data.draw(st.integers(0, len(whole) - 1))
        if data.draw(st.booleans(), "truncate"):
            path.write_bytes(whole[:at])
        else:
            byte = data.draw(st.integers(0, 255).filter(lambda b: b != whole[at]))
            path.write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
        refused(saved)
    finally:
        path.write_bytes(whole)
    load_bundle(saved)


@given(
    junk=st.binary(max_size=200)
    | st.recursive(st.none() | st.integers(), st.lists).map(lambda v: json.dumps(v).encode())
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_no_record_is_refused_whatever_it_is(saved: Path, junk: bytes) -> None:
    (saved / "bundle.json").write_bytes(junk)
    refused(saved)


@pytest.mark.parametrize("junk", [b"\xff\xfe", b"[" * 100_000, b'{"seed":1e999}', b'{"seed":' + b"9" * 5000 + b"}"])
def test_a_hostile_record_is_refused(saved: Path, junk: bytes) -> None:
    (saved / "bundle.json").write_bytes(junk)
    refused(saved)


@pytest.mark.parametrize("name", ["bundle.safetensors", "bundle.json"])
def test_a_missing_file_is_refused(saved: Path, name: str) -> None:
    (saved / name).unlink()
    refused(saved, f"no file .*{name}")


@pytest.mark.parametrize("name", ["bundle.safetensors", "bundle.json"])
def test_a_link_to_nothing_and_a_directory_are_no_file(saved: Path, name: str) -> None:
    (saved / name).unlink()
    (saved / name).symlink_to(saved / "nothing")
    refused(saved, "no file")
    (saved / name).unlink()
    (saved / name).mkdir()
    refused(saved, "no file")


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "no file")


def test_an_edit_by_hand_is_refused(saved: Path) -> None:
    path = saved / "bundle.json"
    path.write_text(path.read_text().replace('"layer": 2', '"layer": 1'))
    refused(saved, "changed after it was written")


def test_even_new_white_space_is_refused_since_it_would_change_the_id(saved: Path) -> None:
    path = saved / "bundle.json"
    path.write_bytes(msgspec.json.format(path.read_bytes(), indent=4))
    refused(saved, "changed after it was written")


def test_tensors_of_another_bundle_are_refused(saved: Path, tmp_path: Path) -> None:
    other = save_bundle(bundle(seed=1), tmp_path / "other")
    (other / "bundle.safetensors").replace(saved / "bundle.safetensors")
    refused(saved, "not the file that bundle.json was written for")


def test_tensors_that_are_no_safetensors_are_refused_though_their_digest_fits(saved: Path) -> None:
    junk = b"\x08\0\0\0\0\0\0\0not json"
    (saved / "bundle.safetensors").write_bytes(junk)
    rewrite(saved, lambda record: record | {"tensors_sha256": hashlib.sha256(junk).hexdigest()})
    refused(saved, "not a safetensors file")


def test_another_major_schema_is_refused_with_its_own_cure(saved: Path) -> None:
    rewrite(saved, lambda record: record | {"schema": "2.0"})
    refused(saved, r"schema '2\.0'")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"layer": LAYERS}, "layer 4 is outside"),
        ({"layer": -1}, r"\$\.layer"),
        ({"hold_layers": [3, 3]}, "hold_layers"),
        ({"hold_layers": [0, 5]}, "hold_layers"),
        ({"roles": ["hermit", "ghost", "pirate"]}, "not sorted"),
        ({"roles": ["ghost", "ghost", "pirate"]}, "repeat a name"),
        ({"roles": ["ghost", "pirate"]}, "role_vectors has shape"),
        ({"styles": ["poem"]}, "styles has shape"),
        ({"traits": []}, "traits have no names"),
        ({"created": "yesterday"}, r"\$\.created"),
        ({"tensors_sha256": None}, "which tensors"),
        ({"readout": {"coordinates": {"style:prose": 1.0}}}, "'style:prose', which the bundle does not measure"),
        ({"canaries": [{"messages": [], "projection": 1.0, "tokens": 1}]}, "continuation_token_ids or text"),
        ({"model": {"name": "tiny"}}, r"\$\.model"),
    ],
)
def test_a_record_that_does_not_fit_its_tensors_is_refused(saved: Path, change: dict[str, Any], match: str) -> None:
    rewrite(saved, lambda record: record | change)
    refused(saved, match)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("axis", np.full((LAYERS, HIDDEN), np.nan), "axis is not finite"),
        ("floors", np.array([0, 0, np.inf, 0]), "floors is not finite"),
        ("role_mean", np.full(HIDDEN, 1e300), "role_mean is not finite"),
        ("axis", np.zeros((LAYERS, HIDDEN)), "axis is zero"),
        ("axis", np.eye(LAYERS, HIDDEN) * [[1], [1], [0], [1]], "axis is zero"),
        ("traits", np.zeros((1, HIDDEN)), "traits is zero"),
        ("axis", np.ones((LAYERS - 1, HIDDEN)), r"axis has shape \[3, 12\], not \[4, 12\]"),
        ("axis", np.ones((HIDDEN, LAYERS)), "axis has shape"),
        ("axis", np.ones(()), "axis has shape"),
        ("basis", np.ones((2, HIDDEN)), "not orthonormal"),
        ("basis", np.eye(3, HIDDEN), "more components than"),
        ("residual_norm", np.zeros(LAYERS), "residual norms"),
    ],
)
def test_tensors_that_can_not_be_scored_with_are_never_made_into_a_bundle(
    name: str, value: np.ndarray, match: str
) -> None:
    with pytest.raises(BundleCorrupt, match=match):
        new_bundle(tensors() | {name: value}, info())


def test_tensors_are_checked_on_loading_too(saved: Path) -> None:
    from safetensors.numpy import save

    good = {name: tensor.astype(np.float32) for name, tensor in tensors().items()}
    for change, match in [
        ({"axis": np.full((LAYERS, HIDDEN), np.nan, np.float32)}, "axis is not finite"),
        ({"axis": np.ones((LAYERS, HIDDEN), np.float64)}, "dtype float64"),
        ({"axis": np.zeros((LAYERS, HIDDEN), np.float32)}, "axis is zero"),
    ]:
        data = save(good | change)
        (saved / "bundle.safetensors").write_bytes(data)
        rewrite(saved, lambda record, d=data: record | {"tensors_sha256": hashlib.sha256(d).hexdigest()})
        refused(saved, match)


def test_all_problems_are_told_at_once() -> None:
    broken = tensors() | {"axis": np.full((LAYERS, HIDDEN), np.nan), "floors": np.zeros(2)}
    del broken["role_mean"]
    with pytest.raises(BundleCorrupt) as caught:
        new_bundle(broken, info(layer=9))
    for problem in ("axis is not finite", "floors has shape", "role_mean is missing", "layer 9"):
        assert problem in caught.value.problem


def test_a_figure_that_json_can_not_carry_is_refused_and_named() -> None:
    with pytest.raises(BundleCorrupt, match=r"figures\.auroc\[1\] is not finite"):
        bundle(figures={"auroc": [0.5, float("nan")]})


# Killed while writing

WRITER = """
import sys
from pathlib import Path
from test_bundle import bundle
from monitor.axis.bundle import save_bundle, with_calibration
base = bundle()
first, second = {
    "tensors": (base, bundle(seed=1)),
    "calibration": (base, with_calibration(base, None, {"padding": list(range(50_000))})),
}[sys.argv[2]]
print("ready", flush=True)
while True:
    save_bundle(first, Path(sys.argv[1]))
    save_bundle(second, Path(sys.argv[1]))
"""


def killed_writes(directory: Path, what: str, times: int) -> list[Bundle | None]:
    """What a reader finds after each of several writers killed in the middle of their work."""
    found: list[Bundle | None] = []
    for i in range(times):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(directory), what],
            env={**os.environ, "PYTHONPATH": IMPORTABLE},
            stdout=subprocess.PIPE,
        )
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(0.01 + 0.0037 * i)
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        try:
            found.append(load_bundle(directory))
        except BundleCorrupt:
            found.append(None)
    return found


@pytest.mark.slow
def test_a_write_that_was_killed_is_never_taken_for_a_good_bundle(tmp_path: Path) -> None:
    whole = {bundle().id, bundle(seed=1).id}
    for loaded in killed_writes(tmp_path, "tensors", times=12):
        assert loaded is None or loaded.id in whole
    assert load_bundle(save_bundle(bundle(), tmp_path)) == bundle()


@pytest.mark.slow
def test_a_recalibration_that_was_killed_leaves_the_old_or_the_new_bundle(tmp_path: Path) -> None:
    save_bundle(bundle(), tmp_path)
    assert None not in killed_writes(tmp_path, "calibration", times=12)


def test_every_state_between_two_bundles_is_refused(tmp_path: Path) -> None:
    old, new = save_bundle(bundle(), tmp_path / "old"), save_bundle(bundle(seed=1), tmp_path / "new")
    (old / "bundle.safetensors").write_bytes((new / "bundle.safetensors").read_bytes())
    refused(old)
    save_bundle(bundle(seed=1), old)
    assert load_bundle(old) == bundle(seed=1)


# The model it is used with


def test_the_model_it_was_made_from_passes_under_any_name() -> None:
    assert check_model(bundle(), facts(name="/models/tiny")) == []


def test_another_dtype_is_a_warning() -> None:
    (warning,) = check_model(bundle(), facts(dtype="bfloat16"))
    assert "float32" in warning and "bfloat16" in warning


@given(
    changed=st.sets(
        st.sampled_from(["weights_sha256", "tokenizer_sha256", "chat_template_sha256", "layers", "hidden"]), min_size=1
    )
)
@settings(deadline=None)
def test_another_model_is_refused_with_every_difference_and_a_cure(changed: set[str]) -> None:
    other = {name: 99 if name in ("layers", "hidden") else "f" * 64 for name in changed}
    words = {
        "weights_sha256": "weights:",
        "tokenizer_sha256": "tokenizer:",
        "chat_template_sha256": "chat template:",
        "layers": "layers:",
        "hidden": "hidden size:",
    }
    with pytest.raises(BundleMismatch) as caught:
        check_model(bundle(), facts(**other))
    assert {name for name, word in words.items() if word in caught.value.problem} == changed
    assert "axis build" in caught.value.cure


# Calibration


def test_a_calibration_changes_the_id_and_nothing_else(tmp_path: Path) -> None:
    plain = bundle()
    readout = Readout(coordinates={"persona_axis": 1.0, "style:poem": -0.5}, prompt={"pc1": 0.25})
    calibrated = with_calibration(plain, readout, {"budget": 0.01})
    assert calibrated.id != plain.id
    assert calibrated.tensor_bytes == plain.tensor_bytes
    loaded = load_bundle(save_bundle(calibrated, tmp_path))
    assert loaded == calibrated
    assert loaded.info.readout == readout
    assert with_calibration(loaded, None, None) == plain


def test_a_readout_of_something_unmeasured_is_refused() -> None:
    with pytest.raises(BundleCorrupt, match="'pc3'"):
        with_calibration(bundle(), Readout(coordinates={"pc3": 1.0}), None)


# Finding one


def test_every_shipped_bundle_loads_by_its_name() -> None:
    for name, path in shipped_bundles().items():
        assert resolve_bundle(name) == path
        load_bundle(path)


def test_a_path_is_resolved_and_an_unknown_name_lists_what_there_is(saved: Path) -> None:
    assert resolve_bundle(str(saved)) == resolve_bundle(saved) == saved
    with pytest.raises(BundleError, match="no axis bundle 'nothing'") as caught:
        resolve_bundle("nothing")
    for name in shipped_bundles():
        assert name in caught.value.cure
