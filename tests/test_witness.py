"""The witness says of a text what the watch said when it was spoken; and no conversation harms another one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES, TAPPED, Collected, is_clean, tiny_bundle, tiny_model
from forced import forced, measured_directions, stream
from hypothesis import given
from hypothesis import strategies as st
from test_watch import Says
from transcripts import SAYINGS, logged, talk

from collectors.models import LoadedModel, describe_model
from collectors.spans import encode_conversation, encode_prompt
from collectors.watch import watch
from collectors.witness import NARROWEST, Witness, windows
from monitor.axis.bundle import Bundle, Readout, load_bundle, resolve_bundle, with_calibration
from monitor.errors import BundleMismatch, ConfigurationError, ModelError
from monitor.events import Projection, decode_projection, encode
from monitor.origin import Skipped

# Refuses what does not alternate, as Gemma's does.
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Says at the top how much there is: what comes before a reply is rewritten by what follows it.
COUNTING = (
    "{{ messages | length }} messages\n{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def loaded_of(model: Any, tokenizer: Any) -> LoadedModel:
    return LoadedModel(model, tokenizer, describe_model(model, tokenizer, name="tiny"))


def witness_of(model: Any, tokenizer: Any, bundle: Bundle | None = None, **options: Any) -> Witness:
    return Witness(loaded_of(model, tokenizer), bundle or tiny_bundle(model, tokenizer), **options)


@pytest.fixture(scope="module")
def witness(llama: Any, tokenizer: Any, bundles: Any) -> Witness:
    return witness_of(llama, tokenizer, bundles["llama"])


def with_template(tokenizer: Any, template: str) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def numbers(projection: Projection) -> np.ndarray:
    """Everything measured, [4, k]."""
    measured = (projection.coordinates, projection.prompt, projection.windows.lowest, projection.windows.last)
    return np.array([list(one.values()) for one in measured])


def apart(one: Projection, other: Projection, sigma: np.ndarray) -> float:
    """The largest difference, in standard deviations."""
    assert (one.tokens, one.turn, one.conversation_id) == (other.tokens, other.turn, other.conversation_id)
    assert one.projection == one.coordinates["assistant_axis"]
    return float((np.abs(numbers(one) - numbers(other)) / sigma).max())


def spread(projections: Sequence[Projection]) -> np.ndarray:
    """Standard deviation between responses on every direction, [k]."""
    return np.std([list(projection.coordinates.values()) for projection in projections], axis=0)


def spoken(
    loaded: LoadedModel, bundle: Bundle, talks: Sequence[Sequence[dict[str, str]]], **generate: Any
) -> list[Projection]:
    """What the watch says while the model says these replies, each with a generate call of its own."""
    tokenizer, collected = loaded.tokenizer, Collected()
    with watch(loaded.model, tokenizer, bundle, collected) as watching:
        for number, messages in enumerate(talks, start=1):
            replies = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
            for turn, index in enumerate(replies):
                says = tokenizer(messages[index]["content"], add_special_tokens=False)["input_ids"]
                ids = torch.tensor([encode_prompt(tokenizer, messages[:index])])
                forcing = [Says([*says, tokenizer.eos_token_id])]
                with watching.identify(conversation_id=f"c{number}", turn=turn):
                    loaded.model.generate(
                        ids, logits_processor=forcing, do_sample=False, **{"max_new_tokens": len(says) + 1} | generate
                    )
    return collected.projections


# The same numbers.


@pytest.mark.parametrize("family", FAMILIES)
def test_a_logged_conversation_gives_what_the_watch_said(family: str, tiny_models: Any, tokenizer: Any) -> None:
    loaded = loaded_of(tiny_models[family], tokenizer)
    readout = Readout(coordinates={"persona_axis": -1.0, "pc1": 0.5}, prompt={"pc1": 1.0})
    bundle = with_calibration(tiny_bundle(loaded.model, tokenizer), readout, None)
    talks = [talk(0, 3), talk(1, 1), talk(2, 2, system="Speak as a keeper."), talk(3, 4), talk(5, 2, system="")]
    live = spoken(loaded, bundle, talks)
    shard = Witness(loaded, bundle, batch_tokens=600).score([logged(one, i) for i, one in enumerate(talks, start=1)])
    assert len(live) == len(shard.projections) == 12 and not shard.skipped and not shard.notes
    assert {projection.tokens < 16 for projection in live} == {True, False}
    sigma = spread(live)
    assert max(apart(said, heard, sigma) for said, heard in zip(live, shard.projections, strict=True)) <= 1e-4
    assert is_clean(loaded.model)


def test_a_reply_that_was_cut_counts_one_token_more(llama: Any, tokenizer: Any, bundles: Any, witness: Witness) -> None:
    # Live the last token of a cut reply is not fed back; in a log nobody can tell that it was cut.
    messages = talk(2, 1)
    says = tokenizer(messages[1]["content"], add_special_tokens=False)["input_ids"]
    cut = says[: len(says) * 2 // 3]
    messages[1]["content"] = tokenizer.decode(cut)
    (live,) = spoken(loaded_of(llama, tokenizer), bundles["llama"], [messages], max_new_tokens=len(cut))
    (heard,) = witness.score([logged(messages)]).projections
    assert live.attributes["finish_reason"] == "length"
    assert heard.tokens == live.tokens + 1 == len(cut)
    fed = encode_prompt(tokenizer, messages[:1]) + cut
    values = (stream(llama, fed, TAPPED) @ measured_directions(bundles["llama"]))[-len(cut) :]
    sigma = values.std(axis=0)
    expected = (numbers(live)[0] * live.tokens + values[-1]) / heard.tokens
    assert (np.abs(numbers(heard)[0] - expected) / sigma).max() <= 1e-4
    # So the difference is bounded: no more than the tokens' range over their number.
    assert (np.abs(numbers(heard)[0] - numbers(live)[0]) <= np.ptp(values, axis=0) / heard.tokens + 1e-4 * sigma).all()
    assert numbers(heard)[1] == pytest.approx(numbers(live)[1], rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_oracle_agrees(dtype: str, tokenizer: Any) -> None:
    model = tiny_model("qwen3", tokenizer, dtype=dtype)
    bundle = tiny_bundle(model, tokenizer)
    talks = [talk(seed, 1 + seed % 3) for seed in range(6)]
    shard = witness_of(model, tokenizer, bundle).score([logged(one, i) for i, one in enumerate(talks, start=1)])
    special = {tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id}
    sigma = spread(shard.projections)
    remaining = iter(shard.projections)
    for messages in talks:
        for index in range(1, len(messages), 2):
            prompt = encode_prompt(tokenizer, messages[:index])
            said = tokenizer(messages[index]["content"], add_special_tokens=False)["input_ids"]
            oracle = forced(model, bundle, prompt, [*said, tokenizer.eos_token_id], {tokenizer.eos_token_id}, special)
            heard = next(remaining)
            assert oracle is not None and heard.tokens == len(oracle.tokens)
            for ours, theirs in zip(numbers(heard)[:2], (oracle.mean, oracle.prompt), strict=True):
                # Half precision rounds the stream itself, and not alike in every batch.
                assert (np.abs(ours - theirs) / sigma).max() <= (1e-4 if dtype == "float32" else 0.1)
    assert next(remaining, None) is None


@pytest.mark.slow
def test_the_real_witness_says_what_the_real_watch_said(smollm2: Any) -> None:
    from collectors.traffic import Reply, Script, play

    bundle, tokenizer = load_bundle(resolve_bundle("smollm2")), smollm2.tokenizer
    asked = [
        ("Say hi.", "Thanks! And goodbye."),
        ("What is the capital of France? One sentence, please.", "And of Italy? One sentence."),
        ("Write a poem about a grey gull.", "Thank you."),
        ("Hello!", "Who are you?"),
    ]
    scripts = [(f"c{i}", Script(f"s{i}", "small_talk", "greetings", turns)) for i, turns in enumerate(asked, start=1)]
    collected, replies = Collected(), list[Reply]()
    with watch(smollm2.model, tokenizer, bundle, collected) as watching:
        said = play(smollm2, watching, scripts, tokens=40, on_reply=replies.append)
    shard = Witness(smollm2, bundle).score([logged(said[id], i) for i, (id, _) in enumerate(scripts, start=1)])
    heard = {(event.conversation_id, event.turn): event for event in shard.projections}
    live = {(event.conversation_id, event.turn): event for event in collected.projections}
    # What a model says need not be how its tokenizer writes the same text: then other tokens are fed.
    as_written = {
        (r.conversation_id, r.turn): len(tokenizer(r.text, add_special_tokens=False)["input_ids"]) == r.tokens
        for r in replies
    }
    sigma = spread(collected.projections)
    assert heard.keys() == live.keys() and len(live) == 8
    ended = 0
    for (name, turn), event in live.items():
        if not all(as_written[name, before] for before in range(turn + 1)):
            continue
        other = heard[name, turn]
        if event.attributes["finish_reason"] == "stop":
            ended += 1
            assert apart(event, other, sigma) <= 1e-4
        else:
            assert other.tokens == event.tokens + 1
            assert (np.abs(numbers(other)[1] - numbers(event)[1]) / sigma).max() <= 1e-4  # the prompt was fed whole
            assert (np.abs(numbers(other)[0] - numbers(event)[0]) / sigma).max() <= 10 / other.tokens
    assert ended


def test_the_pass_ends_at_the_layer(llama: Any, tokenizer: Any, bundles: Any, witness: Witness) -> None:
    passed: list[str] = []
    watched = {f"layer {i}": layer for i, layer in enumerate(llama.model.layers)} | {"head": llama.lm_head}
    handles = [
        module.register_forward_hook(lambda *_, name=name: passed.append(name)) for name, module in watched.items()
    ]
    try:
        witness.score([logged(talk(1, 3)), logged(talk(2, 1), 2)])
    finally:
        for handle in handles:
            handle.remove()
    assert passed == [f"layer {i}" for i in range(TAPPED)]  # of the tapped layer our own hook is the last to run
    assert is_clean(llama)


def test_rows_are_the_same_to_the_bit_and_do_not_depend_on_their_neighbours(witness: Witness) -> None:
    talks = [logged(talk(seed, 1 + seed % 4), seed) for seed in range(1, 12)]
    once, again = witness.score(talks), witness.score(talks)
    assert [encode(one) for one in once.projections] == [encode(one) for one in again.projections]
    alone = [projection for one in talks for projection in witness.score([one]).projections]
    sigma = spread(alone)
    assert max(apart(a, b, sigma) for a, b in zip(once.projections, alone, strict=True)) <= 1e-4


def test_batches_keep_to_the_budget(llama: Any, tokenizer: Any, bundles: Any) -> None:
    talks = [logged(talk(seed, 1 + seed % 4), seed) for seed in range(1, 20)]
    small = witness_of(llama, tokenizer, bundles["llama"], batch_tokens=700)
    batches = small.batches(talks)
    assert len(batches) > 3
    for batch in batches:
        assert len(batch) * max(map(len, batch)) <= 700 or len(batch) == 1
    fed: list[tuple[int, ...]] = []

    def see(_module: Any, args: tuple[Any, ...]) -> None:
        fed.append(tuple(args[0].shape))

    handle = llama.get_input_embeddings().register_forward_pre_hook(see)
    try:
        small.score(talks)
    finally:
        handle.remove()
    assert fed == [(len(batch), max(map(len, batch))) for batch in batches]


# What an event says.


def test_what_a_projection_of_the_witness_is_of(witness: Witness, bundles: Any) -> None:
    first = logged(talk(1, 3), 7, conversation_id="same", time="2026-03-04T23:59:59.5Z")
    second = logged(talk(1, 1), 8, conversation_id="same", user="u")
    shard = witness.score([first, second])
    events = shard.projections
    assert [(p.conversation_id, p.turn) for p in events] == [("same", 0), ("same", 1), ("same", 2), ("same", 0)]
    assert len({p.id for p in events}) == 4 and {len(p.id) for p in events} == {32}
    assert [p.time for p in events[:3]] == [
        "2026-03-04T23:59:59.500000Z",
        "2026-03-05T00:00:00.500000Z",
        "2026-03-05T00:00:01.500000Z",
    ]
    assert events[3].time == "1970-01-01T00:00:00Z"
    for event in events:
        assert (event.source, event.model, event.deployment) == ("anchorwatch/witness", "other-model", "other-model")
        assert (event.axis_id, event.layer, event.held) == (bundles["llama"].id, TAPPED, 0.0)
        assert decode_projection(encode(event)) == event
    assert shard.origins == [first.origin, second.origin]


def test_the_end_of_time_is_no_fault(witness: Witness) -> None:
    shard = witness.score([logged(talk(1, 2), time="9999-12-31T23:59:59Z")])
    assert [event.turn for event in shard.projections] == [0, 1] and not shard.skipped


def test_the_digest_is_of_text_and_settings(llama: Any, tokenizer: Any, bundles: Any, witness: Witness) -> None:
    items = [logged(talk(1, 2)), Skipped(source="log.jsonl", record=2, reason="not JSON"), logged(talk(2, 2), 3)]
    same = witness_of(llama, tokenizer, bundles["llama"])
    assert witness.score(items).digest == witness.digest(items) == same.digest(copy.deepcopy(items))
    halved = tiny_model("llama", tokenizer, dtype="bfloat16")
    others = {
        witness.digest(items[:2]),
        witness.digest(items[::-1]),
        witness.digest([logged(talk(1, 2), user="u"), *items[1:]]),
        witness.digest([logged([*talk(1, 1), *talk(1, 2)[2:3], {"role": "assistant", "content": "No."}]), *items[1:]]),
        witness_of(llama, tokenizer, bundles["llama"], context=256).digest(items),
        witness_of(llama, tokenizer, bundles["llama"], batch_tokens=999).digest(items),
        witness_of(llama, tokenizer, tiny_bundle(llama, tokenizer, layer=1)).digest(items),
        witness_of(halved, tokenizer, bundles["llama"]).digest(items),
    }
    assert len(others | {witness.digest(items)}) == 9


# Windows.


@given(st.integers(1, 5000), st.integers(2, 600))
def test_every_token_is_read_once_and_with_enough_past(length: int, context: int) -> None:
    found = windows(length, context)
    assert [place for window in found for place in range(window.first, window.stop)] == list(range(length))
    for number, window in enumerate(found):
        assert window.start == number * (context // 2)
        assert 0 < window.stop - window.start <= context
        assert window.first == 0 if number == 0 else window.first - window.start >= context // 2
    assert len(found) == 1 or length > context


def test_a_long_conversation_is_read_through_windows(llama: Any, tokenizer: Any, bundles: Any) -> None:
    messages = talk(3, 5)
    encoded = encode_conversation(tokenizer, messages)
    ids, spans = encoded.ids, encoded.spans
    assert 400 < len(ids) < 512
    whole = witness_of(llama, tokenizer, bundles["llama"]).score([logged(messages)])
    slid = witness_of(llama, tokenizer, bundles["llama"], context=256).score([logged(messages)])
    assert (whole.origins[0].notes, slid.origins[0].notes) == ((), ("read through sliding windows of 256 tokens",))
    assert len(whole.projections) == len(slid.projections) == 5
    sigma = spread(whole.projections)
    inside = [end <= 256 for _, end in spans]
    assert 1 < sum(inside) < 5
    differences = [apart(a, b, sigma) for a, b in zip(whole.projections, slid.projections, strict=True)]
    assert all((difference <= 1e-5) == within for difference, within in zip(differences, inside, strict=True))
    # And of what slides each token is what its own window makes of it.
    values = np.full((len(ids), len(sigma)), np.nan)
    for window in windows(spans[-1][1], 256):
        read = stream(llama, ids[window.start : window.stop], TAPPED) @ measured_directions(bundles["llama"])
        values[window.first : window.stop] = read[window.first - window.start :]
    for (start, end), heard in zip(spans, slid.projections, strict=True):
        assert heard.tokens == end - start
        assert (np.abs(numbers(heard)[0] - values[start:end].mean(axis=0)) / sigma).max() <= 1e-4
        assert (np.abs(numbers(heard)[1] - values[start - 1]) / sigma).max() <= 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_more_is_fed_than_the_model_has_places_for(family: str, tiny_models: Any, tokenizer: Any) -> None:
    # GPT-2 has learned 512 positions, and no more: one pass would be an IndexError.
    witness = witness_of(tiny_models[family], tokenizer, context=100_000)
    assert witness.context == 512
    shard = witness.score([logged(talk(1, 40))])
    assert len(shard.projections) == 40 and not shard.skipped
    assert shard.origins[0].notes == ("read through sliding windows of 512 tokens",)


@pytest.mark.parametrize("options", [{"context": 1}, {"context": NARROWEST - 1}, {"batch_tokens": 0}])
def test_settings_that_make_no_sense_are_refused(options: Any, llama: Any, tokenizer: Any, bundles: Any) -> None:
    with pytest.raises(ConfigurationError, match="too small"):
        witness_of(llama, tokenizer, bundles["llama"], **options)


def test_another_models_bundle_is_refused(tiny_models: Any, tokenizer: Any, bundles: Any) -> None:
    with pytest.raises(BundleMismatch, match="weights"):
        witness_of(tiny_models["qwen3"], tokenizer, bundles["llama"])


def test_another_dtype_is_said_in_every_shard(tokenizer: Any, bundles: Any) -> None:
    witness = witness_of(tiny_model("llama", tokenizer, dtype="bfloat16"), tokenizer, bundles["llama"])
    assert "bfloat16" in witness.score([logged(talk(1, 1))]).notes[0]


def test_layers_that_are_never_passed_are_told(tokenizer: Any, bundles: Any) -> None:
    model = tiny_model("llama", tokenizer)
    model.idle = copy.deepcopy(model.model.layers)
    witness = Witness(
        LoadedModel(model, tokenizer, describe_model(model, tokenizer)),
        tiny_bundle(model, tokenizer),
        decoder_layers="idle",
    )
    with pytest.raises(ModelError, match="did not come to the layer"):
        witness.score([logged(talk(1, 1))])
    assert is_clean(model)


# Templates.


def test_where_a_template_rewrites_the_past_each_reply_has_its_own_pass(llama: Any, tokenizer: Any) -> None:
    counting = with_template(tokenizer, COUNTING)
    bundle = tiny_bundle(llama, counting)
    messages = talk(4, 3)
    shard = witness_of(llama, counting, bundle).score([logged(messages, notes=("tool calls left out",))])
    assert [event.turn for event in shard.projections] == [0, 1, 2] and not shard.skipped
    first, second = shard.origins[0].notes
    assert first == "tool calls left out" and second.startswith("scored turn by turn: the chat template rewrites")
    sigma = spread(shard.projections)
    special = {tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id}
    for turn, heard in enumerate(shard.projections):
        # What counts is what the template writes when that reply is the last message.
        text = counting.apply_chat_template(messages[: 2 * turn + 2], tokenize=False)
        header, reply = text[: text.rindex("assistant\n") + 10], messages[2 * turn + 1]["content"]
        prompt, said = (counting(part, add_special_tokens=False)["input_ids"] for part in (header, reply))
        oracle = forced(llama, bundle, prompt, [*said, tokenizer.eos_token_id], {tokenizer.eos_token_id}, special)
        assert oracle is not None and heard.tokens == len(oracle.tokens)
        assert (np.abs(numbers(heard)[0] - oracle.mean) / sigma).max() <= 1e-4


def test_a_long_conversation_turn_by_turn(llama: Any, tokenizer: Any) -> None:
    counting = with_template(tokenizer, COUNTING)
    bundle = tiny_bundle(llama, counting)
    whole = witness_of(llama, counting, bundle).score([logged(talk(3, 5))])
    fed: list[int] = []
    handle = llama.get_input_embeddings().register_forward_pre_hook(lambda _, args: fed.append(args[0].numel()))
    try:
        slid = witness_of(llama, counting, bundle, context=256, batch_tokens=1).score([logged(talk(3, 5))])
    finally:
        handle.remove()
    assert [event.turn for event in slid.projections] == list(range(5)) and not slid.skipped
    assert any("sliding windows of 256" in note for note in slid.origins[0].notes)
    assert max(fed) <= 256 and len(fed) <= 2 * 5  # windows in which no part of the reply lies are not fed
    assert apart(whole.projections[0], slid.projections[0], spread(whole.projections)) <= 1e-5


def test_what_a_template_refuses_is_skipped_and_the_rest_is_scored(llama: Any, tokenizer: Any) -> None:
    strict = with_template(tokenizer, STRICT)
    witness = witness_of(llama, strict)
    odd = [*talk(1, 1), {"role": "user", "content": "Well?"}, *talk(2, 1)]
    good = [logged(talk(1, 2), 1), logged(talk(2, 1), 3)]
    shard = witness.score([good[0], logged(odd, 2), good[1]])
    assert [(event.conversation_id, event.turn) for event in shard.projections] == [
        ("c1", 0), ("c1", 1), ("c2", 0), ("c3", 0),
    ]  # fmt: skip
    assert shard.skipped == [
        Skipped(
            source="log.jsonl",
            record=2,
            reason="the chat template refuses it: Roles must alternate",
            conversation_id="c2",
            turn=1,
        )
    ]
    sigma = spread(shard.projections)
    alone = witness.score(good).projections
    assert (
        max(apart(a, b, sigma) for a, b in zip([*shard.projections[:2], shard.projections[3]], alone, strict=True))
        <= 1e-4
    )


# What can't be scored.


def reasons(shard: Any) -> list[tuple[str | None, int | None, str]]:
    return [(one.conversation_id, one.turn, one.reason) for one in shard.skipped]


def test_replies_that_can_not_be_scored_are_skipped_in_their_places(witness: Witness) -> None:
    def said(*replies: str) -> list[dict[str, str]]:
        return [
            message
            for reply in replies
            for message in ({"role": "user", "content": "Well?"}, {"role": "assistant", "content": reply})
        ]

    torn = Skipped(source="log.jsonl", record=4, reason="not JSON")
    shard = witness.score(
        [
            logged(said("Good.", "", "Better.", "<|im_end|><|pad|>"), 1),
            logged([{"role": "assistant", "content": "Hello, I am a ghost."}, *said("Fine.")], 2),
            logged([{"role": "user", "content": "Anybody?"}], 3),
            torn,
            logged(said("Half a \ud800 pair."), 5),
            logged(said("Last."), 6),
            logged([], 7),
        ]
    )
    assert [(event.conversation_id, event.turn) for event in shard.projections] == [
        ("c1", 0), ("c1", 2), ("c2", 1), ("c6", 0),
    ]  # fmt: skip
    assert reasons(shard) == [
        ("c1", 1, "no token of this reply can be scored"),
        ("c1", 3, "no token of this reply can be scored"),
        ("c2", 0, "nothing was said before this reply"),
        ("c3", None, "the assistant says nothing in it"),
        (None, None, "not JSON"),
        ("c5", 0, "it can't be encoded: TypeError"),
        ("c7", None, "the assistant says nothing in it"),
    ]
    assert [origin.conversation_id for origin in shard.origins] == ["c1", "c2", "c3", "c5", "c6", "c7"]


def test_special_tokens_in_a_text_never_count(witness: Witness) -> None:
    def of(reply: str) -> Projection:
        (event,) = witness.score(
            [logged([{"role": "user", "content": "Well?"}, {"role": "assistant", "content": reply}])]
        ).projections
        return event

    plain, marked = of("The sea. The weather."), of("The sea.<|im_end|> The weather.")
    assert plain.tokens == marked.tokens and numbers(plain).tolist() != numbers(marked).tolist()


def test_one_conversation_that_overflows_harms_no_other(tokenizer: Any) -> None:
    model = tiny_model("llama", tokenizer)
    poison = tokenizer("Z", add_special_tokens=False)["input_ids"]
    assert len(poison) == 1
    with torch.no_grad():
        model.get_input_embeddings().weight[poison[0]] = torch.nan
    witness = witness_of(model, tokenizer)
    good = [logged(talk(seed, 2), seed) for seed in (1, 2, 3)]
    bad = logged([*talk(4, 1), {"role": "user", "content": "Z"}, {"role": "assistant", "content": "Hm, hm."}], 4)
    shard = witness.score([*good[:2], bad, good[2]])
    # Attention weighs a later token with nothing; but nothing times what is no number is none either.
    assert reasons(shard) == [("c4", turn, "the model's values are not finite") for turn in (0, 1)]
    alone = {(p.conversation_id, p.turn): p for p in witness.score(good).projections}
    sigma = spread(list(alone.values()))
    assert len(shard.projections) == 6
    for event in shard.projections:
        assert apart(event, alone[event.conversation_id, event.turn], sigma) <= 1e-4


def test_a_token_without_an_embedding_costs_its_conversation_only(llama: Any, tokenizer: Any) -> None:
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["gulls"])  # as with a tokenizer that was given words which the model never was
    witness = witness_of(llama, larger)
    shard = witness.score([logged(talk(0, 1), 1), logged([*talk(0, 1), *talk(2, 1)], 2)])
    assert "gulls" in SAYINGS[2]
    assert reasons(shard) == [
        ("c2", turn, "the tokenizer gives a token that the model does not have") for turn in (0, 1)
    ]
    assert [event.conversation_id for event in shard.projections] == ["c1"]


# Too little memory.


@contextmanager
def room_for(model: Any, tokens: int) -> Iterator[list[tuple[int, int]]]:
    """A GPU that holds so many padded tokens, and fails at more as a real one does: there, and with that exception."""
    fed: list[tuple[int, int]] = []

    def fill(_module: Any, args: tuple[Any, ...]) -> None:
        fed.append(tuple(args[0].shape))
        if args[0].numel() > tokens:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {args[0].numel()} MiB.")

    handle = model.get_input_embeddings().register_forward_pre_hook(fill)
    try:
        yield fed
    finally:
        handle.remove()


def test_out_of_memory_halves_the_batch(llama: Any, witness: Witness) -> None:
    talks = [logged(talk(seed, 3), seed) for seed in range(1, 9)]
    plain = witness.score(talks)
    with room_for(llama, 600) as fed:
        shard = witness.score(talks)
    assert not shard.skipped and shard.origins == plain.origins and shard.digest == plain.digest
    assert all(note.startswith("out of memory: went on with batches of ") for note in shard.notes)
    # Each halving is one failure, and what fitted once is not tried larger again.
    failures = [rows * width > 600 for rows, width in fed]
    assert 1 <= sum(failures) == len(shard.notes) <= 3 and failures == sorted(failures, reverse=True)
    sigma = spread(plain.projections)
    assert max(apart(a, b, sigma) for a, b in zip(plain.projections, shard.projections, strict=True)) <= 1e-4
    assert is_clean(llama)


def test_one_conversation_too_large_for_the_memory_is_read_in_narrower_windows(
    llama: Any, tokenizer: Any, bundles: Any
) -> None:
    talks = [logged(talk(3, 9), 1), logged(talk(1, 1), 2), logged(talk(2, 1), 3)]
    length = max(len(row) for batch in witness_of(llama, tokenizer, bundles["llama"]).batches(talks) for row in batch)
    with room_for(llama, length - 1):
        shard = witness_of(llama, tokenizer, bundles["llama"], batch_tokens=1).score(talks)
    assert not shard.skipped and len(shard.projections) == 11
    narrowed = length // 2
    assert shard.origins[0].notes == (f"out of memory: read through sliding windows of {narrowed} tokens",)
    assert [origin.notes for origin in shard.origins[1:]] == [(), ()]
    slid = witness_of(llama, tokenizer, bundles["llama"], context=narrowed).score(talks)
    sigma = spread(slid.projections)
    assert max(apart(a, b, sigma) for a, b in zip(slid.projections, shard.projections, strict=True)) <= 1e-4


def test_what_fits_in_no_memory_is_skipped(llama: Any, witness: Witness) -> None:
    small = logged([{"role": "user", "content": "Hm."}, {"role": "assistant", "content": "Hm."}], 2)
    room = max(len(row) for batch in witness.batches([small]) for row in batch)
    assert room < NARROWEST
    with room_for(llama, room):
        shard = witness.score([logged(talk(3, 9), 1), small])
    assert [event.conversation_id for event in shard.projections] == ["c2"]
    assert reasons(shard) == [
        ("c1", turn, "out of memory, however little of it is read at a time") for turn in range(9)
    ]


def test_another_failure_is_not_taken_for_a_full_memory(llama: Any, witness: Witness) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the device went away")

    handle = llama.get_input_embeddings().register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="went away"):
            witness.score([logged(talk(1, 1))])
    finally:
        handle.remove()
    assert is_clean(llama)
