"""Pure placement plan: roles to bundles with CPUs and GPUs, checked before any start."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from rich.table import Table

from fgaif.config import Config, RoleConfig
from fgaif.errors import ConfigError

Role = Literal["rollout", "judge", "trainer", "reward", "reference", "learner", "shared"]
"""``trainer`` is a Ray Train worker of the reward models, ``shared`` a process of several roles."""
ROLES: tuple[Role, ...] = get_args(Role)
PHASES: dict[str, tuple[Role, ...]] = {
    "feedback": ("rollout", "judge"),
    "reward training": ("rollout", "trainer"),
    "PPO": ("rollout", "reward", "learner", "reference", "shared"),
}
"""What runs at the same time, in the order in which it is started. Engines stay for the whole run;
so they are part of each phase."""
_KEYS: dict[Role, str] = {
    "trainer": "reward.workers, reward.*_per_worker",
    "shared": "cluster.learner, cluster.reference, cluster.reward",
}


def phases(config: Config) -> dict[str, tuple[Role, ...]]:
    """``PHASES``, in PPO with the judge instead of reward models where it gives the rewards."""
    if config.ppo.reward_source == "models":
        return PHASES
    training = tuple("judge" if role == "reward" else role for role in PHASES["PPO"])
    return PHASES | {"PPO": training}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """One actor, or one worker of reward training: what it asks of a node."""

    role: Role
    name: str
    cpus: float
    gpus: float
    holds: tuple[Role, ...] = ()
    """The roles of a shared process."""


def shared_roles(config: Config, roles: Collection[Role] = ROLES) -> tuple[Role, ...]:
    """Which of these roles live in one process (`cluster.layout`); none where it would be one."""
    cluster = config.cluster
    found = tuple(role for role in cluster.shared_roles if role in roles)
    return found if cluster.layout == "shared" and len(found) > 1 else ()


def plan_roles(config: Config, roles: Collection[Role] = ROLES) -> tuple[Bundle, ...]:
    """Plan the actors of these roles, one bundle each (the judge runs only while annotating and
    judging captions, and only where a verifier is a checkpoint). Workers of reward training are
    planned beside them; Ray Train starts them."""
    cluster, training = config.cluster, config.reward
    judges = cluster.judge.replicas if config.judge_checkpoints else 0
    several = training.parallel if training.form == "segment" else 1
    trainers = _names("trainer", several * training.workers)
    worker = RoleConfig(cpus=training.cpus_per_worker, gpus=training.gpus_per_worker)
    wanted: list[tuple[Role, RoleConfig, tuple[str, ...]]] = [
        ("rollout", cluster.rollout, _names("rollout", cluster.rollout.replicas)),
        *(
            ("reward", cluster.reward, _names(prefix, cluster.reward.replicas))
            for prefix in (
                ("reward",)
                if config.one_scorer
                else [f"reward-{kind}" for kind in config.kind_names]
            )
        ),
        ("reference", cluster.reference, _names("reference", cluster.reference.replicas)),
        ("learner", cluster.learner, _names("learner", cluster.learner.replicas)),
        ("judge", cluster.judge, _names("judge", judges)),
        ("trainer", worker, trainers),
    ]
    apart = tuple(
        Bundle(role=role, name=name, cpus=each.cpus, gpus=each.gpus)
        for role, each, names in wanted
        if role in roles
        for name in names
    )
    together = shared_roles(config, roles)
    parts = [getattr(cluster, role) for role in together]
    ranks = cluster.learner.replicas if "learner" in together else min(1, len(together))
    return tuple(bundle for bundle in apart if bundle.role not in together) + tuple(
        Bundle(
            role="shared",
            name=name,
            cpus=sum(part.cpus for part in parts),
            gpus=max(part.gpus for part in parts),
            holds=together,
        )
        for name in _names("shared", ranks)
    )


def held_roles(bundles: Sequence[Bundle]) -> set[Role]:
    """Roles of the actors, those of a shared process each for itself."""
    return {role for bundle in bundles for role in bundle.holds or (bundle.role,)}


def _names(prefix: str, replicas: int) -> tuple[str, ...]:
    return tuple(f"{prefix}-{index}" for index in range(replicas))


def check_fits(
    bundles: Sequence[Bundle],
    available: Mapping[str, float],
    *,
    workers: int = 1,
    phases: Mapping[str, Collection[Role]] = PHASES,
) -> None:
    """Refuse a plan that the cluster can never place, before anything pends.

    What runs at the same time (``phases``) must fit together. Of reward training the ``workers`` of
    one reward model: those of others wait until these are done.

    Raises:
        ConfigError: names the resource, what is needed and what there is.
    """
    for phase in phases.values():
        members = [bundle for bundle in bundles if bundle.role in phase]
        others = [bundle for bundle in members if bundle.role == "trainer"][workers:]
        members = [bundle for bundle in members if bundle not in others]
        roles = dict.fromkeys(bundle.role for bundle in members)
        for resource, need in (
            ("CPU", sum(bundle.cpus for bundle in members)),
            ("GPU", sum(bundle.gpus for bundle in members)),
        ):
            have = available.get(resource, 0.0)
            if need > have + 1e-6:
                keys = ", ".join(_KEYS.get(role, f"cluster.{role}") for role in roles)
                raise ConfigError(
                    f"{', '.join(roles)}: needs {need:g} {resource}s but the cluster has {have:g}: "
                    f"lower the {resource.lower()}s or replicas in {keys}, or add nodes"
                )


def plan_table(bundles: Sequence[Bundle], phases: Mapping[str, Collection[Role]] = PHASES) -> Table:
    """Render the plan: CPUs and GPUs of each actor."""
    table = Table(title="placement: one placement group per actor", title_justify="left")
    for column in ("actor", "CPUs", "GPUs"):
        table.add_column(column, justify="left" if column == "actor" else "right")
    for bundle in bundles:
        table.add_row(bundle.name, f"{bundle.cpus:g}", f"{bundle.gpus:g}")
    for phase, roles in phases.items():
        members = [bundle for bundle in bundles if bundle.role in roles]
        total = [sum(getattr(bundle, key) for bundle in members) for key in ("cpus", "gpus")]
        if members:
            table.add_section()
            table.add_row(f"at the same time: {phase}", f"{total[0]:g}", f"{total[1]:g}")
    return table
