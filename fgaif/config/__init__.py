"""One frozen configuration tree: YAML file first, dotted overrides last, unknown keys refused.

A module per part; everything is imported from here.
"""

from fgaif.config.baseline import BaselineConfig
from fgaif.config.cluster import (
    AutoscaleConfig,
    ClusterConfig,
    EngineConfig,
    RewardRoleConfig,
    RoleConfig,
    RolloutRoleConfig,
)
from fgaif.config.data import DataConfig
from fgaif.config.feedback import API, EndpointConfig, FeedbackConfig
from fgaif.config.load import SCENES_CONFIG, dump_config, load_config, parse_config, with_overrides
from fgaif.config.policy import LoraConfig, PolicyConfig, SegmentConfig
from fgaif.config.ppo import AnchorConfig, Estimator, KlConfig, PpoConfig
from fgaif.config.reward import NoiseConfig, RewardConfig, RewardShapeConfig
from fgaif.config.run import Config, EvalConfig, StudyConfig, TrackingConfig
from fgaif.config.serve import ServeBatchConfig, ServeConfig, ServeReplicasConfig

__all__ = [
    "API",
    "SCENES_CONFIG",
    "AnchorConfig",
    "AutoscaleConfig",
    "BaselineConfig",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "EndpointConfig",
    "EngineConfig",
    "Estimator",
    "EvalConfig",
    "FeedbackConfig",
    "KlConfig",
    "LoraConfig",
    "NoiseConfig",
    "PolicyConfig",
    "PpoConfig",
    "RewardConfig",
    "RewardRoleConfig",
    "RewardShapeConfig",
    "RoleConfig",
    "RolloutRoleConfig",
    "SegmentConfig",
    "ServeBatchConfig",
    "ServeConfig",
    "ServeReplicasConfig",
    "StudyConfig",
    "TrackingConfig",
    "dump_config",
    "load_config",
    "parse_config",
    "with_overrides",
]
