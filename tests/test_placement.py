"""The placement plan: pure, printable, refused before anything pends."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from cluster.pipeline.dry_run import stage_roles
from cluster.placement import check_fits, held_roles, plan_roles, plan_table
from fgaif.config import Config, LoraConfig, load_config, with_overrides
from fgaif.errors import CheckpointError, ConfigError
from fgaif.lvlm.sizes import read_facts


@pytest.fixture
def config(tiny_llava_dir: Path) -> Config:
    name = str(tiny_llava_dir)
    return load_config(None, [f"policy.model={name}", f"feedback.verifier={name}"])


def test_every_role_of_the_method_has_its_actor(config: Config) -> None:
    names = [bundle.name for bundle in plan_roles(config)]
    assert names == [
        "rollout-0",
        "reward-object-0",
        "reward-attribute-0",
        "reward-relation-0",
        "reference-0",
        "learner-0",
        "judge-0",
        "trainer-0",
    ]


def test_replicas_multiply_bundles(config: Config) -> None:
    more = config.model_copy(
        update={"cluster": load_config(None, ["cluster.rollout.replicas=3"]).cluster}
    )
    assert sum(bundle.role == "rollout" for bundle in plan_roles(more)) == 3


def test_a_shared_scorer_is_one_actor_per_replica(config: Config) -> None:
    cluster = load_config(None, ["cluster.reward={shared: true, replicas: 2}"]).cluster
    bundles = plan_roles(config.model_copy(update={"cluster": cluster}), ["reward"])
    assert [bundle.name for bundle in bundles] == ["reward-0", "reward-1"]


def test_lora_parameters_are_r_times_rows_plus_columns(tiny_llava_dir: Path) -> None:
    size = read_facts(tiny_llava_dir)
    sides = sum(rows + columns for rows, columns in size.linears)
    assert size.lora_parameters(LoraConfig(r=3)) == 3 * sides
    assert len(size.linears) % 7 == 0  # q k v o gate up down per layer, no CLIP among them


def test_a_plan_that_fits_passes(config: Config) -> None:
    check_fits(plan_roles(config), {"CPU": 6.0, "GPU": 0.0})


def test_a_plan_without_room_names_resource_and_keys(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"needs 6 CPUs but the cluster has 2.*cluster\.learner"):
        check_fits(plan_roles(config), {"CPU": 2.0})


def test_stages_ask_for_room_for_their_own_actors_alone(config: Config) -> None:
    """A machine of two cores, too small for PPO, annotates; other checkpoints are not looked at."""
    given = config.model_copy(
        update={
            "data": config.data.model_copy(update={"responses": Path("given.jsonl")}),
            "policy": config.policy.model_copy(update={"model": "elsewhere"}),
        }
    )
    bundles = plan_roles(given, stage_roles(given, ["sample", "annotate"]))
    assert [bundle.name for bundle in bundles] == ["judge-0"]
    check_fits(bundles, {"CPU": 1.0})
    assert stage_roles(config, ["sample", "eval-after"]) == {"rollout", "reward"}


def test_workers_of_one_reward_model_must_fit_and_others_may_wait(config: Config) -> None:
    given = ["reward.parallel=3", "reward.workers=2", "reward.gpus_per_worker=1"]
    reward = load_config(None, given).reward
    bundles = plan_roles(config.model_copy(update={"reward": reward}), {"trainer"})
    assert [bundle.name for bundle in bundles] == [f"trainer-{i}" for i in range(6)]
    check_fits(bundles, {"CPU": 2.0, "GPU": 2.0}, workers=2)
    with pytest.raises(ConfigError, match=r"needs 2 GPUs but the cluster has 1: .*reward\.workers"):
        check_fits(bundles, {"CPU": 2.0, "GPU": 1.0}, workers=2)


def test_gpus_are_counted_across_roles(config: Config) -> None:
    cluster = load_config(None, ["cluster.reference.gpus=1", "cluster.learner.gpus=1"]).cluster
    bundles = plan_roles(config.model_copy(update={"cluster": cluster}))
    with pytest.raises(ConfigError, match="needs 2 GPUs but the cluster has 1"):
        check_fits(bundles, {"CPU": 64.0, "GPU": 1.0})


def test_the_table_names_every_actor(config: Config) -> None:
    console = Console(width=120, record=True, file=StringIO())
    console.print(plan_table(plan_roles(config)))
    text = console.export_text()
    for bundle in plan_roles(config):
        assert bundle.name in text


def test_a_directory_without_safetensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="pickled weights are not loaded"):
        read_facts(tmp_path)


def test_shared_roles_are_one_process_for_each_rank() -> None:
    """With their CPUs together, and the largest of their shares of a GPU."""
    config = load_config(
        None,
        [
            "cluster.layout=shared", "cluster.learner={replicas: 2, cpus: 1, gpus: 1}",
            "cluster.reference={cpus: 0.5, gpus: 0.5}", "cluster.reward={cpus: 0.25, gpus: 0.5}",
        ],
    )  # fmt: skip
    bundles = plan_roles(config)
    shared = [bundle for bundle in bundles if bundle.role == "shared"]
    assert [bundle.name for bundle in shared] == ["shared-0", "shared-1"]
    assert {(bundle.cpus, bundle.gpus) for bundle in shared} == {(1.75, 1.0)}
    assert shared[0].holds == ("learner", "reference", "reward")
    assert not {"learner", "reference", "reward"} & {bundle.role for bundle in bundles}
    assert {"learner", "reference", "reward"} <= held_roles(bundles)


def test_a_role_that_is_asked_for_alone_shares_with_nobody() -> None:
    """As for the evaluation, which scores and does not train."""
    config = load_config(None, ["cluster.layout=shared"])
    names = [bundle.name for bundle in plan_roles(config, ["rollout", "reward"])]
    assert names == ["rollout-0", *(f"reward-{kind}-0" for kind in config.kind_names)]
    pair = with_overrides(config, ["cluster.shared_roles=[learner, reference]"])
    held = [bundle.holds for bundle in plan_roles(pair) if bundle.role == "shared"]
    assert held == [("learner", "reference")]
    assert sum(bundle.role == "reward" for bundle in plan_roles(pair)) == 3
