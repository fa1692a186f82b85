"""The nouns of FGAIF: what travels between stages and between actors.

Letters for axes: ``B`` response in a batch, ``T`` token of a response, ``S`` segment (sub-sentence)
of a response, ``K`` kind of hallucination (object, attribute, ...), ``C`` class (NONE, OK, HALLU),
``V`` vocabulary. Ragged things are tuples of arrays, padded things are 2-D arrays; a name never
changes layout. Messages hold numpy arrays: tensors are made at the edge, on the right device.
"""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fgaif.errors import DataError

Kind = str
"""A kind of hallucination by its name; ``kinds`` of the configuration says which there are."""
DEFAULT_KINDS: tuple[Kind, ...] = ("object", "attribute", "relation")
"""FGAIF's kinds: those of a configuration that names none, and of files that name none."""
FinishReason = Literal["stop", "length"]
Answer = Literal["yes", "no", "unknown"]
Problem = Literal["", "failed", "unreadable"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]


class SegmentClass(IntEnum):
    """Label of a segment for one kind (method: three classes per sub-sentence and kind)."""

    NONE = 0
    """No fact of this kind in the segment."""
    OK = 1
    """Facts of this kind exist and all agree with the image."""
    HALLU = 2
    """At least one fact of this kind contradicts the image."""


