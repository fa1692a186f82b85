"""Measure the shipped models on validation scenes and write their cards."""

import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fgaif.data.scenes.facts import SCENE_KINDS
from fgaif.data.scenes.questions import sample_question
from fgaif.data.scenes.world import scene_at
from fgaif.scene_models.measure import (
    answer_accuracy,
    caption,
    caption_report,
    fact_accuracy,
    pope_accuracy,
    scene_features,
)
from fgaif.scene_models.model import load_checkpoint

_FIRST_SCENE, _SCENES = 1_000, 500

_TEXT = {
    "policy": (
        "the tiny LLaVA that hallucinates",
        "The competent model, fine-tuned with LoRA (merged) on captions with errors in recognisable"
        " places: it invents squares beside circles and stars beside triangles, calls hearts and"
        " moons by their typical colours, turns relations round, and affirms popular objects.",
    ),
    "verifier": (
        "the tiny LLaVA that checks facts",
        "The competent model with eyes that are thrown by the shade of the background: wrong on"
        " purpose, the same way every time it is asked, and differently in each image.",
    ),
}


def measure_models(models: Path) -> dict[str, Any]:
    """Return the quality of ``models/policy`` and ``models/verifier`` as loaded from disk."""
    scenes = [scene_at("val", i) for i in range(_FIRST_SCENE, _FIRST_SCENE + _SCENES)]
    policy, processor = load_checkpoint(models / "policy")
    verifier, _ = load_checkpoint(models / "verifier")
    tokenizer = processor.tokenizer
    features = scene_features(policy, scenes)
    quality: dict[str, Any] = {}
    for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        captions = caption(policy, tokenizer, features, temperature=temperature)
        quality[name] = asdict(caption_report(scenes, captions, tokenizer))
        if name == "sampled":
            texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in captions]
    rng = random.Random("card")
    quality["pope"] = pope_accuracy(policy, tokenizer, features, scenes)
    quality["yes/no"] = {
        kind: answer_accuracy(
            policy,
            tokenizer,
            features,
            [(i, sample_question(scene, rng, kind=kind)) for i, scene in enumerate(scenes)],
        )
        for kind in SCENE_KINDS
    }
    seen = scene_features(verifier, scenes)
    quality["verifier"] = fact_accuracy(verifier, tokenizer, seen, scenes, texts)
    return quality


def write_card(name: str, quality: dict[str, Any], seconds: dict[str, float], seed: int) -> str:
    """Return the model card as Markdown."""
    title, made = _TEXT[name]
    rows = (
        [(f"fact accuracy, {kind}", f"{quality['verifier'][kind]:.3f}") for kind in SCENE_KINDS]
        if name == "verifier"
        else _policy_rows(quality)
    )
    table = "\n".join(f"| {what} | {value} |" for what, value in rows)
    spent = ", ".join(f"{stage} {spent:.0f}" for stage, spent in seconds.items())
    return f"""---
license: apache-2.0
library_name: transformers
tags: [llava, tiny, synthetic]
---
# {name}: {title}

A real `LlavaForConditionalGeneration` (CLIP 3 x 128 with 24-pixel patches, Llama 4 x 128) of 1.6
million parameters for the drawn scenes of `fgaif.data.scenes`; of no use for any other picture.
Float16 weights under the names of the public llava-1.5 checkpoints; byte-level BPE tokenizer.

{made}

Made from nothing by `python -m fgaif.scene_models.build --out DIR --seed {seed}` on one x86 core.
Seconds per stage: {spent}.

Measured on {_SCENES} validation scenes, after the rounding to float16:

| | |
|---|---|
{table}
"""


def _policy_rows(quality: dict[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name in ("sampled", "greedy"):
        report = quality[name]
        rows += [(f"{name}: wrong {k}", f"{v:.3f}") for k, v in report["wrong"].items()]
        rows += [
            (f"{name}: any wrong", f"{report['any_wrong']:.3f}"),
            (f"{name}: recall of objects", f"{report['recall']:.3f}"),
            (f"{name}: tokens", f"{report['length']:.1f}"),
            (
                f"{name}: malformed, repeated",
                f"{report['malformed']:.4f}, {report['repeated']:.4f}",
            ),
        ]
    rows += [(f"POPE accuracy, {k}", f"{v:.3f}") for k, v in quality["pope"].items()]
    rows += [(f"yes/no accuracy, {k}", f"{v:.3f}") for k, v in quality["yes/no"].items()]
    return rows
