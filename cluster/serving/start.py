"""``fgaif serve``: start the service, show its plan, stop it without dropping a request."""

import errno
import ipaddress
import logging
import os
import signal
import socket
import threading
from collections.abc import Mapping
from typing import Any

import yaml
from ray import serve
from rich.console import Console
from rich.table import Table

from cluster.serving.deployments import (
    API,
    APP,
    ServeArgs,
    deploy,
    deployment_options,
    scorer_kinds,
)
from cluster.serving.request_heads import CALLBACK
from fgaif.config import Config
from fgaif.errors import ActorError, ConfigError
from fgaif.lvlm.model import resolve_checkpoint, split_model
from fgaif.lvlm.sizes import read_facts
from fgaif.reward.checkpoint import checked_cards, common_min_words, read_cards, rewards_version
from fgaif.serving.access import read_serve_key
from fgaif.serving.shape import served_shape, shape_note

_GIB = 2**30


def run_service(config: Config, args: ServeArgs, host: str, port: int, out: Console) -> None:
    """Serve until SIGINT or SIGTERM, then drain.

    Raises:
        ConfigError: no key where one is needed.
        CheckpointError: the folder holds no complete set of reward models.
        ActorError: a deployment did not start.
    """
    import ray

    from cluster.launch import connect

    version = check_models(config, args)
    out.print(_shape_note(config, args), markup=False, soft_wrap=True)
    chosen = {"anonymous": may_be_open(config, host), "rewards": args.rewards.resolve()}
    args = args.model_copy(update=chosen)
    if not joined_cluster(config):
        require_free_port(host, port)
    os.environ.update(CALLBACK)  # for the proxies, where Ray is started here
    connect(config)
    try:
        _start(config, args, host, port)
        shown = f"[{host}]" if ":" in host else host
        key = "without a key" if args.anonymous else f"with the key of {config.serve.key_env}"
        out.print(
            f"serving version {version} at http://{shown}:{port}, {key}; Ctrl-C stops",
            soft_wrap=True,
        )
        _wait_for_signal()
        out.print("stopping: requests in work are finished first")
        left = serve.get_deployment_handle(API, APP).broadcast("drain").results()
        if any(left):
            out.print(f"{sum(left)} requests were not done within {config.serve.drain_s:g} s")
        serve.delete(APP)
    finally:
        ray.shutdown()


def check_models(config: Config, args: ServeArgs) -> str:
    """Version of the folder's reward models, which fit the backbone and each other.

    Raises:
        CheckpointError: they do not, or are not complete.
    """
    backbone = resolve_checkpoint(config.reward_backbone)
    cards = list(checked_cards(args.rewards, backbone, config.kind_names).values())
    common_min_words(cards)
    served_shape(cards, config)
    return rewards_version(args.rewards, config.kind_names)


def may_be_open(config: Config, host: str) -> bool:
    """Whether the service needs no key: none is set, and only this machine reaches it.

    Raises:
        ConfigError: others could reach it and no key is set.
    """
    if read_serve_key(config.serve) is not None:
        return False
    joined = joined_cluster(config)
    if is_loopback(host) and not joined:
        return True
    where = f"the Ray cluster {joined}" if joined else f"--host {host}"
    raise ConfigError(
        f"{where}: others could reach the service, which has no key; set {config.serve.key_env} "
        "(openssl rand -hex 32) or serve.key_file, or serve on 127.0.0.1"
    )


def joined_cluster(config: Config) -> str | None:
    """The address of the Ray cluster that the service joins; None where it starts its own Ray."""
    return config.cluster.address or os.environ.get("RAY_ADDRESS")


def require_free_port(host: str, port: int) -> None:
    """Refuse a port on which something listens: Serve would share it, and each get some requests.

    Raises:
        ConfigError: it is in use, or nothing can listen there.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address, family=family).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"--port {port}: something listens on {host}:{port} already, perhaps another "
                "`fgaif serve`; stop it, or give another --port"
            ) from error
        raise ConfigError(
            f"--host {host} --port {port}: nothing can listen there ({error.strerror or error}); "
            "give an address of this machine and a port above 1023"
        ) from error


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def print_service(config: Config, args: ServeArgs, host: str, port: int, out: Console) -> None:
    """Print deployments with replicas, resources and memory, then the Serve config file."""
    options = deployment_options(config, args)
    table = Table(title=f"service of {args.rewards}, version {check_models(config, args)}")
    for column in ("deployment", "replicas", "CPUs", "GPUs", "weights, GiB", "kinds"):
        table.add_column(column)
    kinds = scorer_kinds(config)
    for name, chosen in options.items():
        actor = chosen["ray_actor_options"]
        weights = _weights_gib(config, args, name)
        table.add_row(
            name,
            _replicas(chosen),
            f"{actor['num_cpus']:g}",
            f"{actor.get('num_gpus', 0):g}",
            f"{weights:.2f}" if weights else "",
            ", ".join(kinds.get(name, ())),
        )
    out.print(table)
    out.print(_shape_note(config, args), markup=False, soft_wrap=True)
    out.print("A reload loads a second copy of the weights beside the first, for a while.")
    out.print(serve_yaml(args, host, port), highlight=False, markup=False, soft_wrap=True)


def serve_yaml(args: ServeArgs, host: str, port: int) -> str:
    """The Serve config file that ``serve deploy`` takes for the same service."""
    given = args.model_dump(mode="json", exclude_defaults=True)
    given["rewards"] = str(args.rewards.resolve())
    if args.config is not None:
        given["config"] = str(args.config.resolve())
    tree = {
        "http_options": {"host": host, "port": port},
        "applications": [
            {
                "name": APP,
                "route_prefix": "/",
                "import_path": "cluster.serving.deployments:app",
                "args": given,
            }
        ],
    }
    return yaml.safe_dump(tree, sort_keys=False)


def _start(config: Config, args: ServeArgs, host: str, port: int) -> None:
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options={"host": host, "port": port})
    try:
        serve.run(deploy(config, args), name=APP, route_prefix="/")
    except RuntimeError as error:
        state = serve.status().applications.get(APP)
        raise ActorError(f"the service did not start: {_reason(state) or error}") from error


def _reason(state: Any) -> str:
    """Last line of the first deployment's message that tells of a failure."""
    deployments: Mapping[str, Any] = state.deployments if state else {}
    for name, status in deployments.items():
        lines = [line for line in status.message.splitlines() if line.strip()]
        if lines and status.status != "HEALTHY":
            return f"{name}: {lines[-1].strip()}"
    return ""


def _wait_for_signal() -> None:
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    while not stop.wait(1.0):
        pass


def _shape_note(config: Config, args: ServeArgs) -> str:
    return shape_note(list(read_cards(args.rewards, config.kind_names).values()), config)


def _replicas(options: Mapping[str, Any]) -> str:
    scaled = options.get("autoscaling_config")
    if scaled is None:
        return str(options.get("num_replicas", 1))
    return f"{scaled['min_replicas']} to {scaled['max_replicas']}"


def _weights_gib(config: Config, args: ServeArgs, name: str) -> float:
    width = 2 if config.policy.dtype == "bfloat16" else 4
    if name == API:
        return 0.0
    if name == "generator":
        return read_facts(split_model(str(args.policy), "--policy")[0]).parameters * width / _GIB
    size = read_facts(resolve_checkpoint(config.reward_backbone))
    adapters = len(config.kinds) if config.serve.placement == "shared" else 0
    lora = adapters * size.lora_parameters(config.reward.lora)
    return (size.parameters + lora) * width / _GIB
