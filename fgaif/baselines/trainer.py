"""TRL's SFT and DPO trainers on the run's policy with the run's LoRA; the result is an adapter.

    folder/adapter/        PEFT adapter, written whole at the end
    folder/baseline.json   settings, data, and what the training cost
    folder/metrics.jsonl   TRL's figures of every step
    folder/checkpoints/    TRL's own, to go on from; removed at the end

Needs the extra ``baselines``. TRL's checkpoints keep the optimiser in torch's own format, which is
read with ``weights_only``; only those that this folder's training wrote are read.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import set_peft_model_state_dict
from transformers import PrinterCallback, TrainerCallback

from fgaif.baselines.chat_text import ChatText
from fgaif.baselines.files import Example
from fgaif.config import Config
from fgaif.errors import ConfigError, DataError, DivergedError
from fgaif.files import readable, write_json, write_whole
from fgaif.lvlm.adapters import ADAPTER_FILES, check_adapter_loaded, read_adapter
from fgaif.lvlm.checkpoint_files import read_tensors
from fgaif.lvlm.inputs import load_encoder
from fgaif.lvlm.model import (
    attach_lora,
    load_adapter,
    load_lvlm,
    resolve_checkpoint,
)
from fgaif.reward.checkpoint import checkpoint_digest
from fgaif.types import Json

Method = Literal["sft", "dpo"]
Report = Callable[[int, int, str], None]
"""Told steps done, steps in all, and a note."""

RESULT, CHECKPOINTS, ADAPTER = "baseline.json", "checkpoints", "adapter"
_KEPT = 2


def require_trl() -> None:
    """See that the extra is installed.

    Raises:
        ConfigError: it is not.
    """
    try:
        import datasets  # noqa: F401
        import trl  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"fgaif baseline needs TRL ({error}); install it: pip install 'fgaif[baselines]', or "
            "pip install -c constraints.txt -e '.[cpu,baselines]' from the repository"
        ) from error


def planned_steps(rows: int, config: Config) -> int:
    """Optimiser steps of a training on so many rows."""
    settings = config.baseline
    return max(1, math.ceil(settings.epochs * math.ceil(rows / settings.batch_size)))


def settings_of(
    method: Method, examples: Sequence[Example], config: Config, start: Path | None
) -> Json:
    """All that the result depends on, as JSON: equal settings make an equal adapter."""
    own = config.baseline.model_dump(mode="json")
    for key in ("checkpoint_every", "rounds", "round_prompts", "samples"):
        own.pop(key)
    rows = hashlib.sha256()
    for example in examples:
        row = [example.image.sha256, example.turns, example.chosen, example.rejected]
        rows.update(json.dumps(row).encode())
    begun = None
    if start is not None:
        begun = hashlib.sha256(b"".join((start / f).read_bytes() for f in ADAPTER_FILES))
    return {
        "method": method,
        "seed": config.seed,
        "policy": checkpoint_digest(resolve_checkpoint(config.policy.model)),
        "dtype": config.policy.dtype,
        "train_projector": config.policy.train_projector,
        "lora": config.policy.lora.model_dump(mode="json"),
        "start": begun and begun.hexdigest(),
        "rows": rows.hexdigest(),
        "baseline": own,
    }


def read_result(folder: Path) -> Json:
    """The ``baseline.json`` of a folder, empty where there is none.

    Raises:
        DataError: it cannot be read.
    """
    try:
        found: Json = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        return found
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / RESULT}: cannot be read ({error}); move the folder") from error


def train_baseline(
    method: Method,
    examples: Sequence[Example],
    config: Config,
    folder: Path,
    *,
    start: Path | None = None,
    report: Report = lambda *_: None,
) -> Json:
    """Train, or go on from the last checkpoint of the same settings; return ``baseline.json``.

    Args:
        folder: is new, or holds an interrupted training with the same :func:`settings_of`.
        start: adapter to go on from, DPO's reference then too; default: a fresh one on the policy.

    Raises:
        DataError: no examples, or the chat template cannot write one.
        DivergedError: the loss is not finite any more.
        ConfigError: TRL is missing, or several GPUs are visible.
    """
    require_trl()
    if torch.cuda.is_available() and torch.cuda.device_count() > 1:
        raise ConfigError(
            f"fgaif baseline trains on one GPU and sees {torch.cuda.device_count()}: TRL would "
            "split every batch among them; set CUDA_VISIBLE_DEVICES=0"
        )
    if not examples:
        raise DataError("fgaif baseline: no rows to train on; make pairs with `fgaif pairs`")
    settings = settings_of(method, examples, config, start)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RESULT, {"done": False, "settings": settings})
    path = resolve_checkpoint(config.policy.model)
    encoder = load_encoder(path, **config.data.image_limits)
    loaded = load_lvlm(path, dtype=config.policy.dtype, attention=config.policy.attention)
    policy = config.policy
    model = (
        attach_lora(loaded, policy.lora, config.seed, projector=policy.train_projector)
        if start is None
        else load_adapter(loaded, start, trainable=True)
    )
    rows = make_dataset(method, examples, ChatText(encoder))
    checkpoints = folder / CHECKPOINTS
    follow = _Follow(report)
    trainer = _trainer(method, model, rows, encoder.processor, config, checkpoints, follow)
    trainer.remove_callback(PrinterCallback)
    checkpoint = _last_checkpoint(checkpoints)
    if checkpoint is not None:
        trainer.add_callback(_PutBack(model, checkpoint))
    begun = time.monotonic()
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    seconds = time.monotonic() - begun
    _save(model, folder / ADAPTER)
    history = [row for row in trainer.state.log_history if "loss" in row]
    write_whole(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history))
    result = {
        "done": True,
        "settings": settings,
        "rows": len(examples),
        "steps": trainer.state.global_step,
        "first": history[0] if history else {},
        "last": history[-1] if history else {},
        "seconds": round(seconds, 1),
    }
    write_json(folder / RESULT, result)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return result


def make_dataset(method: Method, examples: Sequence[Example], chat: ChatText) -> Any:
    """Rows of strings and images by path, which TRL's collators read."""
    import datasets

    columns: dict[str, list[Any]] = {"images": [], "prompt": []}
    answers = ("chosen", "rejected") if method == "dpo" else ("completion",)
    columns |= {name: [] for name in answers}
    for example in examples:
        prompt, chosen = chat.render(example.turns, example.chosen)
        columns["images"].append([example.image.path])
        columns["prompt"].append(prompt)
        columns[answers[0]].append(chosen)
        if method == "dpo":
            assert example.rejected is not None, "a row for SFT"
            columns["rejected"].append(chat.render(example.turns, example.rejected)[1])
    text = datasets.Value("string")
    features = datasets.Features(
        {"images": datasets.List(datasets.Image())}
        | {name: text for name in columns if name != "images"}
    )
    return datasets.Dataset.from_dict(columns, features=features)


