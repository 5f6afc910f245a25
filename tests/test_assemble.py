"""What a build makes of its rollouts: sums against plain loops, the evidence, the canaries, the layers held."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from tiny import ROLES, Built, small_settings

from collectors.assemble import assemble_bundle, project_canaries
from collectors.build import Rollouts
from collectors.models import LoadedModel
from monitor.axis.bundle import Canary, load_bundle, new_bundle, with_calibration
from monitor.axis.catalogue import Catalogue
from monitor.axis.figures import Evidence, figures
from monitor.axis.geometry import unit, without_question_effects
from monitor.axis.show import verify
from monitor.errors import ConfigurationError, ModelError

pytest_plugins = ["miniature"]


def some(rollouts: Rollouts, keep: list[int]) -> Rollouts:
    return Rollouts(
        [rollouts.rollouts[i] for i in keep],
        [rollouts.means[i] for i in keep],
        [rollouts.texts[i] for i in keep],
        rollouts.reliability,
    )


def plain_mean(rollouts: Rollouts, group: str, **fields: str) -> np.ndarray:
    """[layers, hidden], by a loop."""
    chosen = [
        mean
        for rollout, mean in zip(rollouts.rollouts, rollouts.means, strict=True)
        if rollout.group == group and all(getattr(rollout, field) == value for field, value in fields.items())
    ]
    return np.mean(chosen, axis=0)


def test_the_axis_is_the_default_mean_less_the_mean_of_the_making_roles(built: Built) -> None:
    rollouts, tensors = built.rollouts, built.bundle.tensors
    making = sorted({r.name for r in rollouts.rollouts if r.group == "role" and r.split == "make"})
    assert 0 < len(making) < len(ROLES)
    default = plain_mean(rollouts, "default", split="make")
    rows = [i for i, r in enumerate(rollouts.rollouts) if r.group == "role" and r.split == "make"]
    names = [rollouts.rollouts[i].name for i in rows]
    own = without_question_effects(rollouts.stack(rows), names, [rollouts.rollouts[i].question for i in rows])
    vectors = np.mean([own[[name == role for name in names]].mean(axis=0) for role in making], axis=0)
    np.testing.assert_allclose(tensors["default_mean"], default, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(tensors["axis"], default - vectors, rtol=1e-3, atol=1e-4)
    for place, role in enumerate(built.bundle.info.roles):
        if role in making:
            mine = own[[name == role for name in names], built.bundle.layer].mean(axis=0)
            np.testing.assert_allclose(tensors["role_vectors"][place], mine, rtol=1e-3, atol=1e-4)


def test_nothing_of_the_other_splits_makes_the_axis(loaded: LoadedModel, catalogue: Catalogue, built: Built) -> None:
    rollouts = built.rollouts
    garbled = replace(
        rollouts,
        means=[m if r.split == "make" else m + 100 for r, m in zip(rollouts.rollouts, rollouts.means, strict=True)],
    )
    bundle, _ = assemble_bundle(loaded, catalogue, small_settings(), garbled, layer=1)
    for name in ("axis", "persona_axis", "styles", "default_mean", "floors", "residual_norm"):
        np.testing.assert_array_equal(bundle.tensors[name], built.bundle.tensors[name])


def test_the_persona_axis_is_orthogonal_to_every_style_at_every_layer(built: Built) -> None:
    tensors = built.bundle.tensors
    assert tensors["styles"].shape[:2] == (4, 2)
    for layer in range(4):
        cosines = unit(tensors["styles"][layer]) @ unit(tensors["persona_axis"][layer])
        np.testing.assert_allclose(cosines, 0.0, atol=1e-5)


def test_a_style_is_what_the_default_assistant_gains_in_it(built: Built) -> None:
    assert built.bundle.info.styles == ["chat", "poem"]
    for place, style in enumerate(("chat", "poem")):
        gained = plain_mean(built.rollouts, "style", name=style, split="make") - plain_mean(
            built.rollouts, "default", split="make"
        )
        np.testing.assert_allclose(built.bundle.tensors["styles"][:, place], gained, rtol=1e-3, atol=1e-4)


def test_components_are_signed_like_the_axis(built: Built) -> None:
    tensors, layer = built.bundle.tensors, built.bundle.layer
    for first, axis in zip(tensors["first_component"], tensors["axis"], strict=True):
        assert first @ axis > 0
    assert (tensors["basis"] @ tensors["axis"][layer] >= 0).all()
    np.testing.assert_allclose(tensors["basis"][0], tensors["first_component"][layer], atol=1e-5)


def test_floors_are_the_25th_percentile_of_the_making_rollouts(built: Built) -> None:
    made = np.stack(
        [m for r, m in zip(built.rollouts.rollouts, built.rollouts.means, strict=True) if r.split == "make"]
    )
    for layer in range(4):
        along = made[:, layer] @ unit(built.bundle.tensors["axis"][layer])
        assert built.bundle.tensors["floors"][layer] == pytest.approx(np.percentile(along, 25), rel=1e-3, abs=1e-4)
        assert np.mean(along < built.bundle.tensors["floors"][layer]) == pytest.approx(0.25, abs=1 / len(along))


def test_evidence_holds_the_projections_of_every_response_that_made_nothing(built: Built) -> None:
    evidence = Evidence.from_arrays(built.responses)
    kept = [i for i, rollout in enumerate(built.rollouts.rollouts) if rollout.split != "make"]
    assert len(evidence.group) == len(kept) > 0
    for row, i in enumerate(kept):
        for values, name in ((evidence.axis, "axis"), (evidence.persona_axis, "persona_axis")):
            direction = unit(built.bundle.tensors[name].astype(np.float64))
            oracle = np.sum(built.rollouts.means[i] * direction, axis=1)
            np.testing.assert_allclose(values[row], oracle, rtol=1e-3, atol=1e-3)
    assert evidence.random.shape[1] == 200 and evidence.shuffled.shape[1] == 50


def test_every_figure_is_recomputed_from_what_was_committed(built: Built) -> None:
    assert verify(load_bundle(built.directory), built.directory) == []
    again = figures(
        built.bundle.tensors, Evidence.from_arrays(built.responses), built.bundle.info.roles, built.bundle.layer
    )
    assert again["layer"] == built.bundle.layer


def test_the_layer_is_the_one_asked_for(loaded: LoadedModel, catalogue: Catalogue, built: Built) -> None:
    for layer in range(4):
        bundle, _ = assemble_bundle(loaded, catalogue, small_settings(), built.rollouts, layer=layer)
        assert bundle.layer == layer
        first, end = bundle.info.hold_layers
        assert layer <= first < end <= 4  # what the tap reads comes before what is held


@pytest.mark.parametrize("layer", [-1, 4])
def test_a_layer_that_the_model_lacks_is_refused(
    loaded: LoadedModel, catalogue: Catalogue, built: Built, layer: int
) -> None:
    with pytest.raises(ConfigurationError, match="layers 0 to 3") as caught:
        assemble_bundle(loaded, catalogue, small_settings(), built.rollouts, layer=layer)
    assert caught.value.cure


@pytest.mark.parametrize("group", ["default", "role", "style"])
@pytest.mark.parametrize("part", ["make", "choose", "report"])
def test_a_split_without_responses_is_told_by_name(
    loaded: LoadedModel, catalogue: Catalogue, built: Built, group: str, part: str
) -> None:
    keep = [i for i, r in enumerate(built.rollouts.rollouts) if (r.group, r.split) != (group, part)]
    with pytest.raises(ModelError, match=f"{group} to {part}") as caught:
        assemble_bundle(loaded, catalogue, small_settings(), some(built.rollouts, keep))
    assert caught.value.cure


def test_provenance_says_what_was_done(built: Built, loaded: LoadedModel, catalogue: Catalogue) -> None:
    info = built.bundle.info
    assert info.model == loaded.facts and info.catalogue_version == catalogue.version
    assert info.generation["tokens"] == 8 and info.seed == small_settings().seed
    assert info.counts["roles"] == len(ROLES)
    assert info.counts["responses_role"] == sum(r.group == "role" for r in built.rollouts.rollouts)
    settled = sum(value >= 0.9 for value in built.rollouts.reliability.values())
    assert info.counts["roles_settled"] == settled
    assert {"python", "torch", "transformers", "anchorwatch"} <= set(info.engine)
    assert info.readout is None and info.calibration is None


# Canaries


def test_canaries_project_again_to_what_they_were(loaded: LoadedModel, built: Built) -> None:
    canaries = built.bundle.info.canaries
    assert len(canaries) >= 6
    again = project_canaries(loaded, built.bundle)
    for before, after in zip(canaries, again, strict=True):
        assert after.messages == before.messages
        assert after.continuation_token_ids == before.continuation_token_ids
        assert after.projection == pytest.approx(before.projection, rel=1e-6, abs=1e-6)


def test_a_canary_is_the_mean_projection_of_its_continuation(loaded: LoadedModel, built: Built) -> None:
    direction = built.bundle.unit_axis()
    for canary in built.bundle.info.canaries:
        prompt = loaded.tokenizer.apply_chat_template(canary.messages, add_generation_prompt=True, return_dict=False)
        assert canary.continuation_token_ids is not None and len(canary.continuation_token_ids) == canary.tokens
        ids = torch.tensor([prompt + canary.continuation_token_ids])
        seen: list[torch.Tensor] = []
        handle = loaded.model.model.layers[built.bundle.layer].register_forward_hook(
            lambda _module, _args, out, seen=seen: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            loaded.model(ids)
        handle.remove()
        hidden = seen[0].reshape(ids.shape[1], -1)[len(prompt) :].double().numpy()
        assert canary.projection == pytest.approx(float((hidden @ direction).mean()), rel=1e-4, abs=1e-4)


def test_canaries_do_not_depend_on_the_calibration(loaded: LoadedModel, built: Built) -> None:
    calibrated = with_calibration(built.bundle, None, {"note": "anything"})
    assert calibrated.id != built.bundle.id
    assert [c.projection for c in project_canaries(loaded, calibrated)] == [
        c.projection for c in project_canaries(loaded, built.bundle)
    ]


def test_a_canary_may_carry_text_instead_of_ids(loaded: LoadedModel, built: Built) -> None:
    text = "Tell me a story about the sea."
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    asked = [{"role": "user", "content": "Hi"}]
    canaries = [
        Canary(messages=asked, projection=0.0, tokens=len(ids), text=text),
        Canary(messages=asked, projection=0.0, tokens=len(ids), continuation_token_ids=ids),
    ]
    info = msgspec.structs.replace(built.bundle.info, canaries=canaries)
    from_text, from_ids = project_canaries(loaded, new_bundle(built.bundle.tensors, info))
    assert from_text == from_ids
