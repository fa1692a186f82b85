"""The reward models as a service."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from fgaif.config.section import Section


class ServeBatchConfig(Section):
    """Dynamic batching of requests; a request's texts stay together."""

    size: int = Field(16, ge=1)
    """Requests scored together at most; 1 turns batching off."""
    wait_ms: float = Field(2.0, ge=0)
    """Longest wait for a batch to fill once its turn has come."""


class ServeReplicasConfig(Section):
    """Replicas of a scoring deployment: autoscaled where `min` and `max` differ."""

    min: int = Field(1, ge=1)
    """Fewest replicas."""
    max: int = Field(1, ge=1)
    """Most replicas."""
    target_ongoing: float = Field(8.0, gt=0)
    """Requests per replica that autoscaling aims at."""
    cpus: float = Field(1.0, ge=0)
    """CPUs that Ray reserves for each."""
    gpus: float | None = Field(None, ge=0)
    """GPUs that Ray reserves for each, or a fraction of one; default: `cluster.reward.gpus`."""

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.min > self.max:
            raise ValueError(
                f"serve.replicas.min = {self.min} is more than serve.replicas.max = {self.max}: "
                "raise the second"
            )
        return self


class ServeConfig(Section):
    """The reward models as a service; see `fgaif serve`."""

    placement: Literal["shared", "separate"] = "shared"
    """`shared`: adapters and heads of all kinds on one backbone; `separate`: a deployment per
    kind."""
    shape: Literal["card", "config"] = "card"
    """Shape of the rewards: `card`, the `ppo.shape` that the reward models were trained beside and
    their cards hold, or `config`, the `ppo.shape` of this configuration."""
    batch: ServeBatchConfig = ServeBatchConfig()
    replicas: ServeReplicasConfig = ServeReplicasConfig()
    """Of the scoring deployment, or of each kind's."""
    ingress_replicas: int = Field(1, ge=1)
    """Processes that read and check requests."""
    ingress_cpus: float = Field(0.5, ge=0)
    """CPUs that Ray reserves for each of them."""
    queue: int = Field(128, ge=1)
    """Requests in work or waiting, per ingress replica; more are refused with 429."""
    streams: int = Field(64, ge=1)
    """WebSockets open at a time, per ingress replica, once the key is known to be right."""
    streams_without_key: int = Field(16, ge=1)
    """WebSockets besides, whose key is to come in their first message, as browsers send it."""
    start_timeout_s: float = Field(10.0, gt=0)
    """Longest wait for the first message of a WebSocket."""
    timeout_s: float = Field(60.0, gt=0)
    """Longest time for a request, 504 after it, and for silence on a stream."""
    reload_timeout_s: float = Field(600.0, gt=0)
    """Longest time for loading another version of the models."""
    drain_s: float = Field(30.0, ge=0)
    """Time that requests in work get when the service stops."""
    max_body_mib: float = Field(32.0, gt=0)
    """Larger bodies are refused before they are read; base64 makes an image a third larger."""
    max_image_pixels: int = Field(20_000_000, ge=1)
    """Larger images are refused before they are decoded."""
    allow_urls: bool = False
    """Fetch images by https URL; never from private addresses."""
    url_timeout_s: float = Field(10.0, gt=0)
    """Time that fetching an image by URL may take."""
    cors: tuple[str, ...] = ()
    """Origins of other sites' pages that may call the service, such as `https://a.example`."""
    key_env: str = "FGAIF_SERVE_KEY"
    """Environment variable with the API key; the key itself is never configured."""
    key_file: Path | None = None
    """File that holds the key; read instead of the environment variable."""
