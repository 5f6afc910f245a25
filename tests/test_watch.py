"""A watched model answers as it would unwatched, whatever happens; and every response is emitted or counted.

That the emitted numbers are right is `test_tap.py`'s business.
"""

from __future__ import annotations

import contextvars
import copy
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from conftest import FAMILIES, TAPPED, Collected, is_clean, tiny_bundle, tiny_model
from forced import KEY, Run, check, pad, run
from transformers import GenerationConfig, LogitsProcessor, TextIteratorStreamer, pipeline

from collectors.spans import encode_prompt
from collectors.watch import watch
from monitor import telemetry
from monitor.axis.bundle import Readout, with_calibration
from monitor.errors import BundleMismatch
from monitor.events import Projection, decode_projection, encode

GREEDY = {"do_sample": False}
SAMPLING = {"do_sample": True, "top_k": 0}


class Says(LogitsProcessor):
    """Makes a model say given ids, and calls `at_step` on the way."""

    def __init__(self, ids: list[int], at_step: Callable[[int], None] = lambda _: None) -> None:
        self.ids, self.at_step, self.step = ids, at_step, 0

    def __call__(self, _: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.at_step(self.step)
        forced = torch.full_like(scores, -1e9)
        forced[:, self.ids[min(self.step, len(self.ids) - 1)]] = 0.0
        self.step += 1
        return forced


def inputs(prompts: Any, tokenizer: Any, rows: int = 1) -> dict[str, torch.Tensor]:
    ids, mask = pad(prompts(rows), "left", tokenizer.pad_token_id)
    return {"input_ids": ids, "attention_mask": mask}


def unscored(reason: str) -> float:
    return telemetry.RESPONSES_UNSCORED.labels(reason)._value.get()


# The same answer.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "arguments",
    [GREEDY, SAMPLING, {**GREEDY, "num_beams": 3}, {**SAMPLING, "use_cache": False}],
    ids=["greedy", "sampling", "beams", "uncached"],
)
def test_the_tokens_are_the_unwatched_models(
    family: str, arguments: Any, tiny_models: Any, tokenizer: Any, bundles: Any, prompts: Any
) -> None:
    model = tiny_models[family]
    asked = inputs(prompts, tokenizer, 3)
    torch.manual_seed(0)
    plain = model.generate(**asked, max_new_tokens=30, **arguments)
    done = run(model, tokenizer, bundles[family], prompts(3), max_new_tokens=30, **arguments)
    assert done.generated == plain[:, asked["input_ids"].shape[1] :].tolist()
    assert is_clean(model)


@pytest.mark.slow
def test_the_real_models_tokens_are_the_unwatched_models(smollm2: Any, collected: Collected) -> None:
    model, tokenizer = smollm2.model, smollm2.tokenizer
    encoded = [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in ("Hi", "Who are you, ghost?")]
    ids, mask = pad(encoded, "left", tokenizer.pad_token_id)

    def answers() -> list[list[int]]:
        torch.manual_seed(0)
        return [
            model.generate(ids, attention_mask=mask, max_new_tokens=12, **arguments).tolist()
            for arguments in (GREEDY, SAMPLING)
        ]

    plain = answers()
    bundle = tiny_bundle(model, tokenizer, layer=16, hold_layers=(22, 25))
    with watch(model, tokenizer, bundle, collected, installation_key=KEY):
        assert answers() == plain
    assert len(collected.projections) == 4


