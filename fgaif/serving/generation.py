"""``/v1/generate``: the policy's answer, the best of several, or one that is watched over."""

from typing import Protocol

from fgaif.chat.messages import gather_all
from fgaif.data.images import ImageBytes
from fgaif.data.order import request_seed
from fgaif.reward.dense import end_reward
from fgaif.serving.guard import Guarded, GuardSettings, segment_risks
from fgaif.serving.schema import GenerateRequest, GenerateResponse, ModelRef, TextResult
from fgaif.serving.scoring import Sampled, SampleInput, ScoreInput, ScoreOutput


class Sampler(Protocol):
    """Lets the policy answer."""

    async def generate(self, item: SampleInput) -> Sampled:
        """One answer; raises ApiError where none can be had."""


class Models(Protocol):
    """What an answer needs: a policy, reward models, and their name."""

    @property
    def backend(self) -> Sampler:
        """Samples."""

    async def scored(self, item: ScoreInput) -> tuple[list[TextResult], ScoreOutput]:
        """Scores."""

    def model_ref(self, version: str) -> ModelRef:
        """Names the reward models of a version."""


async def generate(models: Models, image: ImageBytes, request: GenerateRequest) -> GenerateResponse:
    """Answer a request."""
    if request.best_of == 1 and request.guard is None:
        sampled = await models.backend.generate(_input(image, request, request.seed))
        return GenerateResponse(text=sampled.text, finish=sampled.finish)
    seeds = [request.seed]
    seeds += [request_seed(request.seed, "best-of", at) for at in range(1, request.best_of)]
    if request.guard is None:
        answers = [
            _as_taken(sampled)
            for sampled in await gather_all(
                models.backend.generate(_input(image, request, seed)) for seed in seeds
            )
        ]
    else:
        answers = await gather_all(_guarded(models, image, request, seed) for seed in seeds)
    scored = ScoreInput(
        image=image,
        prompt=request.prompt,
        texts=tuple(answer.text for answer in answers),
        token_ids=tuple(answer.prefix for answer in answers),
    )
    results, output = await models.scored(scored)
    rewards = [
        result.total + end_reward(answer.finish != "length", len(answer.prefix), output.shape)
        for result, answer in zip(results, answers, strict=True)
    ]
    best = max(range(len(answers)), key=lambda at: (rewards[at], -at))
    return GenerateResponse(
        text=results[best].text,
        finish=answers[best].finish or "stop",
        result=results[best],
        rewards=rewards,
        resampled=sum(a.resampled for a in answers) if request.guard is not None else None,
        unsafe=answers[best].unsafe,
        model=models.model_ref(output.version),
    )


async def _guarded(
    models: Models, image: ImageBytes, request: GenerateRequest, seed: int
) -> Guarded:
    assert request.guard is not None, "asked for without one"
    settings = GuardSettings(threshold=request.guard.threshold, tries=request.guard.tries)
    state = Guarded(settings=settings, first_seed=seed)
    while state.finish is None:
        sampled = await models.backend.generate(_input(image, request, state.seed, state.prefix))
        item = ScoreInput(
            image=image,
            prompt=request.prompt,
            texts=(sampled.text,),
            token_ids=(sampled.token_ids,),
        )
        _, output = await models.scored(item)
        (text,) = output.texts
        risks = segment_risks(text.probs)
        state.take(sampled.text, sampled.token_ids, sampled.finish, text.segments, risks)
    return state


def _as_taken(sampled: Sampled) -> Guarded:
    """An answer that nobody watched over."""
    return Guarded(
        settings=GuardSettings(),
        prefix=sampled.token_ids,
        text=sampled.text,
        finish=sampled.finish,
    )


def _input(
    image: ImageBytes, request: GenerateRequest, seed: int, prefix: tuple[int, ...] = ()
) -> SampleInput:
    return SampleInput(
        image=image,
        prompt=request.prompt,
        temperature=request.sampling_temperature,
        max_new_tokens=request.max_new_tokens - len(prefix),
        seed=seed,
        prefix=prefix,
    )
