"""Every configuration key has its place: does it change a result, extend it, or its execution?"""

from fnmatch import fnmatchcase

import pytest

from cluster.pipeline.keys import (
    ORDER,
    PLACES,
    TABLE,
    Kind,
    Stage,
    changes,
    kind_of,
    leaf_keys,
    stage_values,
)
from cluster.pipeline.train_rewards import input_digest
from fgaif.config import load_config


def test_every_key_has_exactly_one_place() -> None:
    """A key that fails here is new: say in ``TABLE`` of pipeline/keys.py what it changes."""
    places = {key: [p for p in PLACES if fnmatchcase(key, p)] for key in leaf_keys()}
    assert {key: found for key, found in places.items() if len(found) != 1} == {}


def test_every_place_is_that_of_keys_that_exist() -> None:
    """A place that fails here is of a key that was renamed or removed."""
    unused = [place for place in PLACES if not any(fnmatchcase(k, place) for k in leaf_keys())]
    assert unused == []
    assert len(PLACES) == sum(len(keys.split()) for _, keys, _ in TABLE), "a key stands there twice"


def test_keys_are_found_in_every_kind_of_section() -> None:
    known = leaf_keys()
    for key in (
        "name", "ppo.kl.target", "ppo.shape.weights", "reward.noise.*.flip", "endpoints.*.model",
        "kinds.*.prompt", "cluster.rollout.autoscale.max", "study.variants", "serve.batch.size",
    ):  # fmt: skip
        assert key in known
    assert not known.keys() & {"ppo", "ppo.kl", "endpoints", "reward.noise", "cluster.rollout"}
    assert known["kinds"] == ["object", "attribute", "relation"]
    assert known["endpoints.*.model"] is None


SAMPLED: tuple[Stage, ...] = ORDER[:-1]
LABELLED: tuple[Stage, ...] = ORDER[1:-1]
REWARDED: tuple[Stage, ...] = ORDER[2:-1]


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("seed=5", SAMPLED),
        ("data.train=other.jsonl", SAMPLED),
        ("data.responses=given.jsonl", SAMPLED),
        ("policy.temperature=0.7", SAMPLED),
        ("feedback.samples_per_prompt=2", SAMPLED),
        ("segment.min_words=3", LABELLED),
        ("feedback.abstain=0.1", LABELLED),
        ("reward.lr=1", REWARDED),
        ("reward.lora.r=3", REWARDED),
        ("reward.noise={relation: {flip: 0.1}}", REWARDED),
        ("ppo.lr=1", ("train", "eval-after")),
        ("ppo.schedule=cosine", ("train", "eval-after")),
        ("ppo.kl.coef=1", ("train", "eval-after")),
        ("ppo.shape.weights={object: 1}", ("train", "eval-after")),
        ("policy.lora.r=3", ("train", "eval-after")),
        ("data.ppo_prompts=7", ("train", "eval-after")),  # another order of batches from step 0 on
        ("data.eval_prompts=7", ("eval-before", "eval-after")),
        ("eval.seed=7", ("eval-before", "eval-after")),
        ("data.held_out=other.jsonl", ("eval-before", "eval-after")),
        # More prompts only go on in sampling and annotating; what reads them starts anew.
        ("data.feedback_prompts=3000", REWARDED),
        ("ppo.steps=60", ("eval-after",)),
    ],
)
def test_a_result_key_concerns_its_stages_and_those_that_read_them(
    override: str, stages: tuple[Stage, ...]
) -> None:
    assert _of_kind(override, "result") == stages


@pytest.mark.parametrize(
    ("override", "stages"),
    [("data.feedback_prompts=3000", ("sample", "annotate")), ("ppo.steps=60", ("train",))],
)
def test_a_key_that_extends_a_stage(override: str, stages: tuple[Stage, ...]) -> None:
    assert _of_kind(override, "extends") == stages


