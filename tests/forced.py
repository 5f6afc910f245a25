"""The oracle of the live measurements: one plain forward pass over prompt and reply, and the rules written out anew.

It shares no code with what it judges: no tap, no spans, no windows, no `Bundle.directions`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from collectors.watch import HoldPolicy, watch
from monitor.axis.bundle import Bundle
from monitor.events import Projection

KEY = b"k" * 32


@dataclass
class Forced:
    """What one response must come to; arrays have shape [k] or [tokens, k]."""

    tokens: np.ndarray
    mean: np.ndarray
    prompt: np.ndarray
    lowest: np.ndarray
    last: np.ndarray


def measured_directions(bundle: Bundle) -> np.ndarray:
    """[hidden, k], unit columns."""
    rows = [bundle.tensors["axis"][bundle.layer], bundle.tensors["persona_axis"][bundle.layer]]
    rows += [*bundle.tensors["styles"][bundle.layer], *bundle.tensors["basis"]]
    return np.stack([row.astype(np.float64) / np.linalg.norm(row.astype(np.float64)) for row in rows], axis=1)


def stream(model: Any, ids: list[int], layer: int, padding: tuple[int, int, int] | None = None) -> np.ndarray:
    """The residual stream after a layer, [tokens, hidden]. The last entry of `hidden_states` is normed: never used.

    `padding` = (after, how many, with) pads on the right after so many tokens. `generate` then counts the positions of
    new tokens from 0 anew: transformers' own fault, of which it warns, and what the model computes all the same.
    """
    extra = {}
    keep = list(range(len(ids)))
    if padding is not None:
        after, gap, filler = padding
        new = len(ids) - after
        extra["attention_mask"] = torch.tensor([[1] * after + [0] * gap + [1] * new])
        last = 0 if gap else after - 1
        extra["position_ids"] = torch.tensor([[*range(after), *[0] * gap, *range(last + 1, last + 1 + new)]])
        keep = [*range(after), *range(after + gap, len(ids) + gap)]
        ids = ids[:after] + [filler] * gap + ids[after:]
    with torch.no_grad():
        states = model(torch.tensor([ids]), use_cache=False, output_hidden_states=True, **extra).hidden_states
    assert layer + 1 < len(states) - 1
    return states[layer + 1][0].double().numpy()[keep]


def forced(
    model: Any,
    bundle: Bundle,
    prompt: list[int],
    generated: list[int],
    ends: set[int],
    template: set[int],
    padding: tuple[int, int, int] | None = None,
) -> Forced | None:
    """Teacher-force one response. `ends` ends it; `template` ids are no speech; None where nothing was fed back."""
    reply = []
    for token in generated:
        if token in ends:
            break
        reply.append(token)
    ended = len(reply) < len(generated)
    fed = reply if ended else reply[:-1]
    projections = stream(model, prompt + reply, bundle.layer, padding) @ measured_directions(bundle)
    spoken = np.array([projections[len(prompt) + i] for i, token in enumerate(fed) if token not in template])
    if len(spoken) == 0:
        return None
    means = [spoken[i : i + 16].mean(axis=0) for i in range(max(len(spoken) - 15, 1))]
    if len(spoken) < 16:
        means = [spoken.mean(axis=0)]
    lowest = min(means, key=lambda window: window[0])
    return Forced(spoken, spoken.mean(axis=0), projections[len(prompt) - 1], lowest, means[-1])


@dataclass
class Run:
    """One watched generate call."""

    prompts: list[list[int]]
    generated: list[list[int]]
    side: str = "left"
    projections: dict[str, Projection] = field(default_factory=dict)
    emitted: int = 0
    unscored: int = 0


def pad(prompts: list[list[int]], side: str, filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, [rows, width]."""
    width = max(map(len, prompts))
    rows, masks = [], []
    for prompt in prompts:
        gap = width - len(prompt)
        rows.append([filler] * gap + prompt if side == "left" else prompt + [filler] * gap)
        masks.append([0] * gap + [1] * len(prompt) if side == "left" else [1] * len(prompt) + [0] * gap)
    return torch.tensor(rows), torch.tensor(masks)


class _Keep:
    def __init__(self) -> None:
        self.projections: list[Projection] = []

    def publish(self, projection: Projection) -> bool:
        self.projections.append(projection)
        return True


def run(
    model: Any,
    tokenizer: Any,
    bundle: Bundle,
    prompts: list[list[int]],
    *,
    side: str = "left",
    hold: HoldPolicy = "off",
    seed: int = 0,
    **arguments: Any,
) -> Run:
    """Generate under a watch. Projections are keyed by `row-choice`."""
    ids, mask = pad(prompts, side, tokenizer.pad_token_id)
    if "stop_strings" in arguments:
        arguments["tokenizer"] = tokenizer
    keep = _Keep()
    torch.manual_seed(seed)
    with (
        watch(model, tokenizer, bundle, keep, hold=hold) as watching,
        watching.identify(
            conversation_id=[f"c{row}" for row in range(len(prompts))],
            turn=0,
            response_id=[str(row) for row in range(len(prompts))],
        ),
    ):
        output = model.generate(ids, attention_mask=mask, **arguments)
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    return Run(
        prompts,
        sequences[:, ids.shape[1] :].tolist(),
        side,
        {projection.id: projection for projection in keep.projections},
        watching.emitted,
        watching.unscored,
    )


def check(
    model: Any,
    tokenizer: Any,
    bundle: Bundle,
    done: Run,
    *,
    ends: set[int] | None = None,
    bound: float = 1e-4,
) -> list[tuple[Projection, Forced]]:
    """Compare each projection with the oracle: |difference| <= bound x the tokens' standard deviation."""
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id} | (ends or set())
    template = {tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id}
    choices = len(done.generated) // len(done.prompts)
    compared = []
    silent = 0
    for index, generated in enumerate(done.generated):
        row, choice = divmod(index, choices)
        prompt = done.prompts[row]
        gap = max(map(len, done.prompts)) - len(prompt)
        padding = (len(prompt), gap, tokenizer.pad_token_id) if done.side == "right" else None
        oracle = forced(model, bundle, prompt, generated, ends, template, padding)
        if oracle is None:
            silent += 1
            assert f"{row}-{choice}" not in done.projections
            continue
        projection = done.projections[f"{row}-{choice}"]
        assert projection.tokens == len(oracle.tokens)
        sigma = (stream(model, prompt + generated, bundle.layer) @ measured_directions(bundle)).std(axis=0)
        for ours, theirs in (
            (projection.coordinates, oracle.mean),
            (projection.prompt, oracle.prompt),
            (projection.windows.lowest, oracle.lowest),
            (projection.windows.last, oracle.last),
        ):
            difference = np.abs(np.array(list(ours.values())) - theirs) / sigma
            assert difference.max() <= bound, (index, difference.max())
        assert projection.projection == projection.coordinates["assistant_axis"]
        compared.append((projection, oracle))
    assert (done.emitted, done.unscored) == (len(compared), silent)
    return compared
