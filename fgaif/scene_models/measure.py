"""Quality of a tiny LLaVA on known scenes: errors in captions, yes/no answers, POPE."""

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from fgaif.data.scenes.draw import draw_scene
from fgaif.data.scenes.facts import SCENE_KINDS, claim_holds, oracle_classes, read_claims
from fgaif.data.scenes.questions import (
    DESCRIBE,
    PopeStrategy,
    Question,
    pope_pair,
    verify_question,
)
from fgaif.data.scenes.world import Scene
from fgaif.scene_models.model import embed, hidden_states, vision_features
from fgaif.scene_models.tokenizer import EOS_ID, IMAGE_ID, PAD_ID, PATCHES, chat_prompt
from fgaif.types import SegmentClass

POPE_STRATEGIES: tuple[PopeStrategy, ...] = ("random", "popular", "adversarial")

_PIECE = re.compile(r"[^,.;!?]*[,.;!?]|[^,.;!?]+$")


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionReport:
    """Rates over captions. ``wrong``: hallucinated share of the pieces with facts, per kind."""

    wrong: dict[str, float]
    any_wrong: float
    recall: float
    length: float
    repeated: float
    malformed: float
    unfinished: float


def scene_pixels(scenes: Sequence[Scene]) -> Tensor:
    """Draw scenes as model input (B, 3, 72, 72) in [-1, 1], as the processor would."""
    images = np.stack([np.asarray(draw_scene(scene)) for scene in scenes])
    return torch.from_numpy(images.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def scene_features(
    model: LlavaForConditionalGeneration, scenes: Sequence[Scene], batch: int = 500
) -> Tensor:
    """Return the vision features of scenes, (B, 9, 128)."""
    return torch.cat(
        [
            vision_features(model, scene_pixels(scenes[start : start + batch]))
            for start in range(0, len(scenes), batch)
        ]
    )


def prompt_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Encode a prompt text with BOS, its image token repeated once per patch."""
    ids = tokenizer(text).input_ids
    return [i for token in ids for i in ([token] * (PATCHES if token == IMAGE_ID else 1))]


@torch.no_grad()
def caption(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    features: Tensor,
    *,
    temperature: float,
    seed: int = 0,
    max_new_tokens: int = 80,
    batch: int = 256,
) -> list[list[int]]:
    """Sample (or, at temperature 0, decode greedily) one caption per scene; ids include EOS."""
    generator = torch.Generator().manual_seed(seed)
    prompt = prompt_ids(tokenizer, chat_prompt(DESCRIBE))
    captions: list[list[int]] = []
    for part in features.split(batch):
        tokens = _decode(model, prompt, part, temperature, generator, max_new_tokens)
        captions += [_until_eos(row) for row in tokens.tolist()]
    return captions


def _decode(
    model: LlavaForConditionalGeneration,
    prompt: list[int],
    features: Tensor,
    temperature: float,
    generator: torch.Generator,
    max_new_tokens: int,
) -> Tensor:
    llama, cache = model.model.language_model, DynamicCache()
    inputs = embed(model, torch.tensor([prompt] * len(features)), features)
    done = torch.zeros(len(features), dtype=torch.bool)
    tokens: list[Tensor] = []
    while len(tokens) < max_new_tokens and not bool(done.all()):
        output = llama(inputs_embeds=inputs, past_key_values=cache, use_cache=True)
        logits = model.lm_head(output.last_hidden_state[:, -1])
        logits[:, IMAGE_ID] = -torch.inf
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            probs = torch.softmax(logits / temperature, -1)
            token = torch.multinomial(probs, 1, generator=generator)[:, 0]
        token = torch.where(done, PAD_ID, token)
        tokens.append(token)
        done |= token == EOS_ID
        inputs = model.get_input_embeddings()(token)[:, None]
    return torch.stack(tokens, 1)


def _until_eos(row: list[int]) -> list[int]:
    return row[: row.index(EOS_ID) + 1] if EOS_ID in row else row


def pieces(text: str) -> list[str]:
    """Split a caption of this world at its commas and stops."""
    return [piece for piece in _PIECE.findall(text) if piece.strip()]


def caption_report(
    scenes: Sequence[Scene],
    captions: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerFast,
) -> CaptionReport:
    """Compare captions with what the scenes really show."""
    count: Counter[str] = Counter()
    for scene, ids in zip(scenes, captions, strict=True):
        parts = pieces(tokenizer.decode(ids, skip_special_tokens=True))
        claims = {claim for part in parts for claim in read_claims(part)[0]}
        named = {claim.noun for claim in claims if claim.kind == "object"}
        count["recalled"] += len(named & set(scene.nouns))
        count["things"] += len(scene.things)
        count["unfinished"] += ids[-1] != EOS_ID
        count["pieces"] += len(parts)
        count["malformed"] += sum(not read_claims(part)[1] for part in parts)
        count["repeated"] += len(parts) - len({part.strip() for part in parts})
        for classes in oracle_classes(scene, parts):
            count["any"] += SegmentClass.HALLU in classes
            count["with facts"] += any(classes)
            for kind, label in zip(SCENE_KINDS, classes, strict=True):
                count[kind] += label is SegmentClass.HALLU
                count[f"with {kind}"] += label is not SegmentClass.NONE
    return CaptionReport(
        wrong={kind: count[kind] / max(1, count[f"with {kind}"]) for kind in SCENE_KINDS},
        any_wrong=count["any"] / max(1, count["with facts"]),
        recall=count["recalled"] / max(1, count["things"]),
        length=sum(map(len, captions)) / len(captions),
        repeated=count["repeated"] / max(1, count["pieces"]),
        malformed=count["malformed"] / max(1, count["pieces"]),
        unfinished=count["unfinished"] / len(captions),
    )


@torch.no_grad()
def yes_probability(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    features: Tensor,
    questions: Sequence[tuple[int, str]],
    batch: int = 1024,
) -> Tensor:
    """Return p(yes) / (p(yes) + p(no)) for each (feature row, question text)."""
    yes, no = (tokenizer.encode(word, add_special_tokens=False)[0] for word in (" yes", " no"))
    encoded: dict[str, list[int]] = {
        text: prompt_ids(tokenizer, chat_prompt(text)) for text in {t for _, t in questions}
    }
    order = sorted(range(len(questions)), key=lambda i: len(encoded[questions[i][1]]))
    result = torch.zeros(len(questions))
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        prompts = [encoded[questions[i][1]] for i in chosen]
        hidden = hidden_states(model, pad(prompts), features[[questions[i][0] for i in chosen]])
        last = hidden[torch.arange(len(chosen)), torch.tensor([len(p) - 1 for p in prompts])]
        result[chosen] = model.lm_head(last)[:, [yes, no]].softmax(-1)[:, 0]
    return result


def pad(rows: Sequence[Sequence[int]]) -> Tensor:
    """Right-pad rows of ids with zeros: (B, L)."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[PAD_ID] * (width - len(row))] for row in rows])


def answer_accuracy(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    features: Tensor,
    asked: Sequence[tuple[int, Question]],
) -> float:
    """Return the share of yes/no questions answered right."""
    probability = yes_probability(model, tokenizer, features, [(i, q.text) for i, q in asked])
    truth = [q.answer == "yes" for _, q in asked]
    return float(
        np.mean([(p > 0.5) == t for p, t in zip(probability.tolist(), truth, strict=True)])
    )


def pope_accuracy(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    features: Tensor,
    scenes: Sequence[Scene],
    seed: int = 0,
) -> dict[str, float]:
    """Return POPE accuracy per strategy, one yes and one no question per scene."""
    result: dict[str, float] = {}
    for strategy in POPE_STRATEGIES:
        rng = random.Random(f"pope {strategy} {seed}")
        asked = [
            (index, question)
            for index, scene in enumerate(scenes)
            for question in (pope_pair(scene, strategy, rng) or ())
        ]
        result[strategy] = answer_accuracy(model, tokenizer, features, asked)
    return result


def fact_accuracy(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    features: Tensor,
    scenes: Sequence[Scene],
    texts: Sequence[str],
) -> dict[str, float]:
    """Return how often the model as verifier is right about the distinct facts of captions.

    Only facts whose presuppositions hold have a truth and count.
    """
    asked: list[tuple[int, str]] = []
    truth: list[tuple[str, bool]] = []
    for index, (scene, text) in enumerate(zip(scenes, texts, strict=True)):
        for claim in read_claims(text)[0]:
            holds = claim_holds(scene, claim)
            if holds is not None:
                asked.append((index, verify_question(claim.text)))
                truth.append((claim.kind, holds))
    said = (yes_probability(model, tokenizer, features, asked) > 0.5).tolist()
    right = {
        kind: [s == t for s, (k, t) in zip(said, truth, strict=True) if k == kind]
        for kind in SCENE_KINDS
    }
    return {kind: float(np.mean(right[kind])) for kind in SCENE_KINDS}