def test_what_comes_back_has_the_form_that_was_asked_for(
    llama: Any, tokenizer: Any, bundles: Any, prompts: Any, collected: Collected
) -> None:
    asked = inputs(prompts, tokenizer)
    config = GenerationConfig(max_new_tokens=4, num_beams=2, do_sample=False)
    with (
        watch(llama, tokenizer, bundles["llama"], collected) as watching,
        watching.identify(conversation_id="c", turn=0),
    ):
        assert isinstance(llama.generate(**asked, max_new_tokens=4, num_beams=2), torch.Tensor)
        assert isinstance(llama.generate(**asked, generation_config=config), torch.Tensor)
        assert isinstance(llama.generate(asked["input_ids"], config), torch.Tensor)
        output = llama.generate(**asked, max_new_tokens=4, num_beams=2, return_dict_in_generate=True)
        assert output.beam_indices is not None
        assert llama.generate(**asked, max_new_tokens=4, return_dict_in_generate=True, **GREEDY).sequences.shape[0] == 1
    assert config.return_dict_in_generate is not True
    assert len(collected.projections) == 5


# What is emitted.


def test_a_projection_says_what_it_is_of(
    llama: Any, tokenizer: Any, bundles: Any, prompts: Any, collected: Collected
) -> None:
    bundle = bundles["llama"]
    with (
        watch(
            llama,
            tokenizer,
            bundle,
            collected,
            deployment="shop",
            source="/here",
            clock=lambda: "2026-01-01T00:00:00Z",
        ) as watching,
        watching.identify(conversation_id="c", turn=3, response_id="r"),
    ):
        llama.generate(**inputs(prompts, tokenizer), max_new_tokens=8, min_new_tokens=8, **GREEDY)
    (projection,) = collected.projections
    assert decode_projection(encode(projection)) == projection
    assert (projection.id, projection.conversation_id, projection.turn) == ("r-0", "c", 3)
    assert (projection.model, projection.deployment, projection.source) == ("tiny", "shop", "/here")
    assert (projection.axis_id, projection.layer, projection.time) == (bundle.id, TAPPED, "2026-01-01T00:00:00Z")
    assert projection.attributes == {"identity": "given", "finish_reason": "length"}
    assert list(projection.coordinates) == bundle.directions()[0] == list(projection.prompt)
    assert projection.held == 0.0


def test_the_lowest_window_is_the_readouts(llama: Any, tokenizer: Any, bundles: Any, prompts: Any) -> None:
    upside_down = with_calibration(bundles["llama"], Readout(coordinates={"assistant_axis": -1.0}), None)
    arguments = {"max_new_tokens": 60, "min_new_tokens": 60, **GREEDY}
    (low,) = run(llama, tokenizer, bundles["llama"], prompts(1), **arguments).projections.values()
    (high,) = run(llama, tokenizer, upside_down, prompts(1), **arguments).projections.values()
    assert low.windows.lowest["assistant_axis"] < low.projection < high.windows.lowest["assistant_axis"]
    assert low.windows.last == high.windows.last


def test_each_choice_has_an_id_of_its_own_and_the_same_when_it_is_sent_again(
    llama: Any, tokenizer: Any, bundles: Any, prompts: Any
) -> None:
    ids = {
        frozenset(
            run(
                llama, tokenizer, bundles["llama"], prompts(2), max_new_tokens=8, num_return_sequences=3, **SAMPLING
            ).projections.keys()
        )
        for _ in range(2)
    }
    assert ids == {frozenset(f"{row}-{choice}" for row in range(2) for choice in range(3))}


