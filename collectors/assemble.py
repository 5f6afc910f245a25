"""From rollouts to an axis bundle: the arithmetic of the axis, its evidence, its canaries and its provenance.

It generates nothing but the canaries' projections; it knows how rollouts are split, not how they were collected.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from collectors.build import BuildSettings, Rollouts
from collectors.models import LoadedModel
from collectors.spans import encode_prompt, response_tokens, special_token_ids, stop_token_ids
from collectors.tap import Tap
from monitor.axis.bundle import Bundle, BundleInfo, Canary, new_bundle
from monitor.axis.catalogue import Catalogue
from monitor.axis.figures import GROUPS, SPLITS, Evidence, choose_layer, figures
from monitor.axis.geometry import (
    assistant_axis,
    covariance_matched_directions,
    persona_space,
    project_out,
    unit,
    without_question_effects,
)
from monitor.errors import ConfigurationError, ModelError

__all__ = ["assemble_bundle", "project_canaries"]

Floats = NDArray[np.floating]
COMPONENTS = 8
RANDOM_CONTROLS = 200
SHUFFLED_CONTROLS = 50
# Share of the depth at which the paper's models are held: Qwen 46-53 of 64, Llama 56-71 of 80.
HOLD_SHARE = (0.72, 0.83)


def assemble_bundle(
    loaded: LoadedModel,
    catalogue: Catalogue,
    settings: BuildSettings,
    rollouts: Rollouts,
    *,
    layer: int | None = None,
    decoder_layers: str | None = None,
    licence: str = "Apache-2.0",
) -> tuple[Bundle, dict[str, NDArray[Any]]]:
    """Make the bundle and its evidence.

    Args:
        rollouts: of all three splits.
        layer: use this layer instead of the one the choose split prefers.

    Raises:
        ConfigurationError: no such layer.
        ModelError: a split has no responses of the default Assistant, of roles, or of a style.

    Returns:
        The bundle, not calibrated yet, and the arrays of its `responses.safetensors`.
    """
    _check(loaded, rollouts, layer)
    roles = sorted({rollout.name for rollout in rollouts.rollouts if rollout.group == "role"})
    styles = sorted({rollout.name for rollout in rollouts.rollouts if rollout.group == "style"})
    known = {rollout.name: rollout.split for rollout in rollouts.rollouts if rollout.group == "role"}
    role_split = {role: known[role] for role in roles}
    making = [role for role in roles if role_split[role] == "make"]

    default_mean = rollouts.stack(rollouts.where("default", split="make")).mean(axis=0)
    vectors = _role_vectors(rollouts, roles)
    axis = assistant_axis(default_mean, vectors[[roles.index(role) for role in making]])
    style_directions = np.stack(
        [
            rollouts.stack(rollouts.where("style", name=style, split="make")).mean(axis=0) - default_mean
            for style in styles
        ],
        axis=1,
    )  # [layers, styles, hidden]
    persona_axis = project_out(axis, style_directions)

    shaping = [i for i, role in enumerate(roles) if role_split[role] != "report"]
    evidence = _evidence(rollouts, axis, persona_axis, roles, styles, role_split, _alignment(axis, vectors[shaping]))
    chosen = choose_layer(evidence) if layer is None else layer
    evidence = _with_controls(evidence, rollouts, chosen, settings.seed)
    space = persona_space(vectors[:, chosen], COMPONENTS, axis[chosen])
    made = rollouts.stack([i for i, rollout in enumerate(rollouts.rollouts) if rollout.split == "make"])
    tensors: dict[str, NDArray[Any]] = {
        "axis": axis,
        "persona_axis": persona_axis,
        "styles": style_directions,
        "default_mean": default_mean,
        "first_component": np.stack([persona_space(vectors[:, i], 1, axis[i]).basis[0] for i in range(len(axis))]),
        "role_vectors": vectors[:, chosen],
        "basis": space.basis,
        "role_mean": space.mean,
        "singular_values": space.singular_values,
        # The paper's threshold: the 25th percentile of projections over the rollouts.
        "floors": np.percentile(np.einsum("nlh,lh->nl", made, unit(axis)), 25, axis=0),
        "residual_norm": np.linalg.norm(rollouts.stack(rollouts.where("default", split="make")), axis=-1).mean(axis=0),
    }
    stated = {name: np.asarray(tensor, dtype=np.float32) for name, tensor in tensors.items()}
    layers = loaded.facts.layers
    first = min(max(chosen, round(HOLD_SHARE[0] * layers)), layers - 1)
    hold = (first, max(first + 1, round(HOLD_SHARE[1] * layers)))
    info = BundleInfo(
        model=loaded.facts,
        layer=chosen,
        hold_layers=hold,
        styles=styles,
        roles=roles,
        catalogue_version=catalogue.version,
        created=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        licence=licence,
        seed=settings.seed,
        engine={
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "transformers": version("transformers"),
            "anchorwatch": version("anchorwatch"),
        },
        counts=_counts(rollouts, roles, settings),
        generation=asdict(settings),
        figures=figures(stated, evidence, roles, chosen),
    )
    arrays = evidence.arrays()
    draft = new_bundle(tensors, info, arrays)
    canaries = project_canaries(loaded, draft, _canary_messages(catalogue, roles), decoder_layers)
    return new_bundle(tensors, msgspec.structs.replace(draft.info, canaries=canaries), arrays), arrays


def _check(loaded: LoadedModel, rollouts: Rollouts, layer: int | None) -> None:
    layers = loaded.facts.layers
    if layer is not None and not 0 <= layer < layers:
        raise ConfigurationError(
            f"layer {layer} does not exist: the model has layers 0 to {layers - 1}", cure="choose one of these"
        )
    held = {(rollout.group, rollout.split) for rollout in rollouts.rollouts}
    if missing := [f"{group} to {split}" for group in GROUPS for split in SPLITS if (group, split) not in held]:
        raise ModelError(
            f"no responses are left of: {', '.join(missing)}",
            cure="use more roles, or read the responses: the model said nothing, or the judge found nothing in role",
        )


def _role_vectors(rollouts: Rollouts, roles: Sequence[str]) -> Floats:
    """Each role's mean response [roles, layers, hidden], without what the questions that it was asked add.

    Question effects are estimated within a split, so that no split's responses reach into another's vectors.
    """
    vectors: dict[str, Floats] = {}
    for part in SPLITS:
        indices = rollouts.where("role", split=part)
        names = [rollouts.rollouts[i].name for i in indices]
        own = without_question_effects(rollouts.stack(indices), names, [rollouts.rollouts[i].question for i in indices])
        for role in set(names):
            vectors[role] = own[[i for i, name in enumerate(names) if name == role]].mean(axis=0)
    return np.stack([vectors[role] for role in roles])


def _alignment(axis: Floats, vectors: Floats) -> Floats:
    """Cosine of the axis with the first component of `vectors` [roles, layers, hidden], [layers]."""
    pairs = zip(axis, np.moveaxis(vectors, 1, 0), strict=True)
    return np.array([unit(one) @ persona_space(many, 1, one).basis[0] for one, many in pairs], dtype=np.float32)


def _counts(rollouts: Rollouts, roles: Sequence[str], settings: BuildSettings) -> dict[str, int]:
    groups = Counter(rollout.group for rollout in rollouts.rollouts)
    settled = sum(value >= settings.settled for value in rollouts.reliability.values())
    return {"roles": len(roles), "roles_settled": settled, **{f"responses_{k}": n for k, n in sorted(groups.items())}}


def _evidence(
    rollouts: Rollouts,
    axis: Floats,
    persona_axis: Floats,
    roles: Sequence[str],
    styles: Sequence[str],
    role_split: dict[str, str],
    alignment: Floats,
) -> Evidence:
    chosen = [i for i, rollout in enumerate(rollouts.rollouts) if rollout.split != "make"]
    kept = [rollouts.rollouts[i] for i in chosen]
    means = rollouts.stack(chosen)
    names = {"role": roles, "style": styles}
    return Evidence(
        group=np.array([GROUPS.index(rollout.group) for rollout in kept], dtype=np.int16),
        split=np.array([SPLITS.index(rollout.split) for rollout in kept], dtype=np.int16),
        name=np.array([names[r.group].index(r.name) if r.group in names else -1 for r in kept], dtype=np.int16),
        question=np.array([rollout.question for rollout in kept], dtype=np.int16),
        axis=np.einsum("nlh,lh->nl", means, unit(axis)).astype(np.float32),
        persona_axis=np.einsum("nlh,lh->nl", means, unit(persona_axis)).astype(np.float32),
        random=np.zeros((0, 0), np.float16),
        shuffled=np.zeros((0, 0), np.float16),
        role_split=np.array([SPLITS.index(role_split[role]) for role in roles], dtype=np.int16),
        alignment=alignment,
    )


def _with_controls(evidence: Evidence, rollouts: Rollouts, layer: int, seed: int) -> Evidence:
    """Project the report responses on directions that know nothing, or nothing true."""
    making = [i for i, r in enumerate(rollouts.rollouts) if r.split == "make" and r.group in ("default", "role")]
    made = np.stack([rollouts.means[i][layer] for i in making]).astype(np.float64)
    is_default = np.array([rollouts.rollouts[i].group == "default" for i in making])
    random_directions = covariance_matched_directions(made, RANDOM_CONTROLS, seed)
    generator = np.random.default_rng(seed + 1)
    shuffled = []
    for _ in range(SHUFFLED_CONTROLS):
        label = generator.permutation(is_default)
        shuffled.append(made[label].mean(axis=0) - made[~label].mean(axis=0))
    report = np.stack(
        [mean[layer] for mean, r in zip(rollouts.means, rollouts.rollouts, strict=True) if r.split == "report"]
    )
    # Centred, so that float16 keeps enough digits of each projection; ranks are all that is asked of them.
    report = report - report.mean(axis=0)
    return replace(
        evidence,
        random=(report @ random_directions.T).astype(np.float16),
        shuffled=(report @ unit(np.stack(shuffled)).T).astype(np.float16),
    )


def _canary_messages(catalogue: Catalogue, roles: Sequence[str]) -> list[list[dict[str, str]]]:
    """Eight fixed prompts that span the axis: the default Assistant and roles from both ends of the alphabet."""
    asked = [catalogue.questions[i * len(catalogue.questions) // 8].text for i in range(8)]
    systems = [None, "", None, "", *(catalogue.roles[roles[i * (len(roles) - 1) // 3]][0] for i in range(4))]
    return [
        [*([] if system is None else [{"role": "system", "content": system}]), {"role": "user", "content": question}]
        for system, question in zip(systems, asked, strict=True)
    ]


def project_canaries(
    loaded: LoadedModel,
    bundle: Bundle,
    prompts: Sequence[list[dict[str, str]]] | None = None,
    decoder_layers: str | None = None,
) -> list[Canary]:
    """Project fixed conversations, teacher-forced: the bundle's own canaries again, or new ones.

    Args:
        prompts: make new canaries from these prompts, each with a greedy continuation of at most 32 tokens; None
            projects the bundle's canaries' own continuations again.
    """
    tokenizer, model = loaded.tokenizer, loaded.model
    stop, special = stop_token_ids(tokenizer, model.generation_config), special_token_ids(tokenizer)
    vector = torch.from_numpy(bundle.unit_axis().copy())[:, None]
    made: list[Canary] = []
    with torch.inference_mode(), Tap(model, {bundle.layer: vector}, decoder_layers=decoder_layers) as tap:
        for messages, known in (
            [(c.messages, c.continuation_token_ids or _encoded(tokenizer, c)) for c in bundle.info.canaries]
            if prompts is None
            else [(messages, None) for messages in prompts]
        ):
            prompt = encode_prompt(tokenizer, messages)
            ids = torch.tensor([prompt], device=model.device)
            if known is None:
                out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False)
                continuation = out[0, len(prompt) :].tolist()
                continuation = continuation[: response_tokens(continuation, stop, special)[0]]
            else:
                continuation = known
            if not continuation:
                continue
            whole = torch.tensor([prompt + continuation], device=model.device)
            with tap.record(whole.shape[1]) as recording:
                model(whole)
            projections = recording.values[bundle.layer][0, len(prompt) :, 0].double().cpu().numpy()
            made.append(
                Canary(
                    messages=messages,
                    continuation_token_ids=continuation,
                    projection=float(projections.mean()),
                    tokens=len(continuation),
                )
            )
    return made


def _encoded(tokenizer: Any, canary: Canary) -> list[int]:
    return list(tokenizer(canary.text, add_special_tokens=False)["input_ids"])
