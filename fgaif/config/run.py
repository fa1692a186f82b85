"""The whole configuration of a run, and the sections that belong to no stage's settings."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from fgaif.config.baseline import BaselineConfig
from fgaif.config.cluster import ClusterConfig
from fgaif.config.data import DataConfig
from fgaif.config.feedback import API, EndpointConfig, FeedbackConfig
from fgaif.config.policy import PolicyConfig, SegmentConfig
from fgaif.config.ppo import PpoConfig
from fgaif.config.reward import RewardConfig
from fgaif.config.section import Section
from fgaif.config.serve import ServeConfig
from fgaif.kinds import KindConfig, own_colours
from fgaif.types import Kind


class EvalConfig(Section):
    """Before and after."""

    pope_questions_per_image: int = Field(6, ge=2)
    """Half yes, half no."""
    seed: int = 123
    """Of sampled captions and questions."""
    judge: Literal["auto", "verifier", "rewards"] = "auto"
    """Who judges the captions of other images than the embedded world's (there the truth is
    known): `verifier` asks the models of `feedback` about every fact, as in step 1; `rewards` takes
    the reward models' word, which is what PPO has optimised; `auto` is `verifier`, unless
    `feedback.extractor` is `scenes`, which reads no other English."""
    second_verifier: str | None = None
    """A verifier that labelled nothing: a checkpoint or `api:NAME`. It checks the same facts of the
    captions, and its figures stand beside the judge's."""

    @model_validator(mode="after")
    def _a_second_verifier_has_facts(self) -> Self:
        if self.second_verifier is not None and self.judge == "rewards":
            raise ValueError(
                f"eval.second_verifier = {self.second_verifier!r} checks the facts that the judge "
                "found, and eval.judge = 'rewards' finds none: set eval.judge=verifier"
            )
        return self


class TrackingConfig(Section):
    """Where metrics go besides console and JSONL."""

    tensorboard: bool = False
    """Write event files to `RUN/policy/tensorboard`."""
    wandb: bool = False
    """Log to Weights & Biases."""
    trackio: bool = False
    """Log to trackio."""
    project: str = "fgaif"
    """Project of W&B and trackio."""
    rollouts: int = Field(0, ge=0)
    """Write all rollouts of every so many steps to `policy/rollouts`, for `fgaif replay`; 0: never.
    A file takes about 100 bytes per token."""


class StudyConfig(Section):
    """Variants of a run compared over seeds; see `fgaif study` and docs/study.md."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds that each variant is trained with."""
    variants: dict[str, tuple[str, ...]] = Field(
        {"segment": (), "last": ("ppo.shape.placement=last",)}
    )
    """Name of each variant and its overrides, in which `{seed}` stands for the seed. The first is
    what the others are compared with."""
    commands: dict[str, tuple[str, ...]] = Field({})
    """By a variant's name: fgaif commands that make its policy instead of PPO, one after another,
    such as `[pairs, baseline dpo]`; the last leaves an adapter in the run's folder."""
    parallel: int = Field(1, ge=1)
    """Trainings at a time, each in a process of its own; one cluster or machine must have room for
    all of them."""
    evaluate_every: int = Field(0, ge=0)
    """Evaluate the checkpoints of every so many steps too, for the plots; 0: only what matched KL
    needs."""


