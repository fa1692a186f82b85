"""One DeepSpeed rank of the policy learner: LoRA on the language model, trained with PPO, and the
projector beside it where the configuration says so.

Every rank gets the same calls; in ``update`` each takes its own share of every minibatch, and sums
are divided by counts over all ranks, so the result does not depend on how many there are.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from actors.deepspeed_setup import import_deepspeed, join_process_group
from actors.engine import LoraEngine
from actors.progress import advance
from actors.settings import LearnerSettings
from fgaif.files import readable
from fgaif.lvlm.card import write_adapter_card
from fgaif.lvlm.features import set_vision_aside
from fgaif.lvlm.hub import name_base
from fgaif.lvlm.inputs import load_encoder
from fgaif.lvlm.logprobs import next_token_logprobs, response_logprobs
from fgaif.lvlm.model import (
    attach_lora,
    project,
    resolve_checkpoint,
)
from fgaif.lvlm.shared import BaseModels
from fgaif.lvlm.weights import make_manifest
from fgaif.ppo.batch import micro_batches, minibatches, response_lengths, row_lengths
from fgaif.ppo.losses import anchor_kl, clipped_tokens, kl_loss, log_ratio, policy_loss
from fgaif.ppo.metrics import require_finite
from fgaif.ppo.schedule import lr_factor
from fgaif.types import (
    FloatArray,
    ImageRef,
    IntArray,
    Prompt,
    Response,
    TrainBatch,
    UpdateReport,
    WeightsManifest,
)


class LearnerActor:
    """Trains the policy's adapter; the base weights are frozen and are the reference."""

    def __init__(
        self,
        config: LearnerSettings,
        rank: int,
        world_size: int,
        master_addr: str,
        master_port: int,
        models: BaseModels | None = None,
    ) -> None:
        """Load the policy, join the ranks' process group and start the DeepSpeed engine.

        ``models`` are those of other roles in this process.
        """
        self._config = config
        self._rank, self._world = rank, world_size
        device = "cuda" if config.cluster.learner.gpus > 0 else "cpu"
        torch.set_num_threads(config.cluster.threads)
        torch.manual_seed(config.seed + rank)
        deepspeed = import_deepspeed(device)
        join_process_group(
            deepspeed,
            device=device,
            rank=rank,
            world_size=world_size,
            addr=master_addr,
            port=master_port,
        )
        policy = config.policy
        checkpoint = resolve_checkpoint(policy.model)
        models = models or BaseModels()
        base = models.load(
            checkpoint,
            dtype=policy.dtype,
            device=device,
            attention=policy.attention,
            quantization=policy.quantization,
        )
        if policy.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        self._encoder = load_encoder(checkpoint, **config.data.image_limits)
        model = attach_lora(base, policy.lora, config.seed, projector=policy.train_projector)
        set_vision_aside(base, projector=not policy.train_projector)
        self._engine = LoraEngine(
            model,
            deepspeed,
            config.ppo,
            dtype=policy.dtype,
            rank=rank,
            world_size=world_size,
        )
        self._like = base.get_input_embeddings().weight
        self._features = models.features(base, self._encoder, projected=not policy.train_projector)
        self._updates = 0

    @torch.no_grad()
    def logprobs(self, responses: Sequence[Response]) -> list[FloatArray | None]:
        """Log-probs (T,) of this rank's share of the responses, in the precision of training.

        Every rank is given all of them and makes as many forward passes as the others, which are
        collectives under ZeRO-3; what another rank answers for is None.
        """
        lengths = response_lengths(responses)
        rows: list[FloatArray | None] = [None] * len(responses)
        every = np.arange(len(responses))
        for indexes, weights in self._cut(every, self._lengths(responses)):
            found = self._logprobs([responses[index] for index in indexes]).cpu().numpy()
            for index, weight, row in zip(indexes, weights, found, strict=True):
                if weight > 0:
                    rows[index] = row[: lengths[index]]
        return rows

    def update(self, batch: TrainBatch, anchors: Sequence[Prompt]) -> UpdateReport:
        """Run PPO's epochs over the batch; every rank is given all of it (collective).

        ``anchors`` are questions whose next-token distribution must stay near the reference's:
        minibatch i uses the i-th ``ppo.anchor.batch_size`` of them, from the start again when they
        run out. The order of everything depends on the seed and the number of updates alone.

        Raises:
            DivergedError: the loss is not finite.
        """
        started = time.perf_counter()
        config = self._config.ppo
        lr = config.lr * lr_factor(
            self._updates, steps=config.steps, warmup=config.warmup_steps, schedule=config.schedule
        )
        totals = _Totals(self._engine.device)
        norms = []
        every = list(self._minibatches(batch))
        questions = self._anchor_pieces(anchors, len(every))
        for rows, pieces in zip(every, questions, strict=True):
            losses = self._policy_losses(batch, rows, totals)
            losses += [partial(self._anchor_loss, piece, totals) for piece in pieces]
            norms.append(self._engine.step(losses, lr))
        self._updates += 1
        metrics = totals.means(tokens=config.epochs * float(batch.mask.sum()), steps=len(norms))
        if not batch.kl_loss_coef:
            del metrics["policy/kl_loss"]
        metrics |= {
            "policy/grad_norm": float(np.mean(norms)),
            "policy/lr": lr,
            "policy/tokens": config.epochs * float(batch.mask.sum()),
            "policy/seconds": time.perf_counter() - started,
        }
        require_finite(self._updates, metrics, "ppo.lr", config.lr)
        return UpdateReport(metrics=metrics)

    def publish(self, version: int) -> WeightsManifest:
        """Copy the adapter as a numbered version (collective under ZeRO-3)."""
        trained = {name: value.float().numpy() for name, value in self._engine.adapter().items()}
        return make_manifest(trained, scaling=self._config.policy.lora.scaling, version=version)

    def save(self, path: Path) -> None:
        """Write adapter, AdamW state, schedule position and RNG into ``path`` (collective)."""
        self._engine.save(path, {"updates": self._updates})

    def restore(self, path: Path) -> None:
        """Continue exactly where ``save`` was called (collective).

        Raises:
            CheckpointError: files are missing, or made by other ranks, ZeRO stage or model.
        """
        self._updates = self._engine.restore(path)["updates"]

    def save_adapter(self, path: Path) -> None:
        """Write the adapter as a PEFT directory (collective under ZeRO-3)."""
        adapter = self._engine.adapter()
        if self._rank == 0:
            model = self._engine.model
            name_base(model, self._config.policy.model)
            model.save_pretrained(path, state_dict=adapter, save_embedding_layers=False)
            lora = self._config.policy.lora
            write_adapter_card(
                path,
                base=self._config.policy.model,
                rank=lora.r,
                alpha=lora.alpha,
                steps=self._updates,
            )
            readable(path)

    def _minibatches(self, batch: TrainBatch) -> Iterator[IntArray]:
        config = self._config
        for epoch in range(config.ppo.epochs):
            seed = (config.seed, self._updates, epoch)
            yield from minibatches(len(batch.responses), config.ppo.minibatch, seed)

    def _cut(self, rows: IntArray, lengths: IntArray) -> list[tuple[IntArray, FloatArray]]:
        return micro_batches(
            rows,
            lengths,
            size=self._config.ppo.micro_batch,
            tokens=self._config.ppo.micro_tokens,
            rank=self._rank,
            world_size=self._world,
        )

    def _lengths(self, responses: Sequence[Response]) -> IntArray:
        by_tokens = self._config.ppo.micro_tokens is not None
        return row_lengths(responses, self._encoder.prompt_ids if by_tokens else None)

    def _policy_losses(
        self, batch: TrainBatch, rows: IntArray, totals: "_Totals"
    ) -> list[Callable[[], Tensor]]:
        valid = float(batch.mask[rows].sum())

        def loss(indexes: IntArray, weights: FloatArray) -> Tensor:
            responses = [batch.responses[index] for index in indexes]
            width = int(response_lengths(responses).max())
            old, advantages, mask = (
                torch.from_numpy(array).to(self._engine.device)
                for array in (
                    batch.old_logprobs[indexes, :width],
                    batch.advantages[indexes, :width],
                    batch.mask[indexes, :width] * weights[:, None],
                )
            )
            importance = (
                None
                if batch.weights is None
                else torch.from_numpy(batch.weights[indexes, :width]).to(self._engine.device)
            )
            new = self._logprobs(responses)
            clip = self._config.ppo.clip
            value = policy_loss(
                new, old, advantages, mask,
                clip=clip, num_valid_tokens=valid, weights=importance,
            )  # fmt: skip
            totals.add_policy(value, new, old, advantages, mask, clip)
            if not batch.kl_loss_coef:
                return value
            reference = torch.from_numpy(batch.reference_logprobs[indexes, :width])
            reference = reference.to(self._engine.device)
            kl = kl_loss(new, reference, mask, num_valid_tokens=valid)
            totals.kl += kl.detach()
            return value + batch.kl_loss_coef * kl

        cut = self._cut(rows, self._lengths(batch.responses))
        return [partial(loss, *piece) for piece in cut]

    @torch.no_grad()
    def _anchor_pieces(self, anchors: Sequence[Prompt], count: int) -> "list[list[_AnchorPiece]]":
        """Cut the questions of ``count`` minibatches and ask the reference, the bare base model."""
        size = self._config.ppo.anchor.batch_size
        if self._config.ppo.anchor.weight == 0 or not anchors:
            return [[] for _ in range(count)]
        # Once per update: switching the adapter walks over all modules.
        with self._engine.model.disable_adapter():
            return [
                self._anchors_of(
                    [anchors[(n * size + index) % len(anchors)] for index in range(size)]
                )
                for n in range(count)
            ]

    def _anchors_of(self, prompts: Sequence[Prompt]) -> "list[_AnchorPiece]":
        """The questions of a minibatch, cut into micro-batches."""
        lengths = np.ones(len(prompts), np.int64)
        if self._config.ppo.micro_tokens is not None:
            lengths[:] = [len(self._encoder.prompt_ids(prompt)) for prompt in prompts]
        return [
            self._anchor_piece([prompts[i] for i in indexes], weights / np.float32(len(prompts)))
            for indexes, weights in self._cut(np.arange(len(prompts)), lengths)
        ]

    def _anchor_piece(self, prompts: Sequence[Prompt], weights: FloatArray) -> "_AnchorPiece":
        ids, last = self._encoder.encode_prompts(prompts, self._like)
        compute = self._seeing(
            [prompt.image for prompt in prompts],
            partial(next_token_logprobs, input_ids=ids, last=last),
        )
        weight = torch.from_numpy(weights).to(self._engine.device)
        return _AnchorPiece(compute=compute, reference=self._engine.run(compute), weights=weight)

    def _anchor_loss(self, piece: "_AnchorPiece", totals: "_Totals") -> Tensor:
        advance(len(piece.weights))
        kl = anchor_kl(piece.reference, self._engine.run(piece.compute))
        mean = (kl * piece.weights).sum()
        totals.anchor_kl += mean.detach()
        return self._config.ppo.anchor.weight * mean

    def _logprobs(self, responses: Sequence[Response]) -> Tensor:
        """Log-probs (B, T) of the responses under the policy, zero at padding."""
        advance(sum(len(response.token_ids) for response in responses))
        batch = self._encoder.encode(responses, self._like)
        compute = self._seeing(
            [response.prompt.image for response in responses],
            partial(response_logprobs, batch=batch, temperature=self._config.policy.temperature),
        )
        return self._engine.run(compute)

    def _seeing(
        self, images: Sequence[ImageRef], compute: Callable[..., Tensor]
    ) -> Callable[[nn.Module], Tensor]:
        """``compute`` given the images' features, which a trained projector makes at every call."""
        features = self._features(images)
        if not self._config.policy.train_projector:
            return partial(compute, features=features)
        return lambda model: compute(model, features=project(model, features))