def _trainer(
    method: Method,
    model: Any,
    rows: Any,
    processor: Any,
    config: Config,
    checkpoints: Path,
    follow: TrainerCallback,
) -> Any:
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    settings = config.baseline
    common: Json = {
        "output_dir": str(checkpoints),
        "per_device_train_batch_size": settings.micro_batch,
        "gradient_accumulation_steps": settings.batch_size // settings.micro_batch,
        "num_train_epochs": settings.epochs,
        "warmup_steps": settings.warmup,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": settings.max_grad_norm,
        "seed": config.seed,
        "bf16": config.policy.dtype == "bfloat16",
        "gradient_checkpointing": config.policy.gradient_checkpointing,
        "use_cpu": not torch.cuda.is_available(),
        "max_length": None,  # a cut row would teach to stop in the middle
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would show the mean of the steps that were finite
        "save_steps": settings.checkpoint_every,
        "save_total_limit": _KEPT,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    arguments: Json = {
        "model": model,
        "train_dataset": rows,
        "processing_class": processor,
        "callbacks": [follow],
    }
    if method == "sft":
        return SFTTrainer(args=SFTConfig(learning_rate=settings.sft_lr, **common), **arguments)
    chosen = DPOConfig(learning_rate=settings.dpo_lr, beta=settings.beta, **common)
    return DPOTrainer(args=chosen, **arguments)


class _Follow(TrainerCallback):
    """Passes progress on, and stops a training whose loss is not finite."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Json | None = None, **_: Any
    ) -> None:
        """After every step: its loss, and of DPO how often the chosen answer was likelier."""
        loss = (logs or {}).get("loss")
        if logs is None or loss is None:
            return
        if not math.isfinite(loss):
            raise DivergedError(
                f"step {state.global_step}: the loss is {loss}; lower baseline.sft_lr or "
                "baseline.dpo_lr"
            )
        note = f"loss {loss:.3f}"
        if (right := logs.get("rewards/accuracies")) is not None:
            note += f", {right:.0%} in order"
        self._report(state.global_step, state.max_steps, note)


class _PutBack(TrainerCallback):
    """Loads the trained adapter of a checkpoint, after transformers has.

    Beside DPO's reference adapter, which lies in a folder of its own, transformers overlooks the
    trained one and would go on from a fresh one.
    """

    def __init__(self, model: Any, checkpoint: Path) -> None:
        self._model, self._checkpoint = model, checkpoint

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before the first step that is left."""
        tensors = read_tensors(self._checkpoint / ADAPTER_FILES[1])
        set_peft_model_state_dict(self._model, tensors, adapter_name="default")
        check_adapter_loaded(self._model, self._checkpoint, tensors)


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    steps = {
        int(path.name.rpartition("-")[2]): path
        for path in folder.glob("checkpoint-*")
        if (path / "trainer_state.json").is_file() and path.name.rpartition("-")[2].isdecimal()
    }
    return steps[max(steps)] if steps else None


def _save(model: Any, folder: Path) -> None:
    """Write the trained adapter whole, and see that all who load adapters can read it."""
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside, selected_adapters=["default"], save_embedding_layers=False)
    read_adapter(aside)
    readable(aside)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
