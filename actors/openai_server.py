"""vLLM's own OpenAI-compatible server for a local checkpoint, with settings that work here."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from actors.vllm_engine import (
    CPU_ENVIRONMENT,
    ENVIRONMENT,
    context_length,
    engine_settings,
    image_settings,
)
from fgaif.config import Config
from fgaif.errors import ConfigError
from fgaif.lvlm.checkpoint_files import read_json
from fgaif.lvlm.families import family_of_type
from fgaif.lvlm.model import load_processor

KEY_VARIABLE = "VLLM_API_KEY"
"""Where vLLM reads the key that clients must send; unset, it asks for none."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def server_command(model: Path, name: str, config: Config, host: str, port: int) -> list[str]:
    """The command that serves ``model`` under ``name`` with ``config.cluster.engine``.

    Raises:
        ConfigError: an address that others can reach, without a key.
    """
    if host not in LOOPBACK and not os.environ.get(KEY_VARIABLE):
        raise ConfigError(
            f"--host {host}: others can reach it, so set {KEY_VARIABLE} to a key that they must "
            "send, or serve on 127.0.0.1"
        )
    on_gpu = torch.cuda.is_available()
    settings = engine_settings(config, context_length(model, config), on_gpu)
    found = family_of_type(read_json(model / "config.json")["model_type"])
    settings |= image_settings(found, config)
    settings |= {"model": str(model), "served_model_name": name, "host": host, "port": port}
    if template := _template(model):
        settings["chat_template"] = template
    flags = [part for key, value in settings.items() for part in _flag(key, value)]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags]


def _template(model: Path) -> str | None:
    """The chat template with BOS in front, where the tokenizer would put it and the template not.

    vLLM's server adds no special tokens to a rendered chat; a model that was trained with BOS
    answers differently without it.
    """
    processor = load_processor(model)
    ids = processor.tokenizer("x")["input_ids"]
    if ids[0] != processor.tokenizer.bos_token_id:
        return None
    rendered = processor.apply_chat_template([{"role": "user", "content": "x"}])
    if rendered.startswith(processor.tokenizer.bos_token):
        return None
    return "{{ bos_token }}" + str(processor.chat_template)


def _flag(key: str, value: Any) -> list[str]:
    name = key.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]


def server_environment() -> dict[str, str]:
    """Environment of the server process; what is set already stays."""
    ours = dict(ENVIRONMENT)
    if not torch.cuda.is_available():
        ours |= CPU_ENVIRONMENT
    return ours | dict(os.environ)
