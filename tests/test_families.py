"""One table for every family: random checkpoints of the true layout, all that fgaif does with one.

Learner's side against transformers, then the engine's side against the learner's.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import engine_config, photo_prompts, requests, response_to, rollout_actor
from ppo_world import hf_logprobs, make_train_batch, tiny_config
from tiny_families import BUILDERS
from transformers import AutoModelForImageTextToText

from actors.deepspeed_setup import free_port
from actors.learner import LearnerActor
from actors.reference import ReferenceActor
from actors.rollout import RolloutActor
from fgaif.config import Config, LoraConfig, parse_config
from fgaif.data.images import load_image
from fgaif.errors import ConfigError
from fgaif.lvlm.export import export_merged
from fgaif.lvlm.families import FAMILIES, family_of
from fgaif.lvlm.features import FeatureCache, set_vision_aside
from fgaif.lvlm.inputs import Encoder, load_encoder
from fgaif.lvlm.model import attach_lora, load_lvlm, project, resolve_checkpoint
from fgaif.lvlm.sizes import config_facts, read_facts
from fgaif.lvlm.weights import make_manifest, manifest_from_adapter, tensor_name
from fgaif.reward import local
from fgaif.reward.checkpoint import load_reward_model
from fgaif.reward.inputs import load_reward_encoder
from fgaif.reward.model import segment_probs
from fgaif.types import FloatArray, Prompt, Response

NOT_CONFIRMED = ("gemma3",)
QUICK = ("qwen2_5_vl",)  # others are `long`: LLaVA has tests of its own
NAMES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.long) for name in BUILDERS]
WIDE = ("motorcycle", "astronaut", "rocket")  # wide, square, high


@pytest.fixture(scope="module", params=NAMES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families") / request.param
    return resolve_checkpoint(str(BUILDERS[request.param](folder)))


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> Encoder:
    return load_encoder(checkpoint)


@pytest.fixture(scope="module")
def prompts(photos: Path) -> list[Prompt]:
    """Photographs of different aspect, with questions of different length."""
    found = {prompt.id: prompt for prompt in photo_prompts(photos)}
    texts = ("What?", "Describe this image in detail.", "Is there a dog on the couch?")
    return [
        Prompt(id=name, image=found[name].image, text=text)
        for name, text in zip(WIDE, texts, strict=True)
    ]


@pytest.fixture(scope="module")
def responses(prompts: list[Prompt]) -> list[Response]:
    rng = np.random.default_rng(0)
    return [
        response_to(prompt, rng.integers(20, 300, 4 + index).tolist())
        for index, prompt in enumerate(prompts * 2)
    ]


def flat(rows: Any, responses: list[Response]) -> FloatArray:
    """Log-probs of the real tokens, one after another."""
    pairs = zip(rows, responses, strict=True)
    return np.concatenate([np.asarray(row[: len(r.token_ids)]) for row, r in pairs])


@torch.no_grad()
def transformers_logprobs(path: Path, encoder: Encoder, response: Response) -> FloatArray:
    """By the library's own processor and forward pass, from text and image."""
    model = AutoModelForImageTextToText.from_pretrained(path).eval()
    inputs = encoder.processor(
        images=[load_image(response.prompt.image)],
        text=[encoder.render(response.prompt.text)],
        return_tensors="pt",
    )
    start, more = inputs["input_ids"].shape[1], torch.tensor(response.token_ids)[None]
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            value = {"input_ids": more, "attention_mask": torch.ones_like(more)}
            inputs[name] = torch.cat([inputs[name], value.get(name, 0 * more)], dim=1)
    logits = model(**inputs).logits[0, start - 1 : -1].log_softmax(-1)
    return logits.gather(1, more[0, :, None])[:, 0].numpy()


