"""An axis bundle: one directory with the directions of persona space, their provenance, and an id that pins both.

It knows the file format and what must hold of the numbers; not how they are made, nor what a projection means.

::

    bundle.safetensors      the tensors below, float32
    bundle.json             `BundleInfo`, with the sha256 of the tensors and of itself
    responses.safetensors   optional evidence: the activations the axis was made from

=================  ===========================  ==========================================================
tensor             shape                        meaning
=================  ===========================  ==========================================================
`axis`             [layers, hidden]             mean default minus mean role activation, not normalised:
                                                points *towards* the Assistant (arXiv 2601.10387)
`persona_axis`     [layers, hidden]             `axis` with the style directions projected out
`styles`           [layers, styles, hidden]     what the default Assistant's activation gains in each style
`default_mean`     [layers, hidden]             mean default activation
`first_component`  [layers, hidden]             first principal component of the role vectors, signed like `axis`
`role_vectors`     [roles, hidden]              one per role, at the chosen layer
`basis`            [components, hidden]         orthonormal components of persona space, at the chosen layer
`role_mean`        [hidden]                     mean of the role vectors, the origin of persona space
`singular_values`  [n], n >= components         of the centred role vectors
`floors`           [layers]                     capping thresholds on the unit axis, raw residual units
`residual_norm`    [layers]                     mean norm of the residual stream on ordinary chat
`traits`           [traits, hidden]             optional, at the chosen layer
=================  ===========================  ==========================================================
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from monitor.axis.readout import Readout
from monitor.axis.record import (
    REBUILD,
    BundleInfo,
    Canary,
    ModelFacts,
    decode_info,
    encode_info,
    seal,
)
from monitor.axis.soundness import MAX_DIRECTIONS, Array, check_tensors, direction_names
from monitor.errors import BundleCorrupt, BundleError, BundleMismatch

__all__ = [
    "MAX_DIRECTIONS",
    "Array",
    "Bundle",
    "BundleInfo",
    "Canary",
    "ModelFacts",
    "Readout",
    "check_model",
    "load_bundle",
    "load_responses",
    "new_bundle",
    "resolve_bundle",
    "save_bundle",
    "shipped_bundles",
    "with_calibration",
    "with_traits",
]

MAX_JSON_BYTES = 64 << 20
MAX_TENSOR_BYTES = 8 << 30
TENSORS_FILE, INFO_FILE, RESPONSES_FILE = "bundle.safetensors", "bundle.json", "responses.safetensors"
SHIPPED = Path(__file__).parent / "data" / "bundles"


@dataclass(frozen=True, eq=False)
class Bundle:
    """A checked bundle, made by `new_bundle`, `with_calibration` or `load_bundle`; equal if the ids are.

    Attributes:
        info: provenance and meaning.
        tensors: read-only float32 arrays by name; shapes in the module's docstring.
        id: sha256 hex digest over the bytes of `bundle.safetensors` followed by those of `bundle.json`.
        tensor_bytes, info_bytes: those bytes.
    """

    info: BundleInfo
    tensors: Mapping[str, Array]
    id: str
    tensor_bytes: bytes = field(repr=False)
    info_bytes: bytes = field(repr=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bundle) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    @property
    def layer(self) -> int:
        """The chosen decoder layer, from 0."""
        return self.info.layer

    def unit_axis(self, layer: int | None = None) -> Array:
        """The Assistant Axis at a layer (default: the chosen one), unit length, `[hidden]`; towards the Assistant.

        Raises:
            BundleMismatch: the model has no such layer.
        """
        return _unit(self.tensors["axis"][self._checked(layer)])

    def directions(self, layer: int | None = None) -> tuple[list[str], Array]:
        """The measured directions at a layer (default: the chosen one): names and a matrix `[hidden, k]`, k <= 32.

        The columns have unit length, in the order `assistant_axis`, `persona_axis`, `style:<name>` …, `trait:<name>` …,
        `pc1` … `pc8`. Traits and components exist at the chosen layer only; where there is no room for all components,
        the last ones are left out.

        Raises:
            BundleMismatch: the model has no such layer.
        """
        at = self._checked(layer)
        rows = [self.tensors["axis"][at], self.tensors["persona_axis"][at], *self.tensors["styles"][at]]
        if at == self.layer:
            rows += [*self.tensors.get("traits", ()), *self.tensors["basis"]]
        names = direction_names(self.info, len(self.tensors["basis"]), everywhere=at != self.layer)
        # A row is dropped only when `names` ran out of room, which it does at the last components.
        return names, np.stack([_unit(row) for row in rows[: len(names)]], axis=1)

    def _checked(self, layer: int | None) -> int:
        at = self.layer if layer is None else layer
        if not 0 <= at < self.info.model.layers:
            raise BundleMismatch(
                f"layer {at} is outside this bundle's {self.info.model.layers} layers",
                cure=f"choose a layer from 0 to {self.info.model.layers - 1}; the bundle was made for {self.layer}",
            )
        return at


def new_bundle(
    tensors: Mapping[str, NDArray[Any]], info: BundleInfo, responses: Mapping[str, NDArray[Any]] | None = None
) -> Bundle:
    """A bundle of new tensors. Digests in `info` are filled in; `tensors` are copied to float32.

    `responses` is only digested here: give the same arrays to `save_bundle` to keep them. Without it, a
    `responses_sha256` already in `info` stays.

    Raises:
        BundleCorrupt: a tensor is missing, misshapen or not finite, or `info` does not fit; all problems at once.
    """
    with np.errstate(over="ignore"):  # what does not fit into float32 becomes infinite, and is refused below
        copies = {name: np.array(tensor, dtype=np.float32, order="C") for name, tensor in tensors.items()}
    check_tensors(copies, info)
    if responses is not None:
        info = msgspec.structs.replace(info, responses_sha256=_sha256(save_tensors(dict(responses))))
    tensor_bytes = save_tensors(copies)
    sealed = seal(info, _sha256(tensor_bytes))
    return _bundle(sealed, copies, tensor_bytes, encode_info(sealed))


def with_calibration(bundle: Bundle, readout: Readout | None, calibration: Mapping[str, Any] | None) -> Bundle:
    """The same tensors with another readout and calibration; the id changes, since the readout is part of it.

    Raises:
        BundleCorrupt: the readout names a direction that the bundle does not measure, or a number is not finite.
    """
    calibrated = msgspec.structs.replace(
        bundle.info, readout=readout, calibration=None if calibration is None else dict(calibration)
    )
    return new_bundle(bundle.tensors, calibrated)


def with_traits(bundle: Bundle, traits: Mapping[str, NDArray[Any]], readout: Readout) -> Bundle:
    """The same bundle with other traits, and a readout that may name them; without a calibration, so the id changes.

    Args:
        traits: directions [hidden] at the chosen layer, by name; their length does not matter.

    Raises:
        BundleCorrupt: as `with_calibration`; or a trait is not finite, or of another size.
    """
    stacked = np.stack([_unit(np.asarray(trait, dtype=np.float32)) for trait in traits.values()])
    info = msgspec.structs.replace(bundle.info, traits=list(traits), readout=readout, calibration=None)
    return new_bundle({**bundle.tensors, "traits": stacked}, info)


def save_bundle(bundle: Bundle, directory: Path, responses: Mapping[str, NDArray[Any]] | None = None) -> Path:
    """Write a bundle into `directory`, made if need be, and return it. Equal bundles give equal bytes.

    Every file is written beside its place, synced, then moved there; `bundle.json` last. As it carries the digest of
    the tensors, a reader at any moment finds the old bundle, the new one, or one that it refuses, and never a mixture;
    where only the calibration changed, never one that it refuses. One writer a directory.

    Raises:
        BundleCorrupt: `responses` are not those that the bundle was made with.
        OSError: the directory can't be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if responses is not None:
        data = save_tensors(dict(responses))
        if _sha256(data) != bundle.info.responses_sha256:
            raise BundleCorrupt(
                "these responses are not the bundle's evidence", cure="give the same responses to `new_bundle`"
            )
        _replace(directory / RESPONSES_FILE, data)
    tensors = directory / TENSORS_FILE
    if not (tensors.is_file() and _sha256(tensors.read_bytes()) == bundle.info.tensors_sha256):
        _replace(tensors, bundle.tensor_bytes)
    _replace(directory / INFO_FILE, bundle.info_bytes)
    return directory