UNKNOWN = -1
"""Label of a segment whose facts could not all be judged: left out of training, and counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRef:
    """An image by path and content hash; pixels never travel inside records."""

    path: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A question about an image. ``text`` is the user's text without template and image token.

    ``answer`` is the right one where one word tells it (yes, no, a letter); empty elsewhere.
    """

    id: str
    image: ImageRef
    text: str
    answer: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One response to sample; ``seed`` makes it independent of batching, temperature 0 greedy.

    ``prefix`` are ids that the response begins with; ``max_new_tokens`` come after them.
    """

    prompt: Prompt
    sample: int = 0
    seed: int = 0
    temperature: float = 1.0
    max_new_tokens: int = 128
    prefix: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """A sampled response with the ids the policy really produced.

    ``token_ids`` (T,) end with EOS if ``finish == "stop"``; ``rollout_logprobs`` (T,) are the
    engine's, EOS included; ``text`` is the decoding of the ids without special tokens.
    """

    prompt: Prompt
    sample: int
    text: str
    token_ids: IntArray
    rollout_logprobs: FloatArray
    finish: FinishReason
    policy_version: int

    def __post_init__(self) -> None:
        if self.token_ids.shape != self.rollout_logprobs.shape:
            raise DataError(
                f"response {self.id}: {self.token_ids.shape[0]} token ids but "
                f"{self.rollout_logprobs.shape[0]} log-probabilities; both must be (T,)"
            )

    @property
    def id(self) -> str:
        """Key of the response within a run: prompt id and sample index."""
        return f"{self.prompt.id}#{self.sample}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A sub-sentence: ``text[char_start:char_end]`` and ``token_ids[token_start:token_end]``.

    The spans of a response partition its text and its tokens (EOS belongs to no segment).
    ``token_end - 1`` is T_i, the token on which the segment's reward lands.
    """

    index: int
    char_start: int
    char_end: int
    token_start: int
    token_end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """An atomic fact stated by segment ``segment``, as a short English statement.

    ``requires`` holds the texts of facts it presupposes ("There is a red moon." requires "There is
    a moon."): when one of them is judged false, this fact is void and counts for no label.
    """

    kind: Kind
    text: str
    segment: int
    requires: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FactQuery:
    """A distinct fact of an image to be checked once; ``kind`` may have a prompt of its own."""

    image: ImageRef
    text: str
    kind: Kind | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The verifier's answer to one query. ``p_yes`` in [0, 1] where the model gives it.

    ``problem`` says why nothing could be told: no reply, or none that could be read; an answer of
    ``unknown`` without one is the model's own doubt. ``votes`` are those of a panel's members.
    """

    query: FactQuery
    answer: Answer
    p_yes: float | None = None
    problem: Problem = ""
    votes: tuple[Answer, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LabeledResponse:
    """A response with its segments, facts, verdicts by fact text, and labels (S, K) by kinds."""

    response: Response
    kinds: tuple[Kind, ...]
    segments: tuple[Segment, ...]
    facts: tuple[Fact, ...]
    verdicts: dict[str, Verdict]
    labels: IntArray
    provenance: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.labels.shape != (len(self.segments), len(self.kinds)):
            raise DataError(
                f"response {self.response.id}: labels {self.labels.shape} for "
                f"{len(self.segments)} segments and the kinds {', '.join(self.kinds)}"
            )

    def of_kind(self, kind: Kind) -> IntArray:
        """Labels (S,) of one kind; raises DataError where it is none of ``kinds``."""
        if kind not in self.kinds:
            raise DataError(
                f"response {self.response.id}: no labels of the kind {kind}, only of "
                f"{', '.join(self.kinds)}"
            )
        return self.labels[:, self.kinds.index(kind)]


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentScores:
    """Class probabilities of one response: ``probs`` (S, K, C), each row summing to one.

    ``reward`` is what a preference model pays for the response as a whole; its probs say NONE.
    """

    probs: FloatArray
    reward: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Reference log-probs and values of one response: both (T,); values[t] = V(prefix before t).

    Without a critic there are no values.
    """

    reference_logprobs: FloatArray
    values: FloatArray | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """Rollouts ready for PPO. All arrays (B, T), right-padded with zeros where ``mask`` is 0.

    ``task_rewards`` are the per-token rewards before the KL term; ``rewards`` include it.
    ``advantages`` are those of the estimator. With a critic they are whitened over valid tokens,
    and ``returns`` = unwhitened advantages + values; without one, values and returns are None.
    ``weights`` are importance weights of the policy's loss per token, None for all ones;
    ``kl_loss_coef`` is the KL term's coefficient where it is in the loss and not in the rewards.
    """

    responses: tuple[Response, ...]
    mask: FloatArray
    old_logprobs: FloatArray
    reference_logprobs: FloatArray
    values: FloatArray | None
    task_rewards: FloatArray
    rewards: FloatArray
    advantages: FloatArray
    returns: FloatArray | None
    weights: FloatArray | None = None
    kl_loss_coef: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsManifest:
    """A published version of the policy: all that differs from its checkpoint, as float32 arrays.

    ``tensors`` maps ``"<module>.lora_A"`` (r, in) and ``"<module>.lora_B"`` (out, r), whose
    ``scaling * B @ A`` is added to the module's weight, and whole weights by parameter name
    (``model.multi_modal_projector.linear_1.weight``), which replace the checkpoint's. Names are
    Hugging Face's; ``digest`` covers names, shapes and bytes.
    """

    version: int
    digest: str
    scaling: float
    tensors: dict[str, FloatArray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrived:
    """Share of the policy's update that an engine holds, over all layers and of the extreme ones.

    1 is all of it, 0 none; see ``fgaif/lvlm/arrival.py``.
    """

    share: float = 1.0
    weakest: float = 1.0
    weakest_layer: str = ""
    strongest: float = 1.0
    strongest_layer: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedWeights:
    """What an engine found after loading a version: the version, the share of it that arrived, and
    log-probs (T,) of the probe's responses, with the version and without (where it can)."""

    version: int
    arrived: Arrived = field(default_factory=Arrived)
    logprobs: tuple[FloatArray, ...] = ()
    base_logprobs: tuple[FloatArray, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """What an update of the policy or of the value model did; scalars by metric name."""

    metrics: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One PPO step as logged: step, policy version trained on, scalar metrics by dotted name."""

    step: int
    version: int
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionMetrics:
    """How a set of captions fares; None where the truth that a figure needs is not known.

    ``kinds``: by kind, hallucinated share of the segments that have facts of it; ``any``: of the
    segments that have facts of some kind. ``chair_s``, ``chair_i``, ``recall``: CHAIR and object
    recall. Per caption: ``true_facts`` (distinct, true) and ``length`` (tokens without EOS).
    ``repetition``, ``malformed``: share of the segments. ``specificity``: distinct attribute facts
    per distinct object fact; a policy that hedges names things and says nothing of them.
    """

    kinds: dict[Kind, float | None]
    any: float | None
    chair_s: float | None
    chair_i: float | None
    recall: float | None
    true_facts: float | None
    length: float
    repetition: float
    malformed: float | None
    specificity: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PopeMetrics:
    """Yes/no test of object presence; "yes" is the positive class, all figures in [0, 1]."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """One policy on the held-out prompts. ``pope`` is the mean over ``pope_by_strategy``.

    ``greedy`` and ``sampled`` are as ``judge`` sees the captions, ``others`` as further judges do,
    by their names; ``judging`` is what asking the judges took (requests, tokens, cost).
    """

    greedy: CaptionMetrics
    sampled: CaptionMetrics
    pope: PopeMetrics | None = None
    pope_by_strategy: dict[str, PopeMetrics] = field(default_factory=dict)
    judge: str = ""
    others: dict[str, "CaptionView"] = field(default_factory=dict)
    judging: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionView:
    """The captions of an evaluation as one judge sees them, in both ways of decoding."""

    greedy: CaptionMetrics
    sampled: CaptionMetrics


Json = dict[str, Any]