def test_ids_and_logprobs_are_those_of_transformers(
    checkpoint: Path, encoder: Encoder, responses: list[Response]
) -> None:
    model = load_lvlm(checkpoint)
    ours = hf_logprobs(model, checkpoint, responses[:3]).numpy()
    lengths = set()
    for row, response in zip(ours, responses[:3], strict=True):
        inputs = encoder.processor(
            images=[load_image(response.prompt.image)], text=[encoder.render(response.prompt.text)]
        )
        ids = encoder.prompt_ids(response.prompt)
        assert ids == list(inputs["input_ids"][0])
        lengths.add(ids.count(encoder.image_token_id))
        expected = transformers_logprobs(checkpoint, encoder, response)
        np.testing.assert_allclose(row[: len(expected)], expected, atol=2e-5)
    assert min(lengths) > 1
    assert max(lengths) <= read_facts(checkpoint).image_tokens


def test_padding_company_and_order_change_nothing(
    checkpoint: Path, encoder: Encoder, responses: list[Response]
) -> None:
    model = load_lvlm(checkpoint)
    together = hf_logprobs(model, checkpoint, responses).numpy()
    backwards = hf_logprobs(model, checkpoint, responses[::-1]).numpy()[::-1]
    for row, other, response in zip(together, backwards, responses, strict=True):
        length = len(response.token_ids)
        alone = hf_logprobs(model, checkpoint, [response]).numpy()[0]
        np.testing.assert_allclose(row[:length], alone[:length], atol=2e-5)
        np.testing.assert_allclose(row[:length], other[:length], atol=2e-5)
    cache = FeatureCache(model, encoder)
    images = [response.prompt.image for response in responses[:3]]
    assert torch.equal(cache(images).rows, cache(images).rows)
    assert len(cache) == 3


def test_marks_of_other_models_data_are_taken_out(encoder: Encoder, prompts: list[Prompt]) -> None:
    plain = encoder.prompt_ids(prompts[0])
    for text in ("<image>\n{}", "{}\n<image>", "<image>{}", f"{encoder.image_token}{{}}"):
        marked = replace(prompts[0], text=text.format(prompts[0].text))
        assert encoder.prompt_ids(marked) == plain


def test_the_image_is_seen(checkpoint: Path, responses: list[Response]) -> None:
    model = load_lvlm(checkpoint)
    first, second = responses[0], responses[1]
    swapped = response_to(
        Prompt(id="x", image=second.prompt.image, text=first.prompt.text),
        first.token_ids.tolist(),
    )
    own, other = (hf_logprobs(model, checkpoint, [r]).numpy() for r in (first, swapped))
    assert np.abs(own - other).max() > 1e-2


def test_lora_goes_on_the_language_model_and_its_names_map_both_ways(checkpoint: Path) -> None:
    model = load_lvlm(checkpoint)
    family = family_of(model.config)
    in_memory = {name for name, _ in model.named_parameters()}
    public = {family.public_name(name) for name in in_memory}
    assert len(public) == len(in_memory)
    assert {family.public_of_file(name) for name in public} == public
    facts, computed = read_facts(checkpoint), config_facts(model.config)
    assert facts == computed
    assert facts.parameters == sum(value.numel() for value in model.parameters())
    assert facts.vision > 0
    adapted = attach_lora(model, LoraConfig(r=4), seed=0)
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    modules = {tensor_name(name).rpartition(".")[0] for name in trained}
    assert all(module.startswith(f"{family.language}.layers.") for module in modules)
    assert {f"{module}.weight" for module in modules} <= in_memory
    assert len(modules) == 2 * 7
    assert facts.lora_parameters(LoraConfig(r=4)) == sum(p.numel() for p in trained.values())
    set_vision_aside(model, projector=True)
    left = [name for name, _ in model.named_parameters()]
    assert all(family.is_language(name) for name in left)


