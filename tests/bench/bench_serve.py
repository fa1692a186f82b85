"""The scoring service under load: throughput, latency, memory, and a replica that is killed.

    python tests/bench/bench_serve.py [--seconds 6] [--rounds 1] [--clients 1 8 32] [--json FILE]

Starts ``fgaif serve`` on loopback with reward models that were never trained (their speed and
memory are those of trained ones), on three backbones: ``tiny``, the 50k parameters of the tests,
``scenes``, the 0.9M of the embedded world's policy, and random 67M for the memory of weights.
Closed loop: a client sends its next request when it has the answer to the one before; one text of
about 40 tokens and one image per request, 64 of each, so that after the warm-up image features come
from the cache. Clients, HTTP proxy, ingress and models share the machine; each one's CPU time per
request is in the JSON. Every answer is compared with the one that a lone client got.

    batching      serve.batch.size 16 against 1, in turn, on one backbone for all kinds
    placement     shared backbone against one deployment per kind
    weights       the same for the larger backbone, with the memory of the replicas
    kill          two replicas, one killed (SIGKILL) under load; clients retry

Memory is the unique set (USS) of the processes that hold models. Prints a table and a JSON object.
"""

import argparse
import asyncio
import base64
import io
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny

from actors.deepspeed_setup import free_port
from fgaif.client import AsyncRewardClient, ScoringError
from fgaif.config import LoraConfig
from fgaif.data.scenes.captions import write_caption
from fgaif.data.scenes.draw import draw_scene
from fgaif.data.scenes.files import scene_images
from fgaif.lvlm.model import load_lvlm, resolve_checkpoint
from fgaif.reward.checkpoint import RewardCard, checkpoint_digest, save_reward_model
from fgaif.reward.model import new_reward_model, trainable_state
from fgaif.types import DEFAULT_KINDS

