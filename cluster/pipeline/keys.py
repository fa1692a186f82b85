"""What each configuration key changes: a stage's result, how far it goes, or how it is executed.

    result     another value makes another outcome: the stage is done anew
    extends    a larger value adds to what is there: the stage goes on
    execution  speed, memory, money, what is kept: what is there stays right

``TABLE`` places every key of ``Config``. A stage also depends on all that its inputs depend on.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, TypeAdapter

from fgaif.config import API, Config
from fgaif.kinds import KindConfig
from fgaif.types import DEFAULT_KINDS

Stage = Literal[
    "sample", "annotate", "train-reward", "eval-before", "train", "eval-after", "report"
]
Kind = Literal["result", "extends", "execution"]
_JSON = TypeAdapter[Any](Any)
_OF_KIND = tuple(key for key in KindConfig.model_fields if key != "name")
Place = Mapping[Stage, Kind]
"""The stages that a key concerns itself; it is execution for others, unless they read theirs."""

AFTER: dict[Stage, tuple[Stage, ...]] = {
    "sample": (),
    "annotate": ("sample",),
    "train-reward": ("annotate",),
    "eval-before": ("train-reward",),
    "train": ("train-reward",),
    "eval-after": ("train",),
    "report": (),
}
"""The stages, in order, and whose output each reads."""
ORDER: tuple[Stage, ...] = tuple(AFTER)


_OF_CRITIC = ("ppo.value_", "ppo.lam")
"""Keys that say nothing where the estimator has no critic (``ppo.value_lora.r`` among them)."""


def _result(*stages: Stage) -> Place:
    return dict.fromkeys(stages, "result")


def _extends(*stages: Stage) -> Place:
    return dict.fromkeys(stages, "extends")


_EXECUTION: Place = {}
_EVALS: tuple[Stage, ...] = ("eval-before", "eval-after")
_SAMPLING = _result("sample", "train", *_EVALS)

TABLE: tuple[tuple[str, str, Place], ...] = (
    ("", "name dir", _EXECUTION),
    ("", "seed", _SAMPLING),
    ("", "kinds", _result("annotate")),  # names and order: columns of all arrays, seeds
    ("kinds.*", "description prompt", _result("annotate")),
    ("kinds.*", "colour", _EXECUTION),
    ("data", "train", _result("sample", "train")),
    ("data", "responses", _result("sample")),
    ("data", "held_out eval_prompts", _result(*_EVALS)),
    ("data", "image_root shuffle seed max_image_pixels image_pixels", _SAMPLING),
    # The first prompts of a larger number are those of a smaller one, each with a seed of its own.
    ("data", "feedback_prompts", _extends("sample", "annotate")),
    ("data", "ppo_prompts", _result("train")),  # the order of all batches is drawn from them
    ("policy", "model dtype max_new_tokens temperature", _SAMPLING),
    ("policy", "train_projector", _result("train")),
    ("policy", "quantization", _result("train-reward", "train")),
    ("policy.lora", "r alpha dropout", _result("train")),
    ("policy", "gradient_checkpointing attention", _EXECUTION),
    ("segment", "unit min_words", _result("annotate")),
    ("feedback", "samples_per_prompt", _result("sample")),  # they lie beside the prompt's others
    ("feedback", "extractor extract_per verifier prompt prompts_dir", _result("annotate")),
    ("feedback", "abstain max_facts reads", _result("annotate")),
    ("feedback", "max_cost max_tokens", _EXECUTION),
    (
        "endpoints.*",
        "model base_url structured logprobs max_image_side original_images",
        _result("annotate"),
    ),
    ("endpoints.*", "api_key_env api_key_file concurrency timeout_s attempts", _EXECUTION),
    ("endpoints.*", "requests_per_minute tokens_per_minute backoff_s breaker", _EXECUTION),
    ("endpoints.*", "image_tokens price_input price_output", _EXECUTION),
    ("reward", "form pairs captions", _result("train-reward")),
    ("reward", "backbone head lr batch_size epochs warmup", _result("train-reward")),
    ("reward", "weight_decay max_grad_norm val_fraction patience", _result("train-reward")),
    ("reward", "evals class_balance noise_seed", _result("train-reward")),
    ("reward.lora", "r alpha dropout", _result("train-reward")),
    ("reward.noise.*", "ok_to_hallu hallu_to_ok flip", _result("train-reward")),
    ("reward", "micro_batch zero_stage workers parallel", _EXECUTION),
    ("reward", "cpus_per_worker gpus_per_worker", _EXECUTION),
    ("ppo", "steps", _extends("train")),  # see kind_of
    ("ppo", "rollout_batch minibatch epochs lr value_lr value_init", _result("train")),
    ("ppo", "weight_decay adam_betas max_grad_norm", _result("train")),
    ("ppo", "warmup_steps schedule gamma lam clip value_clip", _result("train")),
    ("ppo", "async_depth tis_cap", _result("train")),
    ("ppo", "estimator samples_per_prompt token_penalty reward_source", _result("train")),
    ("ppo.value_lora", "r alpha dropout", _result("train")),
    ("ppo.kl", "coef placement target horizon", _result("train")),
    ("ppo.shape", "weights values value_ok value_hallu value_none", _result("train")),
    ("ppo.shape", "center center_offset center_momentum placement order", _result("train")),
    ("ppo.shape", "repeat_penalty no_stop_penalty", _result("train")),
    ("ppo.shape", "length_penalty length_target", _result("train")),
    ("ppo.shape", "correct_bonus wrong_penalty", _result("train")),
    ("ppo.anchor", "weight prompts batch_size", _result("train")),
    ("ppo", "micro_batch micro_tokens zero_stage max_staleness", _EXECUTION),
    ("ppo", "checkpoint_every keep_checkpoints resume", _EXECUTION),
    ("eval", "pope_questions_per_image seed judge second_verifier", _result(*_EVALS)),
    ("cluster", "address local_cpus threads max_restarts", _EXECUTION),
    ("cluster", "layout shared_roles", _EXECUTION),
    ("cluster", "heartbeat_s heartbeat_timeout_s", _EXECUTION),
    ("cluster", "stall_timeout_s start_timeout_s call_timeout_s", _EXECUTION),
    ("cluster.rollout", "replicas cpus gpus chunk", _EXECUTION),
    ("cluster.rollout.autoscale", "min max target_queue patience", _EXECUTION),
    ("cluster.reward", "replicas cpus gpus shared", _EXECUTION),
    ("cluster.reference", "replicas cpus gpus", _EXECUTION),
    ("cluster.learner", "replicas cpus gpus", _EXECUTION),
    ("cluster.judge", "replicas cpus gpus", _EXECUTION),
    ("cluster.engine", "adapters", _EXECUTION),  # how much of an adapter is rounded away
    ("cluster.engine", "max_num_seqs max_model_len kv_cache_mib", _EXECUTION),
    ("cluster.engine", "gpu_memory_utilization tensor_parallel sleep enforce_eager", _EXECUTION),
    ("tracking", "tensorboard wandb trackio project rollouts", _EXECUTION),
    ("baseline", "*", _EXECUTION),  # no stage: `fgaif baseline` keeps its own settings
    ("study", "*", _EXECUTION),  # variants are runs of their own
    ("serve", "*", _EXECUTION),  # a service, no stage
)
"""Section, keys and place. ``*`` is any name of an entry; at the end, a whole section."""

PLACES: dict[str, Place] = {
    f"{section}.{key}".lstrip("."): place for section, keys, place in TABLE for key in keys.split()
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A key whose value differs from the one that a stage was made with."""

    key: str
    was: Any
    now: Any
    kind: Kind
    note: str = ""
    """Said instead, where the values tell people nothing."""

    def __str__(self) -> str:
        if self.note:
            return self.note
        return f"{self.key} was {_shown(self.was)}, is {_shown(self.now)}"