def test_a_projector_is_trained_or_refused(
    checkpoint: Path, encoder: Encoder, responses: list[Response], tmp_path: Path
) -> None:
    model = load_lvlm(checkpoint)
    family = family_of(model.config)
    if family.project is None:
        with pytest.raises(ConfigError, match=r"policy\.train_projector: the projector of"):
            attach_lora(model, LoraConfig(r=4), seed=0, projector=True)
        return
    images = [response.prompt.image for response in responses[:3]]
    with torch.no_grad():
        found = project(model, FeatureCache(model, encoder, projected=False)(images))
    torch.testing.assert_close(found.rows, FeatureCache(model, encoder)(images).rows)
    config = tiny_config(checkpoint, tmp_path, lr=3e-2)
    policy = config.policy.model_copy(update={"train_projector": True, "temperature": 1.0})
    learner = one_rank(config.model_copy(update={"policy": policy}))
    assert np.isfinite(list(step(learner, responses, 0).values())).all()
    whole = [name for name in learner.publish(1).tensors if "lora_" not in name]
    assert whole
    assert all(name.startswith(f"{family.projector}.") for name in whole)
    learner.save_adapter(tmp_path / "adapter")
    export_merged(checkpoint, tmp_path / "adapter", tmp_path / "out", dtype="float32")
    rows = hf_logprobs(load_lvlm(tmp_path / "out"), tmp_path / "out", responses).numpy()
    expected = np.concatenate(learner.logprobs(responses))
    np.testing.assert_allclose(flat(rows, responses), expected, atol=5e-5)


@pytest.mark.long
def test_a_projector_travels_to_an_engine(
    checkpoint: Path, actor: RolloutActor, responses: list[Response]
) -> None:
    model = load_lvlm(checkpoint)
    family = family_of(model.config)
    if family.project is None:
        pytest.skip("it stays frozen")
    base = flat(hf_logprobs(model, checkpoint, responses).numpy(), responses)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, value in model.named_parameters():
        if name.startswith(f"{family.projector}."):
            value.add_(0.3 * torch.randn(value.shape, generator=generator))
            tensors[name] = value.numpy().copy()
    expected = flat(hf_logprobs(model, checkpoint, responses).numpy(), responses)
    assert np.abs(expected - base).max() > 1e-2
    actor.load_weights(make_manifest(tensors, scaling=1.0, version=1))
    np.testing.assert_allclose(engine_logprobs(actor, responses), expected, atol=2e-4)
    actor.load_weights(make_manifest({}, scaling=1.0, version=0))
    np.testing.assert_allclose(engine_logprobs(actor, responses), base, atol=1e-4)


def reward_settings(checkpoint: Path) -> Config:
    reward = {"lr": 1e-2, "batch_size": 16, "micro_batch": 8, "epochs": 1, "evals": 1}
    return parse_config(
        {
            "policy": {"model": str(checkpoint)},
            "kinds": ["object"],
            "reward": {"lora": {"r": 4, "alpha": 8}, **reward},
        }
    )


def test_a_reward_model_trains_saves_loads_and_scores(
    checkpoint: Path, prompts: list[Prompt], tmp_path: Path
) -> None:
    import reward_samples

    rows = reward_samples.labelled(checkpoint, [prompt.image for prompt in prompts], 24)
    found = local.train_rewards(rows, tmp_path, reward_settings(checkpoint))
    assert np.isfinite(list(found["object"].values())).all()
    model = load_reward_model(tmp_path / "object", checkpoint, dtype="float32")
    encoder = load_reward_encoder(checkpoint, checkpoint, max_image_pixels=10**8)
    assert encoder.reads_policy_ids
    features = FeatureCache(model.backbone, encoder.encoder)
    arguments = {"micro_batch": 4, "device": torch.device("cpu")}
    answers, pieces = [row.response for row in rows], [row.segments for row in rows]
    scores = segment_probs(model, encoder, features, answers, pieces, **arguments)
    assert [len(score) for score in scores] == [len(row.segments) for row in rows]
    alone = segment_probs(model, encoder, features, answers[5:6], pieces[5:6], **arguments)
    np.testing.assert_allclose(alone[0], scores[5], atol=1e-5)


def test_the_value_model_learns_beside_the_frozen_reference(
    checkpoint: Path, responses: list[Response], tmp_path: Path
) -> None:
    actor = ReferenceActor(tiny_config(checkpoint, tmp_path), tmp_path)
    before = actor.evaluate(responses)
    expected = hf_logprobs(load_lvlm(checkpoint), checkpoint, responses, temperature=0.7)
    found = [each.reference_logprobs for each in before]
    np.testing.assert_allclose(np.concatenate(found), flat(expected.numpy(), responses), atol=2e-5)
    report = actor.update_values(make_train_batch(responses, found))
    assert np.isfinite(list(report.metrics.values())).all()
    assert np.abs(actor.evaluate(responses)[0].values - before[0].values).max() > 1e-4