def load_bundle(directory: Path) -> Bundle:
    """Read and check a bundle: presence, checksums, shapes, finiteness, layers.

    The evidence in `responses.safetensors` is not read: it is never scored with (`load_responses` checks it).

    Raises:
        BundleCorrupt: any of those fails; it says which, and the cure.
    """
    info_bytes = _read(directory / INFO_FILE, MAX_JSON_BYTES)
    info = decode_info(info_bytes)
    tensor_bytes, tensors = _read_tensors(directory / TENSORS_FILE, info.tensors_sha256)
    check_tensors(tensors, info)
    return _bundle(info, tensors, tensor_bytes, info_bytes)


def load_responses(bundle: Bundle, directory: Path) -> dict[str, NDArray[Any]]:
    """The evidence beside a bundle.

    Raises:
        BundleCorrupt: it was not kept, is missing, or is not what the bundle was made from.
    """
    if bundle.info.responses_sha256 is None:
        raise BundleCorrupt("this bundle keeps no responses", cure="rebuild it with its responses kept")
    return _read_tensors(directory / RESPONSES_FILE, bundle.info.responses_sha256)[1]


def check_model(bundle: Bundle, facts: ModelFacts) -> list[str]:
    """Compare the model in use with the one the bundle was made from; returns warnings (another dtype), often none.

    Raises:
        BundleMismatch: other weights, tokenizer, chat template or shape; all differences at once.
    """
    made = bundle.info.model
    differences = [
        f"{what}: made with {ours!s:.16}, used with {theirs!s:.16}"
        for what, ours, theirs in [
            ("weights", made.weights_sha256, facts.weights_sha256),
            ("tokenizer", made.tokenizer_sha256, facts.tokenizer_sha256),
            ("chat template", made.chat_template_sha256, facts.chat_template_sha256),
            ("layers", made.layers, facts.layers),
            ("hidden size", made.hidden, facts.hidden),
        ]
        if ours != theirs
    ]
    if differences:
        raise BundleMismatch(
            f"the bundle was made for {made.name}, not for this {facts.name}: " + "; ".join(differences),
            cure="use the bundle of exactly this model, or make one with `anchorwatch axis build`: "
            "after any change of weights, tokenizer or template an axis measures something else",
        )
    if made.dtype != facts.dtype:
        return [f"the bundle was made in {made.dtype}, the model runs in {facts.dtype}: run `anchorwatch axis check`"]
    return []