def kind_of(config: Config, stage: Stage, key: str) -> Kind:
    """What a change of ``key`` does to a stage; keys that no longer exist do nothing."""
    own = (_place(key) or {}).get(stage)
    if own == "result" and not config.ppo.has_critic and key.startswith(_OF_CRITIC):
        return "execution"
    if own == "extends" and key == "ppo.steps" and config.ppo.schedule == "cosine":
        return "result"  # the learning rate of every step depends on their number
    if own is not None:
        return own
    upstream = (kind_of(config, before, key) for before in AFTER[stage])
    return "result" if any(kind != "execution" for kind in upstream) else "execution"


def stage_values(config: Config, stage: Stage) -> dict[str, Any]:
    """The values, as in JSON, of all keys that change a stage's result or extend it."""
    models = (config.feedback.extractor, *config.feedback.verifiers)
    if stage in _EVALS and config.eval.second_verifier is not None:
        models = (*models, config.eval.second_verifier)
    asked = [name.removeprefix(API) for name in models if name.startswith(API)]
    # As earlier versions wrote them: one for each kind, whether configured or by default.
    weights = {kind: config.ppo.shape.weight(kind) for kind in config.kind_names}
    return {
        key: weights if key == "ppo.shape.weights" else value
        for key, value in _values(config)
        if kind_of(config, stage, key) != "execution"
        # Of the endpoints those of step 1: a judge for benchmarks changes no label.
        and (not key.startswith("endpoints.") or key.split(".", 1)[1].rpartition(".")[0] in asked)
    }