def one_rank(config: Config) -> LearnerActor:
    return LearnerActor(config, 0, 1, "127.0.0.1", free_port())


def step(learner: LearnerActor, responses: list[Response], seed: int) -> dict[str, float]:
    batch = make_train_batch(responses, learner.logprobs(responses), seed=seed)
    asked = [response.prompt for response in responses]
    return learner.update(batch, asked).metrics


def test_training_goes_on_from_a_checkpoint_to_the_bit(
    checkpoint: Path, responses: list[Response], tmp_path: Path
) -> None:
    config = tiny_config(checkpoint, tmp_path, anchor={"weight": 1.0, "batch_size": 3})
    straight, resumed = one_rank(config), one_rank(config)
    assert np.isfinite(list(step(straight, responses, 0).values())).all()
    straight.save(tmp_path / "checkpoint")
    resumed.restore(tmp_path / "checkpoint")
    assert step(straight, responses, 1) != step(straight, responses, 0)
    step(resumed, responses, 1)
    step(resumed, responses, 0)
    assert resumed.publish(2).digest == straight.publish(2).digest


@pytest.fixture(scope="module")
def trained(
    checkpoint: Path, responses: list[Response], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, FloatArray]:
    """An adapter after two PPO steps, and the learner's log-probs with it."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_config(checkpoint, folder, lr=3e-2)
    policy = config.policy.model_copy(update={"temperature": 1.0})
    learner = one_rank(config.model_copy(update={"policy": policy}))
    for seed in range(2):
        figures = step(learner, responses, seed)
        assert np.isfinite(list(figures.values())).all()
    learner.save_adapter(folder / "adapter")
    return folder / "adapter", np.concatenate(learner.logprobs(responses))


@pytest.fixture(scope="module")
def exported(checkpoint: Path, trained: tuple[Path, FloatArray]) -> Path:
    out = trained[0].with_name("exported")
    export_merged(checkpoint, trained[0], out, dtype="float32")
    return out


def test_the_export_loads_in_transformers(
    checkpoint: Path, exported: Path, trained: tuple[Path, FloatArray], responses: list[Response]
) -> None:
    rows = hf_logprobs(load_lvlm(exported), exported, responses).numpy()
    np.testing.assert_allclose(flat(rows, responses), trained[1], atol=5e-5)
    base = flat(hf_logprobs(load_lvlm(checkpoint), checkpoint, responses).numpy(), responses)
    assert np.abs(base - trained[1]).max() > 0.1
    again = transformers_logprobs(exported, load_encoder(exported), responses[0])
    np.testing.assert_allclose(again, trained[1][: len(again)], atol=5e-5)


@pytest.fixture(scope="module")
def engine_runs(checkpoint: Path) -> None:
    if checkpoint.name in NOT_CONFIRMED:
        pytest.skip("engine and learner have not been held against each other; docs/families.md")


@pytest.fixture(scope="module")
def actor(checkpoint: Path, engine_runs: None) -> Iterator[RolloutActor]:
    actor = rollout_actor(checkpoint)
    yield actor
    actor.load_weights(make_manifest({}, scaling=1.0, version=0))


def engine_logprobs(actor: RolloutActor, responses: list[Response]) -> FloatArray:
    return np.concatenate(actor.probe_logprobs(responses))


@pytest.mark.long
def test_the_engines_own_processor_gives_our_ids_and_tensors(
    actor: RolloutActor, encoder: Encoder, prompts: list[Prompt]
) -> None:
    from vllm.multimodal.processing import ProcessorInputs, TimingContext

    processor = actor._engine._processor
    for prompt in prompts:
        image = load_image(prompt.image)
        rendered = encoder.tokenizer(encoder.render(prompt.text))["input_ids"]
        items = processor.info.parse_mm_data({"image": [image]})
        made = processor.apply(ProcessorInputs(rendered, items), TimingContext())
        ours = actor._engine.encode(prompt)
        assert made["prompt_token_ids"] == ours["prompt_token_ids"]
        (theirs,), (own,) = made["mm_kwargs"]["image"], ours["mm_kwargs"]["image"]
        assert theirs.keys() == own.keys()
        for name, element in theirs.items():
            assert torch.equal(element.data, own[name].data), name
        (there,), (here,) = made["mm_placeholders"]["image"], ours["mm_placeholders"]["image"]
        assert there.get_num_embeds() == here.get_num_embeds()


@pytest.mark.long
def test_engine_and_learner_agree_before_and_after_a_merged_sync(
    checkpoint: Path, actor: RolloutActor, trained: tuple[Path, FloatArray],
    responses: list[Response],
) -> None:  # fmt: skip
    base = hf_logprobs(load_lvlm(checkpoint), checkpoint, responses).numpy()
    np.testing.assert_allclose(engine_logprobs(actor, responses), flat(base, responses), atol=1e-4)
    loaded = actor.load_weights(manifest_from_adapter(trained[0], version=2))
    assert loaded.arrived.share == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(engine_logprobs(actor, responses), trained[1], atol=1e-4)
    actor.load_weights(make_manifest({}, scaling=1.0, version=0))
    np.testing.assert_allclose(engine_logprobs(actor, responses), flat(base, responses), atol=1e-4)


@pytest.mark.long
def test_what_the_engine_samples_the_learner_scores_alike(
    checkpoint: Path, actor: RolloutActor, prompts: list[Prompt]
) -> None:
    """The engine's log-probs are of what is left when the image token is banned."""
    model, encoder = load_lvlm(checkpoint), load_encoder(checkpoint)
    sampled = actor.generate(requests(prompts, tokens=12))
    assert all(encoder.image_token_id not in response.token_ids for response in sampled)
    head = model.lm_head
    banned = torch.zeros(head.weight.shape[0])
    banned[encoder.image_token_id] = -100.0
    hook = head.register_forward_hook(lambda module, inputs, output: output + banned)
    rows = hf_logprobs(model, checkpoint, sampled).numpy()
    hook.remove()
    rolled = np.concatenate([response.rollout_logprobs for response in sampled])
    np.testing.assert_allclose(flat(rows, sampled), rolled, atol=1e-4)


