"""Step 1: who states facts and who checks them."""

from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from fgaif.config.section import Section

API = "api:"
"""Before the name of an entry of ``endpoints``."""


class EndpointConfig(Section):
    """A model behind an OpenAI-compatible API; named in `endpoints`, used as `api:NAME`."""

    model: str
    """Model name as the endpoint knows it."""
    base_url: str = "https://api.openai.com/v1"
    """Address of the API, up to and without `/chat/completions`."""
    api_key_env: str = Field("OPENAI_API_KEY", pattern="^[A-Za-z_][A-Za-z0-9_]*$")
    """Environment variable that holds the key; the key itself is never configured."""
    api_key_file: Path | None = None
    """File that holds the key; read instead of the environment variable."""
    concurrency: int = Field(16, ge=1)
    """Requests on their way at the same time."""
    requests_per_minute: float | None = Field(None, gt=0)
    """Most requests sent in a minute; default: no limit."""
    tokens_per_minute: float | None = Field(None, gt=0)
    """Input and output tokens, estimated before the request, counted after it."""
    timeout_s: float = Field(120.0, gt=0)
    """Time that a request may take."""
    attempts: int = Field(10, ge=1)
    """Tries of a request before it counts as failed."""
    backoff_s: float = Field(0.5, gt=0)
    """First pause after a failure; it doubles, with jitter, up to a minute."""
    breaker: int = Field(30, ge=1)
    """Failures in a row, over all requests, that stop the job; always more than `concurrency`."""
    structured: Literal["json_schema", "json_object", "text"] = "json_schema"
    """How JSON is asked for; `text` uses the plain-text form of the prompts."""
    logprobs: bool = True
    """Ask for the log-probs of the first token of yes/no answers."""
    max_image_side: int = Field(1024, ge=16)
    """Larger images are shrunk to this many pixels before they are sent."""
    original_images: bool = False
    """Send image files as they are where they are small enough, with their metadata (place, camera,
    date); by default pixels alone are sent, encoded anew."""
    image_tokens: int = Field(1000, ge=0)
    """Tokens that an image counts for in estimates; replies bring the true number."""
    price_input: float = Field(0.0, ge=0)
    """Price of a million input tokens, for the cost display and `max_cost`."""
    price_output: float = Field(0.0, ge=0)
    """Price of a million output tokens."""

    @field_validator("base_url")
    @classmethod
    def _address_alone(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.username or parts.password or parts.query:
            raise ValueError(
                f"holds a user, a password or a query at {parts.hostname}; keys belong in the "
                "environment or in api_key_file"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("give an address such as https://api.openai.com/v1")
        return url


class FeedbackConfig(Section):
    """Step 1: facts, verdicts, labels."""

    extractor: str = Field("scenes", pattern="^(scenes|model|segment|api:.+)$")
    """Who states a segment's atomic facts: `scenes` parses the embedded world's English, `model`
    asks the verifier checkpoint, as a language model with JSON output, `api:NAME` asks an entry of
    `endpoints`, `segment` takes each whole segment as one statement of every kind (no language
    model; a coarse control)."""
    extract_per: Literal["response", "segment"] = "response"
    """One request for all segments of a response, or one per segment, with the response around."""
    verifier: str | tuple[str, ...] = "scenes:verifier"
    """Who answers yes or no for each fact: a checkpoint, as in `policy.model`, or `api:NAME`;
    of a list, at most one checkpoint, and the majority decides."""
    prompt: str = "statement"
    """Verification prompt: a file name in fgaif/feedback/prompts, or a path."""
    prompts_dir: Path | None = None
    """Folder with other extraction prompts; see fgaif/feedback/prompts for the names and slots."""
    abstain: float = Field(0.0, ge=0, lt=0.5)
    """Half-width around p(yes) = 0.5 within which the verdict is `unknown`."""
    samples_per_prompt: int = Field(1, ge=1)
    """Responses sampled for each prompt."""
    max_facts: int = Field(16, ge=1)
    """Facts of one kind in one segment; a longer list is cut and the segment not trusted."""
    reads: int = Field(3, ge=1)
    """Times that a question is put whose replies cannot be read."""
    max_cost: float | None = Field(None, gt=0)
    """Money, in the currency of the prices, that all replies of this run may cost, those of
    earlier tries included."""
    max_tokens: int | None = Field(None, ge=1)
    """Tokens, input and output, that all replies of this run may use."""

    @property
    def verifiers(self) -> tuple[str, ...]:
        """The verifiers as a tuple."""
        return (self.verifier,) if isinstance(self.verifier, str) else self.verifier

    @property
    def local_verifier(self) -> str | None:
        """The checkpoint among the verifiers, which runs on our own actors."""
        return next((name for name in self.verifiers if not name.startswith(API)), None)

    @model_validator(mode="after")
    def _one_checkpoint(self) -> Self:
        local = [name for name in self.verifiers if not name.startswith(API)]
        if not self.verifiers or len(local) > 1 or len(set(self.verifiers)) < len(self.verifiers):
            raise ValueError(
                f"feedback.verifier = {list(self.verifiers)}: give one or more different ones, at "
                "most one of them a checkpoint; serve others with `fgaif openai-server`"
            )
        if self.extractor == "model" and not local:
            raise ValueError(
                "feedback.extractor = 'model' asks the verifier checkpoint, but every verifier is "
                "an API: use feedback.extractor=api:NAME"
            )
        return self