def changes(config: Config, stage: Stage, made_with: Mapping[str, Any]) -> tuple[Change, ...]:
    """Keys in which a configuration differs from what ``stage_values`` gave for another.

    A key that one of them does not have, being of another version, counts with its default.
    """
    now = stage_values(config, stage)
    found = []
    for key in [*now, *(key for key in made_with if key not in now)]:
        kind = kind_of(config, stage, key)
        was, value = (side.get(key, _default(key)) for side in (made_with, now))
        if kind != "execution" and was != value:
            found.append(Change(key=key, was=was, now=value, kind=kind))
    return tuple(found)


@cache
def leaf_keys() -> Mapping[str, Any]:
    """Every key of ``Config`` that holds a value, with its default (None where there is none).

    Entries that users name are ``*``, as in ``endpoints.*.model``.
    """
    return dict(_leaves(Config, ""))


def _leaves(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, field in section.model_fields.items():
        model, named = _section(field.annotation)
        if model is KindConfig:
            yield prefix + name, list(DEFAULT_KINDS)
            yield from ((f"{prefix}{name}.*.{key}", None) for key in _OF_KIND)
        elif model is None:
            known = None if field.is_required() else field.get_default(call_default_factory=True)
            yield prefix + name, _JSON.dump_python(known, mode="json")
        else:
            yield from _leaves(model, f"{prefix}{name}.*." if named else f"{prefix}{name}.")


def _values(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in type(section).model_fields.items():
        model, named = _section(field.annotation)
        value = getattr(section, name)
        if model is KindConfig:
            yield prefix + name, [kind.name for kind in value]
            for kind in value:
                yield from ((f"{prefix}{name}.{kind.name}.{k}", getattr(kind, k)) for k in _OF_KIND)
        elif model is None:
            yield prefix + name, _JSON.dump_python(value, mode="json")
        elif named:
            for entry, item in value.items():
                yield from _values(item, f"{prefix}{name}.{entry}.")
        elif value is not None:
            yield from _values(value, f"{prefix}{name}.")


def _section(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The section that a field holds, None for a value; and whether it holds them by name."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part, get_origin(annotation) is dict
    return None, False


@cache
def _place(key: str) -> Place | None:
    if key in PLACES:
        return PLACES[key]
    return next((PLACES[pattern] for pattern in PLACES if fnmatchcase(key, pattern)), None)


@cache
def _default(key: str) -> Any:
    known = leaf_keys()
    return known.get(next((pattern for pattern in known if fnmatchcase(key, pattern)), ""))


def _shown(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
