"""`bundle.json`: what an axis bundle says about itself, and its one canonical form on disk.

It knows nothing of tensors or files. The canonical form is UTF-8 JSON with sorted keys, indented by one space, and a
final newline; `checksum` is the sha256 of that form with the `checksum` key left out. Because a reader accepts no
other form, a single changed byte is always seen, and equal records are equal bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta, Struct

from monitor.axis.readout import Readout
from monitor.errors import BundleCorrupt

__all__ = ["SCHEMA_VERSION", "BundleInfo", "Canary", "ModelFacts", "decode_info", "encode_info", "seal"]

SCHEMA_VERSION = "1.0"
REBUILD = "restore the bundle from where it came from, or rebuild it with `anchorwatch axis build`"
_RFC3339 = r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)$"

Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Count = Annotated[int, Meta(ge=1)]
Index = Annotated[int, Meta(ge=0)]


class ModelFacts(Struct, frozen=True, kw_only=True):
    """What must be the same in the model a bundle was made from and the model it is used with.

    Attributes:
        name: for people; two names for the same weights are no mismatch.
        weights_sha256, tokenizer_sha256, chat_template_sha256: digests as the collector computes them; empty where
            there is nothing to digest (a model without a chat template).
        layers: number of decoder layers.
        hidden: width of the residual stream.
        dtype: dtype the model ran in, such as `bfloat16`.
    """

    name: Name
    weights_sha256: str
    tokenizer_sha256: str
    chat_template_sha256: str
    layers: Count
    hidden: Count
    dtype: str


class Canary(Struct, frozen=True, kw_only=True):
    """A fixed conversation and continuation with the projection it had when the bundle was made.

    Attributes:
        messages: chat messages, `{"role", "content"}`.
        continuation_token_ids, text: the assistant's continuation, exactly one of the two.
        projection: its mean projection on the unit Assistant Axis at the chosen layer; raw residual units.
        tokens: number of tokens averaged.
    """

    messages: list[dict[str, str]]
    projection: float
    tokens: Count
    continuation_token_ids: list[Index] | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        if (self.continuation_token_ids is None) == (self.text is None):
            raise ValueError("a canary has either continuation_token_ids or text")


class BundleInfo(Struct, frozen=True, kw_only=True):
    """Provenance and meaning of a bundle's tensors. Unknown fields are ignored; another major `schema` is refused.

    Attributes:
        schema: version of this format, `major.minor`.
        model: the model it was made from.
        layer: the chosen decoder layer, from 0; its output is what is projected.
        hold_layers: layers that capping holds, half open: `(first, last + 1)`.
        styles, traits: names in the order of the tensors of the same name.
        roles: names in the order of `role_vectors`, sorted.
        engine: versions of what made it, such as `{"torch": "2.13.0"}`.
        catalogue_version: version of the roles, questions and style requests.
        counts: numbers of roles, questions, responses, tokens …
        generation: sampling settings.
        figures: separation by layer, report figures, controls; any JSON.
        readout: what the detector reads; None until calibrated.
        calibration: frozen baseline and boundaries; any JSON, None until calibrated.
        canaries: fixed conversations that show whether the axis still measures the same.
        created: RFC 3339.
        licence: of the bundle, SPDX.
        seed: of everything drawn while it was made.
        tensors_sha256: of `bundle.safetensors`.
        responses_sha256: of `responses.safetensors`, where that evidence was kept.
        checksum: of this record without this field.
    """

    model: ModelFacts
    layer: Index
    hold_layers: tuple[Index, Index]
    styles: list[Name]
    roles: list[Name]
    catalogue_version: str
    created: Annotated[str, Meta(pattern=_RFC3339)]
    licence: str
    seed: int
    traits: list[Name] = []
    engine: dict[str, str] = {}
    counts: dict[str, int] = {}
    generation: dict[str, Any] = {}
    figures: dict[str, Any] = {}
    readout: Readout | None = None
    calibration: dict[str, Any] | None = None
    canaries: list[Canary] = []
    schema: str = SCHEMA_VERSION
    tensors_sha256: Digest | None = None
    responses_sha256: Digest | None = None
    checksum: Digest | None = None


def seal(info: BundleInfo, tensors_sha256: str) -> BundleInfo:
    """`info` with the digest of its tensors and its own checksum.

    Raises:
        BundleCorrupt: a field has the wrong type, or a number is not finite (JSON can't carry it).
    """
    info = msgspec.structs.replace(info, tensors_sha256=tensors_sha256, checksum=None)
    fields = msgspec.to_builtins(info, enc_hook=_plain)
    if problems := [f"{where} is not finite" for where in _not_finite(fields)]:
        raise BundleCorrupt("; ".join(problems), cure="leave out figures that could not be computed")
    # A round trip through JSON: what was built in memory is then checked and shaped as what a reader will see.
    record: dict[str, Any] = msgspec.json.decode(_canonical(fields))
    record["checksum"] = _checksum(record)
    return _convert(record)


def encode_info(info: BundleInfo) -> bytes:
    """The canonical bytes of a sealed record: what `bundle.json` holds."""
    return _canonical(msgspec.to_builtins(info))


def decode_info(data: bytes) -> BundleInfo:
    """Read `bundle.json`.

    Raises:
        BundleCorrupt: not JSON, not in canonical form, a wrong checksum, another major schema, or an ill-typed field.
    """
    try:
        record = msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BundleCorrupt(f"bundle.json is not JSON: {error}", cure=REBUILD) from error
    if not isinstance(record, dict):
        raise BundleCorrupt("bundle.json is not a JSON object", cure=REBUILD)
    if not _intact(record, data):
        raise BundleCorrupt(
            "bundle.json was changed after it was written: its checksum does not match",
            cure=f"{REBUILD}; to change a calibration use `anchorwatch calibrate`, not an editor",
        )
    schema = str(record.get("schema"))
    if schema.split(".", 1)[0] != SCHEMA_VERSION.split(".", 1)[0]:
        raise BundleCorrupt(
            f"bundle schema {schema!r} is not {SCHEMA_VERSION.split('.', 1)[0]}.x",
            cure="use the version of Anchorwatch that made the bundle, or rebuild it",
        )
    info = _convert(record)
    if info.tensors_sha256 is None:
        raise BundleCorrupt("bundle.json does not say which tensors it belongs to", cure=REBUILD)
    return info


def _plain(value: object) -> object:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()  # figures come straight out of numpy
    raise TypeError(f"{type(value).__name__} has no place in bundle.json")


def _convert(record: Mapping[str, Any]) -> BundleInfo:
    try:
        return msgspec.convert(record, BundleInfo)
    except msgspec.ValidationError as error:
        raise BundleCorrupt(f"bundle.json: {error}", cure=REBUILD) from error


def _canonical(record: Mapping[str, Any]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(record, order="sorted"), indent=1) + b"\n"


def _checksum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical({k: v for k, v in record.items() if k != "checksum"})).hexdigest()


def _intact(record: Mapping[str, Any], data: bytes) -> bool:
    try:
        return record.get("checksum") == _checksum(record) and _canonical(record) == data
    except (msgspec.MsgspecError, ValueError, OverflowError, TypeError, RecursionError):
        return False  # read as JSON, but nothing that the canonical writer could have written


def _not_finite(value: object, where: str = "") -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield where
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _not_finite(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _not_finite(item, f"{where}[{index}]")