ROOT = Path(__file__).parents[2]
MIB = 2**20
SAMPLES = 64
TOLERANCE = 1e-4
ROLES = {
    "ray::ProxyActor": "proxy",
    "ray::ServeReplica:fgaif:api": "ingress",
    "ray::ServeReplica:fgaif:scorer": "scorers",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One way to run the service; ``backbone`` is a key of the reward models that were made."""

    name: str
    backbone: str = "scenes"
    placement: str = "shared"
    batch: int = 16
    replicas: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What ``clients`` clients measured; latencies in milliseconds."""

    setting: str
    clients: int
    requests: int
    per_second: float
    p50: float
    p95: float
    p99: float
    slowest: float
    failed: int
    wrong: int
    cpu_ms: dict[str, float]
    """CPU milliseconds per request of the clients and of the service's processes, by role."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A request: a drawn scene as a data URI, and a caption of it."""

    image: str
    text: str


def main() -> None:
    """Make the models, run all settings and print what they did."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=1, help="batching on and off, in turn")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--only", nargs="+", choices=("batching", "placement", "weights", "kill"))
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    chosen = arguments.only or ["batching", "placement", "weights", "kill"]
    with TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments.seconds, arguments.clients, arguments.json)
        if "batching" in chosen:
            for _ in range(arguments.rounds):
                bench.measure(Setting(name="tiny, batch 16", backbone="tiny"))
                bench.measure(Setting(name="tiny, batch 1", backbone="tiny", batch=1))
                bench.measure(Setting(name="scenes, batch 16"))
                bench.measure(Setting(name="scenes, batch 1", batch=1))
        if "kill" in chosen:
            bench.kill(Setting(name="kill", replicas=2))
        if "placement" in chosen:
            bench.measure(Setting(name="scenes, separate", placement="separate"))
        if "weights" in chosen:
            bench.measure(Setting(name="67M shared", backbone="wide"))
            bench.measure(Setting(name="67M separate", backbone="wide", placement="separate"))
        bench.show()
    print(json.dumps(bench.report(), indent=1))


class Bench:
    """The measurements of one run; all files are in ``folder``."""

    def __init__(
        self, folder: Path, seconds: float, clients: Sequence[int], json_file: Path | None
    ) -> None:
        self._folder = folder
        self._json_file = json_file
        self._seconds = seconds
        self._clients = clients
        self._samples = samples()
        self._loads: list[Load] = []
        self._memory: dict[str, dict[str, float]] = {}
        self._start_s: dict[str, float] = {}
        self._kill: dict[str, float] = {}

    def measure(self, setting: Setting) -> None:
        """Run the service and all numbers of clients against it."""
        with self._running(setting) as (process, url):
            expected = asyncio.run(answers(url, self._samples))
            for clients in self._clients:
                load = asyncio.run(
                    drive(
                        url, self._samples, expected, clients, self._seconds, setting.name, process
                    )
                )
                self._loads.append(load)
                print(load, file=sys.stderr)
            self._memory[setting.name] = memory(process)
        self._save()

    def kill(self, setting: Setting, clients: int = 8) -> None:
        """Kill one of the replicas in the middle of a load, and count what the clients saw."""
        with self._running(setting) as (process, url):
            expected = asyncio.run(answers(url, self._samples))
            before = scorers(process)
            seconds = max(20.0, self._seconds)

            async def run() -> Load:
                loop = asyncio.get_running_loop()
                loop.call_later(seconds / 4, os.kill, before[0].pid, signal.SIGKILL)
                return await drive(
                    url, self._samples, expected, clients, seconds, setting.name, warm_s=0.0
                )

            load = asyncio.run(run())
            self._loads.append(load)
            self._kill = {
                "replicas": len(before),
                "killed": 1,
                "requests": load.requests,
                "failed": load.failed,
                "wrong": load.wrong,
                "replicas_new": len({p.pid for p in scorers(process)} - {p.pid for p in before}),
                "slowest_ms": load.slowest,
            }
        self._save()

    def show(self) -> None:
        """Print the table to standard error."""
        table = Table(title="Scoring service")
        for name in ("setting", "clients", "req/s", "p50 ms", "p95 ms", "p99 ms", "failed"):
            table.add_column(name, justify="left" if name == "setting" else "right")
        for load in self._loads:
            milliseconds = (f"{value:.0f}" for value in (load.p50, load.p95, load.p99))
            rate, failed = f"{load.per_second:.1f}", str(load.failed + load.wrong)
            table.add_row(load.setting, str(load.clients), rate, *milliseconds, failed)
        Console(stderr=True, width=100).print(table)

    def _save(self) -> None:
        if self._json_file is not None:
            text = json.dumps(self.report(), indent=1) + "\n"
            self._json_file.write_text(text, encoding="utf-8")

    def report(self) -> dict[str, object]:
        """Everything so far, for JSON."""
        return {
            "machine": f"{processor()}, {os.cpu_count()} cores",
            "commit": commit(),
            "loads": [asdict(load) for load in self._loads],
            "gain_of_batching": self._gain(),
            "memory_mib": self._memory,
            "start_s": self._start_s,
            "kill": self._kill,
        }

    def _gain(self) -> dict[str, dict[int, float]]:
        """Throughput with batching over that without, by backbone and clients; means of rounds."""
        rates: dict[tuple[str, int], list[float]] = {}
        for load in self._loads:
            rates.setdefault((load.setting, load.clients), []).append(load.per_second)
        means = {key: statistics.mean(values) for key, values in rates.items()}
        return {
            name: {
                clients: round(
                    means[f"{name}, batch 16", clients] / means[f"{name}, batch 1", clients], 2
                )
                for clients in self._clients
            }
            for name in ("tiny", "scenes")
            if f"{name}, batch 1" in {setting for setting, _ in rates}
        }

    @contextmanager
    def _running(self, setting: Setting) -> Iterator[tuple[psutil.Process, str]]:
        """``fgaif serve`` in a process of its own, until it is healthy and after that."""
        rewards, backbone = self._models(setting.backbone)
        port, log = free_port(), self._folder / "serve.log"
        command = [sys.executable, "-m", "fgaif", "serve", "--rewards", str(rewards)]
        command += ["--config", str(ROOT / "configs" / "scenes.yaml"), "--port", str(port)]
        command += [f"policy.model={backbone}", f"serve.placement={setting.placement}"]
        command += [f"serve.batch.size={setting.batch}", "serve.replicas.cpus=0.2"]
        command += [f"serve.replicas.{bound}={setting.replicas}" for bound in ("max", "min")]
        command += ["serve.ingress_cpus=0.1"]
        url, start = f"http://127.0.0.1:{port}", time.perf_counter()
        # Ray's workers give way to all others by default, here to the clients as well.
        environment = os.environ | {"RAY_worker_niceness": "0"}
        with log.open("w") as file:
            process = subprocess.Popen(
                command,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            asyncio.run(healthy(url, process, log))
            self._start_s[setting.name] = round(time.perf_counter() - start, 1)
            yield psutil.Process(process.pid), url
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)

    def _models(self, backbone: str) -> tuple[Path, str]:
        """Reward models on a backbone, made at first use, and the backbone's name."""
        name, min_words = "scenes:policy", 4
        if backbone != "scenes":
            name = str(self._folder / backbone)
            if not Path(name).exists():
                (build_wide if backbone == "wide" else tiny.build_tiny_llava)(Path(name))
        rewards = self._folder / f"rewards-{backbone}"
        if not rewards.exists():
            make_rewards(rewards, resolve_checkpoint(name), min_words)
        return rewards, name


def samples() -> list[Sample]:
    """Drawn scenes with captions, always the same."""
    found, rng = [], random.Random(0)
    for _, scene in scene_images("test", 0, SAMPLES):
        buffer = io.BytesIO()
        draw_scene(scene).save(buffer, "PNG")
        content = base64.b64encode(buffer.getvalue()).decode("ascii")
        found.append(
            Sample(image=f"data:image/png;base64,{content}", text=write_caption(scene, rng))
        )
    return found


def make_rewards(directory: Path, backbone: Path, min_words: int) -> None:
    """Write reward models of all kinds with random adapters and heads."""
    for index, kind in enumerate(DEFAULT_KINDS):
        model = new_reward_model(
            load_lvlm(backbone, dtype="float32"), LoraConfig(r=16, alpha=32), "mlp", index
        )
        generator = torch.Generator().manual_seed(index)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # else zero, and all kinds alike
                parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        card = RewardCard(
            kind=kind,
            head="mlp",
            backbone=str(backbone),
            backbone_digest=checkpoint_digest(backbone),
            tokenizer_digest="",
            min_words=min_words,
            input_digest="",
            metrics={},
        )
        save_reward_model(directory / kind, model, trainable_state(model), card)


def build_wide(directory: Path) -> Path:
    """Write a random LLaVA whose weights (67M parameters) outweigh a process without them."""
    tokenizer = tiny.byte_level_tokenizer()
    config = tiny._config(tokenizer, len(tokenizer), width=1536, image_size=56, max_length=1024)
    return tiny._save(directory, config, tokenizer, 0)


async def healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the service has scored its probe."""
    async with AsyncRewardClient(url, attempts=1, timeout_s=10) as client:
        for _ in range(600):
            if process.poll() is not None:
                raise SystemExit(f"fgaif serve ended: {log.read_text()[-3000:]}")
            try:
                await client.models()
                return
            except ScoringError:
                await asyncio.sleep(0.3)
    raise SystemExit(f"fgaif serve does not answer: {log.read_text()[-3000:]}")


async def answers(url: str, samples: Sequence[Sample]) -> list[float]:
    """The total of each sample, asked one after the other."""
    async with AsyncRewardClient(url) as client:
        return [(await client.score(s.image, s.text)).results[0].total for s in samples]


async def drive(
    url: str,
    samples: Sequence[Sample],
    expected: Sequence[float],
    clients: int,
    seconds: float,
    name: str,
    process: psutil.Process | None = None,
    warm_s: float = 1.5,
) -> Load:
    """Let clients ask for ``seconds`` after the warm-up; requests are all that ended in them.

    CPU time is taken where the service's ``process`` is given.
    """
    start = time.perf_counter() + warm_s
    taken: list[float] = []
    seen: Counter[str] = Counter()

    async def one(client: AsyncRewardClient, rng: random.Random) -> None:
        while (asked := time.perf_counter()) < start + seconds:
            index = rng.randrange(len(samples))
            try:
                answer = await client.score(samples[index].image, samples[index].text)
                right = abs(answer.results[0].total - expected[index]) < TOLERANCE
                seen["right" if right else "wrong"] += 1
            except ScoringError as error:
                seen["failed"] += 1
                print(error, file=sys.stderr)
            if start <= (now := time.perf_counter()) < start + seconds:
                taken.append(1e3 * (now - asked))

    async def watch() -> dict[str, float]:
        used: defaultdict[str, float] = defaultdict(float)
        if process is not None:
            await asyncio.sleep(warm_s)
            before = cpu_seconds(process)
            await asyncio.sleep(start + seconds - time.perf_counter())
            for pid, (role, spent) in cpu_seconds(process).items():
                used[role] += spent - before.get(pid, ("", 0.0))[1]
        return used

    async with AsyncRewardClient(url, attempts=12) as client:
        watching = asyncio.create_task(watch())
        await asyncio.gather(*(one(client, random.Random(seed)) for seed in range(clients)))
        used = await watching
    p50, p95, p99 = np.percentile(taken, [50, 95, 99]).round(1).tolist()
    return Load(
        setting=name,
        clients=clients,
        requests=len(taken),
        per_second=round(len(taken) / seconds, 1),
        p50=p50,
        p95=p95,
        p99=p99,
        slowest=round(max(taken), 1),
        failed=seen["failed"],
        wrong=seen["wrong"],
        cpu_ms={role: round(1e3 * spent / len(taken), 1) for role, spent in used.items()},
    )


def cpu_seconds(process: psutil.Process) -> dict[int, tuple[str, float]]:
    """Role and CPU time so far by process: this one, which holds the clients, and the service's."""
    found = {os.getpid(): ("clients", time.process_time())}
    for child in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):  # idle workers come and go
            title, times = " ".join(child.cmdline()), child.cpu_times()
            named = (role for start, role in ROLES.items() if title.startswith(start))
            found[child.pid] = (next(named, "rest"), times.user + times.system)
    return found


def scorers(process: psutil.Process) -> list[psutil.Process]:
    """The processes that hold models, among those that the service started."""
    found = []
    for child in process.children(recursive=True):
        title = " ".join(child.cmdline())
        if title.startswith("ray::ServeReplica") and ":scorer" in title:
            found.append(child)
    return found


def memory(process: psutil.Process) -> dict[str, float]:
    """MiB of the replicas that hold models, and of all processes of the service."""
    held = [child.memory_full_info().uss / MIB for child in scorers(process)]
    everything = [child.memory_full_info().uss / MIB for child in process.children(recursive=True)]
    return {
        "replicas": len(held),
        "scoring": round(sum(held)),
        "all": round(sum(everything) + process.memory_full_info().uss / MIB),
    }


def processor() -> str:
    """The processor's name where Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """The commit that was measured."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
