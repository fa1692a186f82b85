"""Offline training of the tiny models: the vision tower, then the language model with its helpers.

Losses: next token on what is to be said, plus throw-away linear heads by depth (see targets), plus,
for the first part of a stage, an alignment of projected patches with the words for what they show.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from fgaif.data.scenes.captions import BROAD, CLEAN, POLICY, Noise
from fgaif.data.scenes.questions import sample_question
from fgaif.data.scenes.world import COLOURS, GRID, NOUNS, RELATIONS, SIZES, Scene
from fgaif.scene_models.measure import pad, scene_pixels
from fgaif.scene_models.model import HIDDEN, embed, vision_features
from fgaif.scene_models.rows import Row, RowWriter
from fgaif.scene_models.targets import IGNORE, Entry
from fgaif.scene_models.tokenizer import PATCHES

_QUESTIONS_PER_ROW = 3
_LOOK = (2, len(COLOURS), len(SIZES), GRID, GRID)
_STATED = (len(COLOURS) + 1, len(SIZES) + 1, GRID + 1, GRID + 1)
_MATCH = (3, 3)
_PLACES = (GRID,) * 4
_TRUTH = (2,) * len(RELATIONS) + (3,)
_KINDS = (3,) * 3

Report = Callable[[int, dict[str, float]], None]
"""Called after every step with the step number (from 1) and the step's losses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One training stage of the language model. Shares are of the batch; the rest are questions.

    ``open_share``: share of open questions, which is ``early_open_share`` in the first quarter.
    """

    steps: int
    lr: float
    captions: float
    judged: float
    open_share: float = 0.3
    early_open_share: float = 0.3
    batch: int = 64


class Heads(nn.Module):
    """The throw-away heads, by the depth whose output they read."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Linear(HIDDEN, sum(_LOOK))
        self.stated = nn.Linear(HIDDEN, sum(_STATED))
        self.match = nn.Linear(HIDDEN, sum(_MATCH))
        self.places = nn.Linear(HIDDEN, sum(_PLACES))
        self.truth = nn.Linear(HIDDEN, sum(_TRUTH))
        self.known = nn.Linear(HIDDEN, 2 * len(NOUNS))
        self.fitting = nn.Linear(HIDDEN, len(NOUNS))
        self.subject = nn.Linear(HIDDEN, len(NOUNS) + 1)
        self.ends = nn.Linear(HIDDEN, sum(_KINDS))

    def losses(
        self, layers: Sequence[Tensor], last: Tensor, rows: Sequence[Row]
    ) -> dict[str, Tensor]:
        """Return the weighted losses; ``layers`` are the outputs of layers 0 to 2, (B, L, H)."""
        first, second, third = layers
        losses: dict[str, Tensor] = {}
        at, y = gather(rows, "nouns")
        split = len(_LOOK) + len(_STATED)
        losses["look"] = classes_loss(self.look(first[at]), y[:, : len(_LOOK)], _LOOK)
        losses["stated"] = 0.5 * classes_loss(
            self.stated(second[at]), y[:, len(_LOOK) : split], _STATED
        )
        losses["match"] = classes_loss(self.match(third[at]), y[:, split:], _MATCH)
        at, y = gather(rows, "relations")
        if len(y):
            losses["places"] = 0.5 * classes_loss(self.places(second[at]), y[:, :4], _PLACES)
            losses["truth"] = classes_loss(self.truth(third[at]), y[:, 4:], _TRUTH)
        at, y = gather(rows, "ends")
        losses["ends"] = classes_loss(self.ends(last[at]), y, _KINDS)
        at, y = gather(rows, "sets")
        if len(y):
            bits, known = y.float(), 2 * len(NOUNS)
            bce = F.binary_cross_entropy_with_logits
            losses["known"] = 3 * bce(self.known(second[at]), bits[:, :known])
            losses["fitting"] = 3 * bce(self.fitting(third[at]), bits[:, known:])
        at, y = gather(rows, "subjects")
        if len(y):
            losses["subject"] = F.cross_entropy(self.subject(second[at]), y[:, 0])
        return losses


