"""A checkpoint's answers to questions: greedy, kept by what they depend on, written to files."""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

from fgaif.config import Config, with_overrides
from fgaif.errors import ActorError
from fgaif.eval.judge import Progress
from fgaif.eval.questions import QuestionSet
from fgaif.feedback.store import JsonlStore
from fgaif.files import write_whole
from fgaif.lvlm.adapters import ADAPTER_FILES, read_adapter_config
from fgaif.lvlm.hub import model_name
from fgaif.lvlm.model import split_model
from fgaif.lvlm.weights import manifest_from_adapter
from fgaif.pending import Pending
from fgaif.reward.checkpoint import checkpoint_digest
from fgaif.types import GenerationRequest, Json, Prompt, Response

if TYPE_CHECKING:
    from cluster.groups.rollout_group import RolloutGroup
    from cluster.launch import Cluster

REQUESTS = 512
"""Requests per call and replica."""
_PER_ENGINE = 256  # of a chunk, given to one engine at a time

Engines = Callable[[], "RolloutGroup"]
"""Starts the engines, when the first one is needed."""


@dataclass(frozen=True)
class ModelSpec:
    """A checkpoint, and the adapter that is loaded on top of it; the digests are its identity."""

    checkpoint: Path
    adapter: Path | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``CHECKPOINT[+ADAPTER]``; a name that exists with its ``+`` is a checkpoint.

        Raises:
            CheckpointError: no such checkpoint, or no adapter in the folder.
        """
        return cls(*split_model(text, "--model"))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over checkpoint and adapter, in short."""
        parts = [checkpoint_digest(self.checkpoint)]
        if self.adapter is not None:
            parts += [_sha256(self.adapter / file) for file in ADAPTER_FILES]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """Names of folders, or of the hub's models and their commits, for people."""
        parts = (path for path in (self.checkpoint, self.adapter) if path is not None)
        return "+".join(map(model_name, parts))


@dataclass(frozen=True, slots=True, kw_only=True)
class _KnownAnswer:
    """An answer in the cache; ``key`` names all that it depends on."""

    key: str
    text: str
    finish: str


def generate_answers(
    model: ModelSpec,
    questions: Sequence[QuestionSet],
    cache: Path,
    engines: Engines,
    *,
    chunk: int = REQUESTS,
    progress: Progress = lambda done, total: None,
) -> int:
    """Answer all questions greedily and write the answer files; returns how many were new.

    Answers are kept in ``cache`` by model digest, prompt, image content and length limit: an
    interrupted call goes on where it stopped, and what is known starts no engine.
    """
    store: JsonlStore[_KnownAnswer] = JsonlStore(cache, _encode, _decode)
    known = {answer.key: answer for answer in store}
    todo: dict[str, GenerationRequest] = {}
    total = 0
    for one in questions:
        for prompt in one.prompts:
            total += 1
            key = _key(model, prompt, one.max_new_tokens)
            if key not in known:
                todo[key] = GenerationRequest(
                    prompt=prompt, temperature=0.0, max_new_tokens=one.max_new_tokens
                )
    done = total - len(todo)
    progress(done, total)
    for part, responses in _in_chunks(todo, engines, chunk):
        new = [
            _KnownAnswer(key=key, text=response.text.strip(), finish=response.finish)
            for key, response in zip(part, responses, strict=True)
            if response is not None
        ]
        store.append(new)
        known |= {answer.key: answer for answer in new}
        done += len(new)
        progress(done, total)
    if lost := [key for key in todo if key not in known]:
        raise ActorError(
            f"{len(lost)} of {total} questions killed the engine more than once, the first about "
            f"{todo[lost[0]].prompt.image.path}; {done} answers are kept in {cache}"
        )
    for one in questions:
        _write_answers(model, one, known)
    return len(todo)


def _in_chunks(
    todo: Mapping[str, GenerationRequest], engines: Engines, chunk: int
) -> Iterator[tuple[list[str], list[Response | None]]]:
    """Yield keys and responses by chunk; the next chunk waits at the engines while they work."""
    keys = list(todo)
    parts = [keys[start : start + chunk] for start in range(0, len(keys), chunk)]
    calls: deque[tuple[list[str], Pending[list[Response | None]]]] = deque()
    pool = engines() if parts else None
    for part in parts:
        assert pool is not None
        calls.append((part, pool.generate([todo[key] for key in part], chunk=_PER_ENGINE)))
        if len(calls) > 1:
            first, call = calls.popleft()
            yield first, call.result()
    for part, call in calls:
        yield part, call.result()


def pending_answers(model: ModelSpec, questions: Sequence[QuestionSet], cache: Path) -> int:
    """Count the answers that are not in the cache yet."""
    known = {answer.key for answer in JsonlStore(cache, _encode, _decode)}
    wanted = {
        _key(model, prompt, one.max_new_tokens) for one in questions for prompt in one.prompts
    }
    return len(wanted - known)


def policy_engines(cluster: "Cluster", model: ModelSpec) -> "RolloutGroup":
    """Start the cluster's rollout pool, with the model's adapter loaded on every replica."""
    rollouts = cluster.rollouts()
    if model.adapter is not None:
        rollouts.load_weights(manifest_from_adapter(model.adapter, version=1)).result()
    return rollouts


def generation_config(config: Config, model: ModelSpec) -> Config:
    """The configuration with this model as the policy, and room for its adapter in the engine."""
    overrides = [f"policy.model={json.dumps(str(model.checkpoint))}"]
    if model.adapter is not None:
        overrides.append(f"policy.lora.r={read_adapter_config(model.adapter).r}")
    return with_overrides(config, overrides)


def _key(model: ModelSpec, prompt: Prompt, max_new_tokens: int) -> str:
    parts = [model.digest, prompt.text, prompt.image.sha256, max_new_tokens]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _write_answers(
    model: ModelSpec, questions: QuestionSet, known: Mapping[str, _KnownAnswer]
) -> None:
    rows = [
        {
            "question_id": prompt.id,
            "image": name,
            "prompt": prompt.text,
            "text": (answer := known[_key(model, prompt, questions.max_new_tokens)]).text,
            "answer_id": answer.key[:22],
            "model_id": f"{model.name} {model.digest}",
            "metadata": {"finish": answer.finish},
        }
        for prompt, name in zip(questions.prompts, questions.images, strict=True)
    ]
    write_whole(questions.file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _encode(answer: _KnownAnswer) -> Json:
    return {"key": answer.key, "text": answer.text, "finish": answer.finish}


def _decode(row: Json) -> _KnownAnswer:
    return _KnownAnswer(key=row["key"], text=row["text"], finish=row["finish"])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
