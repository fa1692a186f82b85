"""Digests in the stages.json and checkpoints of runs made before these stored values.

They are computed from the keys of that time alone, so keys that came later change none of them.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from cluster.pipeline.keys import AFTER, Stage
from fgaif.config import API, Config, parse_config
from fgaif.errors import ConfigError
from fgaif.types import DEFAULT_KINDS

_SAMPLING = (
    "seed", "data.train", "data.responses", "data.image_root", "data.shuffle", "data.seed",
    "data.feedback_prompts", "policy.model", "policy.dtype", "policy.max_new_tokens",
    "policy.temperature", "feedback.samples_per_prompt",
)  # fmt: skip
_EVALUATION = (
    "seed", "data.held_out", "data.image_root", "data.shuffle", "data.seed", "data.eval_prompts",
    "policy.model", "policy.dtype", "policy.max_new_tokens", "segment", "eval",
)  # fmt: skip
_KEYS: dict[Stage, tuple[str, ...]] = {
    "sample": _SAMPLING,
    "annotate": ("segment", "feedback", "endpoints"),
    "train-reward": ("reward",),
    "eval-before": _EVALUATION,
    "train": ("data.ppo_prompts", "policy", "ppo"),
    "eval-after": _EVALUATION,
    "report": (),
}
_NAMES = """
    abstain adam_betas alpha anchor async_depth attention backbone base_url batch_size center
    center_momentum center_offset class_balance clip coef cpus_per_worker dropout dtype epochs
    evals extract_per extractor flip gamma gpus_per_worker gradient_checkpointing hallu_to_ok
    head horizon kl lam length_penalty length_target logprobs lora lr max_facts max_grad_norm
    max_image_side max_new_tokens max_staleness micro_batch min_words minibatch model
    no_stop_penalty noise noise_seed ok_to_hallu parallel patience placement
    pope_questions_per_image probe_tolerance prompt prompts prompts_dir r reads repeat_penalty
    rollout_batch samples_per_prompt schedule seed shape steps structured target temperature
    tis_cap train_projector val_fraction value_clip value_hallu value_init value_lora value_lr
    value_none value_ok values verifier warmup warmup_steps weight weight_decay weights workers
    zero_stage
"""
"""Names of the keys in these sections that a digest was made of."""
_COUNTED = frozenset(_NAMES.split()).union(DEFAULT_KINDS)


PROBE_TOLERANCE = 1e-3
"""The default of ``ppo.probe_tolerance``, a key of that time."""


def old_digest(config: Config, stage: Stage, probe_tolerance: float = PROBE_TOLERANCE) -> str:
    """The digest that an earlier version gave a stage made with this configuration."""
    tree = config.model_dump(mode="json")
    tree["ppo"]["probe_tolerance"] = probe_tolerance
    tree["ppo"]["shape"]["weights"] = {k: config.ppo.shape.weight(k) for k in config.kind_names}
    # Later keys that share their names with keys of that time.
    del tree["ppo"]["samples_per_prompt"], tree["ppo"]["kl"]["placement"]
    parts: list[Any] = [[key, _value(config, tree, key)] for key in _KEYS[stage]]
    parts += [old_digest(config, upstream, probe_tolerance) for upstream in AFTER[stage]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def old_config(path: Path) -> tuple[Config, float] | None:
    """The configuration in an earlier run's config.yaml, and its ``ppo.probe_tolerance``.

    None where the file is missing or this version cannot read it.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        tolerance = tree["ppo"].pop("probe_tolerance", PROBE_TOLERANCE)
        return parse_config(tree), tolerance
    except (OSError, yaml.YAMLError, ConfigError, AttributeError, KeyError, TypeError):
        return None


def _value(config: Config, tree: dict[str, Any], key: str) -> Any:
    if key == "endpoints":
        asked = (config.feedback.extractor, *config.feedback.verifiers)
        entries = tree["endpoints"].items()
        return {name: _known(entry) for name, entry in entries if f"{API}{name}" in asked}
    node: Any = tree
    for part in key.split("."):
        node = node[part]
    return _known(node)


def _known(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    return {name: _known(value) for name, value in node.items() if name in _COUNTED}