def gather(rows: Sequence[Row], name: str) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Collect one kind of target over a batch: ((row, position), classes)."""
    entries: list[tuple[int, Entry]] = [
        (i, entry) for i, row in enumerate(rows) for entry in getattr(row.targets, name)
    ]
    where = torch.tensor([i for i, _ in entries], dtype=torch.long)
    position = torch.tensor([p for _, (p, _) in entries], dtype=torch.long)
    return (where, position), torch.tensor([y for _, (_, y) in entries], dtype=torch.long)


def classes_loss(logits: Tensor, target: Tensor, sizes: Sequence[int]) -> Tensor:
    """Sum the cross entropies of several classifications laid side by side in ``logits``."""
    parts = logits.split(list(sizes), -1)
    total = logits.new_zeros(())
    for column, part in enumerate(parts):
        y = target[:, column]
        if bool((y != IGNORE).any()):
            total = total + F.cross_entropy(part, y, ignore_index=IGNORE)
    return total


def train_vision(
    model: LlavaForConditionalGeneration,
    scenes: Sequence[Scene],
    *,
    steps: int,
    report: Report,
    batch: int = 128,
) -> None:
    """Teach the tower to tell, per patch, category, colour, size, row and column."""
    pixels, target = scene_pixels(scenes), _patch_targets(scenes)
    sizes = (len(NOUNS) + 1, len(COLOURS), len(SIZES), GRID, GRID)
    head = nn.Linear(HIDDEN, sum(sizes))
    parameters = [*model.model.vision_tower.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, 1.5e-3, total_steps=steps, pct_start=0.1
    )
    for step in range(1, steps + 1):
        chosen = torch.randint(0, len(scenes), (batch,))
        logits = head(vision_features(model, pixels[chosen])).flatten(0, 1)
        loss = classes_loss(logits, target[chosen].flatten(0, 1), sizes)
        descend(loss, parameters, optimiser)
        schedule.step()
        report(step, {"vision": loss.item()})


def _patch_targets(scenes: Sequence[Scene]) -> Tensor:
    """Return (B, 9, 5): category (0 for an empty cell), colour, size, row, column."""
    cells = torch.arange(PATCHES)
    target = torch.full((len(scenes), PATCHES, 5), IGNORE)
    target[:, :, 0] = 0
    target[:, :, 3], target[:, :, 4] = cells // GRID, cells % GRID
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            cell = thing.row * GRID + thing.column
            look = [
                NOUNS.index(thing.noun) + 1,
                COLOURS.index(thing.colour),
                SIZES.index(thing.size),
            ]
            target[i, cell, :3] = torch.tensor(look)
    return target


def train_language(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    heads: Heads,
    scenes: Sequence[Scene],
    features: Tensor,
    stage: Stage,
    *,
    seed: int,
    report: Report,
) -> None:
    """Run one stage on frozen, cached vision features (N, 9, 128)."""
    rng, writer = random.Random(f"stage {seed}"), RowWriter(tokenizer)
    aligner = _Aligner(tokenizer)
    model.model.vision_tower.requires_grad_(False)
    parameters = [p for p in (*model.parameters(), *heads.parameters()) if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=stage.lr, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, stage.lr, total_steps=stage.steps, pct_start=0.08
    )
    for step in range(1, stage.steps + 1):
        chosen = [rng.randrange(len(scenes)) for _ in range(stage.batch)]
        rows = _stage_rows(writer, [scenes[i] for i in chosen], stage, step, rng)
        layers, last = run_rows(model, rows, features[chosen])
        losses = {"next": next_token_loss(model, rows, last), **heads.losses(layers, last, rows)}
        if step <= 0.6 * stage.steps:
            losses["align"] = aligner.loss(model, [scenes[i] for i in chosen], features[chosen])
        descend(torch.stack(list(losses.values())).sum(), parameters, optimiser)
        schedule.step()
        report(step, {name: loss.item() for name, loss in losses.items()})


def run_rows(
    model: LlavaForConditionalGeneration, rows: Sequence[Row], features: Tensor, groups: int = 3
) -> tuple[list[Tensor], Tensor]:
    """Run rows through the language model; return the outputs of layers 0 to 2 and the last.

    All are (B, L, H), in the order of the rows. Rows of similar length run together, because a
    third of the time would otherwise go into padding.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    width = len(rows[order[-1]].ids)
    size = -(-len(rows) // groups)
    parts: list[list[Tensor]] = [[], [], [], []]
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        ids = pad([rows[i].ids for i in chosen])
        output = model.model.language_model(
            inputs_embeds=embed(model, ids, features[chosen]),
            use_cache=False,
            output_hidden_states=True,
        )
        outputs = [*output.hidden_states[1:4], output.last_hidden_state]
        for part, tensor in zip(parts, outputs, strict=True):
            part.append(F.pad(tensor, (0, 0, 0, width - tensor.shape[1])))
    back = torch.tensor(order).argsort()
    *layers, last = (torch.cat(part)[back] for part in parts)
    return layers, last


def next_token_loss(
    model: LlavaForConditionalGeneration, rows: Sequence[Row], last: Tensor
) -> Tensor:
    """Return the mean cross entropy over the predicted tokens, from last hidden states."""
    ids = pad([row.ids for row in rows])
    predicted = pad([[int(p) for p in row.predicted] for row in rows])[:, 1:].bool()
    return F.cross_entropy(model.lm_head(last[:, :-1][predicted]), ids[:, 1:][predicted])


def _stage_rows(
    writer: RowWriter, scenes: Sequence[Scene], stage: Stage, step: int, rng: random.Random
) -> list[Row]:
    said = round(stage.captions * stage.batch)
    judged = said + round(stage.judged * stage.batch)
    share = stage.early_open_share if step <= 0.25 * stage.steps else stage.open_share
    rows = [writer.caption(scene, rng, CLEAN) for scene in scenes[:said]]
    for scene in scenes[said:judged]:
        noise: Noise = BROAD if rng.random() < 0.7 else POLICY
        rows.append(writer.judged(scene, rng, noise))
    for scene in scenes[judged:]:
        asked = [sample_question(scene, rng, share) for _ in range(_QUESTIONS_PER_ROW)]
        rows.append(writer.questions(scene, asked))
    return rows


class _Aligner:
    """Pulls each projected patch towards the embeddings of its noun, colour and size."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._words = [
            torch.tensor([tokenizer.encode(f" {w}", add_special_tokens=False)[0] for w in words])
            for words in (NOUNS, COLOURS, SIZES)
        ]

    def loss(
        self, model: LlavaForConditionalGeneration, scenes: Sequence[Scene], features: Tensor
    ) -> Tensor:
        target = _patch_targets(scenes)
        where = target[:, :, 0] > 0
        patches = F.normalize(model.model.multi_modal_projector(features[where]), dim=-1)
        words = F.normalize(model.get_input_embeddings().weight, dim=-1)
        labels = target[where][:, :3] - torch.tensor([1, 0, 0])
        parts = [
            F.cross_entropy(10 * patches @ words[ids].T, labels[:, column])
            for column, ids in enumerate(self._words)
        ]
        return torch.stack(parts).sum()


def descend(
    loss: Tensor, parameters: Sequence[nn.Parameter], optimiser: torch.optim.Optimizer
) -> None:
    """Take one optimiser step on the loss, with the gradient norm clipped at one."""
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimiser.step()
