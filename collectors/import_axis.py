"""An axis bundle from published files: the axis as published, what else a bundle needs measured on the spot.

A published axis comes without roles or styles, so such a bundle has no persona space, its persona axis is the axis
itself, and a poem will look like a persona to it. It projects and it holds; build one to judge with.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from msgspec.structs import replace

from collectors.assemble import project_canaries
from collectors.build import BuildSettings, Rollout, generate_rollouts
from collectors.models import LoadedModel
from collectors.published import read_published
from monitor.axis.bundle import Bundle, BundleInfo, new_bundle
from monitor.axis.catalogue import load_catalogue
from monitor.axis.geometry import unit
from monitor.axis.published import axis_from_published, capping_from_published
from monitor.errors import ConfigurationError

__all__ = ["import_bundle"]

QUESTIONS = 24


def import_bundle(
    loaded: LoadedModel,
    axis_file: Path,
    *,
    layer: int | None = None,
    capping: Path | None = None,
    experiment: str | None = None,
    licence: str = "NOASSERTION",
    sha256: str | None = None,
    decoder_layers: str | None = None,
) -> Bundle:
    """Read, check and complete a published axis.

    Args:
        layer: where to project; by default the middle one, as the paper's figures do.
        capping, experiment: a published capping config and the id of one of its experiments. Without them the floors
            are the default Assistant's 25th percentiles, which is not the paper's threshold: it takes rollouts in role.
        sha256: digest that the axis file must have.

    Raises:
        BundleCorrupt, BundleMismatch, BundleError: the files are unsafe, malformed, or of another model.
        ConfigurationError: no such layer, or an experiment whose layers are not adjacent.
    """
    facts = loaded.facts
    chosen = facts.layers // 2 if layer is None else layer
    if not 0 <= chosen < facts.layers:
        raise ConfigurationError(
            f"layer {chosen} does not exist: the model has layers 0 to {facts.layers - 1}", cure="choose one of these"
        )
    axis = axis_from_published(read_published(axis_file, sha256=sha256), (facts.layers, facts.hidden))
    catalogue, settings = load_catalogue(), BuildSettings()
    asked = [
        Rollout("default", "", "make", i % len(catalogue.defaults), i * len(catalogue.questions) // QUESTIONS)
        for i in range(QUESTIONS)
    ]
    means, _ = generate_rollouts(loaded, catalogue, settings, asked, decoder_layers)
    means = means[np.isfinite(means).all(axis=(1, 2))]
    along = np.einsum("nlh,lh->nl", means, unit(axis))
    floors = np.percentile(along, 25, axis=0)
    hold = (chosen, chosen + 1)
    if capping is not None and experiment is not None:
        plan = capping_from_published(read_published(capping), axis, experiment)
        hold = (plan.layers[0], plan.layers[-1] + 1)
        if plan.layers != tuple(range(*hold)):
            raise ConfigurationError(
                f"experiment {experiment!r} holds layers {list(plan.layers)}, which are not adjacent",
                cure="choose one whose id names a range",
            )
        floors[list(plan.layers)] = plan.floors
    empty = np.zeros((0, facts.hidden))
    info = BundleInfo(
        model=facts,
        layer=chosen,
        hold_layers=hold,
        styles=[],
        roles=[],
        catalogue_version=catalogue.version,
        created=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        licence=licence,
        seed=settings.seed,
        engine={"torch": str(torch.__version__)},
        counts={"responses_default": len(means)},
        figures={"imported": axis_file.name, "default_standard_deviation": float(along[:, chosen].std())},
    )
    tensors = {
        "axis": axis,
        "persona_axis": axis,
        "styles": np.zeros((facts.layers, 0, facts.hidden)),
        "default_mean": means.mean(axis=0),
        "first_component": unit(axis),
        "role_vectors": empty,
        "basis": empty,
        "role_mean": np.zeros(facts.hidden),
        "singular_values": np.zeros(0),
        "floors": floors,
        "residual_norm": np.linalg.norm(means, axis=-1).mean(axis=0),
    }
    draft = new_bundle(tensors, info)
    prompts = [[{"role": "user", "content": catalogue.questions[rollout.question].text}] for rollout in asked[::4]]
    canaries = project_canaries(loaded, draft, prompts, decoder_layers)
    return new_bundle(tensors, replace(draft.info, canaries=canaries))