def chat(
    model: Any, tokenizer: Any, questions: list[str], *, system: str | None = None, **arguments: Any
) -> list[dict[str, str]]:
    """A conversation as a client has it: whole replies go back as text."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question in questions:
        messages.append({"role": "user", "content": question})
        ids = torch.tensor([encode_prompt(tokenizer, messages)])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
        reply = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": reply})
    return messages


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_keeps_its_name_over_its_turns(
    family: str, tiny_models: Any, tokenizer: Any, bundles: Any, collected: Collected
) -> None:
    # Random models say random bytes: their replies come back as other tokens, and with characters that stand for none.
    model = tiny_models[family]
    torch.manual_seed(5)
    with watch(model, tokenizer, bundles[family], collected, installation_key=KEY) as watching:
        for caller in ("ann", "bob"):
            with watching.identify(caller=caller):
                chat(model, tokenizer, ["Hi", "And then?", "Why?"], max_new_tokens=12, min_new_tokens=2, **SAMPLING)
        chat(model, tokenizer, ["Hi", "And then?"], max_new_tokens=12, min_new_tokens=2, **SAMPLING)
    names = [projection.conversation_id for projection in collected.projections]
    assert [projection.turn for projection in collected.projections] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert len(set(names[:3])) == len(set(names[3:6])) == len(set(names[6:])) == 1
    assert len(set(names)) == 3
    certainty = [projection.attributes["identity"] for projection in collected.projections]
    assert certainty == ["derived"] * 6 + ["weak"] * 2


def test_without_key_and_name_a_response_is_counted_as_unidentified(
    llama: Any, tokenizer: Any, bundles: Any, prompts: Any, collected: Collected
) -> None:
    before = unscored("unidentified")
    with watch(llama, tokenizer, bundles["llama"], collected) as watching:
        llama.generate(**inputs(prompts, tokenizer, 2), max_new_tokens=4, min_new_tokens=4, **GREEDY)
    assert (watching.emitted, watching.unscored, unscored("unidentified") - before) == (0, 2, 2)


def test_a_drifted_conversation_is_held_by_its_derived_name(llama: Any, tokenizer: Any, collected: Collected) -> None:
    bundle = tiny_bundle(llama, tokenizer)
    drifted: set[str] = set()
    with watch(llama, tokenizer, bundle, collected, installation_key=KEY, hold=lambda name: name in drifted) as w:
        for caller in ("ann", "bob"):
            with w.identify(caller=caller):
                messages = chat(llama, tokenizer, ["Hi"], max_new_tokens=9, min_new_tokens=9, **GREEDY)
                if caller == "ann":
                    drifted.add(collected.projections[-1].conversation_id)
                messages.append({"role": "user", "content": "And then?"})
                ids = torch.tensor([encode_prompt(tokenizer, messages)])
                llama.generate(ids, max_new_tokens=9, min_new_tokens=9, **GREEDY)
    assert [projection.held > 0 for projection in collected.projections] == [False, True, False, False]


# Nothing that goes wrong in here reaches the caller.


def test_an_exception_inside_the_hook_switches_the_tap_off(
    llama: Any, tokenizer: Any, bundles: Any, prompts: Any, collected: Collected
) -> None:
    asked = inputs(prompts, tokenizer, 2)
    plain = llama.generate(**asked, max_new_tokens=8, **GREEDY)
    errors = telemetry.TAP_ERRORS._value.get()
    with watch(llama, tokenizer, bundles["llama"], collected) as watching:
        watching.tap._directions[TAPPED] = torch.zeros(7, 3)  # no such width
        for _ in range(2):
            assert torch.equal(llama.generate(**asked, max_new_tokens=8, **GREEDY), plain)
    assert telemetry.TAP_ERRORS._value.get() - errors == 1
    assert watching.tap.error is not None
    assert (watching.emitted, watching.unscored) == (0, 4)


def test_activations_that_are_not_finite_are_counted_and_never_sent(
    tokenizer: Any, prompts: Any, collected: Collected
) -> None:
    model = tiny_model("llama", tokenizer)
    before = unscored("not_finite")
    with watch(model, tokenizer, tiny_bundle(model, tokenizer), collected) as w, w.identify(conversation_id="c"):
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[3, 5] = float("nan")
        model.generate(**inputs(prompts, tokenizer), max_new_tokens=4, logits_processor=[Says([50])], **GREEDY)
    assert (w.emitted, w.unscored, unscored("not_finite") - before) == (0, 1, 1)
    assert w.tap.error is None


@pytest.mark.parametrize(
    ("says", "limit", "tokens", "finish"),
    [
        ("E", 8, None, None),  # an empty response
        ("aE", 8, 1, "stop"),
        ("a", 1, None, None),  # its one token is never fed back
        ("ab", 2, 1, "length"),
        ("abcdefgh", 8, 7, "length"),
        ("abcE", 4, 3, "stop"),
        ("aSb", 3, 1, "length"),  # a special token in the midst is no speech
    ],
)
def test_short_responses(
    says: str,
    limit: int,
    tokens: int | None,
    finish: str | None,
    llama: Any,
    tokenizer: Any,
    bundles: Any,
    prompts: Any,
    collected: Collected,
) -> None:
    special = {"E": tokenizer.eos_token_id, "S": tokenizer.bos_token_id}
    ids = [special.get(letter) or tokenizer.convert_tokens_to_ids(letter) for letter in says]
    before = unscored("empty")
    with watch(llama, tokenizer, bundles["llama"], collected) as w, w.identify(conversation_id="c", response_id="0"):
        output = llama.generate(
            **inputs(prompts, tokenizer), max_new_tokens=limit, logits_processor=[Says(ids)], **GREEDY
        )
    width = len(prompts(1)[0])
    if tokens is None:
        assert (w.emitted, w.unscored, unscored("empty") - before) == (0, 1, 1)
        return
    (projection,) = collected.projections
    assert (projection.tokens, projection.attributes["finish_reason"]) == (tokens, finish)
    assert projection.windows.lowest == projection.windows.last == projection.coordinates
    check(
        llama,
        tokenizer,
        bundles["llama"],
        Run(prompts(1), [output[0, width:].tolist()], "left", {"0-0": projection}, 1),
    )


def test_a_stop_string_ends_a_response(
    llama: Any, tokenizer: Any, bundles: Any, prompts: Any, collected: Collected
) -> None:
    ids = [tokenizer.convert_tokens_to_ids(letter) for letter in "abXc"]
    with watch(llama, tokenizer, bundles["llama"], collected) as watching, watching.identify(conversation_id="c"):
        llama.generate(
            **inputs(prompts, tokenizer),
            max_new_tokens=20,
            stop_strings=["X"],
            tokenizer=tokenizer,
            logits_processor=[Says(ids)],
            **GREEDY,
        )
    (projection,) = collected.projections
    assert (projection.tokens, projection.attributes["finish_reason"]) == (2, "stop")


def test_a_long_context(llama: Any, tokenizer: Any, bundles: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, len(tokenizer), (8000,), generator=generator).tolist()
    done = run(llama, tokenizer, bundles["llama"], [prompt], max_new_tokens=6, min_new_tokens=6, **GREEDY)
    assert len(check(llama, tokenizer, bundles["llama"], done)) == 1


def test_a_prompt_longer_than_the_window_fails_as_it_does_unwatched(
    tiny_models: Any, tokenizer: Any, bundles: Any, prompts: Any, collected: Collected
) -> None:
    model = tiny_models["gpt2"]
    ids = torch.full((1, 600), 50)  # it has 512 positions
    with pytest.raises(IndexError):
        model.generate(ids, max_new_tokens=2, **GREEDY)
    with watch(model, tokenizer, bundles["gpt2"], collected) as watching, watching.identify(conversation_id="c"):
        with pytest.raises(IndexError):
            model.generate(ids, max_new_tokens=2, **GREEDY)
        model.generate(**inputs(prompts, tokenizer), max_new_tokens=4, min_new_tokens=4, **GREEDY)
    assert len(collected.projections) == 1


@pytest.mark.parametrize("with_ids", [False, True])
def test_embedded_prompts(
    with_ids: bool, llama: Any, tokenizer: Any, bundles: Any, prompts: Any, collected: Collected
) -> None:
    ids = torch.tensor(prompts(1))
    arguments = {"max_new_tokens": 8, "min_new_tokens": 8, **GREEDY}
    embedded = {"inputs_embeds": llama.get_input_embeddings()(ids).detach()} | ({"input_ids": ids} if with_ids else {})
    with watch(llama, tokenizer, bundles["llama"], collected) as w, w.identify(conversation_id="c", turn=0):
        output = llama.generate(**embedded, **arguments)
    generated = output[0, ids.shape[1] if with_ids else 0 :].tolist()
    check(
        llama, tokenizer, bundles["llama"], Run(prompts(1), [generated], "left", {"0-0": collected.projections[0]}, 1)
    )


def test_threads_have_their_own_numbers(llama: Any, tokenizer: Any, bundles: Any, prompts: Any) -> None:
    collected = Collected()
    outputs: dict[str, list[int]] = {}
    start = threading.Barrier(3)

    def converse(number: int, watching: Any) -> None:
        prompt = prompts(8)[number]
        start.wait()
        for turn in range(6):
            with watching.identify(conversation_id=f"{number}", turn=turn):
                output = llama.generate(torch.tensor([prompt]), max_new_tokens=10, min_new_tokens=5, **GREEDY)
            outputs[f"{number}/{turn}"] = output[0, len(prompt) :].tolist()

    with watch(llama, tokenizer, bundles["llama"], collected) as watching:
        threads = [threading.Thread(target=converse, args=(number, watching)) for number in (0, 1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (watching.emitted, watching.unscored, len(collected.projections)) == (18, 0, 18)
    for projection in collected.projections:
        number = int(projection.conversation_id)
        generated = outputs[f"{number}/{projection.turn}"]
        check(
            llama, tokenizer, bundles["llama"], Run([prompts(8)[number]], [generated], "left", {"0-0": projection}, 1)
        )


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as in a terminal; a process in the background may have it switched off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_leaves_no_trace(
    interruptible: None, llama: Any, tokenizer: Any, bundles: Any, prompts: Any, collected: Collected
) -> None:
    asked = inputs(prompts, tokenizer)

    def press(step: int) -> None:
        if step == 3:
            signal.raise_signal(signal.SIGINT)

    with watch(llama, tokenizer, bundles["llama"], collected) as watching, watching.identify(conversation_id="c"):
        with pytest.raises(KeyboardInterrupt):
            llama.generate(**asked, max_new_tokens=8, logits_processor=[Says([50], press)], **GREEDY)
        assert not watching.tap._recordings
        output = llama.generate(**asked, max_new_tokens=8, min_new_tokens=8, **GREEDY)
    (projection,) = collected.projections
    generated = output[0, asked["input_ids"].shape[1] :].tolist()
    check(llama, tokenizer, bundles["llama"], Run(prompts(1), [generated], "left", {"0-0": projection}, 1))
    with pytest.raises(KeyboardInterrupt), watch(llama, tokenizer, bundles["llama"], collected):
        raise KeyboardInterrupt
    assert is_clean(llama)


@pytest.mark.parametrize("order", ["nested", "crossed"])
def test_several_watches_over_one_model(
    order: str, llama: Any, tokenizer: Any, bundles: Any, prompts: Any, collected: Collected
) -> None:
    other, above = Collected(), tiny_bundle(llama, tokenizer, layer=1)
    outer, inner = ExitStack(), ExitStack()
    first = outer.enter_context(watch(llama, tokenizer, bundles["llama"], collected))
    second = inner.enter_context(watch(llama, tokenizer, above, other))
    with first.identify(conversation_id="c", turn=0), second.identify(conversation_id="d", turn=0):
        asked = inputs(prompts, tokenizer)
        generate = {"max_new_tokens": 8, "min_new_tokens": 8, **GREEDY}
        output = llama.generate(**asked, **generate)
        for stack in (inner, outer) if order == "nested" else (outer, inner):
            stack.close()
            llama.generate(**asked, **generate)
    generated = output[0, asked["input_ids"].shape[1] :].tolist()
    for kept, bundle in ((collected, bundles["llama"]), (other, above)):
        done = Run(prompts(1), [generated], "left", {"0-0": kept.projections[0]}, 1)
        check(llama, tokenizer, bundle, done)
    counts = (len(collected.projections), len(other.projections))
    assert counts == ((2, 1) if order == "nested" else (1, 2))
    llama.__dict__.pop("generate", None)  # crossed, the first watch's pass-through stays
    assert is_clean(llama)


def test_a_generate_of_the_models_own_comes_back(tokenizer: Any, prompts: Any, collected: Collected) -> None:
    model = tiny_model("llama", tokenizer)
    calls = []
    own = model.generate

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    model.generate = counting
    with watch(model, tokenizer, tiny_bundle(model, tokenizer), collected) as w, w.identify(conversation_id="c"):
        model.generate(**inputs(prompts, tokenizer), max_new_tokens=4, min_new_tokens=4, **GREEDY)
    assert model.generate is counting
    assert len(calls) == len(collected.projections) == 1


def test_pipelines_are_watched(llama: Any, tokenizer: Any, bundles: Any, collected: Collected) -> None:
    speak = pipeline("text-generation", model=llama, tokenizer=tokenizer)
    with watch(llama, tokenizer, bundles["llama"], collected, installation_key=KEY):
        speak([{"role": "user", "content": "Hi"}], max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert collected.projections[0].tokens >= 4


def test_arguments_may_be_given_in_any_way(
    llama: Any, tokenizer: Any, bundles: Any, prompts: Any, collected: Collected
) -> None:
    ids = torch.tensor(prompts(1))
    end = 60
    config = GenerationConfig(max_new_tokens=9, do_sample=False, eos_token_id=end)
    says = [50, 51, end]
    with watch(llama, tokenizer, bundles["llama"], collected) as watching, watching.identify(conversation_id="c"):
        llama.generate(ids, config, [Says(says)])
        llama.generate(inputs=ids, generation_config=config, logits_processor=[Says(says)])
        llama.generate(None, config, [Says(says)], input_ids=ids)
        llama.generate(input_ids=ids, max_new_tokens=9, eos_token_id=end, logits_processor=[Says(says)], **GREEDY)
        llama.generate(ids, max_length=ids.shape[1] + 9, eos_token_id=end, logits_processor=[Says(says)], **GREEDY)
        many = torch.tensor([end, 61])
        llama.generate(ids, eos_token_id=many, max_new_tokens=9, logits_processor=[Says(says)], **GREEDY)
    assert [projection.tokens for projection in collected.projections] == [2] * 6
    assert {projection.attributes["finish_reason"] for projection in collected.projections} == {"stop"}
    assert len({projection.projection for projection in collected.projections}) == 1


def test_streaming_from_another_thread(
    llama: Any, tokenizer: Any, bundles: Any, prompts: Any, collected: Collected
) -> None:
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    arguments = {"max_new_tokens": 6, "min_new_tokens": 6, "streamer": streamer, **GREEDY}
    with watch(llama, tokenizer, bundles["llama"], collected) as watching:
        with watching.identify(conversation_id="c", turn=0):
            context = contextvars.copy_context()  # a plain thread would not know what `identify` said
        thread = threading.Thread(target=context.run, args=(llama.generate, torch.tensor(prompts(1))), kwargs=arguments)
        thread.start()
        assert "".join(streamer)
        thread.join()
    assert [projection.conversation_id for projection in collected.projections] == ["c"]


@pytest.mark.parametrize(
    "said",
    [
        {"conversation_id": ["a"], "turn": 0},
        {"conversation_id": ["a", "b"], "turn": [0]},
        {"conversation_id": "x" * 257, "turn": 0},
        {"conversation_id": "", "turn": 0},
        {"conversation_id": "a", "turn": -1},
        {"conversation_id": "a", "turn": 0, "response_id": ["r"] * 3},
        {"conversation_id": "a", "turn": "first"},
    ],
)
def test_what_the_caller_says_wrongly_costs_the_measurement_only(
    said: Any, llama: Any, tokenizer: Any, bundles: Any, prompts: Any, collected: Collected
) -> None:
    asked = inputs(prompts, tokenizer, 2)
    plain = llama.generate(**asked, max_new_tokens=5, min_new_tokens=5, **GREEDY)
    before = unscored("error")
    with watch(llama, tokenizer, bundles["llama"], collected) as watching, watching.identify(**said):
        assert torch.equal(llama.generate(**asked, max_new_tokens=5, min_new_tokens=5, **GREEDY), plain)
    assert (watching.emitted, watching.unscored, unscored("error") - before) == (0, 2, 2)


def test_a_publisher_or_policy_that_raises_costs_nothing_but_its_own(
    llama: Any, tokenizer: Any, bundles: Any, prompts: Any
) -> None:
    class Moody(Collected):
        def publish(self, projection: Projection) -> bool:
            if projection.conversation_id == "a":
                raise RuntimeError("not today")
            return super().publish(projection)

    def policy(name: str) -> bool:
        raise RuntimeError("not today")

    asked, moody = inputs(prompts, tokenizer, 3), Moody()
    plain = llama.generate(**asked, max_new_tokens=5, min_new_tokens=5, **GREEDY)
    with (
        watch(llama, tokenizer, bundles["llama"], moody, hold=policy) as watching,
        watching.identify(conversation_id=["a", "b", "c"], turn=0),
    ):
        assert torch.equal(llama.generate(**asked, max_new_tokens=5, min_new_tokens=5, **GREEDY), plain)
    assert [projection.conversation_id for projection in moody.projections] == ["b", "c"]
    assert (watching.emitted, watching.unscored) == (2, 1)


def test_ways_of_generating_that_can_not_be_followed_are_counted(
    llama: Any, tokenizer: Any, bundles: Any, prompts: Any, collected: Collected
) -> None:
    def own_loop(model: Any, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.cat([input_ids, input_ids], dim=1)

    before = unscored("unsupported")
    with watch(llama, tokenizer, bundles["llama"], collected) as watching, watching.identify(conversation_id="c"):
        llama.generate(torch.tensor(prompts(1)), custom_generate=own_loop, max_new_tokens=5)
        llama.generate(torch.tensor(prompts(1)), guidance_scale=1.5, use_cache=False, max_new_tokens=5, **SAMPLING)
    assert (watching.emitted, watching.unscored, unscored("unsupported") - before) == (0, 2, 2)


def test_generating_from_nothing(llama: Any, tokenizer: Any, bundles: Any, collected: Collected) -> None:
    with watch(llama, tokenizer, bundles["llama"], collected) as w, w.identify(conversation_id="c", turn=0):
        output = llama.generate(max_new_tokens=6, min_new_tokens=6, **GREEDY)
    done = Run([output[0, :1].tolist()], [output[0, 1:].tolist()], "left", {"0-0": collected.projections[0]}, 1)
    check(llama, tokenizer, bundles["llama"], done)


def test_another_models_bundle_is_refused(tiny_models: Any, tokenizer: Any, bundles: Any, collected: Collected) -> None:
    with (
        pytest.raises(BundleMismatch, match="weights"),
        watch(tiny_models["qwen3"], tokenizer, bundles["llama"], collected),
    ):
        pass
    changed = copy.deepcopy(tokenizer)
    changed.chat_template += " "
    with (
        pytest.raises(BundleMismatch, match="chat template"),
        watch(tiny_models["llama"], changed, bundles["llama"], collected),
    ):
        pass
    assert is_clean(tiny_models["llama"]) and is_clean(tiny_models["qwen3"])


def test_a_template_without_turns_needs_names(llama: Any, tokenizer: Any, prompts: Any, collected: Collected) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with watch(llama, bare, tiny_bundle(llama, bare), collected, installation_key=KEY) as watching:
        llama.generate(**inputs(prompts, tokenizer), max_new_tokens=5, min_new_tokens=5, **GREEDY)
        with watching.identify(conversation_id="c", turn=0):
            llama.generate(**inputs(prompts, tokenizer), max_new_tokens=5, min_new_tokens=5, **GREEDY)
    assert (watching.emitted, watching.unscored) == (1, 1)
