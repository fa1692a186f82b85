"""Rollout engine in a Ray actor beside bare vLLM and Hugging Face, in one run on one machine.

    python tests/bench/bench_rollout.py [--model DIR] [--prompts 256] [--json FILE]

Prints seconds until the engine is ready in its actor, sampled tokens per second of the rollout
actor, of vLLM's own ``LLM.generate`` and of Hugging Face ``generate`` on the same prompts at
temperature 1 (so at the policy's real length distribution), answers per second of the judge's
question, and seconds and bytes of a weight sync. Actor and bare engine take turns, ``--rounds``
times, and the median counts. Where other programs share the cores, look at the figures per CPU
second of the sampling process: wall clock then measures the neighbours.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from actors.rollout import RolloutActor
from fgaif.config import Config, LoraConfig, parse_config
from fgaif.data.images import load_image
from fgaif.data.prompts import load_prompts
from fgaif.lvlm.inputs import load_encoder
from fgaif.lvlm.model import attach_lora, load_lvlm, resolve_checkpoint
from fgaif.lvlm.weights import make_manifest
from fgaif.types import GenerationRequest, Prompt, WeightsManifest

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


class TimedRollout(RolloutActor):
    """The rollout actor, which also tells how much CPU time its process has used."""

    def cpu_seconds(self) -> float:
        """CPU seconds of this process so far."""
        return time.process_time()


class BareVllm:
    """vLLM's ``LLM.generate`` with text prompts and images, as its documentation shows it."""

    def __init__(self, model: Path, config: Config) -> None:
        from vllm import LLM

        engine = config.cluster.engine
        self._llm = LLM(
            str(model),
            dtype=config.policy.dtype,
            enforce_eager=True,
            max_num_seqs=engine.max_num_seqs,
            max_model_len=512,
            kv_cache_memory_bytes=engine.kv_cache_mib * 2**20,
            skip_mm_profiling=True,
            limit_mm_per_prompt={"image": 1},
        )

    def generate(self, texts: Sequence[str], images: Sequence[Any], tokens: int) -> int:
        """Sample one response per prompt; returns the number of tokens."""
        from vllm import SamplingParams

        outputs = self._llm.generate(
            [
                {"prompt": text, "multi_modal_data": {"image": image}}
                for text, image in zip(texts, images, strict=True)
            ],
            [SamplingParams(seed=i, max_tokens=tokens, logprobs=0) for i in range(len(texts))],
            use_tqdm=False,
        )
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    def cpu_seconds(self) -> float:
        """CPU seconds of this process so far."""
        return time.process_time()


@torch.no_grad()
def hugging_face_tokens(
    model_dir: Path, prompts: Sequence[Prompt], tokens: int, batch: int
) -> Callable[[], int]:
    """Return a function that samples every prompt with Hugging Face ``generate``."""
    model, encoder = load_lvlm(model_dir, dtype="float32"), load_encoder(model_dir)
    eos = encoder.tokenizer.eos_token_id

    @torch.no_grad()
    def sample() -> int:
        total = 0
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            ids = torch.tensor([encoder.prompt_ids(prompt) for prompt in part])
            seen = [encoder.tensors(prompt.image, torch.empty(0)) for prompt in part]
            pixels = torch.cat([each["pixel_values"] for each in seen])
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels,
                do_sample=True, max_new_tokens=tokens, pad_token_id=0, top_k=0,
            )[:, ids.shape[1] :]  # fmt: skip
            ended = (output == eos).int()
            total += int(((ended.cumsum(1) - ended) == 0).sum())
        return total

    return sample


def random_version(model_dir: Path, version: int) -> WeightsManifest:
    """A LoRA r16 version with small random factors."""
    lora = LoraConfig(r=16)
    model = attach_lora(load_lvlm(model_dir, dtype="float32"), lora, seed=0)
    factors = {
        name: (0.01 * torch.randn(value.shape)).numpy()
        for name, value in model.named_parameters()
        if "lora_" in name
    }
    return make_manifest(factors, scaling=lora.scaling, version=version)


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result of a call."""
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def measure(model: Path, prompts: Sequence[Prompt], tokens: int, rounds: int) -> dict[str, float]:
    """Run everything; see the module's docstring."""
    config = parse_config({"cluster": {"engine": {"max_model_len": 512}}})
    options = {"num_cpus": 1, "runtime_env": {"env_vars": ENVIRONMENT}}
    actor_seconds, actor = timed(lambda: _start(TimedRollout, options, model, config))
    report = {"actor_ready_seconds": actor_seconds}
    report["engine_ready_seconds"] = ray.get(actor.stats.remote()).ready_seconds
    bare = ray.remote(BareVllm).options(**options).remote(model, config)
    encoder = load_encoder(model)
    texts = [encoder.render(prompt.text) for prompt in prompts]
    images = [load_image(prompt.image) for prompt in prompts]
    requests = [
        GenerationRequest(prompt=prompt, seed=seed, max_new_tokens=tokens)
        for seed, prompt in enumerate(prompts)
    ]
    sample_hf = hugging_face_tokens(model, prompts, tokens, batch=64)
    runs: dict[str, tuple[Callable[[], int], Callable[[], float]]] = {
        "rollout": (
            lambda: sum(len(r.token_ids) for r in ray.get(actor.generate.remote(requests))),
            lambda: ray.get(actor.cpu_seconds.remote()),
        ),
        "vllm": (
            lambda: ray.get(bare.generate.remote(texts, images, tokens)),
            lambda: ray.get(bare.cpu_seconds.remote()),
        ),
        "huggingface": (sample_hf, time.process_time),
    }
    wall: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, (sample, clock) in runs.items():
            before = clock()
            seconds, total = timed(sample)
            wall[name].append(total / seconds)
            cpu[name].append(total / (clock() - before))
    for label, speeds in (("second", wall), ("cpu_second", cpu)):
        medians = {name: statistics.median(values[1:]) for name, values in speeds.items()}
        report |= {f"{name}_tokens_per_{label}": value for name, value in medians.items()}
        for other in ("vllm", "huggingface"):
            report[f"rollout_to_{other}_per_{label}"] = medians["rollout"] / medians[other]
    report["mean_length"] = runs["rollout"][0]() / len(prompts)
    before = ray.get(actor.cpu_seconds.remote())
    seconds, _ = timed(lambda: ray.get(actor.p_yes.remote(list(prompts) * 4)))
    used = ray.get(actor.cpu_seconds.remote()) - before
    report["answers_per_second"] = 4 * len(prompts) / seconds
    report["answers_per_cpu_second"] = 4 * len(prompts) / used
    manifest = random_version(model, 1)
    ray.get(actor.load_weights.remote(manifest))
    syncs = [timed(lambda: ray.get(actor.load_weights.remote(manifest)))[0] for _ in range(10)]
    report["sync_seconds"] = statistics.median(syncs)
    report["sync_bytes"] = sum(array.nbytes for array in manifest.tensors.values())
    return report


def _start(cls: type, options: dict[str, Any], *arguments: Any) -> Any:
    actor = ray.remote(cls).options(**options).remote(*arguments)
    ray.get(actor.version.remote())
    return actor


def main() -> None:
    """Parse the command line, run, print a table and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="scenes:policy")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    torch.set_num_threads(1)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_prompts("scenes:val", limit=arguments.prompts, cache=Path(folder))
        model = resolve_checkpoint(arguments.model)
        report = measure(model, loaded.prompts, arguments.tokens, arguments.rounds)
    ray.shutdown()
    for name, value in report.items():
        print(f"{name:40} {value:12,.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