@pytest.mark.parametrize(
    "override",
    [
        "ppo.micro_batch=1", "ppo.zero_stage=0", "ppo.max_staleness=1",
        "cluster.engine.adapters=merged",
        "ppo.resume=latest", "ppo.checkpoint_every=1", "ppo.keep_checkpoints=9",
        "policy.gradient_checkpointing=true", "policy.attention=eager", "reward.parallel=3",
        "reward.micro_batch=1", "reward.zero_stage=0", "reward.workers=2",
        "reward.gpus_per_worker=1",
        "feedback.max_cost=3", "cluster.rollout.replicas=2", "cluster.rollout.autoscale={max: 3}",
        "cluster.engine.gpu_memory_utilization=0.5", "cluster.reward.shared=true",
        "cluster.learner.replicas=2", "tracking.rollouts=1",
        "study.seeds=[4, 5]", "serve.queue=3", "dir=elsewhere", "name=other",
        "endpoints.judge.model=j",  # of benchmarks: no stage asks it
    ],
)  # fmt: skip
def test_a_key_of_mere_execution_changes_no_stage(override: str) -> None:
    assert _of_kind(override, "result") == _of_kind(override, "extends") == ()


def _of_kind(override: str, kind: Kind) -> tuple[Stage, ...]:
    """Stages in which the only changes by an override to the defaults are of this kind."""
    before, after = load_config(None), load_config(None, [override])
    found = {stage: changes(after, stage, stage_values(before, stage)) for stage in ORDER}
    return tuple(s for s in ORDER if found[s] and {c.kind for c in found[s]} == {kind})


def test_the_number_of_steps_extends_only_where_no_step_depends_on_it() -> None:
    """With half a cosine down to the last step, each step's learning rate depends on how many."""
    constant, cosine = load_config(None), load_config(None, ["ppo.schedule=cosine"])
    assert kind_of(constant, "train", "ppo.steps") == "extends"
    assert kind_of(cosine, "train", "ppo.steps") == "result"


def test_labels_depend_on_the_models_that_make_them() -> None:
    asked = ["feedback.extractor=api:writer", "endpoints.writer.model=one"]
    made_with = stage_values(load_config(None, asked), "annotate")
    for override, changed in (
        ("model=two", ["endpoints.writer.model was one, is two"]),
        ("concurrency=3", []),
        ("price_input=3", []),
    ):
        config = load_config(None, [*asked, f"endpoints.writer.{override}"])
        assert [str(change) for change in changes(config, "annotate", made_with)] == changed


def test_values_of_another_version_count_with_their_defaults() -> None:
    """A key that came later had its default; one that is gone says nothing."""
    made_with = stage_values(load_config(None), "train")
    del made_with["ppo.tis_cap"]
    made_with["ppo.gone"] = 3
    assert changes(load_config(None), "train", made_with) == ()
    (change,) = changes(load_config(None, ["ppo.tis_cap=9"]), "train", made_with)
    assert str(change) == "ppo.tis_cap was 2.0, is 9.0"


def test_noise_that_is_taken_away_is_a_change() -> None:
    made_with = stage_values(load_config(None, ["reward.noise={object: {flip: 0.2}}"]), "train")
    (change,) = changes(load_config(None), "train", made_with)
    assert str(change) == "reward.noise.object.flip was 0.2, is 0.0"


def test_reward_models_do_not_depend_on_how_they_were_trained() -> None:
    """Nor on ``micro_batch``, which digests of earlier versions counted; those are known still."""

    def digest(*overrides: str, counting: tuple[str, ...] = ()) -> str:
        return input_digest("object", [], load_config(None, overrides), "b", counting)

    for override in ("reward.micro_batch=4", "reward.workers=2", "reward.zero_stage=3"):
        assert digest(override) == digest()
    for override in ("reward.lr=1", "reward.lora.r=3", "reward.head=mlp"):
        assert digest(override) != digest()
    old = digest(counting=("micro_batch",))
    assert old == "31034bb2131cabdb168acafbacf049377475d43df208a60bf04a4817c9709a19"
    overrides = ("reward.noise={object: {flip: 0.1}}", "reward.micro_batch=4", "reward.lora.r=8")
    old = digest(*overrides, counting=("micro_batch",))
    assert old == "f251e312db910ff10de3ca49b2bb94245d5d0e1e9431775c928ee2debfb4be47"
