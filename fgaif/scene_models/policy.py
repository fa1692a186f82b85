"""Make the competent model into one that hallucinates as real ones do, without losing its eyes.

A short LoRA fine-tune on captions with errors in recognisable places, and on yes/no questions in
which absent popular objects are affirmed; merged at the end. Pieces to be judged stay in the mix,
so that what the model knows remains readable for reward models.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from fgaif.data.scenes.captions import BROAD, POLICY, Noise
from fgaif.data.scenes.facts import SCENE_KINDS
from fgaif.data.scenes.questions import Question, ask, sample_claim, sample_question
from fgaif.data.scenes.world import Scene
from fgaif.scene_models.pretrain import (
    Heads,
    Report,
    classes_loss,
    descend,
    gather,
    next_token_loss,
    run_rows,
)
from fgaif.scene_models.rows import Row, RowWriter

LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyStage:
    """The fine-tune: rows per batch of each sort, and how often which absent nouns get a yes."""

    steps: int = 280
    lr: float = 1e-3
    rank: int = 32
    captions: int = 40
    judged: int = 8
    questions: int = 16
    noise: Noise = POLICY
    false_yes: dict[str, float] = field(
        default_factory=lambda: {"square": 0.85, "star": 0.85, "house": 0.3}
    )


def train_policy(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    heads: Heads,
    scenes: Sequence[Scene],
    features: Tensor,
    stage: PolicyStage,
    *,
    seed: int,
    report: Report,
) -> LlavaForConditionalGeneration:
    """Fine-tune with LoRA on cached vision features (N, 9, 128); return the merged model."""
    rng, writer = random.Random(f"policy {seed}"), RowWriter(tokenizer)
    heads.requires_grad_(False)
    config = LoraConfig(r=stage.rank, lora_alpha=2 * stage.rank, target_modules=LORA_TARGETS)
    adapted = get_peft_model(model, config)
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=stage.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, stage.lr, total_steps=stage.steps, pct_start=0.1
    )
    for step in range(1, stage.steps + 1):
        batch = stage.captions + stage.judged + stage.questions
        chosen = [rng.randrange(len(scenes)) for _ in range(batch)]
        rows = _rows(writer, [scenes[i] for i in chosen], stage, rng)
        _, last = run_rows(model, rows, features[chosen])
        next_token = next_token_loss(model, rows, last)
        at, target = gather([_only_judged(row) for row in rows], "ends")
        ends = classes_loss(heads.ends(last[at]), target, (3, 3, 3))
        descend(next_token + ends, parameters, optimiser)
        schedule.step()
        report(step, {"next": next_token.item(), "ends": ends.item()})
    merged: LlavaForConditionalGeneration = adapted.merge_and_unload()
    return merged


def _only_judged(row: Row) -> Row:
    return row if not any(row.predicted) else Row(ids=row.ids, predicted=row.predicted)


def _rows(
    writer: RowWriter, scenes: Sequence[Scene], stage: PolicyStage, rng: random.Random
) -> list[Row]:
    told = stage.captions + stage.judged
    rows = [writer.caption(scene, rng, stage.noise) for scene in scenes[: stage.captions]]
    for scene in scenes[stage.captions : told]:
        noise = stage.noise if rng.random() < 0.7 else BROAD
        rows.append(writer.judged(scene, rng, noise))
    for scene in scenes[told:]:
        rows.append(writer.questions(scene, [_question(scene, stage, rng) for _ in range(3)]))
    return rows


def _question(scene: Scene, stage: PolicyStage, rng: random.Random) -> Question:
    """Half about objects, answered with the bias; the rest about all kinds, answered truly."""
    if rng.random() < 0.5:
        claim = sample_claim(scene, "object", rng)
        return ask(claim, scene, rng, stage.false_yes)
    return sample_question(scene, rng, 0.3, rng.choice(SCENE_KINDS[1:]))
