"""The check of the names that are used of vLLM, on the installed package."""

import zipfile
from pathlib import Path

import pytest
from check_vllm_names import main, missing, reader


def test_the_installed_engine_has_every_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0, capsys.readouterr().out
    assert "ok      lora/request.py: LoRARequest" in capsys.readouterr().out


def test_a_name_that_is_gone_is_found_in_a_wheel(tmp_path: Path) -> None:
    source = tmp_path / "ours.py"
    source.write_text("from vllm.lora.request import LoRARequest, Gone\nfrom vllm.lost import it\n")
    wheel = tmp_path / "vllm-9-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("vllm/lora/request.py", "class LoRARequest:\n    lora_name: str\n")
    used = [("lora/request.py", "lora_name lora_path")]
    assert missing(reader(wheel), [source], used) == [
        "lora/request.py: lora_path", "lora/request.py: Gone", "lost.py: it",
    ]  # fmt: skip
