"""LLaVA-1.5's original layout (liuhaotian/llava-v1.5-7b, LLaVA-RLHF) to that of transformers.

    original                                    here (as llava-hf/llava-1.5-7b-hf)
    model.embed_tokens, model.layers.N, ...     language_model.model. ...
    lm_head                                     language_model.lm_head
    model.mm_projector.0, .2                    multi_modal_projector.linear_1, .linear_2
    CLIP's own repository: vision_model. ...    vision_tower.vision_model. ...

The vocabulary gets ``<image>`` and ``<pad>`` and is padded to a multiple of 64; the new rows are
the mean of the others. The published files are pickled: they are read by torch's reader for weights
alone, which makes tensors and calls nothing that a file names. Nothing else here reads such files.
"""

import pickle
import re
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig as PeftLoraConfig
from safetensors.torch import save_file
from tokenizers import AddedToken
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaProcessor,
)

from fgaif.errors import CheckpointError, first_line
from fgaif.files import readable
from fgaif.lvlm.adapters import ADAPTER_FILES
from fgaif.lvlm.checkpoint_files import read_json, read_tensors
from fgaif.lvlm.families.base import LORA_LEAVES
from fgaif.lvlm.families.llava import LLAVA, in_original_layout
from fgaif.lvlm.hub import FILES, local_folder, split_name
from fgaif.lvlm.hub import reference as name_of
from fgaif.types import Json

