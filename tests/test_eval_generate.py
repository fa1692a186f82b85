"""Generated answers: asked once, kept by what they depend on, resumed, written for any tool."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from engines import rollout_actor
from peft import LoraConfig
from PIL import Image
from safetensors.numpy import save_file

from cluster.evaluation.generate import (
    ModelSpec,
    generate_answers,
    pending_answers,
    policy_engines,
)
from cluster.roles import SyncCheck
from fgaif.data.scenes.files import MODELS
from fgaif.errors import ActorError, CheckpointError, DataError
from fgaif.eval.answers import read_answers
from fgaif.eval.benchmarks.pope import score_pope
from fgaif.eval.corrupt import Corruption
from fgaif.eval.pope_questions import build_from_scenes, read_questions
from fgaif.eval.questions import QuestionBuilder, QuestionSet
from fgaif.pending import Pending, Ready, Then
from fgaif.types import GenerationRequest, Response

Generate = Callable[[Sequence[GenerationRequest]], list[Response]]


class Pool:
    """The part of a rollout pool that is used; ``fail_at`` is the number of a call that fails."""

    def __init__(self, generate: Generate, fail_at: int | None = None) -> None:
        self.calls: list[Sequence[GenerationRequest]] = []
        self.loaded: list[Any] = []
        self._generate = generate
        self._fail_at = fail_at

    def generate(
        self, requests: Sequence[GenerationRequest], chunk: int
    ) -> Pending[list[Response]]:
        fails = len(self.calls) == self._fail_at
        self.calls.append(requests)
        return Then(died) if fails else Ready(self._generate(requests))

    def load_weights(self, manifest: Any) -> Ready[list[SyncCheck]]:
        self.loaded.append(manifest)
        return Ready([SyncCheck(arrived=1.0)])


def died() -> list[Response]:
    raise ActorError("rollout-0 died")


def echo(requests: Sequence[GenerationRequest]) -> list[Response]:
    return [
        Response(
            prompt=request.prompt,
            sample=0,
            text=f" about {request.prompt.text}",
            token_ids=np.array([1]),
            rollout_logprobs=np.zeros(1, np.float32),
            finish="stop",
            policy_version=0,
        )
        for request in requests
    ]


def refused() -> Any:
    raise AssertionError("an engine was started")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "val2014").mkdir(parents=True)
    for number, colour in enumerate(("red", "green", "blue")):
        name = f"COCO_val2014_{number:012d}.jpg"
        Image.new("RGB", (40, 40), colour).save(folder / "val2014" / name)
    return folder


@pytest.fixture
def model() -> ModelSpec:
    return ModelSpec.parse("scenes:policy")


def question_set(
    images: Path,
    out: Path,
    name: str = "pope",
    corruption: Corruption | None = None,
    **options: Any,
) -> QuestionSet:
    rows = [(str(i), f"{i % 3:012d}.jpg", f"Q{i}?") for i in range(5)]
    options = {"max_new_tokens": 8} | options
    builder = QuestionBuilder(images=images, out=out, corruption=corruption)
    return builder.build(name, rows, **options)


def test_images_are_found_by_coco_number_and_bad_ones_cost_their_questions(
    images: Path, tmp_path: Path
) -> None:
    (images / "val2014" / "COCO_val2014_000000000001.jpg").write_bytes(b"broken")
    job = question_set(images, tmp_path)
    assert [prompt.id for prompt in job.prompts] == ["0", "2", "3"]
    assert [item.row for item in job.skipped] == ["1", "4"]
    assert job.images == ("000000000000.jpg", "000000000002.jpg", "000000000000.jpg")
    with pytest.raises(DataError, match=r"none of the images of 1 questions.*no\.jpg"):
        QuestionBuilder(images=images, out=tmp_path).build("x", [("0", "no.jpg", "Q")], 1)


def test_answers_are_greedy_written_for_other_tools_and_known_the_next_time(
    images: Path, tmp_path: Path, model: ModelSpec
) -> None:
    job, pool = question_set(images, tmp_path, suffix="!"), Pool(echo)
    assert generate_answers(model, [job], tmp_path / "c.jsonl", lambda: pool, chunk=2) == 5  # type: ignore[arg-type,return-value]
    assert [len(call) for call in pool.calls] == [2, 2, 1]
    assert {request.temperature for call in pool.calls for request in call} == {0.0}
    rows = [json.loads(line) for line in job.file.read_text().splitlines()]
    assert rows[1] == {
        "question_id": "1",
        "image": "000000000001.jpg",
        "prompt": "Q1?!",
        "text": "about Q1?!",
        "answer_id": rows[1]["answer_id"],
        "model_id": f"policy {model.digest}",
        "metadata": {"finish": "stop"},
    }
    job.file.unlink()
    assert generate_answers(model, [job], tmp_path / "c.jsonl", refused) == 0
    assert len(job.file.read_text().splitlines()) == 5


def test_an_interrupted_call_asks_only_for_the_rest(
    images: Path, tmp_path: Path, model: ModelSpec
) -> None:
    job, cache = question_set(images, tmp_path), tmp_path / "c.jsonl"
    with pytest.raises(ActorError):
        generate_answers(model, [job], cache, lambda: Pool(echo, fail_at=1), chunk=2)  # type: ignore[arg-type,return-value]
    assert not job.file.exists()
    with cache.open("a") as file:
        file.write('{"key": "cut off by a kill')
    assert pending_answers(model, [job], cache) == 3
    pool = Pool(echo)
    assert generate_answers(model, [job], cache, lambda: pool) == 3  # type: ignore[arg-type,return-value]
    assert [r.prompt.id for call in pool.calls for r in call] == ["2", "3", "4"]


def test_an_answer_depends_on_model_prompt_image_and_length(
    images: Path, tmp_path: Path, model: ModelSpec
) -> None:
    cache = tmp_path / "c.jsonl"
    generate_answers(model, [question_set(images, tmp_path)], cache, lambda: Pool(echo))  # type: ignore[arg-type,return-value]
    other = ModelSpec(MODELS / "verifier")
    assert other.digest != model.digest
    assert pending_answers(model, [question_set(images, tmp_path, "chair")], cache) == 0
    assert pending_answers(other, [question_set(images, tmp_path)], cache) == 5
    assert pending_answers(model, [question_set(images, tmp_path, suffix="?")], cache) == 5
    assert pending_answers(model, [question_set(images, tmp_path, max_new_tokens=9)], cache) == 5
    fog = Corruption.parse("fog:3")
    assert pending_answers(model, [question_set(images, tmp_path, corruption=fog)], cache) == 5
    assert len(list((tmp_path / "corrupted" / fog.name).iterdir())) == 3


def test_one_question_in_two_benchmarks_is_asked_once(
    images: Path, tmp_path: Path, model: ModelSpec
) -> None:
    jobs, pool = [question_set(images, tmp_path, name) for name in ("a", "b")], Pool(echo)
    assert generate_answers(model, jobs, tmp_path / "c.jsonl", lambda: pool) == 5  # type: ignore[arg-type,return-value]
    assert all(len(job.file.read_text().splitlines()) == 5 for job in jobs)


def adapter(folder: Path, value: float) -> Path:
    LoraConfig(r=1, lora_alpha=2, target_modules=["q_proj"]).save_pretrained(folder)
    name = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    factors = {
        f"{name}.lora_{part}.weight": np.full((1, 1), value, np.float32) for part in ("A", "B")
    }
    save_file(factors, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_is_part_of_the_model_and_is_loaded_on_the_engines(tmp_path: Path) -> None:
    first = ModelSpec.parse(f"scenes:policy+{adapter(tmp_path / 'one', 1.0)}")
    second = ModelSpec.parse(f"scenes:policy+{adapter(tmp_path / 'two', 2.0)}")
    assert first.name == "policy+one"
    assert len({first.digest, second.digest, ModelSpec.parse("scenes:policy").digest}) == 3
    pool = Pool(echo)
    cluster: Any = SimpleNamespace(rollouts=lambda: pool)
    assert policy_engines(cluster, first) is pool  # type: ignore[comparison-overlap]
    (manifest,) = pool.loaded
    assert (manifest.version, manifest.scaling) == (1, 2.0)


def test_a_plus_in_a_folder_name_is_no_adapter(tmp_path: Path) -> None:
    (tmp_path / "a+b").symlink_to(MODELS / "policy")
    assert ModelSpec.parse(str(tmp_path / "a+b")).adapter is None
    with pytest.raises(CheckpointError, match=r"adapter_config\.json does not exist"):
        ModelSpec.parse(f"scenes:policy+{tmp_path}")


@pytest.mark.slow
def test_the_embedded_policy_answers_questions_built_from_its_world(
    tmp_path: Path, model: ModelSpec
) -> None:
    build_from_scenes("test", tmp_path / "w", count=12, seed=0)
    questions = read_questions(tmp_path / "w" / "coco_pope_random.jsonl")
    rows = [(row.id, row.image, row.text) for row in questions]
    job = QuestionBuilder(images=tmp_path / "w", out=tmp_path).build("a", rows, 6)
    pool = Pool(rollout_actor(MODELS / "policy").generate)
    generate_answers(model, [job], tmp_path / "c.jsonl", lambda: pool)  # type: ignore[arg-type,return-value]
    answers = read_answers(job.file)
    assert {answer.text for answer in answers} <= {"yes", "no"}
    metrics = score_pope({"random": questions}, {"random": answers}).metrics()
    assert metrics["accuracy"] > 0.75
    assert 0.3 < metrics["yes_ratio"] < 0.75
