"""The stages of a run, each reading what the one before wrote into the run folder."""

import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.driver import PpoData, PpoDriver
from cluster.launch import Cluster
from cluster.ledger import ORDER, STAGES, Ledger, Stage
from cluster.placement import plan_roles, plan_table
from cluster.progress import StageProgress
from cluster.roles import Roles
from cluster.train_rewards import train_rewards
from fgaif.config import Config, dump_config
from fgaif.data.sources import Source, open_anchors, open_source, split_prompts
from fgaif.errors import DataError
from fgaif.eval.policy import evaluate_policy
from fgaif.eval.report import build_report, console_table
from fgaif.eval.scenes import SceneJudge, scene_questions
from fgaif.eval.store import Phase, write_eval
from fgaif.feedback.annotate import annotate
from fgaif.feedback.facts import FactExtractor, SceneFacts
from fgaif.feedback.segment import Segmenter
from fgaif.feedback.store import ResponseStore, VerdictStore, read_labels, write_labels
from fgaif.feedback.verify import YesNoVerifier
from fgaif.lvlm.model import load_processor, resolve_checkpoint
from fgaif.types import GenerationRequest, LabeledResponse, Response

_CHUNK = 256
