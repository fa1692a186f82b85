"""Adapters as others find them: readable files, a filled card, a base that PEFT resolves."""

import json
import os
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModel

from fgaif.config import LoraConfig
from fgaif.eval.publication import prepare
from fgaif.files import readable
from fgaif.lvlm.adapters import read_adapter_config
from fgaif.lvlm.card import write_adapter_card
from fgaif.lvlm.checkpoint_files import EMBEDDED
from fgaif.lvlm.hub import name_base
from fgaif.lvlm.model import attach_lora, load_lvlm, resolve_checkpoint


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run on the embedded policy leaves, as its learner writes it."""
    folder = tmp_path_factory.mktemp("run") / "policy" / "adapter"
    policy = attach_lora(load_lvlm(resolve_checkpoint("scenes:policy")), LoraConfig(r=4), 0)
    name_base(policy, "scenes:policy")
    policy.save_pretrained(folder, save_embedding_layers=False)
    write_adapter_card(folder, base="scenes:policy", rank=4, alpha=8.0, steps=18)
    readable(folder)
    return folder


def test_peft_finds_the_base_of_an_embedded_adapter(adapter: Path) -> None:
    assert read_adapter_config(adapter).base_model_name_or_path == str(EMBEDDED / "policy")
    model = AutoPeftModel.from_pretrained(adapter)
    assert type(model.get_base_model()).__name__ == "LlavaForConditionalGeneration"
    assert any("lora_A" in name for name, _ in model.named_parameters())
    assert all(torch.isfinite(value).all() for value in model.parameters())


def test_the_card_says_what_it_is_and_keeps_machine_paths_out(adapter: Path) -> None:
    card = (adapter / "README.md").read_text()
    assert "18 PPO steps" in card
    assert "`scenes:policy`" in card
    assert "[More Information Needed]" not in card
    assert str(EMBEDDED) not in card


def test_a_card_of_a_model_of_the_hub_names_it_as_the_hub_does(tmp_path: Path) -> None:
    write_adapter_card(tmp_path, base="org/name@abc", rank=4, alpha=8.0, steps=1)
    assert 'base_model: "org/name"' in (tmp_path / "README.md").read_text()


def test_a_pushed_adapter_has_no_path_of_this_machine(adapter: Path) -> None:
    found = prepare(adapter, "me/mine", run_dir=None, base=None)
    settings = found.files["adapter_config.json"]
    assert isinstance(settings, bytes)
    assert json.loads(settings)["base_model_name_or_path"] == "scenes:policy"
    assert str(EMBEDDED) not in found.card


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_weights_have_the_rights_that_the_umask_gives(tmp_path: Path, mask: int, mode: int) -> None:
    """safetensors writes 0600, so that a group could not read its own models."""
    inner = tmp_path / "folder" / "model.safetensors"
    inner.parent.mkdir()
    inner.touch(0o600)
    inner.chmod(0o600)
    old = os.umask(mask)
    try:
        readable(tmp_path)
        assert os.umask(mask) == mask
    finally:
        os.umask(old)
    assert inner.stat().st_mode & 0o777 == mode


def test_the_adapter_of_a_run_can_be_read_by_others(adapter: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    assert (adapter / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask
