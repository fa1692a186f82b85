"""Client of the scoring service, without torch and Ray; see :mod:`fgaif.client.client`."""

from fgaif.client.answers import ScoringError, ScoringRefused
from fgaif.client.client import AsyncRewardClient, RewardClient
from fgaif.client.requests import ScoreItem
from fgaif.client.trainers import easyr1_reward, swift_reward, verl_reward
from fgaif.client.trl import trl_reward

__all__ = [
    "AsyncRewardClient",
    "RewardClient",
    "ScoreItem",
    "ScoringError",
    "ScoringRefused",
    "easyr1_reward",
    "swift_reward",
    "trl_reward",
    "verl_reward",
]
