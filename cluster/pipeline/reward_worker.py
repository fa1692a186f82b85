"""What a Ray Train worker does: train the kinds of its task, stepped by DeepSpeed."""

import os
from collections.abc import Sequence
from pathlib import Path

import ray
import ray.train
import torch
from ray.train.torch import get_device
from torch import Tensor
from transformers import PreTrainedModel

from actors.deepspeed_setup import deepspeed_config, import_deepspeed, join_process_group
from cluster.pipeline.reward_task import RewardTask
from fgaif.config import Config
from fgaif.lvlm.families.base import ImageFeatures
from fgaif.lvlm.features import FeatureCache, set_vision_aside
from fgaif.lvlm.model import load_lvlm, resolve_checkpoint
from fgaif.reward.checkpoint import make_card, save_reward_model
from fgaif.reward.dataset import read_data
from fgaif.reward.inputs import RewardEncoder, load_reward_encoder, tokenizer_digest
from fgaif.reward.model import RewardModel, new_reward_model, trainable_state
from fgaif.reward.train import make_optimizer, planned_steps, train_reward_model
from fgaif.types import Kind, LabeledResponse


def run_reward_task(task: RewardTask) -> None:
    """Train the task's kinds, in a Ray Train worker."""
    config = task.config
    torch.set_num_threads(config.cluster.threads)
    rows = ray.get(task.rows)
    path = resolve_checkpoint(config.reward_backbone)
    encoder = load_reward_encoder(
        path,
        resolve_checkpoint(config.policy.model),
        **config.data.image_limits,
    )
    backbone = _load_backbone(path, config)
    features = FeatureCache(backbone, encoder.encoder)
    for kind in task.kinds:
        model = _train_kind(kind, task, rows, backbone, encoder, features)
        if config.reward.zero_stage == 3:  # its parameters are sharded for good
            backbone = _load_backbone(path, config)
            features = FeatureCache(backbone, encoder.encoder)
        else:
            model.backbone.unload()


def _load_backbone(path: Path, config: Config) -> PreTrainedModel:
    policy = config.policy
    backbone = load_lvlm(
        path,
        dtype=policy.dtype,
        device=str(get_device()),
        attention=policy.attention,
        quantization=policy.quantization,
    )
    if policy.gradient_checkpointing:
        backbone.gradient_checkpointing_enable({"use_reentrant": False})
    set_vision_aside(backbone, projector=True)
    return backbone


def _train_kind(
    kind: Kind,
    task: RewardTask,
    rows: Sequence[LabeledResponse],
    backbone: PreTrainedModel,
    encoder: RewardEncoder,
    features: FeatureCache,
) -> RewardModel:
    config, settings = task.config, task.config.reward
    data = read_data(kind, rows, config)
    kinds = config.kind_names
    seed = config.seed * len(kinds) + kinds.index(kind)
    model = new_reward_model(backbone, settings.lora, settings.head, seed)
    engine = _ZeroEngine(model, config, planned_steps(len(data.train), settings))

    def report(done: int, planned: int, figures: dict[str, float]) -> None:
        if "val_loss" in figures:
            ray.train.report({"kind": kind, "step": done, **figures})
        if engine.rank == 0 and ("val_loss" in figures or done % max(1, planned // 50) == 0):
            task.queue.put((kind, done, planned, figures))

    result = train_reward_model(
        data, model, engine, encoder, features, settings, seed=seed, report=report
    )
    if engine.rank == 0:
        metrics = result.metrics.as_floats() | {
            "val_loss": result.val_loss,
            "steps": float(result.steps),
            "unknown_segments": float(data.unknown_segments),
            "unused_responses": float(data.unused_responses),
        }
        card = make_card(
            kind,
            config,
            data,
            backbone_digest=task.backbone_digest,
            tokenizer_digest=tokenizer_digest(encoder.encoder.tokenizer),
            input_digest=task.digests[kind],
            metrics=metrics,
        )
        save_reward_model(task.out_dir / kind, model, result.state, card)
        task.queue.put((kind, result.planned_steps, result.planned_steps, metrics))
    engine.close()
    return model


class _ZeroEngine:
    """A reward model under DeepSpeed ZeRO, as :class:`fgaif.reward.train.Engine`."""

    def __init__(self, model: RewardModel, config: Config, steps: int) -> None:
        context, device = ray.train.get_context(), get_device()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self._deepspeed = import_deepspeed(device.type)
        join_process_group(
            self._deepspeed,
            device=str(device),
            rank=self.rank,
            world_size=self.world_size,
            addr=os.environ["MASTER_ADDR"],
            port=int(os.environ["MASTER_PORT"]),
        )
        optimizer, schedule = make_optimizer(model, config.reward, steps)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._model = model
        self._engine, *_ = self._deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=schedule,
            model_parameters=trained,
            config=deepspeed_config(
                zero_stage=config.reward.zero_stage,
                micro_batch=config.reward.micro_batch,
                max_grad_norm=config.reward.max_grad_norm,
                dtype=config.policy.dtype,
                trained=sum(parameter.numel() for parameter in trained),
                world_size=self.world_size,
            ),
        )

    def __call__(self, input_ids: Tensor, features: ImageFeatures, separators: Tensor) -> Tensor:
        return self._engine(input_ids, features, separators)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def step(self) -> None:
        self._engine.step()

    def state(self) -> dict[str, Tensor]:
        trainable = [p for p in self._model.parameters() if p.requires_grad]
        sharded = self._engine.zero_optimization_stage() == 3
        with self._deepspeed.zero.GatheredParameters(trainable, enabled=sharded):
            return trainable_state(self._model)

    def agree(self, value: float) -> float:
        shared = torch.tensor([value], dtype=torch.float64, device=self._engine.device)
        torch.distributed.broadcast(shared, src=0)
        return float(shared)

    def close(self) -> None:
        """Free DeepSpeed's hooks and buffers."""
        self._engine.destroy()