SOURCE_FILES = (*FILES, "*.bin", "*.model")
"""What is taken of a repository in the original layout."""
_ROWS = 64  # vocabularies are padded to a multiple of it, as the published ones are
_PREFIXES = (
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.vision_tower.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("vision_model.", "vision_tower.vision_model."),
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
_BUFFERS = (".rotary_emb.inv_freq", ".embeddings.position_ids")  # computed, not learned
_LORA = re.compile(
    rf"base_model\.model\.model\.(layers\.\d+\.\w+\.(?:{'|'.join(LORA_LEAVES)}))"
    r"\.lora_([AB])\.(?:\w+\.)?weight"
)
# The conversation "v1" that both projects train with.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% if system is not string %}{% set system = system[0]['text'] %}{% endif %}"
    "{% set messages = messages[1:] %}{% else %}"
    "{% set system = 'A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human\\'s questions.' %}"
    "{% endif %}{{ system + ' ' }}"
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] in ('image', 'image_url') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{{ '</s>' if message['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
---
# {name}

`{source}` in the layout of transformers, converted by fgaif; vision tower: {vision}. Licence and
limits are those of the two.
"""


def convert(source: str, out: Path, vision: str | None = None) -> str:
    """Write a checkpoint or a LoRA adapter in the layout of transformers; returns what it is.

    ``source`` and ``vision``, CLIP's own repository, are folders or names at the hub; by default
    the tower is the one that the checkpoint's configuration names.

    Raises:
        CheckpointError: another layout or architecture, a file is missing or holds something else,
            or ``out`` is there.
    """
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"convert to {out}: the folder is not empty; give a new one")
    folder = local_folder(source, SOURCE_FILES)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        if (folder / ADAPTER_FILES[0]).is_file():
            _convert_adapter(folder, partial)
            what = "adapter"
        else:
            _convert_checkpoint(folder, partial, vision)
            what = "checkpoint"
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise CheckpointError(f"convert to {out}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return what


def new_name(name: str) -> str | None:
    """The name that a weight of the original layout gets; None for what is not learned."""
    if name.endswith(_BUFFERS):
        return None
    for prefix, new in _PREFIXES:
        if name.startswith(prefix):
            return new + name.removeprefix(prefix)
    raise CheckpointError(f"weight {name!r} belongs to no part of a LLaVA-1.5")


def check_shapes(config: LlavaConfig, found: Mapping[str, Iterable[int]]) -> None:
    """See that these are the weights that the configuration describes, all and no others.

    Raises:
        CheckpointError: one is missing, too many, or of another shape.
    """
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    held = model.state_dict().items()
    wanted = {LLAVA.public_name(name): tuple(value.shape) for name, value in held}
    shapes = {name: tuple(shape) for name, shape in found.items()}
    for what, names in (
        ("is missing", wanted.keys() - shapes.keys()),
        ("belongs to no part of the model", shapes.keys() - wanted.keys()),
        ("has another shape", {n for n in wanted.keys() & shapes.keys() if wanted[n] != shapes[n]}),
    ):
        if names:
            name = min(names)
            raise CheckpointError(
                f"after renaming, {name} {what} ({shapes.get(name)} here, {wanted.get(name)} by "
                f"the configuration; {len(names)} such weights)"
            )


def _convert_checkpoint(folder: Path, out: Path, vision: str | None) -> None:
    original = read_json(folder / "config.json")
    _check_settings(folder, original)
    tower = _find_tower(folder, original, vision)
    weights = _read_weights(folder)
    if (folder / "mm_projector.bin").is_file() and "model.mm_projector.0.weight" not in weights:
        weights |= _read_pickled(folder / "mm_projector.bin")
    if not any("vision_model." in name for name in weights):  # trained towers lie with the rest
        parts = ("vision_model.", "model.vision_tower.")
        weights |= {k: v for k, v in _read_weights(tower).items() if k.startswith(parts)}
    renamed = {new: value for name, value in weights.items() if (new := new_name(name))}
    tokenizer = _tokenizer(folder)
    words = len(renamed.get("language_model.model.embed_tokens.weight", ()))
    rows = -(-max(len(tokenizer), words) // _ROWS) * _ROWS
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        if name in renamed:
            renamed[name] = _with_rows(renamed[name], rows)
    config = _configuration(original, CLIPVisionConfig.from_pretrained(tower), tokenizer, rows)
    check_shapes(config, {name: value.shape for name, value in renamed.items()})
    config.architectures = [LlavaForConditionalGeneration.__name__]
    config.dtype = renamed["language_model.lm_head.weight"].dtype
    config.save_pretrained(out)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(out)
    LlavaProcessor(
        image_processor=LlavaImageProcessor.from_pretrained(
            tower, do_pad=original.get("image_aspect_ratio") == "pad"
        ),
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(out)
    save_torch_state_dict(
        {name: value.contiguous() for name, value in renamed.items()},
        out,
        metadata={"format": "pt"},
    )
    card = _CARD.format(name=out.name, source=_told(folder), vision=_told(tower))
    (out / "README.md").write_text(card, encoding="utf-8")
    readable(out)


def _told(folder: Path) -> str:
    return name_of(folder) if split_name(name_of(folder)) else folder.name


def _check_settings(folder: Path, original: Json) -> None:
    """Refuse what is no LLaVA-1.5 on Llama with CLIP."""
    if not in_original_layout(original):
        raise CheckpointError(
            f"{folder}: its config.json is not of LLaVA's original layout (no mm_vision_tower); a "
            "checkpoint with vision_config needs no conversion"
        )
    for key, wanted in (
        ("mm_projector_type", ("mlp2x_gelu",)),
        ("mm_use_im_start_end", (False, None)),
        ("mm_use_im_patch_token", (False, None)),
        ("mm_vision_select_feature", ("patch", "cls_patch", None)),
        ("image_aspect_ratio", ("pad", "square", None)),
        ("hidden_act", ("silu", None)),
        ("rope_scaling", (None,)),
        ("tie_word_embeddings", (False, None)),
    ):
        if original.get(key) not in wanted:
            raise CheckpointError(
                f"{folder}: {key} = {original.get(key)!r} in config.json, where a LLaVA-1.5 has "
                f"{wanted[0]!r}; other versions of LLaVA are not converted"
            )


def _find_tower(folder: Path, original: Json, vision: str | None) -> Path:
    name = vision or str(original["mm_vision_tower"])
    if vision is None and not Path(name).expanduser().is_dir():
        name = f"{name}@main"
    tower = local_folder(name, SOURCE_FILES)
    if not (tower / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: its vision tower {original['mm_vision_tower']!r} is in a repository of its "
            f"own, and {tower} is not it: give its folder, or ORG/NAME@REVISION, with --vision"
        )
    return tower


def _configuration(
    original: Json, vision: CLIPVisionConfig, tokenizer: LlamaTokenizer, rows: int
) -> LlavaConfig:
    kept = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta",
    )  # fmt: skip
    text = LlamaConfig(
        **{key: original[key] for key in kept if original.get(key) is not None},
        vocab_size=rows,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    full = original.get("mm_vision_select_feature") == "cls_patch"
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(vision.image_size // vision.patch_size) ** 2 + full,
        vision_feature_layer=original.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="full" if full else "default",
        tie_word_embeddings=False,
    )


def _tokenizer(folder: Path) -> LlamaTokenizer:
    try:
        tokenizer = LlamaTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # half a file fails in any of the libraries that read it
        raise CheckpointError(
            f"{folder}: cannot load its tokenizer (tokenizer.model): {first_line(error)}"
        ) from error
    tokenizer.add_tokens(AddedToken("<image>", special=True, normalized=False), special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": AddedToken("<pad>", special=True, normalized=False)})
    tokenizer.padding_side = "left"
    return tokenizer


def _with_rows(weight: Tensor, rows: int) -> Tensor:
    """Weight (V, H) with rows appended up to ``rows``: the mean of the others, which never wins."""
    mean = weight.float().mean(dim=0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(rows - len(weight), -1)])


# --- files ----------------------------------------------------------------------------------------


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder, by safetensors where there are any."""
    safe = sorted(folder.glob("*.safetensors"))
    if safe:
        return {name: value for file in safe for name, value in read_tensors(file).items()}
    index = folder / "pytorch_model.bin.index.json"
    names = ["pytorch_model.bin"]
    if index.is_file():
        places: Any = read_json(index).get("weight_map")
        names = sorted({str(place) for place in dict(places or {}).values()})
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder}: {missing[0]} is missing ({len(missing)} of {len(names)} files of weights); "
            "copy the checkpoint again"
        )
    return {key: value for name in names for key, value in _read_pickled(folder / name).items()}


def _read_pickled(file: Path) -> dict[str, Tensor]:
    """Tensors by name, mapped where the file allows it; nothing that the file names is called."""
    try:
        found = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{file}: cannot be read as weights alone ({first_line(error)}); a file that holds "
            "anything else is not opened"
        ) from error
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()
    ):
        raise CheckpointError(f"{file}: holds something else than tensors by name")
    return found


