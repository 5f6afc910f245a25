"""What must hold between a bundle's tensors and its record, and the names of the directions they make.

Pure; it knows the shapes of the table in `monitor.axis.bundle`, and nothing of files or digests.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from monitor.axis.record import REBUILD, BundleInfo
from monitor.errors import BundleCorrupt
from monitor.events import MAX_COORDINATES

__all__ = ["MAX_DIRECTIONS", "Array", "check_tensors", "direction_names"]

MAX_DIRECTIONS = MAX_COORDINATES  # every measured direction travels in every event
MAX_COMPONENTS = 8  # 8 components held 70 % of the variance in the paper's second model (arXiv 2601.10387)
ORTHONORMAL_WITHIN = 1e-3

Array = NDArray[np.float32]


def check_tensors(tensors: Mapping[str, Array], info: BundleInfo) -> None:
    """Check dtypes, shapes, finiteness and what the tensors promise.

    Raises:
        BundleCorrupt: with all problems at once.
    """
    problems = _shape_problems(tensors, info)
    problems += [f"{name} has dtype {t.dtype}, not float32" for name, t in tensors.items() if t.dtype != np.float32]
    problems += [f"{name} is not finite" for name, tensor in tensors.items() if not np.isfinite(tensor).all()]
    if not problems:
        problems = _number_problems(tensors, info)
    if problems:
        raise BundleCorrupt("bad axis bundle: " + "; ".join(problems), cure=REBUILD)


def _shape_problems(tensors: Mapping[str, Array], info: BundleInfo) -> list[str]:
    layers, hidden = info.model.layers, info.model.hidden
    expected: dict[str, tuple[int | None, ...]] = {
        "axis": (layers, hidden),
        "persona_axis": (layers, hidden),
        "styles": (layers, len(info.styles), hidden),
        "default_mean": (layers, hidden),
        "first_component": (layers, hidden),
        "role_vectors": (len(info.roles), hidden),
        "basis": (None, hidden),
        "role_mean": (hidden,),
        "singular_values": (None,),
        "floors": (layers,),
        "residual_norm": (layers,),
    }
    if info.traits:
        expected["traits"] = (len(info.traits), hidden)
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [
        f"{name} has shape {list(tensors[name].shape)}, not {['any' if n is None else n for n in shape]}"
        for name, shape in expected.items()
        if name in tensors and not _fits(tensors[name].shape, shape)
    ]
    if "traits" in tensors and not info.traits:
        problems.append("traits have no names")
    return problems + _info_problems(info)


def _info_problems(info: BundleInfo) -> list[str]:
    layers, problems = info.model.layers, []
    first, end = info.hold_layers
    if info.layer >= layers:
        problems.append(f"layer {info.layer} is outside the model's {layers} layers")
    if not 0 <= first < end <= layers:
        problems.append(f"hold_layers {[first, end]} is no range within the model's {layers} layers")
    for what, names in [("styles", info.styles), ("traits", info.traits), ("roles", info.roles)]:
        if len(set(names)) != len(names):
            problems.append(f"{what} repeat a name")
    if list(info.roles) != sorted(info.roles):
        problems.append("roles are not sorted")
    if (k := 2 + len(info.styles) + len(info.traits)) > MAX_DIRECTIONS:
        problems.append(f"{k} directions with styles and traits are more than the {MAX_DIRECTIONS} an event may carry")
    return problems


def _fits(found: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(found) == len(expected) and all(e in (None, f) for e, f in zip(expected, found, strict=True))


def _number_problems(tensors: Mapping[str, Array], info: BundleInfo) -> list[str]:
    problems = []
    for name in ("axis", "persona_axis", "styles", "traits"):
        if name in tensors and not np.linalg.norm(tensors[name].astype(np.float64), axis=-1).all():
            problems.append(f"{name} is zero somewhere, so it has no direction")
    basis = tensors["basis"].astype(np.float64)
    if not np.allclose(basis @ basis.T, np.eye(len(basis)), atol=ORTHONORMAL_WITHIN):
        problems.append("basis is not orthonormal")
    if len(tensors["singular_values"]) < len(basis):
        problems.append("basis has more components than there are singular values")
    if (tensors["singular_values"] < 0).any() or not (tensors["residual_norm"] > 0).all():
        problems.append("singular values or residual norms are negative or zero")
    if info.readout is not None:
        measured = set(direction_names(info, len(basis)))
        unknown = sorted({*info.readout.coordinates, *info.readout.prompt} - measured)
        problems += [f"the readout uses {name!r}, which the bundle does not measure" for name in unknown]
    return problems


def direction_names(info: BundleInfo, components: int, *, everywhere: bool = False) -> list[str]:
    """Names of the measured directions, at most `MAX_DIRECTIONS`; `everywhere`: only those that all layers have."""
    names = ["assistant_axis", "persona_axis", *(f"style:{name}" for name in info.styles)]
    if everywhere:
        return names
    names += [f"trait:{name}" for name in info.traits]
    return names + [f"pc{i + 1}" for i in range(min(MAX_COMPONENTS, components, MAX_DIRECTIONS - len(names)))]
