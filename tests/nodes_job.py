"""A PPO run as a Ray job: the real driver, groups and placement over the light actors.

    python nodes_job.py fgaif.yaml

writes what ``fgaif train`` writes, under the configuration's run folder.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import light_actors

from cluster.driver import PpoData, PpoDriver
from cluster.launch import Cluster
from cluster.pipeline.keys import stage_values
from cluster.pipeline.stage_status import check_resumable
from cluster.placement import Role
from cluster.roles import Roles
from fgaif.config import Config, load_config
from fgaif.tracking import Tracker
from fgaif.types import ImageRef, Prompt, StepReport

ROLES: tuple[Role, ...] = ("rollout", "reward", "reference", "learner")


def make_prompts(count: int) -> list[Prompt]:
    """Prompts about images that nobody opens."""
    image = ImageRef(path="none.png", sha256="0" * 64)
    return [Prompt(id=f"p{index}", image=image, text="Describe.") for index in range(count)]


def stand_in() -> None:
    """Put the light actors in the place of those that ``Cluster`` imports when it starts a role."""
    for module, name, stand_in in (
        ("actors.rollout", "RolloutActor", light_actors.LightRollout),
        ("actors.reward", "RewardActor", light_actors.LightReward),
        ("actors.reference", "ReferenceActor", light_actors.LightReference),
        ("actors.learner", "LearnerActor", light_actors.LightLearner),
        ("actors.shared", "SharedActor", light_actors.LightShared),
    ):
        sys.modules[module] = ModuleType(module)
        setattr(sys.modules[module], name, stand_in)


def roles_on(cluster: Cluster, config: Config) -> Roles:
    """All roles of a run, started on the cluster."""
    rewards = config.run_dir / "rewards"
    return Roles(
        rollouts=cluster.rollouts(),
        learner=cluster.learner(),
        reference=cluster.reference(rewards),
        rewards=cluster.rewards(rewards),
    )


def train(
    config: Config, roles: Roles, tell: Callable[[StepReport], None] = lambda report: None
) -> None:
    """Run PPO over prompts without images, as ``fgaif train`` does over real ones."""
    data = PpoData(
        prompts=make_prompts(1000),
        anchors=[],
        digest="light",
        settings=stage_values(config, "train"),
        check_resumable=partial(check_resumable, config),
    )
    driver = PpoDriver(config, roles, data, light_actors.segments, lambda *_: ())
    with Tracker(config.run_dir / "policy", config.tracking, name=config.name) as tracker:
        for report in driver.run():
            tracker.log(report)
            tell(report)
    roles.learner.save_adapter(config.run_dir / "policy" / "adapter").result()


def main(path: Path) -> None:
    """Train on the cluster that this process belongs to."""
    stand_in()
    config = load_config(path)
    with Cluster(config, ROLES, live=True) as cluster:
        assert cluster.live is not None
        train(config, roles_on(cluster, config), cluster.live.step)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
