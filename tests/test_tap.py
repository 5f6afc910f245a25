"""The numbers of a tapped model are those of a plain forward pass over the same tokens, however they were generated.

The oracle is `forced.py`: teacher forcing without any of our code; |difference| <= 1e-4 standard deviations of the
response's tokens in float32. Each rule that could be got wrong is also broken here: the oracle must notice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES, TAPPED, Collected, is_clean, tiny_bundle, tiny_model
from forced import Run, check, forced, measured_directions, pad, run, stream
from transformers import CompileConfig, DynamicCache

from collectors.tap import Hold, Steer, Tap
from collectors.watch import watch
from monitor.axis.bundle import Bundle
from monitor.errors import ModelError

ENDS = set(range(40, 70))  # many ids that end a response, so that rows end at different times

GREEDY = {"do_sample": False}
SAMPLING = {"do_sample": True, "top_k": 0}
BEAMS = {"do_sample": False, "num_beams": 3}


# The same number, live and forced.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("cached", [True, False])
def test_sampling(
    family: str, side: str, rows: int, cached: bool, tiny_models: Any, tokenizer: Any, bundles: Any, prompts: Any
) -> None:
    model, bundle = tiny_models[family], bundles[family]
    done = run(model, tokenizer, bundle, prompts(rows), side=side, max_new_tokens=20, use_cache=cached, **SAMPLING)
    assert check(model, tokenizer, bundle, done)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(
    "arguments",
    [
        GREEDY,
        BEAMS,
        {**BEAMS, "num_return_sequences": 2, "length_penalty": -2.0},
        {**BEAMS, "num_return_sequences": 3, "early_stopping": True, "length_penalty": 2.0},
        {**SAMPLING, "num_beams": 3, "num_return_sequences": 2},
        {**SAMPLING, "num_return_sequences": 3},
    ],
    ids=["greedy", "beams", "beams-short", "beams-early", "beams-sampling", "several"],
)
def test_rows_that_end_at_different_times(
    family: str, cached: bool, arguments: Any, tiny_models: Any, tokenizer: Any, bundles: Any, prompts: Any
) -> None:
    model, bundle = tiny_models[family], bundles[family]
    done = run(
        model,
        tokenizer,
        bundle,
        prompts(3),
        max_new_tokens=20,
        use_cache=cached,
        eos_token_id=[tokenizer.eos_token_id, *ENDS],
        **arguments,
    )
    check(model, tokenizer, bundle, done, ends=ENDS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "arguments",
    [
        {"prefill_chunk_size": 7, **SAMPLING},
        {"cache_implementation": "static", "disable_compile": True, **SAMPLING},
        {"cache_implementation": "static", "disable_compile": True, **BEAMS},
        {"guidance_scale": 1.5, **SAMPLING},
    ],
    ids=["chunked-prefill", "static", "static-beams", "guidance"],
)
def test_other_caches(
    family: str, arguments: Any, tiny_models: Any, tokenizer: Any, bundles: Any, prompts: Any
) -> None:
    model, bundle = tiny_models[family], bundles[family]
    done = run(model, tokenizer, bundle, prompts(3)[1:], max_new_tokens=20, **arguments)
    assert len(check(model, tokenizer, bundle, done)) == 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("longer", [-2, 20])
def test_guidance_by_another_prompt(
    family: str, longer: int, tiny_models: Any, tokenizer: Any, bundles: Any, prompts: Any
) -> None:
    # The other prompt's passes reach the positions of the response, after or before the response does.
    model, bundle, asked = tiny_models[family], bundles[family], prompts(2)
    shape = (2, max(map(len, asked)) + longer)
    away = torch.randint(3, len(tokenizer), shape, generator=torch.Generator().manual_seed(0))
    arguments = {"guidance_scale": 1.5, "negative_prompt_ids": away, "max_new_tokens": 20, **SAMPLING}
    done = run(model, tokenizer, bundle, asked, **arguments)
    assert len(check(model, tokenizer, bundle, done)) == 2


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "neox"])
def test_beams_that_a_stop_string_ends(
    family: str, tiny_models: Any, tokenizer: Any, bundles: Any, prompts: Any
) -> None:
    # Nothing was generated from such a beam's last token, so it was not fed; an end token follows it all the same.
    model, bundle, end = tiny_models[family], bundles[family], tokenizer.eos_token_id
    arguments = {"stop_strings": list("abcdefghijklm0123456789"), "num_return_sequences": 2, **BEAMS}
    done = run(model, tokenizer, bundle, prompts(3), max_new_tokens=20, suppress_tokens=[end], **arguments)
    assert any(end in generated for generated in done.generated)
    done.generated = [[token for token in generated if token != end] for generated in done.generated]
    check(model, tokenizer, bundle, done)


class Passes:
    """How many tokens each forward pass of a model was fed."""

    def __init__(self, model: Any) -> None:
        self.fed: list[int] = []
        embedding = model.get_input_embeddings()
        self.handle = embedding.register_forward_hook(lambda _m, args, _out: self.fed.append(args[0].shape[1]))

    def __enter__(self) -> Passes:
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("drafts", ["prompt-lookup", "itself", "stranger", "early-exit"])
def test_rejected_drafts_leave_no_trace(
    family: str, drafts: str, tiny_models: Any, tokenizer: Any, bundles: Any, prompts: Any
) -> None:
    model, bundle = tiny_models[family], bundles[family]
    if drafts == "early-exit" and family not in ("llama", "qwen3"):
        pytest.skip("transformers' early exit does not run this family")
    repeating = prompts(2)[1] + prompts(2)[1]
    arguments: dict[str, Any] = {
        "prompt-lookup": {"prompt_lookup_num_tokens": 4, "repetition_penalty": 0.8},
        "itself": {"assistant_model": copy.deepcopy(model)},
        "stranger": {"assistant_model": tiny_model(family, tokenizer, seed=1)},
        "early-exit": {"assistant_early_exit": 2},
    }[drafts]
    with Passes(model) as passes:
        done = run(model, tokenizer, bundle, [repeating], max_new_tokens=30, **arguments, **GREEDY)
    assert len(check(model, tokenizer, bundle, done)) == 1
    # Drafts were fed; where one's own draft is not always right, some of them were rejected.
    assert max(passes.fed[1:]) > 1
    assert drafts == "itself" or sum(passes.fed) > len(repeating) + len(done.generated[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("whole", [True, False], ids=["whole-history", "new-tokens-only"])
@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic"])
def test_turns_continued_from_one_cache(
    family: str, whole: bool, static: bool, tiny_models: Any, tokenizer: Any, bundles: Any, prompts: Any
) -> None:
    from transformers import StaticCache

    model, bundle = tiny_models[family], bundles[family]
    cache = StaticCache(config=model.config, max_cache_len=200) if static else DynamicCache(config=model.config)
    history: list[int] = []
    collected = Collected()
    with watch(model, tokenizer, bundle, collected) as watching:
        for turn, prompt in enumerate(prompts(3)):
            new = history[int(cache.get_seq_length()) :] + prompt
            history += prompt
            with watching.identify(conversation_id="c", turn=turn):
                output = model.generate(
                    torch.tensor([history if whole else new]),
                    attention_mask=torch.ones(1, len(history), dtype=torch.long),
                    past_key_values=cache,
                    max_new_tokens=9,
                    disable_compile=True,
                    **SAMPLING,
                )
            generated = output[0, len(history if whole else new) :].tolist()
            projection = collected.projections[turn]
            assert projection.turn == turn
            done = Run([list(history)], [generated], projections={"0-0": projection}, emitted=1)
            check(model, tokenizer, bundle, done)
            history += generated


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cached", [True, False])
def test_half_precision(family: str, cached: bool, tokenizer: Any, prompts: Any) -> None:
    # The stream itself is rounded to 8 bits here, differently in a batch than alone: a quarter of a standard deviation.
    model = tiny_model(family, tokenizer, dtype="bfloat16")
    bundle = tiny_bundle(model, tokenizer)
    done = run(model, tokenizer, bundle, prompts(3), max_new_tokens=20, use_cache=cached, **SAMPLING)
    check(model, tokenizer, bundle, done, bound=0.25)


def test_projections_are_float32_under_autocast(llama: Any, bundles: Any, prompts: Any) -> None:
    bundle = bundles["llama"]
    directions = torch.from_numpy(measured_directions(bundle)).float()
    ids = torch.tensor(prompts(1))
    half = torch.autocast("cpu", torch.bfloat16)
    with torch.no_grad(), half, Tap(llama, {TAPPED: directions}) as tap, tap.record() as recording:
        states = llama(ids, output_hidden_states=True).hidden_states[TAPPED + 1]
    ours = recording.values[TAPPED][0, : ids.shape[1]].double().numpy()
    theirs = states[0].double().numpy() @ measured_directions(bundle)
    assert np.abs(ours - theirs).max() < 1e-5 * theirs.std()


@pytest.mark.slow
def test_the_real_model(smollm2: Any) -> None:
    from collectors.spans import encode_prompt

    model, tokenizer = smollm2.model, smollm2.tokenizer
    bundle = tiny_bundle(model, tokenizer, layer=16, hold_layers=(22, 25))
    asked = ["What is a tide?", "You are a ghost in the wires. Say who you are, at length, and where you live."]
    encoded = [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in asked]
    for arguments in (SAMPLING, BEAMS):
        done = run(model, tokenizer, bundle, encoded, max_new_tokens=16, **arguments)
        assert len(check(model, tokenizer, bundle, done)) == 2


# What would be noticed.


def _mutants(prompt: int) -> dict[str, Callable[[np.ndarray, int], np.ndarray]]:
    """Wrong rules: from the projections of all tokens and the number of reply tokens to a mean."""
    return {
        "prompt tokens in the mean": lambda values, fed: values[: prompt + fed].mean(axis=0),
        "the last prompt token counted": lambda values, fed: values[prompt - 1 : prompt + fed].mean(axis=0),
        "positions late by one": lambda values, fed: values[prompt - 1 : prompt + fed - 1].mean(axis=0),
        "positions early by one": lambda values, fed: values[prompt + 1 : prompt + fed + 1].mean(axis=0),
        "the sign flipped": lambda values, fed: -values[prompt : prompt + fed].mean(axis=0),
        "the unfed or stop token counted": lambda values, fed: values[prompt : prompt + fed + 1].mean(axis=0),
        "padding counted": lambda values, fed: np.append(values[prompt : prompt + fed], values[-3:], axis=0).mean(0),
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mutant", list(_mutants(0)))
def test_a_wrong_rule_would_be_seen(
    family: str, mutant: str, tiny_models: Any, tokenizer: Any, bundles: Any, prompts: Any
) -> None:
    model, bundle = tiny_models[family], bundles[family]
    done = run(model, tokenizer, bundle, prompts(3), max_new_tokens=20, **SAMPLING)
    for projection, oracle in check(model, tokenizer, bundle, done):
        row = int(projection.id.partition("-")[0])
        prompt, generated = done.prompts[row], done.generated[row]
        end = [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.pad_token_id]
        values = stream(model, prompt + generated + end, bundle.layer) @ measured_directions(bundle)
        wrong = _mutants(len(prompt))[mutant](values, len(oracle.tokens))
        assert (np.abs(wrong - np.array(list(projection.coordinates.values()))) / values.std(axis=0)).max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shift", [-1, 1])
def test_a_wrong_layer_would_be_seen(family: str, shift: int, tiny_models: Any, tokenizer: Any, prompts: Any) -> None:
    model = tiny_models[family]
    done = run(model, tokenizer, tiny_bundle(model, tokenizer, layer=1), prompts(2), max_new_tokens=8, **SAMPLING)
    with pytest.raises(AssertionError):
        check(model, tokenizer, tiny_bundle(model, tokenizer, layer=1 + shift), done)


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_that_are_not_followed_would_be_seen(
    family: str, tiny_models: Any, tokenizer: Any, bundles: Any, prompts: Any
) -> None:
    model, bundle = tiny_models[family], bundles[family]
    prompt = prompts(1)[0]
    directions = torch.from_numpy(measured_directions(bundle)).float()
    with Tap(model, {TAPPED: directions}) as tap, tap.record() as recording:
        output = model.generate(torch.tensor([prompt]), max_new_tokens=20, return_dict_in_generate=True, **BEAMS)
    generated = output.sequences[0, len(prompt) :].tolist()
    special = {tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id}
    oracle = forced(model, bundle, prompt, generated, special, special)
    assert oracle is not None
    unfollowed = recording.values[TAPPED][0, len(prompt) : len(prompt) + len(generated) - 1].double().numpy()
    kept = [i for i, token in enumerate(generated[:-1]) if token not in special]
    assert np.abs(unfollowed[kept].mean(axis=0) - oracle.mean).max() > 1e-3 * oracle.tokens.std()


# The recording.


def test_what_was_never_fed_is_not_a_number(llama: Any, bundles: Any, prompts: Any) -> None:
    directions = torch.from_numpy(measured_directions(bundles["llama"])).float()
    ids = torch.tensor(prompts(1))
    with torch.no_grad(), Tap(llama, {TAPPED: directions}) as tap, tap.record(positions=200) as recording:
        llama(ids)
    values = recording.values[TAPPED]
    assert values.shape[1] == 200
    assert values[:, : ids.shape[1]].isfinite().all() and values[:, ids.shape[1] :].isnan().all()


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_the_buffer_grows_when_more_is_fed_than_was_announced(
    static: bool, llama: Any, bundles: Any, prompts: Any
) -> None:
    arguments = {"cache_implementation": "static", "disable_compile": True} if static else {}
    directions = torch.from_numpy(measured_directions(bundles["llama"])).float()
    prompt = prompts(1)[0]
    with Tap(llama, {TAPPED: directions}) as tap, tap.record(positions=3) as recording:
        output = llama.generate(torch.tensor([prompt]), max_new_tokens=40, min_new_tokens=40, **arguments, **SAMPLING)
    fed = output[0, :-1].tolist()
    theirs = stream(llama, fed, TAPPED) @ measured_directions(bundles["llama"])
    assert np.abs(recording.values[TAPPED][0, : len(fed)].numpy() - theirs).max() < 1e-4 * theirs.std()


def test_the_whole_stream_is_recorded_where_no_directions_are_given(llama: Any, prompts: Any) -> None:
    ids = prompts(1)[0]
    with torch.no_grad(), Tap(llama, {0: None, 2: None}) as tap, tap.record() as recording:
        llama(torch.tensor([ids]))
    for layer in (0, 2):
        ours = recording.values[layer][0, : len(ids)].numpy()
        assert np.abs(ours - stream(llama, ids, layer)).max() < 1e-5


def test_nothing_is_recorded_outside_a_recording_and_no_hook_stays(llama: Any, prompts: Any) -> None:
    ids = torch.tensor(prompts(1))
    with torch.no_grad(), Tap(llama, {TAPPED: None}) as tap:
        llama(ids)
        with tap.record() as outer:
            with tap.record() as inner:
                llama(ids)
            assert not outer.values and inner.values
        llama(ids)
        assert not is_clean(llama)
    assert is_clean(llama)


def test_a_layer_that_does_not_exist_is_refused(llama: Any) -> None:
    with pytest.raises(ModelError, match="layer 4 does not exist"):
        Tap(llama, {4: None})


# Holding and steering.


def unit_vector(hidden: int = 32, seed: int = 3) -> torch.Tensor:
    vector = torch.from_numpy(np.random.default_rng(seed).standard_normal(hidden)).float()
    return vector / vector.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_holding_is_the_papers_floor_on_held_rows_only(
    family: str, tiny_models: Any, tokenizer: Any, prompts: Any
) -> None:
    model, vector, layer, floor = tiny_models[family], unit_vector(), 1, 0.3
    ids, mask = pad(prompts(3), "left", tokenizer.pad_token_id)
    hold = Hold((layer,), vector[None], (floor,))
    with torch.no_grad():
        before = model(ids, attention_mask=mask, output_hidden_states=True)
        with Tap(model, {layer: vector[:, None]}, hold=hold) as tap, tap.record(0, [True, False, True]) as recording:
            after = model(ids, attention_mask=mask, output_hidden_states=True)
    h, v = before.hidden_states[layer + 1].double().numpy(), vector.double().numpy()
    expected = h - v * np.minimum(h @ v - floor, 0.0)[..., None]
    held = after.hidden_states[layer + 1].double().numpy()
    assert np.abs(held[[0, 2]] - expected[[0, 2]]).max() < 1e-5 * np.abs(h).max()
    assert torch.equal(after.hidden_states[layer + 1][1], before.hidden_states[layer + 1][1])
    assert torch.equal(after.logits[1], before.logits[1])
    assert not torch.equal(after.logits[0], before.logits[0])
    # The floor is reached exactly, to the last digits of float32; what is above it keeps its bits.
    below = (h @ v < floor)[[0, 2]]
    assert below.any() and not below.all()
    assert np.abs((held[[0, 2]] @ v)[below] - floor).max() < 1e-5 * np.abs(h).max()
    assert np.array_equal(held[[0, 2]][~below], h[[0, 2]][~below])
    # Measured before the cap.
    assert np.abs(recording.values[layer][..., 0].numpy() - h @ v).max() < 1e-4
    assert np.array_equal(recording.moved[layer].numpy()[[0, 2]], below)
    assert not recording.moved[layer][1].any()


def test_every_held_layer_reaches_its_floor(llama: Any, prompts: Any) -> None:
    vectors = torch.stack([unit_vector(seed=seed) for seed in (1, 2)])
    hold = Hold((1, 2), vectors, (0.5, 1.0))
    ids = torch.tensor(prompts(1))
    with torch.no_grad(), Tap(llama, {}, hold=hold) as tap, tap.record(0, [True]):
        states = llama(ids, output_hidden_states=True).hidden_states
    for layer, vector, floor in zip(hold.layers, vectors, hold.floors, strict=True):
        assert (states[layer + 1] @ vector).min() > floor - 1e-4


def test_steering_adds_its_vector_at_every_token(llama: Any, prompts: Any) -> None:
    vector, ids = unit_vector(), torch.tensor(prompts(1))
    with torch.no_grad():
        before = llama(ids, output_hidden_states=True).hidden_states[2]
        with Tap(llama, {}, steer=Steer(1, vector, -2.5)) as tap, tap.record():
            after = llama(ids, output_hidden_states=True).hidden_states[2]
    assert (after - before - -2.5 * vector).abs().max() < 1e-5


def floored(model: Any, tokenizer: Any, floor: float) -> Bundle:
    """Holds at the tapped layer, and at the next one never."""
    bundle = tiny_bundle(model, tokenizer)
    tensors = dict(bundle.tensors) | {"floors": np.array([0.0, 0.0, floor, -1e9], np.float32)}
    from monitor.axis.bundle import new_bundle

    return new_bundle(tensors, bundle.info)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("arguments", [SAMPLING, {**BEAMS, "num_return_sequences": 2}], ids=["sampling", "beams"])
def test_a_held_response_is_measured_as_if_it_were_not(
    family: str, arguments: Any, tiny_models: Any, tokenizer: Any, prompts: Any
) -> None:
    model = tiny_models[family]
    bundle = floored(model, tokenizer, 4.0)
    free = run(model, tokenizer, bundle, prompts(3), max_new_tokens=20, **arguments)
    done = run(model, tokenizer, bundle, prompts(3), max_new_tokens=20, hold="always", **arguments)
    assert done.generated != free.generated
    shares = []
    for projection, oracle in check(model, tokenizer, bundle, done):
        assert projection.held == pytest.approx(float((oracle.tokens[:, 0] < 4.0).mean()))
        shares.append(projection.held)
    assert max(shares) > 0
    assert all(projection.held == 0 for projection in free.projections.values())


@pytest.mark.parametrize("arguments", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_only_the_conversations_that_the_policy_names_are_held(
    arguments: Any, llama: Any, tokenizer: Any, prompts: Any
) -> None:
    bundle = floored(llama, tokenizer, 1e3)
    free = run(llama, tokenizer, bundle, prompts(3), max_new_tokens=20, **arguments)
    some = run(llama, tokenizer, bundle, prompts(3), max_new_tokens=20, hold=lambda name: name == "c1", **arguments)
    check(llama, tokenizer, bundle, some)
    assert {key: p.held for key, p in some.projections.items()} == {"0-0": 0.0, "1-0": 1.0, "2-0": 0.0}
    assert some.generated[1] != free.generated[1]
    assert some.generated[0] == free.generated[0] and some.generated[2] == free.generated[2]


# torch.compile.


def _compiled_like(model: Any) -> Any:
    """A copy: compiling leaves traces in a model."""
    torch._dynamo.reset()
    return copy.deepcopy(model)


@pytest.mark.slow
@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.long), "gemma3"])
def test_a_compiled_forward_gives_the_same_numbers(
    family: str, tiny_models: Any, tokenizer: Any, bundles: Any, prompts: Any
) -> None:
    model, bundle = _compiled_like(tiny_models[family]), bundles[family]
    model.forward = torch.compile(model.forward, backend="aot_eager")
    ids, mask = pad(prompts(2), "left", tokenizer.pad_token_id)
    # Compiled before it is watched, as in a server: the graph must not go on as if there were no hooks.
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=6, **GREEDY)
    done = run(model, tokenizer, bundle, prompts(2), max_new_tokens=6, **GREEDY)
    assert done.generated == plain[:, ids.shape[1] :].tolist()
    again = run(model, tokenizer, bundle, prompts(2), max_new_tokens=6, **GREEDY)
    for seen in (done, again):
        assert len(check(tiny_models[family], tokenizer, bundle, seen)) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "before", "fullgraph"),
    [  # by default those four in which every two choices meet
        pytest.param(family, before, fullgraph, marks=[pytest.mark.long] if even ^ before ^ fullgraph else [], id=name)
        for even, family in enumerate(["llama", "gemma3"])
        for before, when in enumerate(["watched-first", "compiled-first"])
        for fullgraph in (False, True)
        for name in [f"{family}-{when}-{fullgraph}"]
    ],
)
def test_generates_own_compilation_gives_the_same_numbers(
    family: str, before: bool, fullgraph: bool, tiny_models: Any, tokenizer: Any, bundles: Any, prompts: Any
) -> None:
    model, bundle = _compiled_like(tiny_models[family]), bundles[family]
    compiled = CompileConfig(backend="aot_eager", mode=None, fullgraph=fullgraph)
    compiled._compile_all_devices = True
    arguments = {"cache_implementation": "static", "compile_config": compiled, "max_new_tokens": 6, **GREEDY}
    ids, mask = pad(prompts(2), "left", tokenizer.pad_token_id)
    if before:
        model.generate(ids, attention_mask=mask, **arguments)
    done = run(model, tokenizer, bundle, prompts(2), **arguments)
    assert len(check(tiny_models[family], tokenizer, bundle, done)) == 2
    assert compiled.fullgraph is fullgraph
