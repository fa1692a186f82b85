"""Write checkpoints that both transformers and vLLM load."""

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from fgaif.errors import CheckpointError
from fgaif.files import readable
from fgaif.lvlm.adapters import ADAPTER_FILES, read_adapter_config
from fgaif.lvlm.arrival import arrived, merged_sums
from fgaif.lvlm.families import family_of
from fgaif.lvlm.hub import check_base, model_name
from fgaif.lvlm.model import load_adapter, load_lvlm, load_processor
from fgaif.types import Arrived

LEAST_SURVIVING = 0.95
"""Share of an update below which rounding is refused, unless the caller accepts it."""

_CARD = """---
base_model: {base}
library_name: transformers
pipeline_tag: image-text-to-text
tags: [fgaif, {model_type}]
---
# {name}

A {family} policy aligned by fine-grained AI feedback (FGAIF, arXiv 2404.05046) and exported with
its LoRA adapter merged into the weights.

- base checkpoint: `{base}`
- adapter: `{adapter}` (r = {r}, alpha = {alpha})
- projector: {projector}
- dtype: {dtype}; {share:.1%} of the adapter's update survive the rounding ({weakest:.1%} in the
  weakest layer)

The adapter itself lies in `adapter/`, unrounded: load it with PEFT on the base checkpoint, or serve
it with vLLM's `--enable-lora`.

The merged checkpoint loads with `transformers.AutoModelForImageTextToText.from_pretrained` and
with vLLM. Licence and limits are those of the base checkpoint.
"""


def save_model(
    model: PreTrainedModel,
    processor: Any,
    directory: Path,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Save weights (safetensors, public names), config, tokenizer, processor and chat template.

    ``dtype`` converts the weights on the way; the model itself is left as it is.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = dtype or model.dtype
    config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    processor.save_pretrained(directory)
    weights = {name: tensor.to(config.dtype) for name, tensor in _public_weights(model)}
    save_torch_state_dict(weights, directory, metadata={"format": "pt"})


def export_merged(
    base_dir: Path,
    adapter_dir: Path,
    out_dir: Path,
    *,
    dtype: str,
    least: float = LEAST_SURVIVING,
) -> Arrived:
    """Merge an adapter into its base and write a checkpoint for transformers and vLLM.

    Merged in float32 and rounded once, to ``dtype``; returns how much of the update survives that.
    The adapter itself is written beside the weights, in ``adapter/``: served or loaded on the base
    it is never rounded. The checkpoint is written beside ``out_dir`` and renamed when it is
    complete, so an interrupted export leaves nothing that looks finished.

    Raises:
        CheckpointError: the adapter does not fit or names another commit, ``out_dir`` exists and
            is not empty, or less than ``least`` of the update survives; then nothing is written.
    """
    _check_empty(out_dir)
    check_base(adapter_dir, read_adapter_config(adapter_dir), base_dir)
    processor = load_processor(base_dir)
    adapted = load_adapter(load_lvlm(base_dir, dtype="float32"), adapter_dir)
    kept = surviving(adapted, dtype)
    if not kept.share >= least:
        raise CheckpointError(
            f"export of {adapter_dir}: rounding to {dtype} keeps {kept.share:.1%} of the update "
            f"({kept.weakest:.1%} in {kept.weakest_layer}), less than {least:.0%}: the export "
            "would be nearer to the base than to the policy. Write it with --dtype float32, ship "
            "the adapter alone with --adapter-only, or accept the loss with --allow-loss"
        )
    settings = adapted.peft_config["default"]
    partial = out_dir.with_name(f".{out_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    card = _CARD.format(
        name=out_dir.name,
        base=model_name(base_dir),
        family=family_of(adapted.get_base_model().config).name,
        model_type=adapted.get_base_model().config.model_type,
        adapter=adapter_dir.name,
        r=settings.r,
        alpha=settings.lora_alpha,
        projector="trained with the adapter" if settings.modules_to_save else "the base's",
        dtype=dtype,
        share=kept.share,
        weakest=kept.weakest,
    )
    try:
        save_model(adapted.merge_and_unload(), processor, partial, dtype=getattr(torch, dtype))
        _copy_adapter(adapter_dir, partial / "adapter")
        (partial / "README.md").write_text(card, encoding="utf-8")
        readable(partial)
        if out_dir.exists():
            out_dir.rmdir()
        partial.rename(out_dir)
    except (OSError, SafetensorError) as error:  # the library's own words for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"export to {out_dir}: cannot be written ({error}); nothing is left there: free some "
            "space or give another folder"
        ) from error
    return kept


def export_adapter(adapter_dir: Path, out_dir: Path) -> None:
    """Copy the PEFT adapter alone, for those who load or serve it on its base.

    Raises:
        CheckpointError: no adapter, or ``out_dir`` exists and is not empty.
    """
    _check_empty(out_dir)
    read_adapter_config(adapter_dir)
    _copy_adapter(adapter_dir, out_dir)


@torch.no_grad()
def surviving(adapted: PeftModel, dtype: str) -> Arrived:
    """How much of the adapter's update is left when the merged weights are rounded to ``dtype``,
    held against the base as it is in that dtype."""
    sums = {}
    rounded = getattr(torch, dtype)
    for name, layer in adapted.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            base = layer.get_base_layer().weight.float()
            update = layer.get_delta_weight("default").float()
            sums[name] = merged_sums(base.to(rounded), (base + update).to(rounded), update)
    return arrived(sums)


def _check_empty(out_dir: Path) -> None:
    if out_dir.exists() and any(out_dir.iterdir()):
        raise CheckpointError(f"export to {out_dir}: the folder is not empty; give a new one")


def _copy_adapter(adapter_dir: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ADAPTER_FILES:
        shutil.copyfile(adapter_dir / name, folder / name)


def _public_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    family = family_of(model.config)
    tied = model.config.tie_word_embeddings or model.config.text_config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            yield family.public_name(name), tensor