@pytest.mark.long
def test_an_engine_serves_the_adapter_unmerged(
    checkpoint: Path,
    engine_runs: None,
    trained: tuple[Path, FloatArray],
    responses: list[Response],
) -> None:
    config = engine_config()
    engine = config.cluster.engine.model_copy(update={"adapters": "unmerged"})
    lora = LoraConfig(r=4, alpha=8.0)
    config = config.model_copy(
        update={
            "cluster": config.cluster.model_copy(update={"engine": engine}),
            "policy": config.policy.model_copy(update={"lora": lora}),
        }
    )
    if not load_encoder(checkpoint).family.serves_adapters:
        with pytest.raises(ConfigError, match="vLLM serves no adapters on"):
            RolloutActor(checkpoint, config)
        return
    served = RolloutActor(checkpoint, config)
    KEPT.append(served)
    loaded = served.load_weights(manifest_from_adapter(trained[0], version=2))
    assert loaded.arrived.share == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(engine_logprobs(served, responses), trained[1], atol=1e-4)


KEPT: list[RolloutActor] = []
"""An engine that is collected takes the process-wide groups of the others along."""


@pytest.mark.long
def test_the_export_loads_in_vllm(
    exported: Path,
    engine_runs: None,
    trained: tuple[Path, FloatArray],
    responses: list[Response],
) -> None:
    fresh = rollout_actor(exported)
    np.testing.assert_allclose(engine_logprobs(fresh, responses), trained[1], atol=1e-4)


def test_every_type_of_every_family_has_a_checkpoint_in_the_table() -> None:
    assert {name for family in FAMILIES for name in family.model_types} == set(BUILDERS)
