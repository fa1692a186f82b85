"""The stages of a run, each reading what the one before wrote into the run folder."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cluster.driver import PpoData, PpoDriver
from cluster.launch import Cluster
from cluster.ledger import ORDER, STAGES, Ledger, Stage
from cluster.placement import plan_roles, plan_table
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
from fgaif.feedback.facts import SceneFacts
from fgaif.feedback.segment import Segmenter
from fgaif.feedback.store import ResponseStore, VerdictStore, read_labels, write_labels
from fgaif.feedback.verify import YesNoVerifier
from fgaif.lvlm.model import load_processor, resolve_checkpoint
from fgaif.tracking import Tracker
from fgaif.types import GenerationRequest, LabeledResponse, Prompt, Response

_CHUNK = 256
"""Requests per call: small enough for a moving progress bar, large enough for full batches."""


def run_stages(
    config: Config, stages: Sequence[Stage], force: bool, console: Console
) -> Path | None:
    """Run the stages that are not up to date, in order; return the report's path if it was made.

    Raises:
        FgaifError: whatever stopped a stage. Finished stages stay finished.
    """
    ledger = Ledger(config.run_dir)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    wanted = [stage for stage in ORDER if stage in stages]
    todo = _to_run(ledger, config, wanted, force)
    for stage in wanted:
        if stage not in todo:
            console.print(f"{stage}: up to date")
    if not todo:
        return None
    _require_upstream(ledger, config, todo)
    with Cluster(config) as cluster:
        run = Run(config, cluster, console)
        for stage in todo:
            if stage == "report":
                continue
            with ledger.record(config, stage):
                run.stage(stage)
    return make_report(config, console) if "report" in todo else None


def print_plan(config: Config, stages: Sequence[Stage], force: bool, console: Console) -> None:
    """Show placement and what each stage would do, and start nothing."""
    console.print(plan_table(plan_roles(config)))
    ledger = Ledger(config.run_dir)
    table = Table(title=f"stages of {config.run_dir}", title_justify="left")
    for column in ("stage", "found", "would"):
        table.add_column(column)
    todo = _to_run(ledger, config, [stage for stage in ORDER if stage in stages], force)
    for stage in stages:
        table.add_row(
            stage, ledger.status(config, stage), "run" if stage in todo else "skip, up to date"
        )
    console.print(table)


def make_report(config: Config, console: Console) -> Path:
    """Build the report from the run folder and print its table and path."""
    path = build_report(config.run_dir)
    console.print(console_table(config.run_dir))
    console.print(f"report: {path}")
    return path


class Run:
    """One run's stages over one cluster: engines started by one stage serve the next."""

    def __init__(self, config: Config, cluster: Cluster, console: Console) -> None:
        self._config = config
        self._cluster = cluster
        self._console = console
        self._dir = config.run_dir
        self._policy_path = resolve_checkpoint(config.policy.model)
        self._tokenizer = load_processor(self._policy_path).tokenizer
        self._segmenter = Segmenter(self._tokenizer, config.segment.min_words)
        self._extractor = SceneFacts()

    def stage(self, name: Stage) -> None:
        """Run one stage."""
        actions: dict[Stage, Callable[[], None]] = {
            "sample": self.sample,
            "annotate": self.annotate,
            "train-reward": self.train_reward,
            "eval-before": lambda: self.evaluate("before"),
            "train": self.train,
            "eval-after": lambda: self.evaluate("after"),
        }
        self._console.rule(name, align="left")
        actions[name]()

    @cached_property
    def train_source(self) -> Source:
        """Prompts of steps 1 and 3."""
        data = self._config.data
        return self._open(data.train, data.feedback_prompts + data.ppo_prompts)

    @cached_property
    def held_out(self) -> Source:
        """Prompts of the evaluation."""
        return self._open(self._config.data.held_out, self._config.data.eval_prompts)

    def sample(self) -> None:
        """Step 1a: responses of the policy."""
        prompts, _ = split_prompts(self.train_source, self._config)
        requests = [
            GenerationRequest(
                prompt=prompt,
                sample=sample,
                seed=request_seed(self._config.seed, "sample", prompt.id, sample),
                temperature=self._config.policy.temperature,
                max_new_tokens=self._config.policy.max_new_tokens,
            )
            for prompt in prompts
            for sample in range(self._config.feedback.samples_per_prompt)
        ]
        rollouts = self._cluster.rollouts()
        self._cluster.judges()  # loads while the policy samples
        with ResponseStore(self._dir / "responses" / "responses.jsonl") as store:
            known = {response.id for response in store.read()}
            todo = [r for r in requests if f"{r.prompt.id}#{r.sample}" not in known]
            self._say_resumed(len(known), "responses")
            for chunk in self._track(todo, "sampling", _CHUNK * self._replicas):
                store.append(rollouts.generate(chunk).result())

    def annotate(self) -> None:
        """Step 1b: segments, facts, verdicts, labels."""
        responses = self._responses()
        judges = self._cluster.judges()
        verifier = YesNoVerifier(
            lambda prompts: judges.p_yes(prompts).result(), self._config.feedback
        )
        with (
            VerdictStore(self._dir / "feedback" / "verdicts.jsonl") as store,
            self._progress("annotating", len(responses)) as advance,
        ):
            labeled = annotate(
                responses, self._segmenter, self._extractor, verifier, store, progress=advance
            )
        write_labels(self._dir / "feedback" / "labels.jsonl", labeled)
        self._write_summary(labeled)
        self._cluster.stop("judge")

    def train_reward(self) -> None:
        """Step 2: one reward model per kind."""
        labels = self._dir / "feedback" / "labels.jsonl"
        train_rewards(self._config, read_labels(labels), self._dir / "rewards", self._console)

    def evaluate(self, phase: Phase) -> None:
        """Captions and yes/no answers on held-out prompts, with the base or the trained policy."""
        rollouts = self._cluster.rollouts()
        if phase == "after":
            adapter = self._dir / "policy" / "adapter"
            manifest = manifest_from_adapter(adapter, version=self._config.ppo.steps)
            rollouts.load_weights(manifest).result()
        source = self.held_out
        prompts = source.prompts.prompts
        judge = SceneJudge(source.scene_of, self._segmenter)
        questions = scene_questions(
            prompts,
            source.scene_of,
            per_image=self._config.eval.pope_questions_per_image,
            seed=self._config.eval.seed,
        )
        report, captions = evaluate_policy(
            lambda requests: self._generate(requests, f"captions {phase}"),
            lambda asked: rollouts.p_yes(asked).result(),
            prompts,
            judge=judge,
            questions=questions,
            config=self._config,
        )
        write_eval(self._dir / "eval", phase, report, captions)

    def train(self) -> None:
        """Step 3: PPO."""
        source = self.train_source
        _, prompts = split_prompts(source, self._config)
        anchors = open_anchors(self._config, source, prompts)
        rewards = self._dir / "rewards"
        roles = Roles(
            rollouts=self._cluster.rollouts(),
            learner=self._cluster.learner(),
            reference=self._cluster.reference(rewards),
            rewards=self._cluster.rewards(rewards),
        )
        data = PpoData(prompts=prompts, anchors=anchors, digest=source.prompts.digest)
        driver = PpoDriver(self._config, roles, data, self._segmenter, self._extractor)
        with Tracker(self._config, self._dir / "policy", self._console) as tracker:
            for report in driver.run():
                tracker.log(report)
        roles.learner.save_adapter(self._dir / "policy" / "adapter").result()

    def _responses(self) -> list[Response]:
        path = self._dir / "responses" / "responses.jsonl"
        with ResponseStore(path) as store:
            responses = list(store.read())
        if not responses:
            raise DataError(f"{path}: no responses; run `fgaif sample` first")
        return responses

    def _generate(self, requests: Sequence[GenerationRequest], what: str) -> list[Response]:
        rollouts = self._cluster.rollouts()
        responses: list[Response] = []
        with self._progress(what, len(requests)) as advance:
            for start in range(0, len(requests), _CHUNK):
                chunk = requests[start : start + _CHUNK]
                responses += rollouts.generate(chunk).result()
                advance(len(chunk))
        return responses

    def _open(self, name: str, limit: int) -> Source:
        source = open_source(name, self._config, limit)
        if warning := source.prompts.warning():
            self._console.print(f"[yellow]{warning}[/yellow]", highlight=False)
        return source

    @contextmanager
    def _progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a bar with rate and time left; yields a function that advances it."""
        columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(what, total=total)
            yield lambda count: progress.advance(task, count)


def _to_run(ledger: Ledger, config: Config, wanted: Sequence[Stage], force: bool) -> list[Stage]:
    """Stages that are missing, stale, forced, always made (the report) or downstream of such."""
    todo: list[Stage] = []
    for stage in wanted:
        redo_upstream = any(upstream in todo for upstream in STAGES[stage].after)
        fresh = ledger.status(config, stage) == "done"
        if force or redo_upstream or not fresh or stage == "report":
            todo.append(stage)
    return todo


def _require_upstream(ledger: Ledger, config: Config, todo: Sequence[Stage]) -> None:
    """Refuse a stage whose input was never made, or was made with another configuration."""
    for stage in todo:
        for upstream in STAGES[stage].after:
            status = ledger.status(config, upstream)
            if upstream not in todo and status != "done":
                what = "has not run" if status == "missing" else "ran with other settings"
                raise DataError(
                    f"{stage} needs {upstream}, which {what} in {config.run_dir}: run "
                    f"`fgaif {upstream.split('-')[0] if 'eval' in upstream else upstream}` "
                    "with this configuration first, or `fgaif run`"
                )
