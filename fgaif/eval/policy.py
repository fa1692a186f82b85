"""Evaluate one policy: the same prompts and seeds before and after, greedy and sampled."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from fgaif.config import Config
from fgaif.errors import DataError
from fgaif.eval.benchmarks.pope import mean_metrics, pope_metrics
from fgaif.eval.captions import JudgedCaption, caption_metrics
from fgaif.eval.pope_questions import STRATEGIES, PopeQuestion
from fgaif.types import (
    CaptionView,
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
Review = Callable[[Sequence[JudgedCaption]], list[JudgedCaption]]
"""The same captions as another judge sees them, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Captions:
    """The judged captions of one policy, in the order of the prompts.

    ``others`` are the same captions as further judges see them, by the judges' names.
    """

    greedy: tuple[JudgedCaption, ...]
    sampled: tuple[JudgedCaption, ...]
    others: dict[str, "Captions"] = field(default_factory=dict)

    def of(self, mode: Mode) -> tuple[JudgedCaption, ...]:
        """Return the captions of one decoding mode."""
        return self.greedy if mode == "greedy" else self.sampled


@dataclass(frozen=True, slots=True, kw_only=True)
class PopeAnswer:
    """A yes/no question and whether the policy said yes."""

    question: PopeQuestion
    yes: bool


def evaluate_policy(
    generate: Generate,
    p_yes: PYes,
    prompts: Sequence[Prompt],
    *,
    judge: Judge,
    judge_name: str = "",
    others: Mapping[str, Review] | None = None,
    questions: Sequence[PopeQuestion] = (),
    config: Config,
) -> tuple[EvalReport, Captions, list[PopeAnswer]]:
    """Caption the held-out prompts twice, judge the captions, and put the yes/no questions.

    Requests depend on the prompts and ``config.eval.seed`` alone, so two policies get the same.
    ``others`` look at the captions after the judge, in order.

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
    reviews = {name: review(judged) for name, review in (others or {}).items()}
    others_see = {name: _captions(review) for name, review in reviews.items()}
    captions = replace(_captions(judged), others=others_see)
    answers = ask_pope(p_yes, questions)
    by_strategy = pope_by_strategy(answers)
    view = _view(captions, config)
    report = EvalReport(
        greedy=view.greedy,
        sampled=view.sampled,
        pope=mean_metrics(list(by_strategy.values())) if by_strategy else None,
        pope_by_strategy=by_strategy,
        judge=judge_name,
        others={name: _view(other, config) for name, other in others_see.items()},
    )
    return report, captions, answers


def _captions(judged: Sequence[JudgedCaption]) -> Captions:
    """Greedy ones come first, as they were asked for."""
    half = len(judged) // 2
    return Captions(greedy=tuple(judged[:half]), sampled=tuple(judged[half:]))


def _view(captions: Captions, config: Config) -> CaptionView:
    greedy, sampled = (caption_metrics(captions.of(mode), config.kind_names) for mode in MODES)
    return CaptionView(greedy=greedy, sampled=sampled)


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


def ask_pope(p_yes: PYes, questions: Sequence[PopeQuestion]) -> list[PopeAnswer]:
    """Put each distinct question once; yes means p(yes) >= 0.5. Answers are in order."""
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
    return [PopeAnswer(question=q, yes=yes[q.image.sha256, q.text] >= 0.5) for q in questions]


def pope_by_strategy(answers: Sequence[PopeAnswer]) -> dict[str, PopeMetrics]:
    """Score the answers of every strategy that there are questions of."""
    scores: dict[str, PopeMetrics] = {}
    for strategy in STRATEGIES:
        asked = [answer for answer in answers if answer.question.strategy == strategy]
        if asked:
            labels = [answer.question.label for answer in asked]
            scores[strategy] = pope_metrics([answer.yes for answer in asked], labels)
    return scores
