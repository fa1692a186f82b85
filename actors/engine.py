"""A model with an adapter inside a DeepSpeed engine: forward, one optimiser step, exact state."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from actors.deepspeed_setup import deepspeed_config, master_tensors, torch_optimizer
from fgaif.checkpoint import load_optimizer_tensors, optimizer_tensors
from fgaif.config import PpoConfig
from fgaif.errors import CheckpointError
from fgaif.files import readable
from fgaif.lvlm.model import without_dropout

_LORA = "lora.safetensors"
_FACTS = "engine.json"


class _Inside(nn.Module):
    """Runs any computation on the model as one forward pass of the engine, so its hooks apply."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[nn.Module], Tensor]) -> Tensor:
        return compute(self.model)


class LoraEngine:
    """One rank of the training of an adapter; collective calls are marked as such."""

    def __init__(
        self,
        model: PeftModel,
        deepspeed: ModuleType,
        config: PpoConfig,
        *,
        dtype: str,
        rank: int,
        world_size: int,
    ) -> None:
        """Wrap ``model``, whose trainable parameters are the adapter's, for good without dropout
        (collective)."""
        self.model = model
        self._deepspeed = deepspeed
        self._rank, self._world = rank, world_size
        self._stage = config.zero_stage
        self._parameters = {
            name: value for name, value in model.named_parameters() if value.requires_grad
        }
        optimizer = torch.optim.AdamW(
            list(self._parameters.values()),
            lr=config.lr,
            betas=config.adam_betas,
            weight_decay=config.weight_decay,
        )
        self._engine, *_ = deepspeed.initialize(
            model=_Inside(model),
            optimizer=optimizer,
            config=deepspeed_config(
                zero_stage=config.zero_stage,
                micro_batch=config.micro_batch,
                max_grad_norm=config.max_grad_norm,
                dtype=dtype,
                trained=sum(value.numel() for value in self._parameters.values()),
                world_size=world_size,
            ),
        )
        without_dropout(self._engine)
        self.device = torch.device(self._engine.device)

    def run(self, compute: Callable[[nn.Module], Tensor]) -> Tensor:
        """Return ``compute(model)`` (collective under ZeRO-3)."""
        return self._engine(compute)

    def step(self, losses: Sequence[Callable[[], Tensor]], lr: float) -> float:
        """Take one optimiser step on the sum of the losses over all ranks (collective).

        Each loss is made, differentiated and freed in turn; every rank must bring as many. Returns
        the gradient norm before clipping.
        """
        for group in torch_optimizer(self._engine).param_groups:
            group["lr"] = lr
        for index, loss in enumerate(losses):
            self._engine.set_gradient_accumulation_boundary(index == len(losses) - 1)
            # DeepSpeed averages gradients over the ranks; ours are parts of one sum.
            self._engine.backward(loss() * self._world)
        # Without ZeRO in float32 the engine keeps no norm, but the parameters keep their gradients.
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        plain = torch.nn.utils.get_total_norm(gradients) if self._stage == 0 else torch.tensor(0.0)
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return float(plain if norm is None else norm)

    def adapter(self) -> dict[str, Tensor]:
        """Copy the whole adapter to the CPU, by parameter name (collective under ZeRO-3)."""
        with self._gathered():
            return {
                name: value.detach().to("cpu", copy=True).contiguous()
                for name, value in self._parameters.items()
            }

    def save(self, path: Path, facts: Mapping[str, int]) -> None:
        """Write adapter, this rank's AdamW state and RNG, and the caller's ``facts`` (collective).

        Tensors are safetensors and the rest is JSON, so that ``restore`` unpickles nothing.
        """
        path.mkdir(parents=True, exist_ok=True)
        adapter = self.adapter()
        state = optimizer_tensors(torch_optimizer(self._engine), master_tensors(self._engine))
        state["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            state["rng.cuda"] = torch.cuda.get_rng_state()
        save_file({name: value.cpu() for name, value in state.items()}, self._rank_file(path))
        if self._rank == 0:
            save_file(adapter, path / _LORA)
            (path / _FACTS).write_text(json.dumps(self._layout() | dict(facts)), encoding="utf-8")
            readable(path / _LORA)
        readable(self._rank_file(path))

    def restore(self, path: Path) -> dict[str, int]:
        """Put back what ``save`` wrote and return its facts (collective).

        Raises:
            CheckpointError: files are missing, or made by other ranks, stage or model.
        """
        try:
            facts: dict[str, int] = json.loads((path / _FACTS).read_text(encoding="utf-8"))
            self._check_layout(path, facts)
            adapter = load_file(path / _LORA)
            state = load_file(self._rank_file(path))
        except (OSError, ValueError, SafetensorError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path}: cannot read the learner's state: {error}") from error
        with self._gathered(modify=True), torch.no_grad():
            shapes = {name: value.shape for name, value in self._parameters.items()}
            if shapes != {name: value.shape for name, value in adapter.items()}:
                raise CheckpointError(
                    f"{path}: its adapter does not fit this run's policy (model, lora or "
                    "train_projector); resume with the saved values"
                )
            for name, value in self._parameters.items():
                value.copy_(adapter[name])
        rng = {name: state.pop(name) for name in list(state) if name.startswith("rng.")}
        load_optimizer_tensors(torch_optimizer(self._engine), master_tensors(self._engine), state)
        torch.set_rng_state(rng["rng.cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(rng["rng.cuda"])
        return facts

    def _gathered(self, *, modify: bool = False) -> AbstractContextManager[None]:
        return self._deepspeed.zero.GatheredParameters(
            list(self._parameters.values()),
            modifier_rank=0 if modify else None,
            enabled=self._stage == 3,
        )

    def _layout(self) -> dict[str, int]:
        return {"ranks": self._world, "zero_stage": self._stage}

    def _check_layout(self, path: Path, facts: Mapping[str, int]) -> None:
        now = self._layout()
        saved = {key: facts.get(key) for key in now}
        if saved != now:
            keys = "cluster.learner.replicas={ranks} ppo.zero_stage={zero_stage}"
            raise CheckpointError(
                f"{path}: saved with {keys.format(**saved)}, this run has {keys.format(**now)}; "
                f"to resume, set {keys.format(**saved)}"
            )

    def _rank_file(self, path: Path) -> Path:
        return path / f"optimizer-rank{self._rank}.safetensors"
