"""What an annotation will ask and about what it will cost, before anything is asked."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from fgaif.chat.limits import estimate, has_price
from fgaif.chat.messages import ChatRequest
from fgaif.config import API, Config
from fgaif.feedback.extract import asks_in_text, load_facts_prompt
from fgaif.feedback.segment import split_offsets
from fgaif.feedback.verify import load_fact_prompt
from fgaif.types import ImageRef, LabeledResponse, Response

FACTS_PER_SEGMENT = 2.0
SEGMENTS_PER_RESPONSE = 6.0
"""Assumed where nothing was labelled or sampled yet: a detailed description of a photograph."""
_SAMPLE = 500
_FACT_TOKENS = 15
_YES_NO_TOKENS = 2
_NO_IMAGE = ImageRef(path="", sha256="")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Averages over responses: characters, segments, and facts that are asked about."""

    chars: float
    segments: float
    facts: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What one model will be asked; ``tokens`` and ``cost`` are about what it will come to,
    ``priced`` is False where an endpoint has no price."""

    role: str
    model: str
    requests: int
    tokens: int
    cost: float
    priced: bool = True


def measure(
    labeled: Iterable[LabeledResponse], responses: Iterable[Response], config: Config
) -> Sizes:
    """Averages of the first labelled responses, else of the first sampled ones, else assumed."""
    known = list(islice(labeled, _SAMPLE))
    if known:
        return Sizes(
            chars=sum(len(item.response.text) for item in known) / len(known),
            segments=sum(len(item.segments) for item in known) / len(known),
            facts=sum(len(item.verdicts) for item in known) / len(known),
        )
    texts = [response.text for response in islice(responses, _SAMPLE)]
    if texts:
        pieces = [len(split_offsets(text, config.segment.least_words)) - 1 for text in texts]
        segments = sum(pieces) / len(texts)
        chars = sum(map(len, texts)) / len(texts)
        return Sizes(chars=chars, segments=segments, facts=segments * FACTS_PER_SEGMENT)
    segments = SEGMENTS_PER_RESPONSE
    return Sizes(chars=80 * segments, segments=segments, facts=segments * FACTS_PER_SEGMENT)


def plan_feedback(config: Config, responses: int, sizes: Sizes) -> list[Asked]:
    """Requests, tokens and money for ``responses`` responses, per model that is asked."""
    feedback = config.feedback
    plan: list[Asked] = []
    if feedback.extractor == "model" or feedback.extractor.startswith(API):
        per_segment = feedback.extract_per == "segment"
        prompt = load_facts_prompt(
            config.kinds,
            feedback.extract_per,
            text_form=asks_in_text(config),
            folder=feedback.prompts_dir,
        )
        count = responses * (sizes.segments if per_segment else 1)
        written = int(_FACT_TOKENS * sizes.facts / (sizes.segments if per_segment else 1))
        request = ChatRequest(
            prompt_version=prompt.version,
            subject="",
            text=prompt.text + "x" * int(sizes.chars),
            max_tokens=written,
        )
        name = feedback.extractor
        model = (feedback.local_verifier or name) if name == "model" else name
        plan.append(_asked("extractor", model, count, request, config))
    question = load_fact_prompt(feedback.prompt)
    request = ChatRequest(
        prompt_version=question.version,
        subject="",
        text=question.text + "x" * 40,
        image=_NO_IMAGE,
        max_tokens=_YES_NO_TOKENS,
    )
    plan += [
        _asked("verifier", name, responses * sizes.facts, request, config)
        for name in feedback.verifiers
    ]
    return plan


def _asked(role: str, model: str, count: float, request: ChatRequest, config: Config) -> Asked:
    requests = round(count)
    endpoint = config.endpoints.get(model.removeprefix(API)) if model.startswith(API) else None
    if endpoint is None:
        return Asked(role=role, model=Path(model).name, requests=requests, tokens=0, cost=0.0)
    each = estimate(request, endpoint)
    return Asked(
        role=role,
        model=f"{model} ({endpoint.model})",
        requests=requests,
        tokens=requests * each.tokens,
        cost=requests * each.cost,
        priced=has_price(endpoint),
    )