@dataclass(frozen=True, slots=True, kw_only=True)
class _AnchorPiece:
    """Questions of a micro-batch: their next-token log-probs (N, V) under any policy and under the
    reference, and each one's share (N,) of the minibatch's mean."""

    compute: Callable[[nn.Module], Tensor]
    reference: Tensor
    weights: Tensor


class _Totals:
    """Sums over the pieces of an update on this rank, as tensors to keep the device busy."""

    def __init__(self, device: torch.device) -> None:
        self.loss, self.clipped, self.k3, self.surprise, self.anchor_kl, self.kl, self.ratio_max = (
            torch.zeros(7, device=device).unbind()
        )

    @torch.no_grad()
    def add_policy(
        self, loss: Tensor, new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float
    ) -> None:
        """Add one piece; all but ``loss`` are (B, T)."""
        difference = log_ratio(new, old, mask)
        self.loss += loss
        self.clipped += clipped_tokens(new, old, advantages, mask, clip=clip)
        self.k3 += (difference.expm1() - difference).sum()
        self.surprise -= (new * mask).sum()
        self.ratio_max.copy_(torch.maximum(self.ratio_max, difference.max().exp()))

    def means(self, *, tokens: float, steps: int) -> dict[str, float]:
        """Means over all ranks' tokens or optimiser steps, and the largest ratio (collective)."""
        sums = torch.stack(
            [self.loss, self.anchor_kl, self.clipped, self.k3, self.surprise, self.kl]
        )
        largest = self.ratio_max.clone()
        torch.distributed.all_reduce(sums)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        loss, anchor, clipped, k3, surprise, kl = sums.tolist()
        return {
            "policy/loss": loss / steps,
            "policy/anchor_kl": anchor / steps,
            "policy/kl_loss": kl / steps,
            "policy/clip_frac": clipped / tokens,
            "policy/approx_kl": k3 / tokens,
            "policy/entropy": surprise / tokens,
            "policy/ratio_max": largest.item(),
        }
