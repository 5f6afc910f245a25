"""Scripted conversations: the growing cache changes nothing that is said or measured, and the scripts are sound."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model
from tiny import Built

from collectors.models import LoadedModel
from collectors.traffic import DRIFTING, HEALTHY, NAMES, Reply, Script, load_scripts, play
from collectors.watch import watch
from monitor.axis.catalogue import load_catalogue
from monitor.errors import CatalogueError, ModelError

pytest_plugins = ["miniature"]

SCRIPTS = [
    Script(
        id="long", kind="therapy", topic="", turns=("Hi", "Why?", "Tell me a story about the sea, please.", "Go on")
    ),
    Script(id="short", kind="small_talk", topic="", turns=("What is the weather like on an island?",)),
    Script(id="middle", kind="role_play", topic="", turns=("You are a ghost.", "Who counted the ships?", "And hours?")),
    Script(id="other", kind="jailbreak", topic="", turns=("A keeper", "Write it down in a small blue book. " * 4)),
]
TALKS = [(script.id, script) for script in SCRIPTS]
GREEDY = 1e-4  # so cold that sampling takes the likeliest token
ALSO_END = range(3, 300, 16)  # random weights seldom end a reply: let some more tokens do so


class Call:
    """One generate call, as the model saw it."""

    def __init__(self, arguments: dict[str, Any], output: Any) -> None:
        self.ids = arguments["input_ids"]
        self.mask = arguments["attention_mask"]
        self.generated = output.sequences[:, self.ids.shape[1] :]

    def prompt(self, row: int) -> list[int]:
        """The row's ids without what is masked."""
        ids: list[int] = self.ids[row][self.mask[row].bool()].tolist()
        return ids


def talker(tokenizer: Any) -> Any:
    """A model whose replies end at different times; it says no template token, so that text and ids tell the same."""
    model = tiny_model("llama", tokenizer)
    model.generation_config.suppress_tokens = [tokenizer.pad_token_id, tokenizer.bos_token_id]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *ALSO_END]
    return model


def listened(tokenizer: Any, facts: Any) -> tuple[LoadedModel, list[Call]]:
    """A talker that notes its generate calls."""
    model = talker(tokenizer)
    plain, calls = model.generate, []

    def generate(**arguments: Any) -> Any:
        given = {name: arguments[name].clone() for name in ("input_ids", "attention_mask")}
        output = plain(**arguments)
        calls.append(Call(given, output))
        return output

    model.generate = generate
    return LoadedModel(model, tokenizer, facts), calls


def until_end(ids: list[int], tokenizer: Any) -> list[int]:
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id, *ALSO_END}
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


# The growing cache


@pytest.fixture(scope="module")
def played(loaded: LoadedModel) -> tuple[dict[str, list[dict[str, str]]], list[Call], list[Reply]]:
    model, calls = listened(loaded.tokenizer, loaded.facts)
    replies: list[Reply] = []
    messages = play(model, None, TALKS, tokens=20, temperature=GREEDY, on_reply=replies.append)
    return messages, calls, replies


def test_replies_are_those_of_a_fresh_prompt(played: tuple[Any, list[Call], list[Reply]], loaded: LoadedModel) -> None:
    """The oracle has no cache, no padding and no other rows: one prompt, greedy decoding."""
    fresh = talker(loaded.tokenizer)
    compared = 0
    for call in played[1]:
        for row in range(len(call.ids)):
            ids = torch.tensor([call.prompt(row)])
            alone = fresh.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
            expected = until_end(alone[0, ids.shape[1] :].tolist(), loaded.tokenizer)
            assert until_end(call.generated[row].tolist(), loaded.tokenizer) == expected
            compared += 1
    assert compared == sum(len(script.turns) for script in SCRIPTS) == 10


def test_every_prompt_reads_as_the_template_writes_the_conversation(
    played: tuple[Any, list[Call], list[Reply]], loaded: LoadedModel
) -> None:
    messages, calls, _ = played
    going_on = [name for name, _ in TALKS]
    for turn, call in enumerate(calls):
        going_on = [script.id for script in SCRIPTS if len(script.turns) > turn]
        assert len(call.ids) == len(going_on)
        for row, name in enumerate(going_on):
            written = loaded.tokenizer.apply_chat_template(
                messages[name][: 2 * turn + 1], tokenize=False, add_generation_prompt=True
            )
            assert loaded.tokenizer.decode(call.prompt(row)) == written


