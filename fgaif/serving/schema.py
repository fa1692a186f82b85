"""The messages of the scoring API; server and client share them, OpenAPI is made of them.

Rewards are PPO's, made by ``fgaif/reward/dense.py`` with the shape that ``/v1/models`` tells, as
far as image and text decide them: without the run's centres and the terms of the whole response
(see docs/serving.md). For segment i and kind k the reward is w_k v_{i,k}, by default w_k (p_OK -
p_HALLU); a segment's is the sum over kinds minus its penalty, a text's total the sum over segments.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from fgaif.data.scenes.questions import DESCRIBE
from fgaif.types import Kind

DEFAULT_PROMPT = DESCRIBE
MAX_TEXT_CHARS = 20_000
MAX_TEXTS = 64
MAX_ITEMS = 64
MAX_TEXTS_PER_REQUEST = 512
MAX_PROMPT_CHARS = 4_000
MAX_MIN_WORDS = 100
MAX_BEST_OF = 16

ErrorType = Literal[
    "invalid_request", "unauthorized", "too_large", "overloaded", "timeout", "internal"
]

# The characters of str.isspace, spelled out: what \S leaves out differs between the regular
# expressions of pydantic, of Python and of JSON Schema (U+0085, U+001C to U+001F, U+FEFF).
NOT_BLANK = r"[^\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
SMALL_NUMBER = r"^([1-9][0-9]?|100)$"
"""A number from 1 to ``MAX_MIN_WORDS`` in a form."""
ShapeSource = Literal["card", "default", "config"]

Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT_CHARS, pattern=NOT_BLANK)]
"""A text to score: something that is not white space."""
Question = Annotated[str, Field(max_length=MAX_PROMPT_CHARS)]
ImageText = Annotated[str, Field(min_length=1, json_schema_extra={"format": "image"})]
"""An image as a data URI (``data:image/png;base64,...``), as base64 alone, or, where the server
allows it, as an https URL."""


def _integral(value: Any) -> Any:
    # JSON has one kind of number: 5.0 is an integer to its schemas.
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Integer = Annotated[int, BeforeValidator(_integral)]
_MinWords = Annotated[int, Field(ge=1, le=MAX_MIN_WORDS), BeforeValidator(_integral)]


class _ApiMessage(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class _ApiRequest(_ApiMessage):
    # Strict: what is accepted is what OpenAPI says.
    model_config = ConfigDict(extra="forbid", strict=True)


class ScoreRequest(_ApiRequest):
    """One image and one or more texts about it."""

    text: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS)]
    """The answer to judge, or a list of answers to the same question."""
    image: ImageText
    """Data URI, base64, or an https URL where the server allows it."""
    prompt: Question = DEFAULT_PROMPT
    """The question that the text answers."""
    facts: bool = False
    """Also list each segment's facts, where the server can tell them."""
    min_words: _MinWords | None = None
    """Fewest words of a piece cut at a comma; default: what the reward models were trained with."""

    @property
    def texts(self) -> list[str]:
        """The texts as a list."""
        return [self.text] if isinstance(self.text, str) else self.text


class BatchRequest(_ApiRequest):
    """Several score requests at once; one that fails does not fail the others."""

    items: list[ScoreRequest] = Field(min_length=1, max_length=MAX_ITEMS)

    @model_validator(mode="after")
    def _not_too_many(self) -> Self:
        count = sum(len(item.texts) for item in self.items)
        if count > MAX_TEXTS_PER_REQUEST:
            raise ValueError(f"{count} texts in one request; send at most {MAX_TEXTS_PER_REQUEST}")
        return self


class RewardRequest(_ApiRequest):
    """OpenRLHF's request to a remote reward model, with images."""

    query: list[Annotated[str, Field(max_length=MAX_TEXT_CHARS + MAX_PROMPT_CHARS)]] = Field(
        min_length=1, max_length=MAX_TEXTS_PER_REQUEST
    )
    """Prompt and response as one text each."""
    prompts: list[Question]
    """The prompts alone; each query starts with its prompt."""
    labels: list[Any] | None = None
    """Ignored, or the images where ``images`` is absent: OpenRLHF sends a label per prompt."""
    images: list[ImageText] | None = None
    """One image per query."""
    question: Question | None = None
    """What the reward models are told was asked; default: the prompt as sent, template included."""

    @model_validator(mode="after")
    def _lists_match(self) -> Self:
        pictures = self.images if self.images is not None else self.labels
        for name, values in (("prompts", self.prompts), ("images", pictures)):
            if values is None or len(values) != len(self.query):
                found = "none" if values is None else len(values)
                raise ValueError(f"{name}: {found}, but {len(self.query)} queries; give one each")
        return self