def shipped_bundles() -> dict[str, Path]:
    """Bundles that come with Anchorwatch, by name."""
    return {path.parent.name: path.parent for path in sorted(SHIPPED.glob(f"*/{INFO_FILE}"))}


def resolve_bundle(name_or_path: str | Path) -> Path:
    """The directory of a bundle, given as the name of a shipped one or as a path (`./name` is always a path).

    Raises:
        BundleError: neither.
    """
    shipped = shipped_bundles()
    if isinstance(name_or_path, str) and name_or_path in shipped:
        return shipped[name_or_path]
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    raise BundleError(
        f"no axis bundle {str(name_or_path)!r}",
        cure=f"give the path of a bundle's directory, or one of the shipped bundles: {', '.join(shipped) or 'none'}",
    )


def _bundle(info: BundleInfo, tensors: dict[str, Array], tensor_bytes: bytes, info_bytes: bytes) -> Bundle:
    for tensor in tensors.values():
        tensor.setflags(write=False)
    return Bundle(info, tensors, _sha256(tensor_bytes, info_bytes), tensor_bytes, info_bytes)


def _unit(vector: Array) -> Array:
    wide = vector.astype(np.float64)  # the square of a float32 can overflow one
    return (wide / np.linalg.norm(wide)).astype(np.float32)


def _read(path: Path, limit: int) -> bytes:
    try:
        if not path.is_file():
            raise BundleCorrupt(f"no file {path}", cure=f"check the path; else {REBUILD}")
        if (size := path.stat().st_size) > limit:
            raise BundleCorrupt(f"{path} has {size} bytes, more than the limit of {limit}", cure=REBUILD)
        return path.read_bytes()
    except OSError as error:
        raise BundleCorrupt(f"can't read {path}: {error}", cure="check the file's permissions and its disk") from error


def _read_tensors(path: Path, digest: str | None) -> tuple[bytes, dict[str, NDArray[Any]]]:
    data = _read(path, MAX_TENSOR_BYTES)
    if _sha256(data) != digest:
        raise BundleCorrupt(
            f"{path.name} is damaged, or is not the file that bundle.json was written for", cure=REBUILD
        )
    try:
        return data, load_tensors(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise BundleCorrupt(f"{path.name} is not a safetensors file: {error}", cure=REBUILD) from error


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")  # one fixed name: killed writes leave no heap behind
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the move itself must outlive a power cut, and in this order
    finally:
        os.close(descriptor)


def _sha256(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
