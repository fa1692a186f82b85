"""What `fgaif doctor` and `--dry-run` say of memory: on a 7B whose weights are holes in a file."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from cluster.cli import doctor
from cluster.cli import main as cli
from fgaif.lvlm.families.llava import LLAVA
from fgaif.lvlm.model import resolve_checkpoint

RECIPE = Path(__file__).parents[1] / "configs" / "my_images.yaml"


@pytest.fixture(scope="module")
def llava7b(llava15_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA-1.5-7B to all who read headers: 14 GB that take no room on the disk.

    Tokenizer and image processor are those of the narrow LLaVA-1.5.
    """
    folder = tmp_path_factory.mktemp("llava-7b")
    for file in (*llava15_dir.glob("*.json"), *llava15_dir.glob("*.jinja")):
        shutil.copy(file, folder)
    narrow = json.loads((llava15_dir / "config.json").read_text())
    text = LlamaConfig(vocab_size=32064, max_position_embeddings=4096)
    config = LlavaConfig(text_config=text, image_token_id=narrow["image_token_index"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    header, end = {}, 0
    for name, value in model.state_dict().items():
        start, end = end, end + 2 * math.prod(value.shape)
        offsets = {"shape": list(value.shape), "data_offsets": [start, end]}
        header[LLAVA.public_name(name)] = {"dtype": "F16", **offsets}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


@pytest.fixture
def say(
    llava7b: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> "Say":
    monkeypatch.setattr(doctor, "findings", list)  # the machine's own are tested elsewhere
    monkeypatch.setattr(cli, "out", Console(width=200))
    monkeypatch.setattr(cli, "err", Console(width=200, stderr=True))
    return Say(llava7b, monkeypatch, capsys)


class Say:
    """Calls a command with the recipe for one GPU: its exit code and all that it says."""

    def __init__(
        self, model: Path, patch: pytest.MonkeyPatch, caught: pytest.CaptureFixture[str]
    ) -> None:
        self._model, self._patch, self._caught = model, patch, caught

    def __call__(self, *arguments: str) -> tuple[int, str]:
        command = arguments[0]
        given = [f"policy.model={self._model}", f"feedback.verifier={self._model}"]
        given += ["data.train=scenes:train", "data.held_out=scenes:test"]
        told = ["fgaif", command, "--config", str(RECIPE), *given, *arguments[1:]]
        self._patch.setattr(sys, "argv", told)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = self._caught.readouterr()
        return int(stop.value.code or 0), said.out + said.err


def proposal(said: str) -> list[str]:
    """The overrides that a refusal advises."""
    words = said.partition("this fits: ")[2].replace("│", " ").split()
    return [word for word in words if "=" in word]


@pytest.mark.parametrize("command", ["doctor", "run"])
def test_a_run_that_fits_is_said_to(say: Say, tmp_path: Path, command: str) -> None:
    dry = ["--dry-run", "--full"] if command == "run" else []
    code, said = say(command, *dry, "--assume", "1x80", f"dir={tmp_path}")
    assert code == 0, said
    assert "the GPUs have room (assumed: 1x80)" in said
    assert "the host's memory is not known" in said  # of machines that are assumed
    assert "PPO, GPU 0" in said


@pytest.mark.parametrize("command", ["doctor", "run"])
def test_a_run_that_does_not_is_refused_with_the_setting_that_does(
    say: Say, tmp_path: Path, command: str
) -> None:
    dry = ["--dry-run", "--full"] if command == "run" else []
    large = ["ppo.micro_batch=16", f"dir={tmp_path}"]
    code, said = say(command, *dry, "--assume", "1x80", *large)
    assert code == (1 if command == "doctor" else 2)
    assert "PPO: GPU 0 would hold" in said
    found = proposal(said)
    assert found, said
    code, said = say(command, *dry, "--assume", "1x80", *large, *found)
    assert code == 0, said
    code, said = say(command, *dry, "--assume", "1x24", *large)
    assert code != 0
    assert "1 GPU(s) of 80 GB would do" in said


def test_the_fixture_is_a_checkpoint(llava7b: Path) -> None:
    assert resolve_checkpoint(str(llava7b)) == llava7b
    assert (llava7b / "model.safetensors").stat().st_size > 14 * 10**9
    assert (llava7b / "model.safetensors").stat().st_blocks * 512 < 10**7
