"""A whole instrument in miniature: a tiny random model in a folder, and a bundle made and calibrated with it.

A test module asks for these fixtures by `pytest_plugins = ["miniature"]`. What the model says means nothing; every rule
of collecting, resuming, assembling and judging is the same in it as in a real one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_model
from tiny import Built, small_catalogue, small_scripts, small_settings

from monitor.axis.bundle import save_bundle
from monitor.axis.catalogue import Catalogue


@pytest.fixture(scope="session")
def catalogue() -> Catalogue:
    return small_catalogue()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """The tiny model as a user would have it: a folder with weights, configuration and tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("llama", tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def loaded(model_folder: Path) -> Any:
    from collectors.models import load_model

    return load_model(str(model_folder), device="cpu")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, loaded: Any, catalogue: Catalogue) -> Built:
    """One undisturbed build."""
    from collectors.assemble import assemble_bundle
    from collectors.build import collect_rollouts

    work = tmp_path_factory.mktemp("build") / "work"
    rollouts = collect_rollouts(loaded, catalogue, small_settings(), work)
    bundle, responses = assemble_bundle(loaded, catalogue, small_settings(), rollouts)
    directory = save_bundle(bundle, work.parent / "bundle", responses)
    return Built(work, rollouts, bundle, responses, directory)


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory: pytest.TempPathFactory, loaded: Any, built: Built) -> Path:
    """The folder of the same bundle, calibrated on the tiny model's own talk."""
    from collectors.calibrate import learn_and_calibrate, played, read_conversations, write_conversations
    from collectors.traffic import HEALTHY

    folder = tmp_path_factory.mktemp("calibrated")
    scripts = small_scripts()
    said = played(loaded, scripts, tokens=20, batch_size=16)
    write_conversations(folder / "said.jsonl.gz", scripts, said, built.bundle.info.model.name)
    develop = read_conversations(folder / "said.jsonl.gz", scripts, built.bundle.info.model.name)
    kinds = {script.id: script.kind for script in scripts}
    healthy = [one for one in develop if kinds[one.origin.conversation_id] in HEALTHY]
    bundle, _ = learn_and_calibrate(loaded, built.bundle, develop, healthy, scripts, {}, budget=0.1)
    return save_bundle(bundle, folder / "bundle", built.responses)