class Config(Section):
    """The whole run."""

    name: str = Field("scenes", pattern=r"^[A-Za-z0-9._-]+$")
    """Name of the run: its folder is `dir/name`."""
    dir: Path = Path("runs")
    """Folder of all runs."""
    seed: int = 0
    """Of sampling, training and evaluation; what draws prompts is `data.seed`."""
    kinds: tuple[KindConfig, ...] = Field(KindConfig.default(), min_length=1)
    """Kinds of hallucination, each with a reward model of its own: names, or mappings with `name`,
    `description`, `prompt` and `colour`. Their order is that of all arrays and seeds."""
    data: DataConfig = DataConfig()
    policy: PolicyConfig = PolicyConfig()
    segment: SegmentConfig = SegmentConfig()
    feedback: FeedbackConfig = FeedbackConfig()
    endpoints: dict[str, EndpointConfig] = Field({})
    """OpenAI-compatible APIs by a name of your choice."""
    reward: RewardConfig = RewardConfig()
    ppo: PpoConfig = PpoConfig()
    baseline: BaselineConfig = BaselineConfig()
    eval: EvalConfig = EvalConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()
    study: StudyConfig = StudyConfig()
    serve: ServeConfig = ServeConfig()

    @field_validator("name")
    @classmethod
    def _name_is_no_way_out(cls, name: str) -> str:
        if name in (".", ".."):
            raise ValueError("names a folder that is there already; give the run a name of its own")
        return name

    @model_validator(mode="after")
    def _endpoints_exist(self) -> Self:
        for key, names in (
            ("feedback.extractor", (self.feedback.extractor,)),
            ("feedback.verifier", self.feedback.verifiers),
            ("eval.second_verifier", filter(None, [self.eval.second_verifier])),
        ):
            for name in names:
                if name.startswith(API) and name.removeprefix(API) not in self.endpoints:
                    known = ", ".join(self.endpoints) or "none"
                    raise ValueError(f"{key} = {name!r}: no such entry of endpoints ({known})")
        return self

    @model_validator(mode="after")
    def _second_verifier_is_held_out(self) -> Self:
        if self.eval.second_verifier in self.feedback.verifiers:
            raise ValueError(
                f"eval.second_verifier = {self.eval.second_verifier!r}: is one of feedback.verifier"
                " too, whose verdicts the reward models have learned; name another model"
            )
        return self

    @model_validator(mode="after")
    def _kinds_are_distinct(self) -> Self:
        names = self.kind_names
        for name in names:
            # "dogs: ..." is read as the kind "dog" in the plain-text form of extraction.
            if names.count(name) > 1 or f"{name}s" in names:
                raise ValueError(
                    f"kinds = {list(names)}: {name!r} is there twice, or once more in the plural; "
                    "kinds differ"
                )
        return self

    @model_validator(mode="after")
    def _kinds_are_known(self) -> Self:
        names, shape = self.kind_names, self.ppo.shape
        for key in (
            *(f"reward.noise.{name}" for name in self.reward.noise),
            *(f"ppo.shape.weights.{name}" for name in shape.weights),
            *(f"ppo.shape.order.{name}" for name in shape.order),
            *(f"ppo.value_init.{name}" for name in {self.ppo.value_init} - {"policy"}),
        ):
            if key.rpartition(".")[2] not in names:
                raise ValueError(f"{key}: no such kind; kinds = {list(names)}")
        if self.reward.parallel > len(names):
            raise ValueError(
                f"reward.parallel = {self.reward.parallel}: there are only {len(names)} kinds, "
                f"each with one reward model; set reward.parallel={len(names)} or less"
            )
        return self

    @model_validator(mode="after")
    def _preferences_have_no_kinds(self) -> Self:
        if self.reward.form == "preference" and self.ppo.value_init != "policy":
            raise ValueError(
                f"ppo.value_init = {self.ppo.value_init!r}: with reward.form=preference there is "
                "no reward model of a kind; set ppo.value_init=policy"
            )
        cluster = self.cluster
        shares = cluster.layout == "shared" and "reward" in cluster.shared_roles
        if self.reward.form == "preference" and shares:
            raise ValueError(
                "reward.form = 'preference' with cluster.layout = 'shared': the shared process "
                "scores sub-sentences only; set cluster.shared_roles=[learner,reference]"
            )
        return self

    @model_validator(mode="after")
    def _ppo_without_dropout(self) -> Self:
        adapters = {"policy.lora": self.policy.lora, "ppo.value_lora": self.ppo.value_lora}
        for key, lora in adapters.items():
            if lora.dropout:
                raise ValueError(
                    f"{key}.dropout = {lora.dropout}: PPO compares log-probs and values before and "
                    "after a step, and dropout would pass for the step's effect; set it to 0 (that "
                    "of reward.lora may stay)"
                )
        return self

    @model_validator(mode="after")
    def _bfloat16_with_zero(self) -> Self:
        stages = {"ppo": self.ppo.zero_stage, "reward": self.reward.zero_stage}
        for section, stage in stages.items():
            if self.policy.dtype == "bfloat16" and stage == 0:
                raise ValueError(
                    f"{section}.zero_stage = 0 with policy.dtype = 'bfloat16': without ZeRO "
                    "DeepSpeed keeps no float32 copy of what it trains in bfloat16; set "
                    f"{section}.zero_stage=1"
                )
        return self

    @model_validator(mode="after")
    def _shared_weights_stay_whole(self) -> Self:
        cluster = self.cluster
        shares = cluster.layout == "shared" and "learner" in cluster.shared_roles
        if shares and self.ppo.zero_stage == 3:
            raise ValueError(
                "ppo.zero_stage = 3 with cluster.layout = 'shared': stage 3 divides the weights "
                "that the other roles read; set ppo.zero_stage=2"
            )
        return self

    @model_validator(mode="after")
    def _four_bits_stay_as_they_are(self) -> Self:
        if self.policy.quantization == "none":
            return self
        said = f"policy.quantization = {self.policy.quantization!r}"
        if not self.cluster.reward.shared:
            raise ValueError(
                f"{said}: adapters cannot be merged into weights of 4 bits; set "
                "cluster.reward.shared=true, with which reward models keep theirs beside them"
            )
        for section, stage in {
            "ppo": self.ppo.zero_stage,
            "reward": self.reward.zero_stage,
        }.items():
            if stage == 3:
                raise ValueError(
                    f"{section}.zero_stage = 3 with {said}: stage 3 cannot divide such weights; "
                    f"set {section}.zero_stage=2"
                )
        return self

    @model_validator(mode="after")
    def _sleepers_are_not_ahead(self) -> Self:
        if self.cluster.engine.sleep and self.ppo.async_depth > 0:
            raise ValueError(
                f"cluster.engine.sleep with ppo.async_depth = {self.ppo.async_depth}: engines that "
                "sample ahead never sleep; set ppo.async_depth=0"
            )
        return self

    @property
    def kind_names(self) -> tuple[Kind, ...]:
        """Names of the kinds, in order."""
        return tuple(kind.name for kind in self.kinds)

    @property
    def own_colours(self) -> dict[Kind, str]:
        """Colours that the configuration sets, as ``#rrggbb``."""
        return own_colours(self.kinds)

    @property
    def run_dir(self) -> Path:
        """Folder of everything this run writes."""
        return self.dir / self.name

    @property
    def merges_adapters(self) -> bool:
        """Whether engines add the policy's adapter to their weights (`cluster.engine.adapters`)."""
        wanted = self.cluster.engine.adapters
        return wanted == "merged" or (wanted == "auto" and self.policy.dtype == "float32")

    @property
    def one_scorer(self) -> bool:
        """Whether one actor has all reward models, or the only one."""
        return self.cluster.reward.shared or self.reward.form == "preference"

    @property
    def judge_checkpoints(self) -> tuple[str, ...]:
        """Verifiers that run on our own engines, one after the other: that of the feedback, and
        the second one of the evaluation."""
        wanted = (self.feedback.local_verifier, self.eval.second_verifier)
        return tuple(name for name in wanted if name is not None and not name.startswith(API))

    @property
    def reward_backbone(self) -> str:
        """Checkpoint of the reward models."""
        return self.reward.backbone or self.policy.model
