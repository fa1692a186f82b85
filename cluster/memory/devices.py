"""Devices whose memory a plan is compared with: of a Ray cluster, of this machine, or assumed."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

import psutil

from fgaif.config import Config
from fgaif.errors import ConfigError, first_line

_GIB = 2**30
_GB = 10**9
_QUERY = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
_ASSUMED = re.compile(r"(\d+)x(\d+(?:\.\d+)?)(GB|GiB)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """Bytes of each GPU, and of the host of a machine; ``gpus`` None and ``host`` None: unknown.

    ``found`` says in a few words where the figures are from, or why they are not known.
    """

    gpus: tuple[int, ...] | None
    host: int | None
    found: str


def parse_assumed(text: str) -> Devices:
    """Read ``4x80``: four GPUs of 80 GB. A comma adds others: ``2x80,1x24``.

    GB are 10^9 bytes, so 80 is 74.5 GiB: what every card sold as one of 80 GB has at least (A100
    and H100 report about 79 GiB; cards with ECC in ordinary memory, such as the L40S of 48 GB, not
    much more than this). ``4x79.1GiB`` gives an exact figure.

    Raises:
        ConfigError: not of that form.
    """
    gpus: list[int] = []
    for part in text.replace(" ", "").split(","):
        match = _ASSUMED.fullmatch(part)
        if match is None or int(match[1]) == 0 or float(match[2]) == 0:
            raise ConfigError(
                f"--assume {text}: expected COUNTxGB, such as 4x80 (four GPUs of 80 GB), 1x24, or "
                "4x79.1GiB"
            )
        unit = _GIB if match[3] == "GiB" else _GB
        gpus += [int(float(match[2]) * unit)] * int(match[1])
    return Devices(gpus=tuple(gpus), host=None, found=f"assumed: {text}")


def devices_of(config: Config, assumed: str | None) -> Devices:
    """Devices that a run of this configuration would find; nothing is started.

    Those ``assumed``, else those of the Ray cluster that it would join, else this machine's.

    Raises:
        ConfigError: ``assumed`` has another form.
    """
    if assumed is not None:
        return parse_assumed(assumed)
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    if not address or address == "local":
        return local_devices()
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        first = first_line(error)
        return Devices(gpus=None, host=None, found=f"Ray at {address} does not answer: {first}")
    try:
        return cluster_devices()
    finally:
        ray.shutdown()


def local_devices() -> Devices:
    """GPUs of this machine that CUDA_VISIBLE_DEVICES leaves visible, and its memory."""
    gpus, visible = list_memory(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        chosen = [part.strip() for part in visible.split(",") if part.strip()]
        if all(part.isdigit() and int(part) < len(gpus) for part in chosen):
            gpus = tuple(gpus[int(part)] for part in chosen)
    return Devices(gpus=gpus, host=psutil.virtual_memory().total, found="this machine")


def list_memory() -> tuple[int, ...]:
    """Bytes of each GPU that the driver lists here; none without a driver."""
    if shutil.which(_QUERY[0]) is None:
        return ()
    answer = subprocess.run(_QUERY, capture_output=True, text=True, timeout=30, check=False)
    lines = answer.stdout.split() if answer.returncode == 0 else []
    return tuple(int(line) * 2**20 for line in lines if line.isdigit())


def cluster_devices() -> Devices:
    """GPUs of all nodes of the Ray cluster that this process has joined.

    Each node's driver is asked by a task there. GPUs that Ray counts but no driver lists are
    unknown. The host's memory is known only where all nodes are one machine.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    counted = int(sum(node["Resources"].get("GPU", 0) for node in nodes))
    hosts = {node["NodeManagerHostname"] for node in nodes}
    host = psutil.virtual_memory().total if len(hosts) == 1 else None
    asked = [
        ray.remote(list_memory)
        .options(
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        )
        .remote()
        for node in nodes
        if node["Resources"].get("GPU", 0)
    ]
    gpus = tuple(size for sizes in ray.get(asked, timeout=120) for size in sizes)
    if len(gpus) > counted and len(set(gpus)) == 1:  # some are hidden from Ray
        gpus = gpus[:counted]
    if len(gpus) != counted:
        why = f"Ray counts {counted} GPUs, the NVIDIA driver lists {len(gpus)}"
        return Devices(gpus=None, host=host, found=why)
    return Devices(gpus=gpus, host=host, found=f"{len(nodes)} Ray node(s)")
