"""Fixtures shared by all tests, and the environment that every test process starts from."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch, transformers, vllm or ray are imported; worker processes inherit it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# Two threads of a process wait for each other in busy loops as soon as other processes work beside
# it: with as many test processes as cores that took ten times as long as one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import tiny
import torch
from hypothesis import settings

# The same examples every time, and none lost to a busy machine.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


LONGEST = (
    "pipeline", "my_images", "feedback_job", "lost_head", "autoscaler", "chaos",
    "many_nodes", "role_groups", "reward_actor", "serve", "arrival", "learner",
    "gpus", "openai_server", "live", "actor_group", "rollout_group", "full_sync",
    "long_run", "tensor_parallel", "rollout", "measure", "weight_sync", "eval_generate",
    "jobs", "scenes", "export", "serving_schema",
)  # fmt: skip
"""Files whose tests take the longest, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is no CUDA device; the longest files come first.

    With a file per worker at a time, a long one begun last would be waited for alone; so
    ``make test`` also tells xdist to leave the order as it is.
    """
    rank = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _exact_small_numbers() -> None:
    """vLLM's CPU engine leaves its thread rounding tiny numbers to zero, which hypothesis minds."""
    torch.set_flush_denormal(False)


@pytest.fixture(autouse=True, scope="module")
def _own_process_group() -> Iterator[None]:
    """Take back what a file leaves in torch. DeepSpeed keeps the group that it has seen first, also
    when a vLLM engine of the next file has made and closed others, and ZeRO-3 puts its own function
    in the place of ``linear``."""
    linear = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = linear
    if "deepspeed" in sys.modules:
        from deepspeed import comm
        from deepspeed.utils import groups

        comm.comm.cdb = None
        for name in [name for name in vars(groups) if name.startswith("_") and name.isupper()]:
            if name.endswith("_GROUP"):
                setattr(groups, name, None)


@pytest.fixture(scope="session")
def tiny_llava_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint directory of a random LLaVA of 4 image tokens; do not write into it."""
    return tiny.build_tiny_llava(tmp_path_factory.mktemp("tiny_llava"))


@pytest.fixture(scope="session")
def wide_llava_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny LLaVA with matrices of over 100,000 weights: ZeRO-3 leaves smaller ones whole."""
    return tiny.build_tiny_llava(tmp_path_factory.mktemp("wide_llava"), width=320)


@pytest.fixture(scope="session")
def llava15_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a narrow random LLaVA-1.5 (576 image tokens); do not write into it."""
    return tiny.build_llava15(tmp_path_factory.mktemp("llava15"))


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of real photographs with ``prompts.jsonl``; do not write into it."""
    return tiny.write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(params=["threads", pytest.param("ray", marks=pytest.mark.long)])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What groups of actors take for Ray: actors in threads, or a real local Ray."""
    import fake_ray

    if request.param == "threads":
        return fake_ray.stand_in(monkeypatch)
    request.getfixturevalue("local_ray")
    return fake_ray.ray


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray of two CPUs for a file's tests; its workers can import what lies beside them."""
    import ray  # takes a second, and most files do without

    here = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=here
    )
    yield
    ray.shutdown()
