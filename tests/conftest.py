"""What the collectors' tests share: a tiny tokenizer, tiny random models of five families, and a bundle for each.

They are random, so they say nothing sensible; but every rule of spans, caches, beams and hooks is the same in them as
in a real model, at a thousandth of the cost.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import msgspec
import numpy as np
import pytest
from receiver import receiver  # noqa: F401  (known to every test by this; so are the next)
from servers import (  # noqa: F401
    brokers,
    kafka,
    own_alertmanager,
    own_kafka,
    own_prometheus,
    own_redis,
    shared_redis,
)
from shares import pytest_collection_modifyitems, pytest_xdist_make_scheduler  # noqa: F401

from monitor.axis.bundle import Bundle, BundleInfo, new_bundle
from monitor.events import Projection

# Before torch is imported, here and by whatever a test starts: tiny tensors gain nothing from several threads, and lose
# much where the cores are busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# pytest-xdist tells its processes how wide a terminal is, and a console keeps what it finds when it is made.
for _size in ("COLUMNS", "LINES"):
    os.environ.pop(_size, None)

# A machine that is busy is no failure: nothing here is judged by the clock. Every run tries the same examples, so that
# a change is judged by what it changes; `--hypothesis-profile search` looks for new ones, ten times as many.
hypothesis.settings.register_profile(
    "anchorwatch", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile(
    "search", hypothesis.settings.get_profile("anchorwatch"), derandomize=False, max_examples=1000
)
hypothesis.settings.load_profile("anchorwatch")

FAMILIES = ("llama", "qwen3", "gemma3", "gpt2", "neox")
TAPPED = 2
HOLD_LAYERS = (2, 4)

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SAMPLE = (
    "You are a helpful assistant. What is the weather like on an island? Tell me a story about the sea, please.\n\n"
    "The lighthouse keeper counted the ships and the gulls and the hours, and wrote them down in a small blue book.\n"
)


class Collected:
    """A publisher that keeps what it is given."""

    def __init__(self) -> None:
        self.projections: list[Projection] = []

    def publish(self, projection: Projection) -> bool:
        self.projections.append(projection)
        return True


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Byte-level BPE with ChatML, as SmolLM2 and Qwen have it: end token and padding are two ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        [SAMPLE] * 3,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|pad|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        padding_side="left",
    )
    made.chat_template = CHATML
    return made


def tiny_model(family: str, tokenizer: Any, *, seed: int = 0, dtype: str = "float32", layers: int = 4) -> Any:
    """A random model. Its weights are larger than a fresh model's, so that its tokens and projections vary."""
    import torch
    import transformers

    ids = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "initializer_range": 0.3,
    }
    wide = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    }
    config: Any
    match family:
        case "llama":
            config = transformers.LlamaConfig(**wide, num_key_value_heads=2, **ids)
        case "qwen3":
            config = transformers.Qwen3Config(**wide, num_key_value_heads=2, head_dim=8, **ids)
        case "gemma3":  # three layers of four see the last 8 tokens only
            kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
            config = transformers.Gemma3TextConfig(
                **wide, num_key_value_heads=2, head_dim=8, sliding_window=8, layer_types=kinds[:layers], **ids
            )
        case "gpt2":
            config = transformers.GPT2Config(n_embd=32, n_layer=layers, n_head=4, n_positions=512, **ids)
        case "neox":
            config = transformers.GPTNeoXConfig(**wide, **ids)
        case _:
            raise ValueError(family)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


@pytest.fixture(scope="session")
def tiny_models(tokenizer: Any) -> dict[str, Any]:
    return {family: tiny_model(family, tokenizer) for family in FAMILIES}


@pytest.fixture(scope="session")
def llama(tiny_models: dict[str, Any]) -> Any:
    return tiny_models["llama"]


def tiny_bundle(model: Any, tokenizer: Any, **changes: Any) -> Bundle:
    """A bundle of random directions for a tiny model."""
    from collectors.models import describe_model

    facts = describe_model(model, tokenizer, name="tiny")
    layers, hidden = facts.layers, facts.hidden
    draw = np.random.default_rng(7).standard_normal
    info = BundleInfo(
        model=facts,
        layer=TAPPED,
        hold_layers=HOLD_LAYERS,
        styles=["poem", "chat"],
        roles=["ghost", "hermit", "pirate"],
        catalogue_version="0",
        created="2026-01-02T03:04:05Z",
        licence="Apache-2.0",
        seed=7,
    )
    tensors = {
        "axis": draw((layers, hidden)),
        "persona_axis": draw((layers, hidden)),
        "styles": draw((layers, 2, hidden)),
        "default_mean": draw((layers, hidden)),
        "first_component": draw((layers, hidden)),
        "role_vectors": draw((3, hidden)),
        "basis": np.linalg.qr(draw((hidden, 2)))[0].T,
        "role_mean": draw(hidden),
        "singular_values": np.array([2.0, 1.0]),
        "floors": np.zeros(layers),
        "residual_norm": np.full(layers, 5.0),
    }
    return new_bundle(tensors, msgspec.structs.replace(info, **changes))


@pytest.fixture(scope="session")
def bundles(tiny_models: dict[str, Any], tokenizer: Any) -> dict[str, Bundle]:
    return {family: tiny_bundle(model, tokenizer) for family, model in tiny_models.items()}


@pytest.fixture(scope="session")
def smollm2() -> Iterator[Any]:
    """The real SmolLM2-135M-Instruct; skipped where its package is not installed."""
    from collectors.models import load_model
    from monitor.errors import ModelError

    try:
        yield load_model("smollm2", device="cpu")
    except ModelError as error:
        pytest.skip(str(error))


def is_clean(model: Any) -> bool:
    """No hook and no `generate` of ours is on the model. transformers keeps hooks of its own there."""
    hooks = [
        hook
        for module in model.modules()
        for hook in [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    ]
    ours = [hook for hook in hooks if inspect.unwrap(hook).__module__.startswith("collectors")]
    return not ours and "generate" not in model.__dict__


@pytest.fixture
def collected() -> Collected:
    return Collected()


Prompts = Callable[[int], list[list[int]]]


@pytest.fixture(scope="session")
def prompts(tokenizer: Any) -> Prompts:
    """Encoded chat prompts of different lengths."""
    from collectors.spans import encode_prompt

    asked = [
        "What is the weather like?",
        "Tell me a story about the sea, please.",
        "Hi",
        "You are a ghost. Where do you live, and who counted the ships?",
        "Why?",
        "Write a small blue book about gulls and hours.",
        "Who are you?",
        "Please help me on an island of keepers",
    ]
    return lambda count: [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in asked[:count]]