class RankRequest(_ApiRequest):
    """One image and several texts about it, to be put in order."""

    image: ImageText
    texts: list[Text] = Field(min_length=2, max_length=MAX_TEXTS)
    prompt: Question = DEFAULT_PROMPT
    """The question that the texts answer."""
    min_words: _MinWords | None = None
    """As in ``/v1/score``."""


class GuardRequest(_ApiRequest):
    """Sub-sentences that are likely hallucinated are sampled again; see docs/serving.md."""

    threshold: float = Field(0.5, ge=0, le=1)
    """A sub-sentence is dropped where P(hallucinated) of some kind is over this."""
    tries: _Integer = Field(4, ge=0, le=16)
    """Times that it is sampled again before the answer is cut in front of it."""


class GenerateRequest(_ApiRequest):
    """A question about an image for the served policy."""

    image: ImageText
    prompt: Question = DEFAULT_PROMPT
    temperature: float | None = Field(None, ge=0, le=2)
    """0 is greedy. Default: 0, with ``best_of`` or ``guard`` 1."""
    max_new_tokens: _Integer = Field(128, ge=1, le=1024)
    seed: _Integer = Field(0, ge=0, lt=2**31)
    best_of: _Integer = Field(1, ge=1, le=MAX_BEST_OF)
    """Sample so many answers and give the one with the highest reward."""
    guard: GuardRequest | None = None
    """Have the reward models watch over each answer while it is sampled."""

    @property
    def sampling_temperature(self) -> float:
        """The temperature, where it is not given the default."""
        if self.temperature is not None:
            return self.temperature
        return 0.0 if self.best_of == 1 and self.guard is None else 1.0


class ReloadRequest(_ApiRequest):
    """Ask for the reward models that are now in the served directory."""

    version: str | None = Field(None, max_length=64)
    """Refuse if the directory holds another version."""


class KindScore(_ApiMessage):
    """One segment and kind: class probabilities (sum 1) and the weighted reward."""

    none: float
    ok: float
    hallu: float
    reward: float


class FactOut(_ApiMessage):
    """An atomic fact that a segment states."""

    kind: Kind
    text: str


class SegmentOut(_ApiMessage):
    """A sub-sentence: ``text[start:end]`` of the scored text, in characters (code points)."""

    index: int
    start: int
    end: int
    text: str
    kinds: dict[Kind, KindScore]
    reward: float
    """Sum over the kinds minus the penalty."""
    penalty: float = 0.0
    """For a segment that repeats an earlier one, or is malformed where that can be told."""
    facts: list[FactOut] | None = None
    """None where they were not asked for or cannot be told."""


class TextResult(_ApiMessage):
    """One scored text; its segments cover it from start to end."""

    text: str
    segments: list[SegmentOut]
    rewards: dict[Kind, float]
    """Sum over the segments, per kind."""
    penalty: float = 0.0
    """Sum over the segments."""
    total: float
    """Sum of the segments' rewards."""


class ModelRef(_ApiMessage):
    """Which reward models answered; the version is a digest of their cards and weights."""

    name: str
    version: str


class Timing(_ApiMessage):
    """Milliseconds in the server: all of it, and waiting for and running the models."""

    total: float
    score: float


class ScoreResponse(_ApiMessage):
    """Results in the order of the texts."""

    results: list[TextResult]
    model: ModelRef
    timing_ms: Timing


class Error(_ApiMessage):
    """What went wrong, in words; ``field`` names the part of the request, as ``items.0.image``."""

    type: ErrorType
    message: str
    field: str | None = None


class ErrorResponse(_ApiMessage):
    """The body of every answer that is not a success."""

    error: Error


