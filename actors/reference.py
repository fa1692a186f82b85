"""Reference policy and value model in one actor: who evaluates V also trains it.

An estimator without a critic (``ppo.estimator``) leaves the reference alone: no value adapter, no
head, no optimiser, and no second backbone.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.progress import advance
from actors.settings import ReferenceSettings
from fgaif.checkpoint import load_optimizer_tensors, optimizer_tensors
from fgaif.errors import CheckpointError, ConfigError
from fgaif.files import readable
from fgaif.lvlm.features import FeatureCache
from fgaif.lvlm.inputs import EncodedBatch, Encoder, load_encoder
from fgaif.lvlm.logprobs import gather_hidden, hidden_logprobs
from fgaif.lvlm.model import (
    attach_lora,
    base_of,
    last_hidden,
    load_adapter,
    resolve_checkpoint,
    without_dropout,
)
from fgaif.lvlm.shared import BaseModels
from fgaif.ppo.advantages import explained_variance
from fgaif.ppo.batch import micro_batches, minibatches, response_lengths, row_lengths
from fgaif.ppo.losses import value_loss
from fgaif.ppo.metrics import require_finite
from fgaif.ppo.schedule import lr_factor
from fgaif.types import Evaluation, FloatArray, IntArray, Response, TrainBatch, UpdateReport

_STATE = "value.safetensors"
_FACTS = "value.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    """A model with what it needs to read responses."""

    model: nn.Module
    encoder: Encoder
    features: FeatureCache

    def hidden(self, responses: Sequence[Response]) -> tuple[EncodedBatch, Tensor]:
        """Encoded responses and their last hidden states (B, L, D)."""
        advance(sum(len(response.token_ids) for response in responses))
        like = base_of(self.model).get_input_embeddings().weight
        batch = self.encoder.encode(responses, like)
        features = self.features([response.prompt.image for response in responses])
        return batch, last_hidden(self.model, batch.input_ids, features)


class ReferenceActor:
    """Frozen reference log-probs, and values from a LoRA adapter with a linear head.

    Where both start from one checkpoint they share one copy of it: the reference is the backbone
    with the value adapter switched off.
    """

    def __init__(
        self, config: ReferenceSettings, rewards: Path, models: BaseModels | None = None
    ) -> None:
        """Load the models; ``rewards/KIND`` starts the value model if ``ppo.value_init`` says so.

        ``models`` are those of other roles in this process.

        Raises:
            CheckpointError: that reward model is missing or does not fit its backbone.
            ConfigError: its backbone reads other token ids than the policy.
        """
        self._config = config
        self._models = models or BaseModels()
        self._device = torch.device("cuda" if config.cluster.reference.gpus > 0 else "cpu")
        torch.set_num_threads(config.cluster.threads)
        torch.manual_seed(config.seed)
        self._value: _Reader | None = None
        kind = config.ppo.value_init
        policy = resolve_checkpoint(config.policy.model)
        if not config.ppo.has_critic:
            self._reference = self._reader(self._load(policy), policy)
            self._parameters: dict[str, nn.Parameter] = {}
            return
        backbone = policy if kind == "policy" else resolve_checkpoint(config.reward_backbone)
        base = self._load(backbone)
        if kind == "policy":
            self._model = attach_lora(base, config.ppo.value_lora, config.seed)
        else:
            self._model = load_adapter(base, rewards / kind, trainable=True)
        without_dropout(self._model)
        self._value = self._reader(self._model, backbone)
        self._reference = (
            self._value if backbone == policy else self._reader(self._load(policy), policy)
        )
        self._check_vocabulary()
        width = base.get_input_embeddings().weight.shape[1]
        self._head = nn.Linear(width, 1, device=self._device)
        nn.init.zeros_(self._head.weight)
        nn.init.zeros_(self._head.bias)
        self._parameters = {
            name: value for name, value in self._model.named_parameters() if value.requires_grad
        } | {f"head.{name}": value for name, value in self._head.named_parameters()}
        self._optimizer = torch.optim.AdamW(
            list(self._parameters.values()),
            lr=config.ppo.value_lr,
            betas=config.ppo.adam_betas,
            weight_decay=config.ppo.weight_decay,
        )
        self._updates = 0

    def info(self) -> dict[str, int]:
        """Trained parameters of the value model, and 1 if it shares the reference's backbone."""
        return {
            "trainable_parameters": sum(value.numel() for value in self._parameters.values()),
            "shared_backbone": int(self._reference is self._value),
        }

    def evaluate(self, responses: Sequence[Response]) -> list[Evaluation]:
        """Reference log-probs and values, both (T,), of each response; values[t] = V(before t).

        Without a critic there are no values.
        """
        if self._value is None:
            rows = self._per_token(responses, self._reference_logprobs)
            return [Evaluation(reference_logprobs=row) for row in rows]
        if self._reference is self._value:
            with self._model.disable_adapter():
                logprobs = self._per_token(responses, self._reference_logprobs)
        else:
            logprobs = self._per_token(responses, self._reference_logprobs)
        values = self._per_token(responses, self._values)
        return [
            Evaluation(reference_logprobs=row, values=value)
            for row, value in zip(logprobs, values, strict=True)
        ]

    def update_values(self, batch: TrainBatch) -> UpdateReport:
        """Fit the values to the returns: epochs x minibatches with their own seeded shuffles.

        Raises:
            DivergedError: the loss is not finite.
        """
        started = time.perf_counter()
        config = self._config.ppo
        lr = config.value_lr * lr_factor(
            self._updates, steps=config.steps, warmup=config.warmup_steps, schedule=config.schedule
        )
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        steps = [
            self._minibatch(batch, rows)
            for epoch in range(config.epochs)
            for rows in minibatches(
                len(batch.responses), config.minibatch, (self._config.seed, self._updates, epoch)
            )
        ]
        self._updates += 1
        loss, norm = np.mean(steps, axis=0).tolist()
        found = {"value/loss": loss, "value/grad_norm": norm}
        require_finite(self._updates, found, "ppo.value_lr", config.value_lr)
        valid = batch.mask > 0
        assert batch.values is not None
        assert batch.returns is not None
        return UpdateReport(
            metrics={
                "value/loss": loss,
                "value/grad_norm": norm,
                "value/mean": float(batch.values[valid].mean()),
                "value/explained_variance": explained_variance(
                    batch.values, batch.returns, batch.mask
                ),
                "value/lr": lr,
                "value/seconds": time.perf_counter() - started,
            }
        )

    def save(self, path: Path) -> None:
        """Write adapter, head, AdamW state, schedule position and RNG into ``path``."""
        path.mkdir(parents=True, exist_ok=True)
        state = optimizer_tensors(self._optimizer, list(self._parameters.values()))
        state["rng.cpu"] = torch.get_rng_state()
        if self._device.type == "cuda":
            state["rng.cuda"] = torch.cuda.get_rng_state()
        save_file({name: value.cpu() for name, value in state.items()}, path / _STATE)
        readable(path / _STATE)
        facts = {"updates": self._updates, "value_init": self._config.ppo.value_init}
        (path / _FACTS).write_text(json.dumps(facts), encoding="utf-8")

    def restore(self, path: Path) -> None:
        """Continue exactly where ``save`` was called.

        Raises:
            CheckpointError: files are missing, or made by another model.
        """
        try:
            facts = json.loads((path / _FACTS).read_text(encoding="utf-8"))
            state = load_file(path / _STATE)
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot read the value model: {error}") from error
        rng = {name: state.pop(name) for name in list(state) if name.startswith("rng.")}
        load_optimizer_tensors(self._optimizer, list(self._parameters.values()), state)
        torch.set_rng_state(rng["rng.cpu"])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(rng["rng.cuda"])
        self._updates = int(facts["updates"])

    def _load(self, path: Path) -> PreTrainedModel:
        policy = self._config.policy
        model = self._models.load(
            path,
            dtype=policy.dtype,
            device=str(self._device),
            attention=policy.attention,
            quantization=policy.quantization,
        )
        if policy.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    def _reader(self, model: nn.Module, path: Path) -> _Reader:
        encoder = load_encoder(path, **self._config.data.image_limits)
        features = self._models.features(base_of(model), encoder)
        return _Reader(model=model, encoder=encoder, features=features)

    def _check_vocabulary(self) -> None:
        assert self._value is not None
        ours, theirs = (
            reader.encoder.tokenizer.get_vocab() for reader in (self._value, self._reference)
        )
        if ours != theirs:
            raise ConfigError(
                f"ppo.value_init = {self._config.ppo.value_init!r}: reward.backbone = "
                f"{self._config.reward.backbone!r} has another vocabulary than policy.model = "
                f"{self._config.policy.model!r}, but values belong to tokens; set ppo.value_init "
                "to 'policy'"
            )

    @torch.no_grad()
    def _per_token(
        self, responses: Sequence[Response], compute: Callable[[list[Response]], Tensor]
    ) -> list[FloatArray]:
        """Apply ``compute``, (B, T) for B responses, in micro-batches; rows (T,) in order."""
        lengths = response_lengths(responses)
        rows: list[FloatArray] = [np.zeros(0, np.float32)] * len(responses)
        for indexes in self._cut(np.arange(len(responses)), responses):
            found = compute([responses[index] for index in indexes]).cpu().numpy()
            for index, row in zip(indexes, found, strict=True):
                rows[index] = row[: lengths[index]]
        return rows

    def _cut(self, rows: IntArray, responses: Sequence[Response]) -> list[IntArray]:
        """Micro-batches of these rows of the responses, longest first."""
        config = self._config.ppo
        prompt_ids = self._reference.encoder.prompt_ids if config.micro_tokens is not None else None
        lengths = row_lengths(responses, prompt_ids)
        cut = micro_batches(rows, lengths, size=config.micro_batch, tokens=config.micro_tokens)
        return [indexes for indexes, _ in cut]

    def _reference_logprobs(self, responses: Sequence[Response]) -> Tensor:
        batch, hidden = self._reference.hidden(responses)
        return hidden_logprobs(
            self._reference.model,
            hidden,
            batch,
            temperature=self._config.policy.temperature,
        )

    def _values(self, responses: Sequence[Response]) -> Tensor:
        """Values (B, T) from the state that predicts each token, which has not seen it."""
        assert self._value is not None
        batch, hidden = self._value.hidden(responses)
        return self._head(gather_hidden(hidden, batch.positions).float())[..., 0]

    def _minibatch(self, batch: TrainBatch, rows: IntArray) -> tuple[float, float]:
        """One optimiser step; returns loss and gradient norm before clipping."""
        config = self._config.ppo
        valid = float(batch.mask[rows].sum())
        lengths = response_lengths(batch.responses)
        self._optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self._device)
        assert batch.values is not None
        assert batch.returns is not None
        for indexes in self._cut(rows, batch.responses):
            width = int(lengths[indexes].max())
            old, returns, mask = (
                torch.from_numpy(array[indexes, :width]).to(self._device)
                for array in (batch.values, batch.returns, batch.mask)
            )
            values = self._values([batch.responses[index] for index in indexes])
            loss = value_loss(
                values, old, returns, mask, clip=config.value_clip, num_valid_tokens=valid
            )
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self._parameters.values(), config.max_grad_norm)
        self._optimizer.step()
        return total.item(), norm.item()
