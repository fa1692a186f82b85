"""Step 1 after sampling: responses to labelled responses, asking each distinct question once."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from fgaif.errors import ActorError
from fgaif.feedback.facts import ExtractedFacts, FactExtractor, FactVerifier
from fgaif.feedback.labels import label_segments
from fgaif.feedback.segment import segment_responses
from fgaif.feedback.store import VerdictStore
from fgaif.types import FactQuery, LabeledResponse, Response, Segment, Verdict

Progress = Callable[[int, int], None]
"""Called with (facts verified so far, facts in all), those from the store included."""


def annotate(
    responses: Sequence[Response],
    tokenizer: Any,
    extractor: FactExtractor,
    verifier: FactVerifier,
    store: VerdictStore,
    *,
    min_words: int = 5,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> list[LabeledResponse]:
    """Segment, extract, verify and label responses, in order.

    Every batch of verdicts is stored before the next is asked, so a stopped run goes on where it
    was. Verdicts of failed questions are not stored: they label UNKNOWN now and are asked again by
    the next run. ``provenance`` names extractor, verifier, prompt and splitting, the image's hash,
    and the indexes of malformed segments.

    Args:
        tokenizer: the policy's, a ``PreTrainedTokenizerFast``.
        batch_size: questions per call of the verifier.

    Raises:
        DataError: a response that is not the decoding of its ids, or a full disk.
        ActorError: the verifier answered another question than the one asked.
    """
    segments = segment_responses(responses, tokenizer, min_words)
    extracted = extractor.extract(responses, segments)
    queries = _queries(zip(responses, extracted, strict=True))
    verdicts = _verify(queries, verifier, store, batch_size, progress)
    return [
        _labeled(response, parts, found, verdicts, extractor, verifier, min_words)
        for response, parts, found in zip(responses, segments, extracted, strict=True)
    ]


_Key = tuple[str, str]


def _queries(pairs: Iterable[tuple[Response, ExtractedFacts]]) -> dict[_Key, FactQuery]:
    """Distinct questions by (image content, fact text), what facts presuppose included."""
    queries: dict[_Key, FactQuery] = {}
    for response, found in pairs:
        image = response.prompt.image
        for text in _texts(found):
            if (image.sha256, text) not in queries:
                queries[image.sha256, text] = FactQuery(image=image, text=text)
    return queries


def _texts(found: ExtractedFacts) -> dict[str, None]:
    texts: dict[str, None] = {}
    for fact in found.facts:
        texts.update(dict.fromkeys((*fact.requires, fact.text)))
    return texts


def _verify(
    queries: dict[_Key, FactQuery],
    verifier: FactVerifier,
    store: VerdictStore,
    batch_size: int,
    progress: Progress | None,
) -> dict[_Key, Verdict]:
    verdicts: dict[_Key, Verdict] = {}
    missing: list[FactQuery] = []
    for key, query in queries.items():
        known = store.get(verifier.prompt_version, verifier.name, *key)
        if known is None:
            missing.append(query)
        else:
            verdicts[key] = replace(known, query=query)
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        answers = verifier.verify(batch)
        if [answer.query for answer in answers] != batch:
            raise ActorError(f"verifier {verifier.name}: answers do not match the questions")
        given = [
            answer for answer in answers if answer.p_yes is not None or answer.answer != "unknown"
        ]
        store.append(verifier.prompt_version, verifier.name, given)
        verdicts.update(((a.query.image.sha256, a.query.text), a) for a in answers)
        if progress is not None:
            progress(len(verdicts), len(queries))
    return verdicts


def _labeled(
    response: Response,
    segments: tuple[Segment, ...],
    found: ExtractedFacts,
    verdicts: dict[_Key, Verdict],
    extractor: FactExtractor,
    verifier: FactVerifier,
    min_words: int,
) -> LabeledResponse:
    image = response.prompt.image
    own = {
        text: replace(verdicts[image.sha256, text], query=FactQuery(image=image, text=text))
        for text in _texts(found)
    }
    return LabeledResponse(
        response=response,
        segments=segments,
        facts=found.facts,
        verdicts=own,
        labels=label_segments(segments, found.facts, own, found.malformed),
        provenance={
            "extractor": extractor.name,
            "verifier": verifier.name,
            "prompt_version": verifier.prompt_version,
            "min_words": str(min_words),
            "policy_version": str(response.policy_version),
            "image_sha256": image.sha256,
            "malformed": ",".join(map(str, found.malformed)),
        },
    )
