"""One generate call: what it was asked, and where the values of each response's tokens lie in its recording.

It knows how transformers lays out prompts, positions and beams, and nothing of bundles, identities or events.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collectors.spans import stop_token_ids
from collectors.tap import Recording

__all__ = ["Gathered", "GenerateCall", "adapted", "gather", "read_call", "sequences_of"]


@dataclass(frozen=True)
class GenerateCall:
    """What one generate call was asked.

    Attributes:
        ids: the input [rows, start], as far as it is part of the sequences that come back; None where it is embedded.
        mask: attention mask [rows, width], or None.
        rows: conversations asked for.
        start: columns of the returned sequences that stand before the generated ones.
        width: absolute position of the first generated token; more than `start` where the cache holds the beginning.
        limit: most tokens that can be generated.
        beams: number of beams; 1 without beam search.
        stop: ids that end a response.
        wants_dict: whether the caller asked for a dict of outputs.
        compile_config: how transformers is to compile the decoding, where that was said.
        supported: false for ways of generating in which the recording can't be trusted.
    """

    ids: Tensor | None
    mask: Tensor | None
    rows: int
    start: int
    width: int
    limit: int
    beams: int
    stop: frozenset[int]
    wants_dict: bool
    compile_config: Any
    supported: bool

    def prompt(self, row: int) -> list[int] | None:
        """The whole prompt's ids without padding; None where only its end was given, or only embeddings."""
        if self.ids is None or self.start < self.width:
            return None
        ids = self.ids[row]
        return list((ids if self.mask is None else ids[self.mask[row].bool()]).tolist())


