"""What holds for all benchmarks of one call of ``fgaif eval``, and who judges."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.evaluation.options import CommonOptions, JudgeOptions, VerifierOptions
from fgaif.chat.batched import BatchedChat
from fgaif.chat.cached import CachedChat
from fgaif.chat.limits import Budget, Spend, estimate, price
from fgaif.chat.messages import ChatModel, ChatRequest, Reply, RequestFailed
from fgaif.chat.store import ReplyStore
from fgaif.config import SCENES_CONFIG, Config, EndpointConfig, load_config
from fgaif.errors import ConfigError
from fgaif.eval.benchmark import EvalContext
from fgaif.eval.corrupt import Corruption
from fgaif.eval.questions import QuestionBuilder

if TYPE_CHECKING:
    from cluster.evaluation.generate import ModelSpec
    from cluster.launch import Cluster

_REPLIES = Path("runs") / "judge.sqlite"
JUDGE_ENTRY = "judge"
"""Name of the endpoint that ``--judge-model`` and its companions describe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What holds for all benchmarks of a call. ``verifier`` is a local checkpoint's name."""

    config: Config
    out: Path | None = None
    model: "ModelSpec | None" = None
    images: Path | None = None
    corruption: str | None = None
    judge: str | None = None
    rejudge: str | None = None
    calibration: Path | None = None
    verifier: str | None = None
    replies: Path
    seed: int = 0
    as_json: bool = False
    dry_run: bool = False


def make_settings(
    common: CommonOptions,
    judge: JudgeOptions | None = None,
    verifier: VerifierOptions | None = None,
) -> Settings:
    """Read configuration and model, and check that the options go together.

    Raises:
        ConfigError, CheckpointError: an option cannot be used; the message names it.
    """
    for name, needs in (("images", common.images), ("out", common.out)):
        if common.model is not None and needs is None:
            raise ConfigError(f"--model needs --{name}")
    if common.corrupt is not None and common.model is None:
        raise ConfigError("--corrupt changes what a model sees: it needs --model")
    overrides = list(common.overrides or ())
    entry = judge.judge if judge is not None else None
    if judge is not None and judge.judge_model is not None:
        entry = JUDGE_ENTRY
        overrides += _endpoint_overrides(judge)
    checkpoint = verifier.verifier if verifier is not None else None
    base = SCENES_CONFIG if (common.model or "").startswith("scenes:") or checkpoint else None
    return Settings(
        config=load_config(common.config or base, overrides),
        out=common.out,
        model=_model(common.model) if common.model is not None else None,
        images=common.images,
        corruption=common.corrupt,
        judge=entry,
        rejudge=judge.rejudge if judge is not None else None,
        calibration=judge.calibration if judge is not None else None,
        verifier=checkpoint,
        replies=common.out / "judge.sqlite" if common.out is not None else _REPLIES,
        seed=common.seed,
        as_json=common.json,
        dry_run=common.dry_run,
    )


def judge_settings(config: Config, entry: str | None) -> EndpointConfig:
    """The judge's entry of ``endpoints``.

    Raises:
        ConfigError: none is named, or there is no such entry.
    """
    known = ", ".join(config.endpoints) or "none"
    if entry is None:
        raise ConfigError(
            "this benchmark needs a judge: give --judge NAME, an entry of `endpoints` in the "
            f"configuration (there: {known}), or --judge-model with --judge-url"
        )
    if entry not in config.endpoints:
        raise ConfigError(f"--judge {entry}: no such entry in `endpoints`; known: {known}")
    return config.endpoints[entry]


def eval_context(settings: Settings, longest_answer: int | None = None) -> EvalContext:
    """Return what the call's benchmarks are prepared with.

    Args:
        longest_answer: most new tokens, where a benchmark would allow more.

    Raises:
        ConfigError: the corruption cannot be read.
    """
    builder = None
    if settings.model is not None:
        assert settings.images is not None, "checked with the options"
        assert settings.out is not None, "checked with the options"
        corruption = settings.corruption and Corruption.parse(settings.corruption, settings.seed)
        builder = QuestionBuilder(
            images=settings.images,
            out=settings.out,
            corruption=corruption or None,
            longest_answer=longest_answer,
        )
    return EvalContext(
        builder=builder,
        images=settings.images,
        judge=settings.config.endpoints.get(settings.judge) if settings.judge else None,
        verifier=settings.verifier,
        seed=settings.seed,
        min_words=settings.config.segment.least_words,
        kinds=settings.config.kinds,
    )


def _model(text: str) -> "ModelSpec":
    from cluster.evaluation.generate import ModelSpec  # torch: not for scoring

    return ModelSpec.parse(text)


def _endpoint_overrides(judge: JudgeOptions) -> list[str]:
    settings = {
        "model": judge.judge_model,
        "base_url": judge.judge_url,
        "api_key_env": judge.judge_key_env,
    }
    return [f"endpoints.{JUDGE_ENTRY}.{key}={value}" for key, value in settings.items() if value]


@asynccontextmanager
async def open_judge(
    config: Config, entry: str | None, replies: Path, report_usage: Callable[[str], None]
) -> AsyncIterator[ChatModel]:
    """Open the judge, an entry of ``endpoints``, over its stored replies.

    ``report_usage`` gets a line with the tokens and the cost at the end.

    Raises:
        ConfigError: no such entry, or its key is missing.
    """
    from fgaif.chat.endpoint import Endpoint  # openai: not for scoring

    settings = judge_settings(config, entry)
    budget = Budget(config.feedback.max_cost, config.feedback.max_tokens)
    pixels = config.data.max_image_pixels
    endpoint = Endpoint(str(entry), settings, budget, max_image_pixels=pixels)
    with ReplyStore(replies) as store:
        budget.charge(price(settings, *store.tokens(endpoint.name)))
        try:
            yield CachedChat(endpoint, store)
        finally:
            await endpoint.close()
            report_usage(budget.usage().line())


def local_verifier(cluster: "Cluster", checkpoint: Path, store: ReplyStore) -> ChatModel:
    """A checkpoint on the cluster's judge engines, as a chat model over the store."""
    from fgaif.reward.checkpoint import checkpoint_digest  # torch: not for scoring

    judges = cluster.judges()
    name = checkpoint_digest(checkpoint)[:16]
    return CachedChat(BatchedChat(name, lambda requests: judges.answer(requests).result()), store)


@dataclass
class CountingJudge:
    """Answers nothing; adds up what the requests would cost at most."""

    settings: EndpointConfig
    requests: int = 0
    spend: Spend = field(default_factory=Spend)
    name: str = "dry run"

    async def ask(self, request: ChatRequest) -> Reply:
        """Count the request and fail it, so that nobody asks again."""
        self.requests += 1
        self.spend += estimate(request, self.settings)
        raise RequestFailed("dry run: nothing was asked")
