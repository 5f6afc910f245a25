"""A build goes on where it was killed, stops where it has settled, and what it captures is what the model computed."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from conftest import tiny_model
from safetensors import safe_open
from tiny import Built, environment, small_catalogue, small_settings

from collectors.assemble import assemble_bundle
from collectors.build import BuildSettings, Rollout, Rollouts, collect_rollouts, generate_rollouts
from collectors.models import LoadedModel
from monitor.axis.catalogue import Catalogue
from monitor.errors import CatalogueError, ConfigurationError, ModelError

pytest_plugins = ["miniature"]

# Builds in a process of its own, and says so after every shard.
BUILD = """
import sys
from pathlib import Path
from collectors.build import collect_rollouts
from collectors.models import load_model
from monitor.errors import AnchorwatchError
from tiny import small_catalogue, small_settings
loaded = load_model(sys.argv[1], device="cpu")
print("ready", flush=True)
try:
    collect_rollouts(loaded, small_catalogue(), small_settings(batch_size=4), Path(sys.argv[2]),
                     progress=lambda done, total, what: print(done, flush=True))
except AnchorwatchError as error:
    print(error)
    sys.exit(2)
"""


def building(model: Path, work: Path, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILD, str(model), str(work)]
    threads = str(torch.get_num_threads())
    return subprocess.Popen(
        command, env=environment(OMP_NUM_THREADS=threads), stdout=subprocess.PIPE, text=True, **options
    )


def shards(work: Path) -> dict[str, tuple[dict[str, str], bytes]]:
    """What each shard says, and its activations to the bit. (safetensors writes metadata in no fixed order.)"""
    found = {}
    for path in sorted(work.glob("*.safetensors")):
        with safe_open(path, framework="np") as shard:
            found[path.name] = shard.metadata(), shard.get_tensor("means").tobytes()
    return found


def same(one: Rollouts, other: Rollouts) -> bool:
    return (
        one.rollouts == other.rollouts
        and one.texts == other.texts
        and one.reliability == other.reliability
        and all(np.array_equal(a, b) for a, b in zip(one.means, other.means, strict=True))
    )


def silent_after(loaded: LoadedModel, tokenizer: Any, ends: Sequence[int]) -> LoadedModel:
    """The same weights, but `ends` end a response."""
    model = tiny_model("llama", tokenizer)
    model.generation_config.eos_token_id = list(ends)
    return LoadedModel(model, tokenizer, loaded.facts)


# Killed, resumed, refused


def test_a_build_that_was_killed_ends_as_one_that_was_not(
    tmp_path: Path, model_folder: Path, loaded: LoadedModel, catalogue: Catalogue
) -> None:
    settings = small_settings(batch_size=4)
    undisturbed = collect_rollouts(loaded, catalogue, settings, tmp_path / "undisturbed")
    whole = shards(tmp_path / "undisturbed")

    process = building(model_folder, tmp_path / "killed")
    assert process.stdout is not None
    for _ in range(4):  # "ready" and three shards; the fourth is being made when the signal comes
        assert process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left = shards(tmp_path / "killed")
    assert 3 <= len(left) < len(whole)

    resumed = collect_rollouts(loaded, catalogue, settings, tmp_path / "killed")
    assert shards(tmp_path / "killed") == whole
    assert same(resumed, undisturbed)
    bundles = [assemble_bundle(loaded, catalogue, settings, rollouts)[0] for rollouts in (undisturbed, resumed)]
    infos = [msgspec.structs.replace(bundle.info, created="", checksum=None) for bundle in bundles]
    assert infos[0] == infos[1]
    assert bundles[0].tensor_bytes == bundles[1].tensor_bytes


def test_a_shard_that_was_half_written_is_not_one(
    tmp_path: Path, loaded: LoadedModel, catalogue: Catalogue, built: Built
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    whole = shards(built.work)
    (work / "build.json").write_bytes((built.work / "build.json").read_bytes())
    (work / "fixed-0000.partial").write_bytes((built.work / "fixed-0000.safetensors").read_bytes()[:100])
    again = collect_rollouts(loaded, catalogue, small_settings(), work)
    assert shards(work) == whole
    assert same(again, built.rollouts)
    assert not list(work.glob("*.partial"))


def test_a_finished_build_is_read_back_without_the_model(
    loaded: LoadedModel, catalogue: Catalogue, built: Built
) -> None:
    broken = tiny_model("llama", loaded.tokenizer)
    broken.generate = None  # would be called, were anything generated
    again = collect_rollouts(
        LoadedModel(broken, loaded.tokenizer, loaded.facts), catalogue, small_settings(), built.work
    )
    assert same(again, built.rollouts)


@pytest.mark.parametrize("other", ["settings", "catalogue", "model"])
def test_the_folder_of_another_build_is_refused(
    loaded: LoadedModel, catalogue: Catalogue, built: Built, other: str
) -> None:
    settings = small_settings(tokens=9) if other == "settings" else small_settings()
    if other == "catalogue":
        catalogue = msgspec.structs.replace(catalogue, version="another")
    if other == "model":
        loaded = replace(loaded, facts=msgspec.structs.replace(loaded.facts, weights_sha256="f" * 64))
    before = shards(built.work)
    with pytest.raises(ConfigurationError, match=f"another build: {other} differ") as caught:
        collect_rollouts(loaded, catalogue, settings, built.work)
    assert "--work" in caught.value.cure
    assert shards(built.work) == before


def test_a_torn_stamp_is_told_with_the_cure(tmp_path: Path, loaded: LoadedModel, catalogue: Catalogue) -> None:
    (tmp_path / "build.json").write_text('{"model": ')
    with pytest.raises(ConfigurationError, match=r"build\.json") as caught:
        collect_rollouts(loaded, catalogue, small_settings(), tmp_path)
    assert caught.value.cure


def test_a_full_disk_is_told_with_the_cure_and_leaves_whole_shards_only(
    tmp_path: Path, model_folder: Path, loaded: LoadedModel, catalogue: Catalogue
) -> None:
    # The stamp fits, a shard does not: as on a disk that fills up meanwhile.
    room = 2_500
    work = tmp_path / "work"
    process = building(model_folder, work, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)))
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 2, said
    assert "can't be written" in said and "cure:" in said
    assert (work / "build.json").exists()
    assert not shards(work) and not list(work.glob("*.partial"))
    collect_rollouts(loaded, catalogue, small_settings(batch_size=4), work)
    assert shards(work)


# Settling


def role_counts(rollouts: Rollouts) -> Counter[str]:
    return Counter(rollout.name for rollout in rollouts.rollouts if rollout.group == "role")


def planned(work: Path) -> Counter[str]:
    """Role rollouts in the shards, also those that came to nothing."""
    found: Counter[str] = Counter()
    for path in work.glob("round*.safetensors"):
        with safe_open(path, framework="np") as shard:
            found.update(rollout["name"] for rollout in json.loads(shard.metadata()["rollouts"]))
    return found


def test_each_role_stops_when_its_own_vector_has_settled(
    tmp_path: Path, loaded: LoadedModel, catalogue: Catalogue
) -> None:
    # How settled each role is after its first round, by a build that ends there.
    first = collect_rollouts(loaded, catalogue, small_settings(max_rollouts=2), tmp_path / "first").reliability
    between = float(np.mean(sorted(first.values())[3:5]))
    assert 0 < between < 1
    rollouts = collect_rollouts(loaded, catalogue, small_settings(settled=between), tmp_path / "second")
    counts = planned(tmp_path / "second")
    for role, reliability in first.items():
        assert (counts[role] == 2) == (reliability >= between)
    assert set(counts.values()) <= {2, 4, 6}
    assert {role: rollouts.reliability[role] for role in first if counts[role] == 2} == {
        role: reliability for role, reliability in first.items() if counts[role] == 2
    }


def test_a_role_that_never_settles_stops_at_the_cap(tmp_path: Path, loaded: LoadedModel, catalogue: Catalogue) -> None:
    seen: list[tuple[int, int]] = []
    collect_rollouts(
        loaded,
        catalogue,
        small_settings(settled=0.999999, max_rollouts=5),  # two rounds of 2: the third would go over it
        tmp_path,
        progress=lambda done, total, _: seen.append((done, total)),
    )
    assert set(planned(tmp_path).values()) == {4}
    assert all(done <= total for done, total in seen)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_the_planned_total_falls_as_roles_settle(tmp_path: Path, loaded: LoadedModel, catalogue: Catalogue) -> None:
    totals: list[int] = []
    settings = small_settings(settled=1e-9)
    rollouts = collect_rollouts(
        loaded, catalogue, settings, tmp_path, progress=lambda _done, total, _what: totals.append(total)
    )
    assert totals[0] == 20 + 8 * 6
    assert len(rollouts.rollouts) <= totals[-1] < totals[0]


# Splits and plans


def test_roles_and_questions_never_cross_the_splits(built: Built, catalogue: Catalogue) -> None:
    roles: dict[str, set[str]] = {}
    questions: dict[int, set[str]] = {}
    requests: dict[int, set[str]] = {}
    for rollout in built.rollouts.rollouts:
        if rollout.group == "role":
            roles.setdefault(rollout.name, set()).add(rollout.split)
        asked = requests if rollout.group == "style" else questions
        asked.setdefault(rollout.question, set()).add(rollout.split)
    for places in (roles, questions, requests):
        assert places and all(len(splits) == 1 for splits in places.values())
    assert {split for splits in roles.values() for split in splits} == {"make", "choose", "report"}


def test_a_role_meets_each_question_of_its_split_before_one_comes_again(built: Built) -> None:
    asked: dict[str, list[int]] = {}
    for rollout in built.rollouts.rollouts:
        if rollout.group == "role" and rollout.split == "make":
            asked.setdefault(rollout.name, []).append(rollout.question)
    assert asked
    for questions in asked.values():  # 6 questions are in the making split, and at most 6 rollouts
        assert len(set(questions)) == len(questions)


def test_the_default_assistant_answers_under_all_its_prompts(built: Built, catalogue: Catalogue) -> None:
    used = Counter(rollout.prompt for rollout in built.rollouts.rollouts if rollout.group == "default")
    assert set(used) == set(range(len(catalogue.defaults)))


def test_a_catalogue_that_is_too_small_is_refused(tmp_path: Path, loaded: LoadedModel) -> None:
    few = msgspec.structs.replace(small_catalogue(), questions=small_catalogue().questions[:2])
    with pytest.raises(CatalogueError) as caught:
        collect_rollouts(loaded, few, small_settings(), tmp_path)
    assert caught.value.cure


def test_fewer_roles_on_request(tmp_path: Path, loaded: LoadedModel, catalogue: Catalogue) -> None:
    rollouts = collect_rollouts(loaded, catalogue, small_settings(roles=4, max_rollouts=2), tmp_path)
    assert len(rollouts.reliability) == 4


def test_wrong_settings_are_told_all_at_once() -> None:
    with pytest.raises(ConfigurationError) as caught:
        BuildSettings(
            tokens=1,
            temperature=0.0,
            batch_size=0,
            round_rollouts=1,
            max_rollouts=0,
            settled=1.0,
            default_repeats=0,
            style_repeats=0,
            roles=3,
        )
    for name in (
        "tokens", "temperature", "batch_size", "round_rollouts", "max_rollouts",
        "settled", "default_repeats", "style_repeats", "roles",
    ):  # fmt: skip
        assert f"{name} is" in caught.value.problem
    assert caught.value.cure


# What is captured


def spoken(ids: list[int], ends: set[int], special: set[int]) -> list[int]:
    """Places of the tokens that count: before the first end token, fed back, and no template."""
    end = next((i for i, token in enumerate(ids) if token in ends), None)
    fed = len(ids) - 1 if end is None else end
    return [i for i in range(fed) if ids[i] not in special]


def test_every_captured_mean_is_what_a_plain_forward_pass_computes(loaded: LoadedModel, catalogue: Catalogue) -> None:
    """The oracle feeds prompt and reply, without padding, cache or tap, and reads `output_hidden_states`."""
    batch = [
        Rollout("role", "pirate", "make", 1, 0),
        Rollout("default", "", "make", 0, 5),
        Rollout("style", "poem", "make", 2, 1),
        Rollout("default", "", "make", 1, 3),
    ]
    model, tokenizer = tiny_model("llama", loaded.tokenizer), loaded.tokenizer
    said: list[torch.Tensor] = []
    plain = model.generate

    def listened(**arguments: Any) -> torch.Tensor:
        said.append(plain(**arguments))
        return said[-1]

    model.generate = listened
    settings = small_settings(tokens=24, batch_size=4)
    means, texts = generate_rollouts(LoadedModel(model, tokenizer, loaded.facts), catalogue, settings, batch)
    systems = [catalogue.roles["pirate"][1], None, "Be helpful.", ""]
    asked = [
        catalogue.questions[0].text, catalogue.questions[5].text,
        catalogue.styles[1].text, catalogue.questions[3].text,
    ]  # fmt: skip
    special = {tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id}
    width = said[0].shape[1] - 24
    last: list[torch.Tensor] = []
    model.model.layers[-1].register_forward_hook(
        lambda _module, _args, out: last.append(out[0] if isinstance(out, tuple) else out)
    )
    for row in range(4):
        system, question = systems[row], asked[row]
        head = [] if system is None else [{"role": "system", "content": system}]
        prompt = tokenizer.apply_chat_template(
            [*head, {"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        reply = said[0][row, width:].tolist()
        with torch.no_grad():
            states = model(torch.tensor([prompt + reply]), use_cache=False, output_hidden_states=True).hidden_states
        places = [len(prompt) + i for i in spoken(reply, {tokenizer.eos_token_id, tokenizer.pad_token_id}, special)]
        assert places
        # The last of `hidden_states` is normed; the last layer's own output comes from a hook.
        raw = [*states[1:-1], last[-1].reshape(states[1].shape)]
        oracle = np.stack([layer[0, places].double().mean(dim=0).numpy() for layer in raw])
        scale = np.stack([layer[0].double().std().numpy() for layer in raw])
        np.testing.assert_array_less(np.abs(means[row] - oracle).max(axis=1), 1e-4 * scale)
        assert texts[row] == tokenizer.decode(
            reply[: next((i for i, t in enumerate(reply) if t in special), len(reply))], skip_special_tokens=True
        )


def test_the_tap_leaves_the_model_as_it_was(loaded: LoadedModel, built: Built) -> None:
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.model.modules())


def test_empty_responses_are_left_out(tmp_path: Path, loaded: LoadedModel, catalogue: Catalogue) -> None:
    # Every other token ends a response, so about half of them end before they begin.
    often = silent_after(loaded, loaded.tokenizer, range(0, len(loaded.tokenizer), 2))
    rollouts = collect_rollouts(often, catalogue, small_settings(settled=0.999999), tmp_path)
    everything = planned(tmp_path).total() + 20
    assert 0 < len(rollouts.rollouts) < everything
    assert len(rollouts.rollouts) == len(rollouts.means) == len(rollouts.texts)
    assert all(np.isfinite(mean).all() for mean in rollouts.means)


def test_a_model_that_says_nothing_at_all_is_told_with_the_cure(
    tmp_path: Path, loaded: LoadedModel, catalogue: Catalogue
) -> None:
    mute = silent_after(loaded, loaded.tokenizer, range(len(loaded.tokenizer)))
    with pytest.raises(ModelError, match="said nothing") as caught:
        collect_rollouts(mute, catalogue, small_settings(), tmp_path)
    assert caught.value.cure


def test_the_judge_decides_which_role_responses_are_kept(
    tmp_path: Path, loaded: LoadedModel, catalogue: Catalogue, built: Built
) -> None:
    shown: list[tuple[Rollout, str]] = []

    def only_pirates(responses: list[tuple[Rollout, str]]) -> list[bool]:
        shown.extend(responses)
        return [rollout.name == "pirate" for rollout, _ in responses]

    kept = collect_rollouts(loaded, catalogue, small_settings(), built.work, keep=only_pirates)
    assert {rollout.group for rollout, _ in shown} == {"role"}
    assert set(role_counts(kept)) == {"pirate"}
    everybody = Counter(rollout.group for rollout in built.rollouts.rollouts)
    pirates = role_counts(built.rollouts)["pirate"]
    assert pirates
    assert Counter(rollout.group for rollout in kept.rollouts) == {**everybody, "role": pirates}