def read_call(model: Any, tokenizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GenerateCall:
    """Read the arguments of `model.generate(*args, **kwargs)`, with transformers' own precedence."""
    given = args[0] if args else None
    for name in ("inputs", "input_ids"):
        given = kwargs.get(name) if given is None else given
    config = args[1] if len(args) > 1 else kwargs.get("generation_config")

    def setting(name: str, otherwise: Any = None) -> Any:
        values = (kwargs.get(name), getattr(config, name, None), getattr(model.generation_config, name, None))
        return next((value for value in values if value is not None), otherwise)

    embeds = kwargs.get("inputs_embeds")
    mask = kwargs.get("attention_mask")
    start = given.shape[1] if given is not None else 0 if embeds is not None else 1  # else a lone beginning token
    width = embeds.shape[1] if embeds is not None else start
    if embeds is None and mask is not None and kwargs.get("past_key_values") is not None:
        width = max(width, mask.shape[1])
    limit = setting("max_new_tokens")
    if limit is None:
        longest = setting("max_length")
        limit = 20 if longest is None else max(longest - start, 0)  # 20 is transformers' own default
    stop = stop_token_ids(
        tokenizer, SimpleNamespace(eos_token_id=setting("eos_token_id"), pad_token_id=setting("pad_token_id"))
    )
    prompt = given if given is not None else embeds
    cached = setting("use_cache", True)
    return GenerateCall(
        ids=given,
        mask=mask,
        rows=1 if prompt is None else int(prompt.shape[0]),
        start=int(start),
        width=int(width),
        limit=int(limit),
        beams=int(setting("num_beams", 1)),
        stop=stop,
        wants_dict=bool(setting("return_dict_in_generate", False)),
        compile_config=setting("compile_config"),
        # Guidance feeds a second prompt; without a cache it can't be told from the first. The others run loops of
        # their own.
        supported=not (
            kwargs.get("custom_generate") is not None
            or setting("cache_implementation") == "paged"
            or (not cached and setting("guidance_scale", 1) != 1)
        ),
    )


def adapted(
    call: GenerateCall, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments, as far as they must change so that the call can be followed; the tokens stay the same.

    Only a dict of outputs says which beam each token came from; and a graph that must not break can't have hooks.
    """
    changes: dict[str, Any] = {"return_dict_in_generate": True} if call.beams > 1 else {}
    if call.compile_config is not None and call.compile_config.fullgraph:
        changes["compile_config"] = copy.copy(call.compile_config)
        changes["compile_config"].fullgraph = False
    config = args[1] if len(args) > 1 else kwargs.get("generation_config")
    if config is None or not changes:
        return args, kwargs | changes
    kwargs = {name: value for name, value in kwargs.items() if name not in changes}
    config = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(config, name, value)
    if len(args) > 1:
        return (args[0], config, *args[2:]), kwargs
    return args, kwargs | {"generation_config": config}


def sequences_of(call: GenerateCall, output: Any) -> Tensor | None:
    """The returned ids [responses, columns]; None where they do not begin with the input: places would differ then."""
    sequences = output if isinstance(output, Tensor) else output.sequences
    if sequences.dim() != 2 or len(sequences) % call.rows:
        return None
    if call.ids is not None:
        asked = call.ids.to(sequences.device).repeat_interleave(len(sequences) // call.rows, dim=0)
        if not torch.equal(sequences[:, : call.start], asked):
            return None
    return sequences


@dataclass(frozen=True)
class Gathered:
    """What one call recorded, by response; values that were never recorded are NaN.

    Attributes:
        prompt: at the last prompt token, [responses, k].
        spoken: at each generated token, [responses, generated, k].
        moved: where holding moved the token, [responses, generated].
        followed: tokens from which another one was generated; without beams all, [responses, generated].
    """

    prompt: NDArray[np.float32]
    spoken: NDArray[np.float32]
    moved: NDArray[np.bool_]
    followed: NDArray[np.bool_]


def gather(call: GenerateCall, recording: Recording, layer: int, output: Any, sequences: Tensor) -> Gathered:
    """Copy each response's values off the device, once."""
    values = recording.values[layer]
    device = values.device
    responses, generated = len(sequences), sequences.shape[1] - call.start
    moved = torch.zeros(values.shape[:2], dtype=torch.bool, device=device)
    for at_layer in recording.moved.values():
        moved[:, : at_layer.shape[1]] |= at_layer.to(device)[:, : moved.shape[1]]
    columns = torch.arange(call.width, call.width + generated, device=device).expand(responses, -1)
    row_of = torch.arange(responses, device=device)[:, None].expand(responses, generated)
    prompt_row = torch.arange(responses, device=device)
    followed = torch.ones(responses, generated, dtype=torch.bool, device=device)
    beam_indices = None if isinstance(output, Tensor) else getattr(output, "beam_indices", None)
    if call.beams > 1:
        if beam_indices is None:
            raise ValueError("beam search did not say which beams its tokens came from")
        # A beam's token `t` was fed in the row from which its token `t + 1` was then chosen.
        chosen = torch.full((responses, generated), -1, dtype=torch.long, device=device)
        known = beam_indices.to(device)[:, 1 : generated + 1]
        chosen[:, : known.shape[1]] = known
        followed = chosen >= 0
        row_of = chosen.clamp(min=0)
        prompt_row = beam_indices.to(device)[:, 0].clamp(min=0)
    last = torch.full((responses,), call.width - 1, device=device)
    if call.mask is not None:  # padded on the right: the last prompt token stands before the padding
        places = torch.arange(call.mask.shape[1], device=call.mask.device)
        last = (call.mask * places).argmax(dim=1).to(device).repeat_interleave(responses // call.rows)
    recorded = columns < values.shape[1]
    columns = columns.clamp(max=values.shape[1] - 1)
    spoken = torch.where(recorded[..., None], values[row_of, columns], torch.nan)
    packed = torch.cat([values[prompt_row, last][:, None], spoken], dim=1).float().cpu().numpy()
    return Gathered(
        packed[:, 0], packed[:, 1:], (moved[row_of, columns] & recorded).cpu().numpy(), followed.cpu().numpy()
    )
