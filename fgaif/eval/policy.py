"""Evaluate one policy: the same prompts and seeds before and after, greedy and sampled."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from fgaif.config import Config
from fgaif.errors import DataError
from fgaif.eval.benchmarks.pope import mean_metrics, pope_metrics
from fgaif.eval.captions import JudgedCaption, caption_metrics
from fgaif.eval.pope_questions import STRATEGIES, PopeQuestion
from fgaif.types import (
    EvalReport,
    GenerationRequest,
    PopeMetrics,
    Prompt,
    Response,
)

Mode = Literal["greedy", "sampled"]
MODES: tuple[Mode, ...] = get_args(Mode)

Generate = Callable[[Sequence[GenerationRequest]], list[Response]]
"""One response per request, in order."""
PYes = Callable[[Sequence[Prompt]], list[float]]
"""Probability of yes rather than no, per prompt."""
Judge = Callable[[Sequence[Response]], list[JudgedCaption]]
"""Segments, facts and labels of each response, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Captions:
    """The judged captions of one policy, in the order of the prompts."""

    greedy: tuple[JudgedCaption, ...]
    sampled: tuple[JudgedCaption, ...]

    def of(self, mode: Mode) -> tuple[JudgedCaption, ...]:
        """Return the captions of one decoding mode."""
        return self.greedy if mode == "greedy" else self.sampled


def evaluate_policy(
    generate: Generate,
    p_yes: PYes,
    prompts: Sequence[Prompt],
    *,
    judge: Judge,
    questions: Sequence[PopeQuestion] = (),
    config: Config,
) -> tuple[EvalReport, Captions]:
    """Caption the held-out prompts twice, judge the captions, and put the yes/no questions.

    Requests depend on the prompts and ``config.eval.seed`` alone, so two policies get the same.

    Raises:
        DataError: no prompts, or an engine that lost a response.
    """
    if not prompts:
        raise DataError("evaluation: no held-out prompts; check data.held_out")
    requests = [
        *eval_requests(prompts, "greedy", config),
        *eval_requests(prompts, "sampled", config),
    ]
    judged = judge(_in_order(generate(requests), requests))
    captions = Captions(greedy=tuple(judged[: len(prompts)]), sampled=tuple(judged[len(prompts) :]))
    by_strategy = ask_pope(p_yes, questions)
    report = EvalReport(
        greedy=caption_metrics(captions.greedy, config.kind_names),
        sampled=caption_metrics(captions.sampled, config.kind_names),
        pope=mean_metrics(list(by_strategy.values())) if by_strategy else None,
        pope_by_strategy=by_strategy,
    )
    return report, captions


def eval_requests(prompts: Sequence[Prompt], mode: Mode, config: Config) -> list[GenerationRequest]:
    """One request per prompt: greedy, or sampled at the policy's temperature with its own seed."""
    return [
        GenerationRequest(
            prompt=prompt,
            sample=MODES.index(mode),
            seed=config.eval.seed * 1_000_000 + index,
            temperature=0.0 if mode == "greedy" else config.policy.temperature,
            max_new_tokens=config.policy.max_new_tokens,
        )
        for index, prompt in enumerate(prompts)
    ]


def _in_order(
    responses: Sequence[Response], requests: Sequence[GenerationRequest]
) -> Sequence[Response]:
    got = [(response.prompt.id, response.sample) for response in responses]
    if got != [(request.prompt.id, request.sample) for request in requests]:
        raise DataError(
            f"evaluation: asked for {len(requests)} captions and got {len(responses)}, or another "
            "order; each request must bring one response"
        )
    return responses


def ask_pope(p_yes: PYes, questions: Sequence[PopeQuestion]) -> dict[str, PopeMetrics]:
    """Put each distinct question once and score every strategy; yes means p(yes) >= 0.5."""
    distinct = {(question.image.sha256, question.text): question for question in questions}
    prompts = [
        Prompt(id=f"pope-{index}", image=question.image, text=question.text)
        for index, question in enumerate(distinct.values())
    ]
    yes = dict(zip(distinct, p_yes(prompts) if prompts else [], strict=True))
    if lost := [q for q in distinct.values() if math.isnan(yes[q.image.sha256, q.text])]:
        raise DataError(
            f"evaluation: {len(lost)} of {len(distinct)} yes/no questions got no answer, the first "
            f"about {lost[0].image.path}: {lost[0].text!r}; leave out that image"
        )
    scores: dict[str, PopeMetrics] = {}
    for strategy in STRATEGIES:
        asked = [question for question in questions if question.strategy == strategy]
        if asked:
            answers = [yes[question.image.sha256, question.text] >= 0.5 for question in asked]
            scores[strategy] = pope_metrics(answers, [question.label for question in asked])
    return scores
