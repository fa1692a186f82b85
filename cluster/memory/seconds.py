"""How long stages and PPO steps would take on GPUs: arithmetic on sizes, from a table of devices.

For a language model of N parameters of w bytes, L tokens of a sequence (image, prompt, response of
T), on a device of F operations and W bytes a second, of which a share ``USED`` is had:

    pass        2 N L / F                     forward, for each sequence
    training    4 N L / F                     forward, and backward through the frozen base
                6 N L / F                     with gradient checkpointing, which goes forward twice
    sampling    2 N (L - T) / F + T N w / (W S)   prompt; then the weights are read once for S
                                              sequences together (`cluster.engine.max_num_seqs`)

A PPO step of B responses, K reward models and E epochs samples B, scores them (K passes of reward
models, one of the reference, one of the value model, one of the learner), and trains B E in the
learner and in the value model. What lies on one GPU adds up, GPUs work at the same time. Every
response is taken to have all of `policy.max_new_tokens`; adapters, attention, the vision tower and
what passes between the actors are left out. So a figure is an order of magnitude: a stage that
takes three times as long has something wrong.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from cluster.memory.actors import PROMPT_TEXT, Models, read_models
from cluster.memory.devices import Devices
from cluster.memory.plan import MemoryPlan, Planned, plan_memory
from cluster.placement import Role, held_roles, plan_roles
from fgaif.config import Config
from fgaif.lvlm.sizes import ModelFacts

USED = 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A GPU as its data sheet has it: dense bfloat16 operations and bytes of memory a second."""

    name: str
    flops: float
    bandwidth: float


DEVICES = {
    24: Device(name="RTX 4090", flops=165e12, bandwidth=1.01e12),
    40: Device(name="A100", flops=312e12, bandwidth=1.56e12),
    48: Device(name="L40S", flops=362e12, bandwidth=0.86e12),
    80: Device(name="A100", flops=312e12, bandwidth=2.04e12),
    94: Device(name="H100 NVL", flops=835e12, bandwidth=3.9e12),
    141: Device(name="H200", flops=989e12, bandwidth=4.8e12),
}
"""By GB: of cards of one size the slower one."""


def device_of(size: int) -> Device | None:
    """The device of so many bytes; None where the table has none like it."""
    near = min(DEVICES, key=lambda gb: abs(gb * 10**9 - size))
    return DEVICES[near] if abs(near * 10**9 - size) < 0.12 * size else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Seconds of one sequence on a device, by what is done with it."""

    forward: float
    training: float
    sampling: float


def work(model: ModelFacts, config: Config, device: Device) -> Work:
    """By the formulas above."""
    policy = config.policy
    flops, bandwidth = device.flops * USED, device.bandwidth * USED
    prompt = model.image_tokens + PROMPT_TEXT
    length, width = prompt + policy.max_new_tokens, 2 if policy.dtype == "bfloat16" else 4
    again = 2 if policy.gradient_checkpointing else 0
    read = model.language * width / bandwidth / config.cluster.engine.max_num_seqs
    return Work(
        forward=2 * model.language * length / flops,
        training=(4 + again) * model.language * length / flops,
        sampling=2 * model.language * prompt / flops + policy.max_new_tokens * read,
    )


def estimate(config: Config, plan: MemoryPlan, models: Models) -> dict[str, float] | None:
    """Seconds of each part of a PPO step, and of the stages; None where devices are unknown.

    Annotation is not among them: its requests depend on what responses say.
    """
    gpus = plan.devices.gpus
    found = device_of(min(gpus)) if gpus else None
    if found is None or plan.unplaced:
        return None
    device = found
    policy, ppo, data = models[config.policy.model], config.ppo, config.data
    reward = models[config.reward_backbone]
    mine, theirs = work(policy, config, device), work(reward, config, device)
    kinds, batch = len(config.kinds), ppo.rollout_batch
    critic = 1 if ppo.has_critic else 0
    together = config.cluster.reward.shared or config.cluster.layout == "shared"
    one_kind = kinds if together else 1
    scoring: dict[Role, float] = {
        "reward": one_kind * theirs.forward,
        "reference": (1 + critic) * mine.forward,
        "learner": mine.forward,
    }
    updating: dict[Role, float] = {
        "reference": critic * ppo.epochs * mine.training,
        "learner": ppo.epochs * mine.training,
    }
    engines = config.cluster.rollout.replicas
    step = {
        "rollout": batch * mine.sampling / engines,
        "score": batch * _slowest(plan, config, lambda role: scoring.get(role, 0.0)),
        "update": batch * _slowest(plan, config, lambda role: updating.get(role, 0.0)),
    }
    seen = data.feedback_prompts * config.feedback.samples_per_prompt
    rounds = -(-kinds // config.reward.parallel) / config.reward.workers
    return {
        **{f"PPO step: {name}": value for name, value in step.items()},
        "PPO step": sum(step.values()),
        "sample": seen * mine.sampling / engines,
        "train-reward": seen * config.reward.epochs * theirs.training * rounds,
        "train": ppo.steps * sum(step.values()),
        "eval-before, eval-after": 4 * data.eval_prompts * mine.sampling / engines,
    }


def _slowest(plan: MemoryPlan, config: Config, seconds: Callable[[Role], float]) -> float:
    """Of the GPUs in PPO, the one with most to do for a sequence."""
    cluster, busy = config.cluster, [0.0]
    for load in plan.loads:
        if load.phase == "PPO" and load.gpu is not None:
            busy.append(sum(_seconds(actor, cluster.learner.replicas, cluster.reward.replicas,
                                     seconds) for actor in load.on_it))  # fmt: skip
    return max(busy)


def _seconds(actor: Planned, ranks: int, scorers: int, seconds: Callable[[Role], float]) -> float:
    """What an actor takes for a sequence that it shares with the others of its role."""
    shares: dict[Role, int] = {"learner": ranks, "reward": scorers}
    if actor.bundle.holds:  # as many scorers as ranks; the first also is the reference
        shares["reward"] = ranks
    first = actor.bundle.name.endswith("-0")
    return sum(
        seconds(role) / shares.get(role, 1)
        for role in actor.bundle.holds or (actor.bundle.role,)
        if role != "reference" or first
    )


def show_seconds(
    config: Config, roles: Collection[Role], devices: Devices, console: Console
) -> None:
    """Print the estimate where the roles are PPO's and the devices are in the table."""
    held = held_roles(plan_roles(config, roles))
    if not {"rollout", "learner"} <= held:
        return
    models = read_models(config, held | {"reward"})
    plan = plan_memory(config, roles, devices, models)
    if found := estimate(config, plan, models):
        console.print(estimate_table(found, config, plan))


def estimate_table(seconds: dict[str, float], config: Config, plan: MemoryPlan) -> Table:
    """Render an estimate, with the device that it is for."""
    assert plan.devices.gpus
    device = device_of(min(plan.devices.gpus))
    assert device is not None
    tokens = config.policy.max_new_tokens
    table = Table(
        title=f"time, an order of magnitude: {device.name}, {USED:.0%} of its peak, responses of "
        f"{tokens} tokens; annotation is not counted",
        title_justify="left",
    )
    table.add_column("")
    table.add_column("time", justify="right")
    for name, value in seconds.items():
        table.add_row(name, _time(value))
    return table


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
