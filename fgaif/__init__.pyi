from fgaif.client import RewardClient as RewardClient
from fgaif.config import Config as Config
from fgaif.config import RewardShapeConfig as RewardShapeConfig
from fgaif.config import load_config as load_config
from fgaif.errors import FgaifError as FgaifError
from fgaif.feedback.annotate import label_response as label_response
from fgaif.feedback.external import make_response as make_response
from fgaif.feedback.segment import segment_response as segment_response
from fgaif.feedback.segment import split as split
from fgaif.lvlm.model import load_lvlm as load_lvlm
from fgaif.lvlm.model import load_processor as load_processor
from fgaif.pipeline import run as run
from fgaif.ppo.advantages import gae as gae
from fgaif.reward.dense import RewardCenters as RewardCenters
from fgaif.reward.dense import dense_rewards as dense_rewards
from fgaif.reward.local import train_rewards as train_rewards
from fgaif.serving.rewards import Rewards as Rewards
from fgaif.serving.rewards import TextScores as TextScores
from fgaif.serving.rewards import load_rewards as load_rewards
from fgaif.types import LabeledResponse as LabeledResponse
from fgaif.types import Response as Response
from fgaif.types import Segment as Segment
from fgaif.types import SegmentScores as SegmentScores

__version__: str