# --- adapters -------------------------------------------------------------------------------------


def _convert_adapter(folder: Path, out: Path) -> None:
    """A LoRA adapter on the language model of a LLaVA in the original layout."""
    settings = read_json(folder / ADAPTER_FILES[0])
    extra = folder / "non_lora_trainables.bin"
    if extra.is_file():
        raise CheckpointError(
            f"{folder}: {extra.name} holds whole weights that were trained beside the adapter: "
            "merge both into a checkpoint with LLaVA's own script, and convert that"
        )
    pickled, safe = folder / "adapter_model.bin", folder / ADAPTER_FILES[1]
    tensors = read_tensors(safe) if safe.is_file() else _read_pickled(pickled)
    renamed = {}
    for name, value in tensors.items():
        found = _LORA.fullmatch(name)
        if found is None:
            raise CheckpointError(
                f"{folder}: {name} is no LoRA factor of a language model in the original layout"
            )
        place = f"base_model.model.model.language_model.{found[1]}.lora_{found[2]}.weight"
        renamed[place] = value.contiguous()
    written = PeftLoraConfig(
        r=int(settings["r"]),
        lora_alpha=settings["lora_alpha"],
        lora_dropout=settings.get("lora_dropout") or 0.0,
        target_modules=LLAVA.lora_targets,
        bias="none",
        inference_mode=True,
        base_model_name_or_path=Path(str(settings.get("base_model_name_or_path"))).name,
    )
    other = [key for key in ("use_dora", "rank_pattern", "alpha_pattern") if settings.get(key)]
    if other or settings.get("bias", "none") != "none" or settings.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder}: {other or 'bias or peft_type'}: only plain LoRA is known")
    written.save_pretrained(out)
    save_file(renamed, out / ADAPTER_FILES[1], metadata={"format": "pt"})
    readable(out)