def test_rows_of_different_lengths_and_numbers_of_turns_each_get_all_their_replies(
    played: tuple[Any, list[Call], list[Reply]],
) -> None:
    messages, calls, replies = played
    assert [len(call.ids) for call in calls] == [4, 3, 2, 1]
    for name, script in TALKS:
        assert [m["content"] for m in messages[name] if m["role"] == "user"] == list(script.turns)
        assert [m["role"] for m in messages[name]] == ["user", "assistant"] * len(script.turns)
        mine = [reply for reply in replies if reply.conversation_id == name]
        assert [reply.turn for reply in mine] == list(range(len(script.turns)))
        assert [reply.text for reply in mine] == [m["content"] for m in messages[name] if m["role"] == "assistant"]
    assert all(0 <= reply.tokens <= 20 for reply in replies)
    assert len({reply.tokens for reply in replies}) > 3  # and they end at different times


def test_the_batch_changes_nothing_that_is_said(
    played: tuple[Any, list[Call], list[Reply]], loaded: LoadedModel
) -> None:
    model, _ = listened(loaded.tokenizer, loaded.facts)
    assert play(model, None, TALKS, tokens=20, temperature=GREEDY, batch_size=3) == played[0]


def test_the_same_seed_says_the_same_and_another_does_not(loaded: LoadedModel) -> None:
    said = [play(loaded, None, TALKS[:2], tokens=8, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


def test_what_is_measured_over_the_cache_is_what_one_plain_pass_computes(
    loaded: LoadedModel, built: Built, collected: Any
) -> None:
    model, calls = listened(loaded.tokenizer, loaded.facts)
    with watch(model.model, model.tokenizer, built.bundle, collected) as watched:
        play(model, watched, TALKS, tokens=20, temperature=GREEDY)
    found = {(p.conversation_id, p.turn): p for p in collected.projections}
    names, directions = built.bundle.directions()
    layer, compared = built.bundle.layer, 0
    seen: list[torch.Tensor] = []
    plain = tiny_model("llama", loaded.tokenizer)
    plain.model.layers[layer].register_forward_hook(
        lambda _module, _args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    for turn, call in enumerate(calls):
        for row, name in enumerate(script.id for script in SCRIPTS if len(script.turns) > turn):
            prompt = call.prompt(row)
            reply = until_end(call.generated[row].tolist(), loaded.tokenizer)
            fed = reply[:-1] if len(reply) == 20 else reply  # the last one of a cut reply is never fed
            if not fed:
                assert (name, turn) not in found
                continue
            with torch.no_grad():
                plain(torch.tensor([prompt + reply]), use_cache=False)
            hidden = seen[-1].reshape(-1, directions.shape[0]).double().numpy() @ directions
            projection = found[name, turn]
            mean = hidden[len(prompt) : len(prompt) + len(fed)].mean(axis=0)
            sigma = hidden.std(axis=0)
            for where, oracle in ((projection.coordinates, mean), (projection.prompt, hidden[len(prompt) - 1])):
                difference = np.abs(np.array([where[name] for name in names]) - oracle) / sigma
                assert difference.max() <= 1e-4
            assert projection.tokens == len(fed)
            compared += 1
    assert compared == len(found) >= 8


def test_a_template_that_rewrites_earlier_turns_is_refused(loaded: LoadedModel) -> None:
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.chat_template = "{{ messages[-1]['content'] }}<|im_start|>"
    with pytest.raises(ModelError, match="rewrites earlier turns") as caught:
        play(LoadedModel(loaded.model, tokenizer, loaded.facts), None, TALKS[:1], tokens=2)
    assert caught.value.cure


# Script files


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def script(**changes: Any) -> dict[str, Any]:
    return {"id": "a", "kind": "small_talk", "topic": "tea", "turns": ["Hi"], **changes}


def test_a_file_of_ones_own_is_read(tmp_path: Path) -> None:
    (read,) = load_scripts(write(tmp_path / "own.json", [script()]))
    assert read == Script(id="a", kind="small_talk", topic="tea", turns=("Hi",))


def test_all_problems_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    wrong = [script(kind="gossip"), script(turns=[]), script(id="b", kind="plot"), script(id="c", turns=["Hi", " "])]
    with pytest.raises(CatalogueError) as caught:
        load_scripts(write(tmp_path / "wrong.json", wrong))
    for part in ("a: kind 'gossip'", "a: no turns", "b: kind 'plot'", "a: more than one script", "c: an empty turn"):
        assert part in caught.value.problem
    assert caught.value.cure


@pytest.mark.parametrize("content", [[], {}, [{"id": "a"}], [script(turns="Hi")], "demo"])
def test_a_malformed_file_is_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(CatalogueError) as caught:
        load_scripts(write(tmp_path / "wrong.json", content))
    assert caught.value.cure


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match="can't be read") as caught:
        load_scripts(tmp_path / "none.json")
    assert "develop" in caught.value.cure


# The scripts that come with it


@pytest.mark.parametrize("name", NAMES)
def test_shipped_scripts_are_sound(name: str) -> None:
    scripts = load_scripts(name)
    turns = [" ".join(turn.casefold().split()) for script in scripts for turn in script.turns]
    repeated = [turn for turn, count in Counter(turns).items() if count > 1]
    assert not [turn for turn in repeated if len(turn.split()) >= 5]  # "shorter please" is what people say
    kinds = Counter(script.kind for script in scripts)
    if name == "demo":  # as the issue of the demo asks: at least 28 conversations of 6 to 10 turns
        assert len(scripts) >= 28
        assert all(6 <= len(script.turns) <= 10 for script in scripts)
        assert set(kinds) >= {"bounded_task", "creative_writing", "small_talk", "therapy", "philosophy", "role_play"}
        return
    assert all(script.family for script in scripts)
    healthy, drifting = (sum(kinds[kind] for kind in side) for side in (HEALTHY, DRIFTING))
    assert (healthy, drifting) == {"develop": (150, 80), "calibrate": (230, 0), "test": (130, 100)}[name]
    assert healthy - kinds["bounded_task"] >= healthy / 2  # at least half of the healthy ones are hard
    assert set(kinds) >= {*DRIFTING} if name != "calibrate" else set(kinds) == {*HEALTHY}


def test_splits_share_no_topic_family() -> None:
    families = [{script.family for script in load_scripts(name)} for name in ("develop", "calibrate", "test")]
    for one, other in combinations(families, 2):
        assert not one & other


# Catalogue roles whose names are everyday words; as such they may occur in what users say.
EVERYDAY = {
    "actor",
    "ancient",
    "assistant",
    "builder",
    "chef",
    "coach",
    "counselor",
    "critic",
    "designer",
    "doctor",
    "echo",
    "editor",
    "familiar",
    "graduate",
    "guide",
    "hybrid",
    "infant",
    "judge",
    "musician",
    "narrator",
    "novelist",
    "parent",
    "patient",
    "poet",
    "reviewer",
    "student",
    "survivor",
    "teacher",
    "therapist",
    "tree",
    "veteran",
    "whale",
    "wind",
    "witness",
    "writer",
}


@pytest.mark.parametrize("name", ["develop", "test"])
def test_no_role_of_the_catalogue_is_played(name: str) -> None:
    roles = {role.replace("_", " ") for role in load_catalogue().roles} - EVERYDAY
    named = re.compile(r"\b(" + "|".join(map(re.escape, sorted(roles))) + r")s?\b", re.IGNORECASE)
    assert named.search("You are an old Vampire now.")  # the yardstick itself
    found = {
        script.id: named.findall(" ".join(script.turns)) for script in load_scripts(name) if script.kind in DRIFTING
    }
    assert {id: words for id, words in found.items() if words} == {}


def grams(text: str) -> frozenset[tuple[str, ...]]:
    """Five words in a row; of a shorter text, all of it."""
    words = re.findall(r"[a-z0-9']+", text.casefold())
    return frozenset(tuple(words[i : i + 5]) for i in range(max(len(words) - 4, 1)))


def alike(ours: Iterable[str], theirs: Iterable[str]) -> list[tuple[float, str, str]]:
    """Pairs whose 5-grams overlap by a Jaccard index above 0.3."""
    others = [(text, grams(text)) for text in theirs]
    places = defaultdict(set)
    for number, (_, theirs_grams) in enumerate(others):
        for gram in theirs_grams:
            places[gram].add(number)
    found = []
    for text in ours:
        mine = grams(text)
        for number in set().union(*(places[gram] for gram in mine if gram in places)):
            other, its = others[number]
            index = len(mine & its) / len(mine | its)
            if index > 0.3:
                found.append((index, text, other))
    return found


def test_what_is_reported_was_seen_by_nothing_that_was_fitted() -> None:
    assert alike(["a b c d e f"], ["a b c d e f", "x"])  # the yardstick itself
    said = {name: [turn for script in load_scripts(name) for turn in script.turns] for name in NAMES}
    for one, other in combinations(NAMES, 2):
        assert not {turn.casefold() for turn in said[one]} & {turn.casefold() for turn in said[other]}, (one, other)
        assert alike(said[one], said[other]) == [], (one, other)
    catalogue = load_catalogue()
    requests = [request.text for request in catalogue.styles]
    questions = [question.text for question in catalogue.questions]
    for name in NAMES:
        assert alike(said[name], requests) == [], name
        assert alike(said[name], questions) == [], name
