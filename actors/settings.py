"""What each role reads of the configuration: the sections that an actor names, and nothing else.

An actor is given a :class:`fgaif.config.Config`, or anything that has these sections. mypy holds an
actor to its own: a section that is not listed here cannot be read.
"""

# ruff: noqa: D102  # the sections say themselves what they are

from typing import Protocol

from fgaif.config import (
    ClusterConfig,
    DataConfig,
    PolicyConfig,
    PpoConfig,
    RewardConfig,
)
from fgaif.types import Kind


class ModelSettings(Protocol):
    """What every role needs that runs a model."""

    @property
    def data(self) -> DataConfig: ...
    @property
    def policy(self) -> PolicyConfig: ...
    @property
    def cluster(self) -> ClusterConfig: ...


class EngineSettings(ModelSettings, Protocol):
    """A vLLM engine of the policy or of the verifier."""

    @property
    def seed(self) -> int: ...
    @property
    def merges_adapters(self) -> bool: ...


class LearnerSettings(ModelSettings, Protocol):
    """A rank of the learner."""

    @property
    def seed(self) -> int: ...
    @property
    def ppo(self) -> PpoConfig: ...


class BackboneSettings(ModelSettings, Protocol):
    """A role that may load the reward models' backbone."""

    @property
    def reward(self) -> RewardConfig: ...
    @property
    def reward_backbone(self) -> str: ...


class ReferenceSettings(LearnerSettings, BackboneSettings, Protocol):
    """The reference and value model, which may start from a reward model."""


class RewardSettings(BackboneSettings, Protocol):
    """A scorer of one kind or of all."""

    @property
    def kind_names(self) -> tuple[Kind, ...]: ...


class SharedSettings(ReferenceSettings, RewardSettings, Protocol):
    """Several roles in one process."""
