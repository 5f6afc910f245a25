"""The paper's published axis and capping configs in Anchorwatch's terms: shapes checked, the sign decided or refused.

It works on numbers that were already read (`collectors.published` reads the `.pt` files, safely) and knows no files.

**The sign.** The paper caps with a *floor* (arXiv 2601.10387): with unit `v` and threshold `t`,
`h <- h - v * min(<h, v> - t, 0)`. The code published with it clamps from *above*:
`h <- h - w * max(<h, w> - cap, 0)`. The two are the same exactly when `w = -v` and `cap = -t`, so a published vector
should point *away* from the Assistant. Had it been stored the other way round, that clamp would push the model away
from its persona: the one mistake here that nobody would see. So each vector is compared with the axis at its layer:

- cosine below -0.5: stored flipped, as the clamp needs it; the plan gets `v = -w`, `t = -cap`;
- cosine above 0.5: refused as ambiguous, unless the caller knows that it is a floor (`stored="towards"`), which is
  then taken as it is;
- in between: refused; a hold along it would not be a hold along this axis.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from monitor.errors import BundleCorrupt, BundleError, BundleMismatch

__all__ = ["CappingPlan", "axis_from_published", "capping_from_published"]

ALONG = 0.5  # least |cosine| with the axis at which a vector counts as the axis, in either direction
FETCH = "fetch the file again from `lu-christina/assistant-axis-vectors`, or make an axis with `anchorwatch axis build`"
_RANGE = re.compile(r"layers_(\d+):(\d+)")

Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class CappingPlan:
    """Floors along the Assistant Axis: hold `<h, vectors[i]> >= floors[i]` at the output of layer `layers[i]`.

    Attributes:
        layers: decoder layers, from 0, ascending, each once.
        vectors: `[n, hidden]`, unit length, pointing *towards* the Assistant.
        floors: `[n]`, raw residual units.
    """

    layers: tuple[int, ...]
    vectors: Array
    floors: Array


class _Vector(Struct):
    layer: int
    vector: Any


class _Intervention(Struct):
    vector: str
    cap: float | None = None  # other experiments of the file may be no capping


class _Experiment(Struct):
    id: str
    interventions: list[_Intervention]


class _Config(Struct):
    vectors: dict[str, _Vector]
    experiments: list[_Experiment]


def axis_from_published(content: object, expected_shape: tuple[int, int]) -> Array:
    """The Assistant Axis `[layers, hidden]` from what `assistant_axis.pt` holds: an array, or a mapping with `axis`.

    Published as mean default minus mean role activation, so it points towards the Assistant; its length is kept. That
    sign can't be seen from the numbers: compare it with an axis of one's own, or re-project known conversations.

    Raises:
        BundleCorrupt: no array there, or one that is not finite, or zero at a layer.
        BundleMismatch: another shape than the model's `(layers, hidden)`.
    """
    if isinstance(content, Mapping):
        if "axis" not in content:
            raise BundleCorrupt(f"a published axis has the key 'axis', this has {_listed(content)}", cure=FETCH)
        content = content["axis"]
    axis = _finite(content, "the published axis")
    if axis.shape != expected_shape:
        raise BundleMismatch(
            f"the published axis has shape {list(axis.shape)}, the model has [layers, hidden] = {list(expected_shape)}",
            cure="take the axis that was published for exactly this model",
        )
    if empty := np.flatnonzero(~_norms(axis).astype(bool)).tolist():
        raise BundleCorrupt(f"the published axis is zero at layers {empty}", cure=FETCH)
    return axis


def capping_from_published(
    content: object, axis: Array, experiment: str, *, stored: Literal["towards", "away"] | None = None
) -> CappingPlan:
    """One experiment of what `capping_config.pt` holds, as floors along the axis; the sign as told above.

    Published vectors need not have unit length; their caps refer to the unit vector, as the published code does. An id
    such as `layers_46:54-p0.25` names a half-open range, 46 to 53, which must be exactly the layers that are held.

    Args:
        content: `{"vectors": {name: {"layer", "vector"}}, "experiments": [{"id", "interventions"}]}`.
        axis: `[layers, hidden]` of the same model, towards the Assistant.
        experiment: its id.
        stored: which way the vectors point, where the caller knows; it must agree with the axis.

    Raises:
        BundleCorrupt: malformed, not finite, a zero vector, or layers that are not those of the id.
        BundleMismatch: another hidden size or number of layers, or a sign that is ambiguous or not the one stated.
        BundleError: no such experiment; the cure lists those there are.
    """
    config = _config(content)
    chosen = [found for found in config.experiments if found.id == experiment]
    if not chosen:
        raise BundleError(
            f"no capping experiment {experiment!r}",
            cure=f"choose one of: {', '.join(found.id for found in config.experiments) or 'none, the file has none'}",
        )
    rows = sorted((_row(config, one, axis, stored) for one in chosen[0].interventions), key=lambda row: row[0])
    layers = tuple(layer for layer, _, _ in rows)
    _check_layers(experiment, layers)
    return CappingPlan(
        layers, np.stack([vector for _, vector, _ in rows]), np.array([floor for _, _, floor in rows], np.float32)
    )


def _config(content: object) -> _Config:
    try:
        return msgspec.convert(content, _Config)
    except msgspec.ValidationError as error:
        raise BundleCorrupt(f"not a published capping config: {error}", cure=FETCH) from error


def _row(
    config: _Config, intervention: _Intervention, axis: Array, stored: Literal["towards", "away"] | None
) -> tuple[int, Array, float]:
    """Layer, unit vector towards the Assistant, floor."""
    name = intervention.vector
    if name not in config.vectors:
        raise BundleCorrupt(f"the capping config has no vector {name!r}", cure=FETCH)
    layer = config.vectors[name].layer
    vector = _finite(config.vectors[name].vector, f"capping vector {name!r}").astype(np.float64)
    if not 0 <= layer < len(axis) or vector.shape != axis[0].shape:
        raise BundleMismatch(
            f"capping vector {name!r} (layer {layer}, shape {list(vector.shape)}) does not fit an axis of shape "
            f"{list(axis.shape)}",
            cure="take the capping config that was published for exactly this model",
        )
    if intervention.cap is None or not np.isfinite(intervention.cap):
        raise BundleCorrupt(f"the cap of {name!r} is missing or not finite", cure=FETCH)
    norm = np.linalg.norm(vector)
    if not norm:
        raise BundleCorrupt(f"capping vector {name!r} is zero", cure=FETCH)
    unit = vector / norm
    along = axis[layer].astype(np.float64)
    sign = _sign(name, float(unit @ along / np.linalg.norm(along)), stored)
    return layer, (sign * unit).astype(np.float32), sign * intervention.cap


def _sign(name: str, cosine: float, stored: Literal["towards", "away"] | None) -> float:
    found = "away" if cosine < -ALONG else "towards" if cosine > ALONG else None
    if found is None:
        raise BundleMismatch(
            f"capping vector {name!r} has cosine {cosine:.2f} with the axis at its layer: its sign is ambiguous",
            cure="check that axis and capping config are of the same model",
        )
    if found != (stored or "away"):
        raise BundleMismatch(
            f"capping vector {name!r} points {found} the Assistant (cosine {cosine:.2f}), "
            + (f"not {stored}" if stored else "where the published clamp from above would push the model off it"),
            cure="check the sign of the axis; if the caps are known to be floors, say that the vectors are stored "
            f"{found!r}",
        )
    return -1.0 if found == "away" else 1.0


def _check_layers(experiment: str, layers: tuple[int, ...]) -> None:
    if not layers:
        raise BundleCorrupt(f"capping experiment {experiment!r} holds nothing", cure=FETCH)
    if len(set(layers)) != len(layers):
        raise BundleCorrupt(f"capping experiment {experiment!r} holds a layer twice: {list(layers)}", cure=FETCH)
    if (named := _RANGE.match(experiment)) and layers != tuple(range(int(named[1]), int(named[2]))):
        raise BundleCorrupt(
            f"capping experiment {experiment!r} says layers {named[1]} to {int(named[2]) - 1}, holds {list(layers)}",
            cure=FETCH,
        )


def _finite(content: object, what: str) -> Array:
    if not isinstance(content, np.ndarray) or content.dtype.kind not in "fiu":
        raise BundleCorrupt(f"{what} is no array of numbers", cure=FETCH)
    with np.errstate(over="ignore"):
        array: Array = content.astype(np.float32)
    if not np.isfinite(array).all():
        raise BundleCorrupt(f"{what} is not finite", cure=FETCH)
    return array


def _norms(rows: Array) -> NDArray[np.float64]:
    return np.asarray(np.linalg.norm(rows.astype(np.float64), axis=-1))


def _listed(content: Mapping[Any, Any]) -> str:
    return ", ".join(repr(key) for key in list(content)[:8]) or "none"
