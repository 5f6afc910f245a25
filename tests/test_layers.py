"""The decoder layers are found where they can be told, and where not the error names the override."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import FAMILIES, tiny_model
from torch import nn

from collectors.layers import find_decoder_layers
from monitor.errors import ModelError

PATHS = {
    "llama": "model.layers",
    "qwen3": "model.layers",
    "gemma3": "model.layers",
    "gpt2": "transformer.h",
    "neox": "gpt_neox.layers",
}


def stack(count: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(2, 2) for _ in range(count))


class Model(nn.Module):
    """Anything with a configuration and lists of layers."""

    def __init__(self, count: int | None, **lists: nn.Module) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=count)
        for name, module in lists.items():
            self.add_module(name, module)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family(family: str, tiny_models: Any) -> None:
    model = tiny_models[family]
    found = find_decoder_layers(model)
    assert (found.path, len(found)) == (PATHS[family], 4)
    assert found.owner is model.get_decoder() or family == "neox"
    assert found[3] is found.layers[3]


@pytest.mark.parametrize("index", [-1, 4, 100])
def test_a_layer_outside_is_refused(index: int, llama: Any) -> None:
    with pytest.raises(ModelError, match="layers 0 to 3") as caught:
        find_decoder_layers(llama)[index]
    assert caught.value.cure


def test_a_wrapper_around_the_model(llama: Any) -> None:
    class Adapter(nn.Module):
        """Wraps as PEFT does: the configuration stays with the model inside."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.base_model = nn.ModuleDict({"model": model})

    assert find_decoder_layers(Adapter(llama)).path == "base_model.model.model.layers"
    assert find_decoder_layers(torch.compile(llama)).path == "_orig_mod.model.layers"  # type: ignore[arg-type]


def test_a_bare_decoder(llama: Any) -> None:
    found = find_decoder_layers(llama.model)
    assert (found.path, found.owner) == ("layers", llama.model)


def test_a_text_configuration_inside_another(tokenizer: Any) -> None:
    import transformers

    text = tiny_model("gemma3", tokenizer).config
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4)
    model = transformers.Gemma3ForConditionalGeneration(config)
    # The vision tower is as deep as the decoder: transformers itself says which is which.
    assert find_decoder_layers(model).path == "model.language_model.layers"


def test_experts_are_no_decoder_layers() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = stack(4)

    assert find_decoder_layers(Model(4, layers=nn.ModuleList(Layer() for _ in range(4)))).path == "layers"


@pytest.mark.parametrize(
    ("model", "listed"),
    [
        (Model(3, left=stack(3), right=stack(3)), "left (3), right (3)"),
        (Model(5, left=stack(3)), "left (3)"),
        (Model(None, left=stack(3)), "left (3)"),
        (Model(3), "(none)"),
    ],
    ids=["two fit", "none fits", "no count", "no lists"],
)
def test_what_can_not_be_told_names_the_override(model: Model, listed: str) -> None:
    with pytest.raises(ModelError) as caught:
        find_decoder_layers(model)
    assert "can't be told" in caught.value.problem and listed in caught.value.problem
    assert "decoder_layers=" in caught.value.cure


def test_the_override_decides() -> None:
    model = Model(3, left=stack(3), right=stack(3))
    found = find_decoder_layers(model, "right")
    assert found.layers is model.right and found.owner is model


@pytest.mark.parametrize("override", ["middle", "", "left.0", "empty"])
def test_a_wrong_override_names_the_right_ones(override: str) -> None:
    with pytest.raises(ModelError) as caught:
        find_decoder_layers(Model(3, left=stack(3), right=stack(3), empty=nn.ModuleList()), override)
    assert repr(override) in caught.value.problem
    assert "left, right" in caught.value.cure