class BatchResponse(_ApiMessage):
    """An answer or an error for each item, in order."""

    responses: list[ScoreResponse | ErrorResponse]


class RewardResponse(_ApiMessage):
    """OpenRLHF's answer of a remote reward model, one number per query.

    ``rewards`` are totals; ``scores``, in [0, 1], the share of segments in which no kind's most
    likely class is HALLU (1 for an empty response); ``extra_logs`` the sums of each kind, of the
    penalties, and the number of segments.
    """

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]


class RankResponse(_ApiMessage):
    """The texts' places, best first, by what PPO pays for them; equal ones keep their order."""

    order: list[int]
    """Indexes of the texts, the best first."""
    results: list[TextResult]
    """In the order of the request."""
    model: ModelRef
    timing_ms: Timing


class GenerateResponse(_ApiMessage):
    """The policy's answer; ``finish`` is ``length`` where it was cut at the limit, ``cut`` where a
    guard found nothing better. The rest is there with ``best_of`` or ``guard``."""

    text: str
    finish: Literal["stop", "length", "cut"]
    result: TextResult | None = None
    """The answer's scores."""
    rewards: list[float] | None = None
    """What each of the ``best_of`` answers is worth, its end included; the best was given."""
    resampled: int | None = None
    """Sub-sentences that the guard dropped, of all answers."""
    unsafe: bool = False
    """The guard accepted no first sub-sentence; the least risky one is given."""
    model: ModelRef | None = None
    """The reward models."""


class CardOut(_ApiMessage):
    """What the card of a reward model says of it."""

    head: str
    min_words: int
    backbone_digest: str
    input_digest: str
    noise: dict[str, float] | None
    metrics: dict[str, float]


class ModelOut(_ApiMessage):
    """A served set of reward models."""

    name: str
    version: str
    kinds: list[Kind]
    """All kinds, in order."""
    colours: dict[Kind, str] = {}
    """Colours (``#rrggbb``) that the configuration sets; pages choose those of other kinds."""
    meanings: dict[Kind, str] = {}
    """What facts of a kind are, where the configuration or the package says it."""
    backbone: str
    """Name of the backbone, without its folder."""
    placement: Literal["shared", "separate"]
    loaded_at: str
    """ISO 8601, UTC."""
    cards: dict[Kind, CardOut]
    shape: dict[str, Any] = {}
    """The shape of the rewards: the keys of ``ppo.shape``. ``center``, ``center_*``,
    ``no_stop_penalty``, ``length_*`` and ``placement`` say what a run adds; rewards here do not."""
    shape_from: ShapeSource = "default"
    """Where it is from: the reward models' cards; the default, for cards of earlier versions, which
    hold none; or the service's configuration (``serve.shape``)."""


class ModelsResponse(_ApiMessage):
    """The served models; ``generates`` says whether ``/v1/generate`` is there."""

    models: list[ModelOut]
    generates: bool = False


class ReloadResponse(_ApiMessage):
    """Version before and now, equal where nothing had changed; replicas that swapped."""

    previous: str
    version: str
    replicas: int


class HealthResponse(_ApiMessage):
    """Liveness and readiness in one: ready means that a probe was scored by the models."""

    status: Literal["ok", "unready"]
    ready: bool
    version: str | None = None


class StreamStart(_ApiRequest):
    """First message of a stream."""

    image: ImageText
    prompt: Question = DEFAULT_PROMPT
    facts: bool = False
    min_words: _MinWords | None = None
    key: str | None = Field(None, max_length=4096, repr=False)
    """The API key, for browsers, which cannot set the header of a WebSocket."""


class StreamDelta(_ApiRequest):
    """A piece of the text, in order."""

    delta: str = Field(max_length=MAX_TEXT_CHARS)


class StreamEnd(_ApiRequest):
    """No more text."""

    end: Literal[True]


class StreamReady(_ApiMessage):
    """The server's first message."""

    ready: Literal[True] = True
    model: ModelRef


class StreamSegment(_ApiMessage):
    """A sub-sentence that later text cannot change."""

    segment: SegmentOut


class StreamResult(_ApiMessage):
    """The last message: what ``/v1/score`` says of the whole text."""

    result: TextResult
