"""`fgaif serve` before anything starts: the plan, the Serve config file, and who may be let in."""

import socket
from pathlib import Path

import pytest
import reward_samples
import serving_samples
import yaml
from rich.console import Console

from cluster.serving.deployments import ServeArgs, deployment_options
from cluster.serving.start import (
    check_models,
    may_be_open,
    print_service,
    require_free_port,
    serve_yaml,
)
from fgaif.config import load_config, with_overrides
from fgaif.errors import CheckpointError, ConfigError

SERVE = Path(__file__).parents[1] / "configs" / "serve"


def test_replicas_resources_and_queues_come_from_the_configuration() -> None:
    args = ServeArgs(rewards=Path("r"))
    options = deployment_options(load_config(None, ["serve.batch.size=40"]), args)
    assert set(options) == {"scorer", "api"}
    assert options["scorer"]["num_replicas"] == 1
    assert options["scorer"]["max_ongoing_requests"] == 80
    scaled = load_config(
        None, ["serve.placement=separate", "serve.replicas={min: 1, max: 3, gpus: 0.5}"]
    )
    options = deployment_options(scaled, args)
    assert set(options) == {"scorer-object", "scorer-attribute", "scorer-relation", "api"}
    assert options["scorer-object"]["autoscaling_config"]["max_replicas"] == 3
    assert options["scorer-object"]["ray_actor_options"]["num_gpus"] == 0.5
    own = load_config(None, ["cluster.reward.gpus=0.2"])
    assert deployment_options(own, args)["scorer"]["ray_actor_options"]["num_gpus"] == 0.2
    none = load_config(None, ["cluster.reward.gpus=0.2", "serve.replicas.gpus=0"])
    assert deployment_options(none, args)["scorer"]["ray_actor_options"]["num_gpus"] == 0
    with pytest.raises(ConfigError, match=r"serve\.replicas\.min = 3"):
        load_config(None, ["serve.replicas={min: 3, max: 2}"])


def test_dry_run_prints_a_plan_and_a_file_for_serve_deploy(
    tiny_llava_dir: Path, tmp_path: Path
) -> None:
    rewards = serving_samples.write_rewards(tiny_llava_dir, tmp_path / "rewards")
    args = ServeArgs(rewards=rewards, set=("serve.queue=9",))
    out = Console(record=True, width=200)
    config = with_overrides(reward_samples.settings(tiny_llava_dir), args.set)
    print_service(config, args, "127.0.0.1", 8123, out)
    printed = out.export_text()
    assert "scorer" in printed
    tree = yaml.safe_load(printed[printed.index("http_options:") :])
    assert tree == yaml.safe_load(serve_yaml(args, "127.0.0.1", 8123))
    (application,) = tree["applications"]
    assert application["import_path"] == "cluster.serving.deployments:app"
    assert ServeArgs.model_validate(application["args"]) == args


def test_a_folder_without_reward_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="train-reward"):
        print_service(load_config(None), ServeArgs(rewards=tmp_path), "127.0.0.1", 8000, Console())


def test_reward_models_of_another_backbone_are_refused_before_the_start(
    tiny_llava_dir: Path, tmp_path: Path
) -> None:
    args = ServeArgs(rewards=serving_samples.write_rewards(tiny_llava_dir, tmp_path))
    with pytest.raises(CheckpointError, match=r"set reward\.backbone"):
        check_models(load_config(None), args)


def test_only_loopback_needs_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FGAIF_SERVE_KEY", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = load_config(None)
    assert may_be_open(config, "127.0.0.1")
    assert may_be_open(config, "::1")
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        with pytest.raises(ConfigError, match="FGAIF_SERVE_KEY"):
            may_be_open(config, host)
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # where another host may have been chosen
    with pytest.raises(ConfigError, match="FGAIF_SERVE_KEY"):
        may_be_open(config, "127.0.0.1")
    monkeypatch.setenv("FGAIF_SERVE_KEY", "a-key-of-the-tests-0123456789")
    assert not may_be_open(config, "0.0.0.0")


@pytest.mark.parametrize("name", ["serve.yaml", "rayservice.yaml"])
def test_shipped_serve_files_name_what_exists(name: str) -> None:
    tree = yaml.safe_load((SERVE / name).read_text())
    if "spec" in tree:
        assert (tree["apiVersion"], tree["kind"]) == ("ray.io/v1", "RayService")
        tree = yaml.safe_load(tree["spec"]["serveConfigV2"])
    from ray.serve.schema import ServeDeploySchema

    (application,) = ServeDeploySchema.model_validate(tree).applications
    assert application.import_path == "cluster.serving.deployments:app"
    args = ServeArgs.model_validate(application.args)
    load_config(None, args.set)


def test_a_port_in_use_is_refused_and_another_one_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}: something listens.*another --port"):
            require_free_port("127.0.0.1", port)
    require_free_port("127.0.0.1", port)
    require_free_port("localhost", port)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--host 203\.0\.113\.7 .*nothing can listen there"):
        require_free_port("203.0.113.7", 8000)
