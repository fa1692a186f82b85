"""The rollout actor on a real vLLM engine, compared with Hugging Face on the same weights."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch
from engines import engine_config, photo_prompts, requests, response_to, rollout_actor

from actors.rollout import RolloutActor, _forced
from actors.vllm_engine import answer_ids
from fgaif.config import parse_config
from fgaif.errors import CheckpointError, DataError
from fgaif.lvlm.inputs import load_encoder
from fgaif.lvlm.model import load_lvlm
from fgaif.types import GenerationRequest, Prompt, Response


@pytest.fixture(scope="module")
def actor(tiny_llava_dir: Path) -> RolloutActor:
    return rollout_actor(tiny_llava_dir)


@pytest.fixture(scope="module")
def prompts(photos: Path) -> list[Prompt]:
    return photo_prompts(photos)


class HuggingFace:
    """Log-probs of next tokens, straight from the Hugging Face forward pass."""

    def __init__(self, path: Path) -> None:
        self.model = load_lvlm(path, dtype="float32")
        self.encoder = load_encoder(path)

    @torch.no_grad()
    def logits(self, response: Response) -> torch.Tensor:
        """(T, V): row t predicts token t of the response."""
        prompt = self.encoder.prompt_ids(response.prompt)
        ids = torch.tensor([[*prompt, *response.token_ids.tolist()]])
        pixels = torch.from_numpy(self.encoder.pixels(response.prompt.image)["pixel_values"])
        logits = self.model(input_ids=ids, pixel_values=pixels).logits[0]
        return logits[len(prompt) - 1 : -1]

    def logprobs(self, response: Response, *, temperature: float = 1.0, ban: bool = False):
        logits = self.logits(response) / temperature
        if ban:
            logits[:, self.encoder.image_token_id] -= 100 / temperature
        rows = torch.arange(len(response.token_ids))
        return logits.log_softmax(-1)[rows, torch.from_numpy(response.token_ids)].numpy()


@pytest.fixture(scope="module")
def hugging_face(tiny_llava_dir: Path) -> HuggingFace:
    return HuggingFace(tiny_llava_dir)


def test_responses_keep_order_and_do_not_depend_on_the_batch(
    actor: RolloutActor, prompts: list[Prompt]
) -> None:
    asked = requests(prompts)
    together = actor.generate(asked)
    assert [response.prompt for response in together] == prompts
    backwards = actor.generate(asked[::-1])[::-1]
    alone = actor.generate(asked[2:3])[0]
    for one, other in zip(together, backwards, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
    np.testing.assert_array_equal(alone.token_ids, together[2].token_ids)
    reseeded = actor.generate([replace(asked[2], seed=99)])[0]
    assert reseeded.token_ids.tolist() != alone.token_ids.tolist()


def test_the_same_requests_give_the_same_bits_whatever_came_before(
    actor: RolloutActor, prompts: list[Prompt]
) -> None:
    """Not after other prompts about the same images, nor with prefixes of theirs in the cache."""
    long = [replace(prompt, text="What do you see in this photograph? " * 9) for prompt in prompts]
    asked = requests(long[:3])
    first = actor.generate(asked)
    actor.generate(requests([*long[2:], *prompts]))
    actor.generate(asked[1:])
    again = actor.generate(asked)
    for before, after in zip(first, again, strict=True):
        np.testing.assert_array_equal(after.token_ids, before.token_ids)
        assert after.rollout_logprobs.tobytes() == before.rollout_logprobs.tobytes()


def test_logprobs_are_those_of_the_sampled_distribution(
    actor: RolloutActor, prompts: list[Prompt], hugging_face: HuggingFace
) -> None:
    for temperature in (1.0, 0.7):
        for response in actor.generate(requests(prompts[:3], temperature=temperature)):
            expected = hugging_face.logprobs(response, temperature=temperature, ban=True)
            np.testing.assert_allclose(response.rollout_logprobs, expected, atol=1e-4)


def test_greedy_takes_the_most_likely_token(
    actor: RolloutActor, prompts: list[Prompt], hugging_face: HuggingFace
) -> None:
    for response in actor.generate(requests(prompts[:3], temperature=0.0)):
        logits = hugging_face.logits(response)
        logits[:, hugging_face.encoder.image_token_id] = -torch.inf
        taken = logits[torch.arange(len(logits)), torch.from_numpy(response.token_ids)]
        torch.testing.assert_close(taken, logits.amax(-1), atol=1e-4, rtol=0)


def test_a_prefix_is_gone_on_from(actor: RolloutActor, prompts: list[Prompt]) -> None:
    asked = requests(prompts[:2], temperature=0.0)
    for request, whole in zip(asked, actor.generate(asked), strict=True):
        prefix = tuple(whole.token_ids[:3].tolist())
        left = request.max_new_tokens - len(prefix)
        (rest,) = actor.generate([replace(request, prefix=prefix, max_new_tokens=left)])
        assert rest.token_ids.tolist() == whole.token_ids.tolist()
        assert rest.text == whole.text
        assert not rest.rollout_logprobs[:3].any()
        np.testing.assert_allclose(rest.rollout_logprobs[3:], whole.rollout_logprobs[3:], atol=1e-4)


def test_eos_ends_a_response_and_belongs_to_it(
    actor: RolloutActor, prompts: list[Prompt], hugging_face: HuggingFace
) -> None:
    responses = actor.generate(requests(prompts * 8, tokens=64))
    eos = hugging_face.encoder.tokenizer.eos_token_id
    ended = [response for response in responses if response.finish == "stop"]
    assert 0 < len(ended) < len(responses)
    for response in responses:
        assert (response.token_ids[-1] == eos) == (response.finish == "stop")
        assert eos not in response.token_ids[:-1]
        assert hugging_face.encoder.image_token_id not in response.token_ids
        assert "</s>" not in response.text
        assert response.policy_version == 0


def test_a_prompt_that_cannot_fit_is_refused_by_name(
    actor: RolloutActor, prompts: list[Prompt]
) -> None:
    with pytest.raises(DataError, match=rf"prompt {prompts[0].id}: .*max_model_len"):
        actor.generate(requests(prompts[:1], tokens=100_000))


def test_probe_equals_teacher_forcing(
    actor: RolloutActor, prompts: list[Prompt], hugging_face: HuggingFace
) -> None:
    probes = [response_to(prompts[0], [9, 50, 33, 2]), response_to(prompts[1], [77])]
    for found, probe in zip(actor.probe_logprobs(probes), probes, strict=True):
        np.testing.assert_allclose(found, hugging_face.logprobs(probe), atol=1e-4)


def test_forced_logprobs_are_rescaled_to_the_sampling_temperature() -> None:
    """Scores of 3 tokens, own token first; at temperature 0.5 p becomes p^2 / sum p^2."""
    row = np.log([0.5, 0.25, 0.25])
    flat = SimpleNamespace(
        logprobs=[*[0.0] * 4, row[0], *row, row[2], *row],
        start_indices=[0, 4, 8],
        end_indices=[4, 8, 12],
    )
    found = _forced(SimpleNamespace(prompt_logprobs=flat), 2, temperature=0.5)
    np.testing.assert_allclose(np.exp(found), [0.25 / 0.375, 0.0625 / 0.375], rtol=1e-6)


def test_p_yes_is_the_share_of_yes_in_the_first_token(
    actor: RolloutActor, prompts: list[Prompt], hugging_face: HuggingFace
) -> None:
    questions = [replace(p, text=text) for text in ("Yes?", "Is it right?") for p in prompts]
    yes, no = answer_ids(hugging_face.encoder.tokenizer)
    for found, prompt in zip(actor.p_yes(questions), questions, strict=True):
        chances = hugging_face.logits(response_to(prompt, [0]))[0].softmax(-1)
        share = chances[list(yes)].sum() / chances[[*yes, *no]].sum()
        assert found == pytest.approx(float(share), abs=1e-5)


def test_answers_that_begin_alike_are_refused() -> None:
    def tokenizer(text: str, **_: bool) -> dict[str, list[int]]:
        return {"input_ids": [1, *map(ord, text)]}

    with pytest.raises(CheckpointError, match="same token"):
        answer_ids(tokenizer)


@pytest.mark.long
def test_as_a_ray_actor(actor: RolloutActor, prompts: list[Prompt], tiny_llava_dir: Path) -> None:
    """Responses cross the process border unchanged, and the engine's own seed plays no part."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        remote = ray.remote(RolloutActor).options(num_cpus=1)
        handle = remote.remote(tiny_llava_dir, engine_config())
        found = ray.get(handle.generate.remote(requests(prompts)))
        assert ray.get(handle.stats.remote()).requests == len(prompts)
    finally:
        ray.shutdown()
    for one, other in zip(actor.generate(requests(prompts)), found, strict=True):
        assert one.text == other.text
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_allclose(one.rollout_logprobs, other.rollout_logprobs, atol=1e-5)


@pytest.mark.slow
def test_long_prompts_that_do_not_fit_one_pass_are_sampled(llava15_dir: Path, photos: Path) -> None:
    """Sixteen prompts of 590 tokens are more than vLLM takes at once: a seeded one that was cut
    ended in "CPU Generator does not use offset"."""
    config = parse_config(
        {"cluster": {"engine": {"max_num_seqs": 16, "max_model_len": 1024, "kv_cache_mib": 64}}}
    )
    actor = RolloutActor(llava15_dir, config)
    (prompt, *_) = photo_prompts(photos)
    asked = [
        GenerationRequest(prompt=prompt, sample=i, seed=i, max_new_tokens=4) for i in range(16)
    ]
    found = actor.generate(asked)
    assert [response.sample for response in found] == list(range(16))
