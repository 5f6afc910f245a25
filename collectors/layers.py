"""Finds a model's decoder layers. It knows nothing of what is done with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from monitor.errors import ModelError

__all__ = ["DecoderLayers", "find_decoder_layers"]


@dataclass(frozen=True)
class DecoderLayers:
    """The stack of decoder layers, in order.

    Attributes:
        path: its dotted name inside the model.
        owner: the module whose forward runs the stack; it is called with `past_key_values` by keyword.
        layers: the layers; layer `i`'s output is the residual stream after layer `i` (the paper's post-MLP residual).
    """

    path: str
    owner: nn.Module
    layers: nn.ModuleList

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: int) -> nn.Module:
        """Layer `index`, counted from 0.

        Raises:
            ModelError: no such layer.
        """
        if not 0 <= index < len(self.layers):
            raise ModelError(
                f"layer {index} does not exist: {self.path} has layers 0 to {len(self.layers) - 1}",
                cure="choose a layer inside that range, or load the bundle that was made for this model",
            )
        return self.layers[index]


def find_decoder_layers(model: nn.Module, override: str | None = None) -> DecoderLayers:
    """Find the one `ModuleList` that holds as many equal layers as the configuration says.

    Args:
        model: a decoder-only transformers model, also wrapped (PEFT, compiled).
        override: dotted name of the `ModuleList`, for a model in which it can't be told.

    Raises:
        ModelError: none or several fit, or `override` names no layer list; the message names the override.
    """
    modules = dict(model.named_modules())
    if override is not None:
        found = modules.get(override)
        if not isinstance(found, nn.ModuleList) or len(found) == 0:
            raise ModelError(
                f"decoder_layers={override!r} is not a list of layers of {type(model).__name__}",
                cure=f"name one of: {', '.join(_layer_lists(modules)) or '(the model has none)'}",
            )
        return _decoder_layers(modules, override, found)
    count = _layer_count(modules)
    lists = [path for path, size in _layer_lists(modules).items() if size == count]
    # A list inside another one's layers is a part of them: experts, as many as there are layers.
    candidates = [path for path in lists if not any(path.startswith(f"{outer}.") for outer in lists)]
    if len(candidates) > 1:
        # A vision or audio tower may happen to be as deep: the text decoder is the one transformers itself points to.
        get_decoder: Any = getattr(model, "get_decoder", None)
        decoder = get_decoder() if callable(get_decoder) else None
        inside = {id(module) for module in decoder.modules()} if isinstance(decoder, nn.Module) else set()
        candidates = [path for path in candidates if id(modules[path]) in inside] or candidates
    if len(candidates) != 1:
        listed = ", ".join(f"{path} ({size})" for path, size in _layer_lists(modules).items()) or "(none)"
        raise ModelError(
            f"the decoder layers of {type(model).__name__} can't be told: "
            f"{len(candidates)} lists have {count} layers; lists found: {listed}",
            cure='pass decoder_layers="dotted.name.of.the.list" (on the command line: --decoder-layers)',
        )
    found = modules[candidates[0]]
    assert isinstance(found, nn.ModuleList)
    return _decoder_layers(modules, candidates[0], found)


def _layer_count(modules: Mapping[str, nn.Module]) -> int | None:
    """What the outermost configuration says; a wrapper need not have one of its own."""
    for module in modules.values():
        config: Any = getattr(module, "config", None)
        text_config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        count = getattr(text_config, "num_hidden_layers", None)
        if isinstance(count, int):
            return count
    return None


def _layer_lists(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """Every `ModuleList` whose members are of one class, with its length."""
    return {
        path: len(module)
        for path, module in modules.items()
        if isinstance(module, nn.ModuleList) and len(module) > 0 and len({type(layer) for layer in module}) == 1
    }


def _decoder_layers(modules: Mapping[str, nn.Module], path: str, layers: nn.ModuleList) -> DecoderLayers:
    return DecoderLayers(path=path, owner=modules[path.rpartition(".")[0]], layers=layers)
