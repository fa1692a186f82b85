"""The stages of a run, each reading what the one before wrote into the run folder."""

import logging
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console

from actors.vllm_engine import context_length
from cluster.console import StepDisplay, progress_bars
from cluster.driver import PpoData, PpoDriver
from cluster.launch import Cluster
from cluster.pipeline.annotate import annotate_responses
from cluster.pipeline.aside import move_aside
from cluster.pipeline.contents import Hashes
from cluster.pipeline.dry_run import (
    StagePlan,
    plan_stages,
    require_upstream,
    say_split,
    stage_roles,
)
from cluster.pipeline.evaluate import CaptionJudges, judging_engines, truth_known
from cluster.pipeline.feedback_report import write_summary
from cluster.pipeline.inputs import refuse_inputs, wrong_inputs
from cluster.pipeline.keys import ORDER, Stage, stage_values
from cluster.pipeline.run_lock import driver_lock, require_own
from cluster.pipeline.sample import sample_all
from cluster.pipeline.stage_status import StageStatus, check_resumable
from cluster.pipeline.train_preference import train_preference_model
from cluster.pipeline.train_rewards import train_rewards
from cluster.pipeline.verifier_rewards import OpenVerifier
from cluster.roles import Roles
from fgaif.chat.limits import Usage
from fgaif.checkpoint import checkpoint_names
from fgaif.config import Config, dump_config, with_overrides
from fgaif.data.captions import ImageCaptions
from fgaif.data.order import request_seed
from fgaif.data.prompts import PromptSet, skipped_warning, split_by_length
from fgaif.data.scenes.facts import SCENE_KINDS, oracle
from fgaif.data.sources import Source, open_anchors, open_source, split_prompts
from fgaif.errors import DataError
from fgaif.eval.policy import Captions, evaluate_policy
from fgaif.eval.pope_questions import PopeQuestion
from fgaif.eval.report import EXAMPLES, build_report, console_table
from fgaif.eval.run_results import REWARDS, Phase, figures_json, note_too_long, write_eval
from fgaif.eval.scenes import SceneJudge, scene_questions
from fgaif.feedback.external import read_responses
from fgaif.feedback.facts import SceneFacts
from fgaif.feedback.label_order import check_order
from fgaif.feedback.labels import Oracle
from fgaif.feedback.segment import segment_response
from fgaif.feedback.store import label_store, response_store
from fgaif.files import write_json, write_whole
from fgaif.lvlm.inputs import load_encoder
from fgaif.lvlm.model import resolve_checkpoint
from fgaif.lvlm.weights import manifest_from_adapter
from fgaif.reward.checkpoint import checkpoint_digest
from fgaif.reward.metrics import calibration_bins, reward_metrics
from fgaif.reward.preference_model import PREFERENCE
from fgaif.tracking import Tracker, log_results
from fgaif.types import (
    EvalReport,
    GenerationRequest,
    Json,
    LabeledResponse,
    Prompt,
    Response,
    Segment,
    StepReport,
)
from fgaif.versions import untested_engine

log = logging.getLogger(__name__)

_LOGGED = ("kl/response", "length/tokens", "mismatch/mean", "seconds/total")


def run_stages(
    config: Config, stages: Sequence[Stage], force: bool, console: Console
) -> Path | None:
    """Run the stages that are not up to date, in order; return the report's path if it was made.

    Outputs that are made anew are moved aside first, as ``plan_stages`` says.

    Raises:
        FgaifError: what is asked for cannot be done, and nothing was changed; or whatever stopped a
            stage. Finished stages stay finished.
    """
    stage_status = StageStatus(config.run_dir)
    planned_on = stage_status.entries()
    plans = plan_stages(stage_status, config, stages, force)
    for plan in plans:
        if not plan.runs:
            console.print(f"{plan.stage}: up to date")
    todo = [plan for plan in plans if plan.runs]
    if not todo:
        return None
    require_upstream(stage_status, config, [plan.stage for plan in todo])
    refuse_inputs(wrong_inputs(config, [plan.stage for plan in todo]))
    say_split(config, todo, console)
    if heavy := [plan for plan in todo if plan.stage != "report"]:
        with driver_lock(config.run_dir):
            if stage_status.entries() != planned_on:
                raise DataError(
                    f"{config.run_dir}: another command has worked in this folder meanwhile; run "
                    "this one again"
                )
            _run_over_cluster(config, heavy, stage_status, console)
    if todo[-1].stage != "report":
        return None
    whole = len(todo) == len(ORDER)
    return make_report(config, console, _process_seconds() if whole else None)


def _run_over_cluster(
    config: Config, plans: Sequence[StagePlan], stage_status: StageStatus, console: Console
) -> None:
    """Run stages as planned; nothing is written before the last thing that may refuse them."""
    if warning := untested_engine():
        console.print(warning, style="yellow", markup=False)
    roles = stage_roles(config, [plan.stage for plan in plans])
    console.print("starting Ray" if not config.cluster.address else "joining the Ray cluster")
    with Cluster(config, roles, live=True) as cluster:
        run = Run(config, cluster, console)
        stage_status.keep_values()
        write_whole(config.run_dir / "config.yaml", dump_config(config))
        annotating = any(plan.stage == "annotate" for plan in plans)
        if config.feedback.local_verifier and annotating and not config.cluster.engine.sleep:
            cluster.judges()  # loads while the policy samples
        training = any(plan.stage == "train" for plan in plans)
        training &= config.ppo.reward_source == "models" and not judging_engines(config)
        for plan in plans:
            run.prepare(plan, stage_status)
            if plan.stage == "eval-before" and training:
                run.roles()  # they load while captions are sampled
            if cluster.live:
                cluster.live.publisher.stage(plan.stage)
            start = time.monotonic()
            log.info("%s begins", plan.stage)
            with stage_status.record(config, plan.stage):
                run.stage(plan.stage)
            log.info("%s is done after %.1f s", plan.stage, time.monotonic() - start)


def make_report(config: Config, console: Console, wall_seconds: float | None = None) -> Path:
    """Build the report from the run folder and print its table and path."""
    require_own(config.run_dir)
    path = build_report(config.run_dir, wall_seconds)
    console.print(console_table(config.run_dir))
    console.print(f"report: {path}")
    return path


def step_line(report: StepReport) -> str:
    """The metrics of a step that people look at first, for the log."""
    known = {name: report.metrics.get(name) for name in _LOGGED}
    known |= {n: v for n, v in report.metrics.items() if n.startswith(("reward/", "hallu/"))}
    return ", ".join(f"{name} {value:.4g}" for name, value in known.items() if value is not None)


class Run:
    """One run's stages over one cluster: engines started by one stage serve the next."""

    def __init__(self, config: Config, cluster: Cluster, console: Console) -> None:
        self._config = config
        self._cluster = cluster
        self._console = console
        self._dir = config.run_dir
        self._policy_path = resolve_checkpoint(config.policy.model)
        self._resume = False
        self._hashes = Hashes(config.run_dir)
        self._encoder = load_encoder(self._policy_path, **config.data.image_limits)
        self._tokenizer = self._encoder.tokenizer

    def prepare(self, plan: StagePlan, stage_status: StageStatus) -> None:
        """Go on with what is there, or move it aside; nothing that was finished is removed."""
        if plan.goes_on:
            self._say(f"{plan.stage}: going on: {plan.why or 'where it stopped'}")
            self._resume = plan.stage == "train"
        elif plan.outputs:
            note = {"why": plan.why, "stages.json": stage_status.entry(plan.stage)}
            target = move_aside(self._dir, plan.stage, plan.outputs, note)
            stage_status.forget(plan.stage)
            self._say(plan.moving(self._dir, done_to=target))

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
        config = self._config
        store = response_store(self._dir / "responses" / "responses.jsonl")
        known = {response.id for response in store}
        if config.data.responses is not None:
            given = self._given(config.data.responses)
            store.append(response for response in given if response.id not in known)
            return
        prompts, _ = split_prompts(self.train_source, config)
        prompts = self._fitting("sample", prompts)
        requests = [
            GenerationRequest(
                prompt=prompt,
                sample=sample,
                seed=request_seed(config.seed, "sample", prompt.id, sample),
                temperature=config.policy.temperature,
                max_new_tokens=config.policy.max_new_tokens,
            )
            for prompt in prompts
            for sample in range(config.feedback.samples_per_prompt)
        ]
        todo = [r for r in requests if f"{r.prompt.id}#{r.sample}" not in known]
        sample_all(self._cluster, todo, "sampling", self._console, len(known), store.append)

    def _given(self, path: Path) -> Sequence[Response]:
        """Responses that another tool sampled."""
        data = self._config.data
        found = read_responses(
            path,
            self._tokenizer,
            root=data.image_root,
            max_pixels=data.max_image_pixels,
            check=self._hashes.check_image,
        )
        if warning := found.warning():
            self._console.print(warning, style="yellow", markup=False)
        return found.responses

    def annotate(self) -> None:
        """Step 1b: segments, facts, verdicts, labels."""
        config, folder = self._config, self._dir / "feedback"
        labels = label_store(folder / "labels.jsonl")
        judges, judge_name = None, ""
        if config.feedback.local_verifier is not None:
            judges = self._cluster.judges()
            checkpoint = resolve_checkpoint(config.feedback.local_verifier)
            judge_name = checkpoint_digest(checkpoint)[:16]
        start = time.monotonic()
        starting = "" if judges is None else "starting the verifier"
        with progress_bars(self._console, "labelling responses") as progress:

            def report(done: int, total: int, usage: Usage | None) -> None:
                note = starting if done == len(labels) else ""
                if usage and usage.requests:
                    rate = usage.replies / (time.monotonic() - start)
                    note = f"{rate:.1f}/s, {usage.line()}"
                progress(done, total, note=note)

            annotate_responses(config, labels, self._tokenizer, judges, judge_name, report)
        # Responses of another tool are not of `data.train`, which may not even be there.
        given = config.data.responses is not None
        skipped = 0 if given else len(self.train_source.prompts.skipped)
        write_summary(folder, labels, config.kind_names, self._oracle(), skipped, self._console)
        self._cluster.stop("judge")

    def train_reward(self) -> None:
        """Step 2: one reward model per kind, or one of preferences."""
        if self._config.reward.form == "preference":
            self._train_preference()
            return
        kinds = self._config.kind_names
        labels = label_store(self._dir / "feedback" / "labels.jsonl", kinds)
        check_order(labels, response_store(self._dir / "responses" / "responses.jsonl"))
        labeled = list(labels)
        self._say(
            f"starting the training of {len(kinds)} reward models on {len(labeled)} responses"
        )
        with progress_bars(self._console, *kinds) as progress:
            train_rewards(
                self._config,
                labeled,
                self._dir / "rewards",
                lambda kind, done, total, _: progress(done, total, kind),
            )

    def _train_preference(self) -> None:
        config = self._config
        labels = label_store(self._dir / "feedback" / "labels.jsonl", config.kind_names)
        labeled = [] if config.reward.pairs is not None else list(labels)
        with progress_bars(self._console, PREFERENCE) as progress:
            card = train_preference_model(
                config,
                labeled,
                self._dir / "rewards",
                lambda name, done, total, _: progress(done, total, name),
            )
        left = ", ".join(f"{count} {name}" for name, count in card.pairs.items() if count)
        self._say(f"pairs: {left}; {card.metrics['accuracy']:.1%} of those held out in order")

    def evaluate(
        self, phase: Phase, adapter: Path | None = None, folder: Path | None = None
    ) -> None:
        """Caption held-out images with the base or the trained policy and judge the captions.

        ``adapter`` and ``folder`` default to the run's own.
        """
        rollouts = self._cluster.rollouts()
        if phase == "after":
            adapter = adapter or self._dir / "policy" / "adapter"
            version = self._config.ppo.steps
            rollouts.load_weights(manifest_from_adapter(adapter, version=version)).result()
        source = self.held_out
        stage: Stage = "eval-before" if phase == "before" else "eval-after"
        prompts = self._fitting(stage, source.prompts.prompts)
        judges = CaptionJudges(
            self._config, self._cluster, source, self._sub_sentences, self._segmenter
        )
        name, judge = judges.judge()
        if name == REWARDS:
            self._say(
                "warning: captions are judged by the reward models themselves, which PPO optimises;"
                " let a verifier judge (eval.judge=verifier, feedback.extractor=model or api:NAME)"
            )
        report, captions, answers = evaluate_policy(
            lambda requests: sample_all(
                self._cluster, requests, f"captions {phase}", self._console
            ),
            lambda asked: rollouts.p_yes(asked).result(),
            prompts,
            judge=judge,
            judge_name=name,
            others=judges.others(),
            questions=self._pope_questions(source),
            config=self._config,
        )
        if judges.judging:
            took = ", ".join(f"{name} {value:,g}" for name, value in judges.judging.items())
            self._say(f"judging the captions {phase}: {took}")
        report = replace(report, judging=judges.judging)
        write_eval(folder or self._dir / "eval", phase, report, captions, answers)
        if phase == "after" and folder is None:
            self._log_results(report, captions)
        by_kind = self._config.reward.form == "segment"
        if phase == "before" and truth_known(self._config) and by_kind:
            own = SceneJudge(source.scene_of, self._segmenter, self._config.kind_names)
            responses = [caption.labeled.response for caption in captions.sampled]
            self._check_rewards([caption.labeled for caption in own(responses)])

    def _log_results(self, report: EvalReport, captions: Captions) -> None:
        """Final figures and some captions, to trackers that show them."""
        config = self._config
        figures = {
            f"after/{mode}/{name}": value
            for mode, metrics in (("sampled", report.sampled), ("greedy", report.greedy))
            for name, value in figures_json(metrics).items()
            if value is not None
        }
        rows = [
            [caption.labeled.response.prompt.id, caption.labeled.response.text, report.judge]
            for caption in captions.sampled[:EXAMPLES]
        ]
        settings = config.model_dump(mode="json")
        columns = ("prompt", "caption", "judge")
        log_results(
            self._dir / "policy", config.tracking, config.name, settings, figures, columns, rows
        )

    def roles(self, verifier: OpenVerifier | None = None) -> Roles:
        """PPO's actors; those that do not run yet are started, which does not wait for them.

        With a ``verifier`` it gives the rewards.
        """
        rewards = self._dir / "rewards"
        return Roles(
            rollouts=self._cluster.rollouts(),
            learner=self._cluster.learner(),
            reference=self._cluster.reference(rewards),
            rewards=self._cluster.rewards(rewards) if verifier is None else verifier.rewards,
        )

    def train(self) -> None:
        """Step 3: PPO; a training that was interrupted goes on from its last checkpoint."""
        if self._config.ppo.reward_source == "models":
            self._train(None)
        else:
            with OpenVerifier(self._config, self._cluster) as verifier:
                self._train(verifier)

    def _train(self, verifier: OpenVerifier | None) -> None:
        config, folder = self._config, self._dir / "policy"
        if self._resume and config.ppo.resume is None and checkpoint_names(folder / "checkpoints"):
            config = with_overrides(config, ["ppo.resume=latest"])
        if config.reward.captions is not None:
            wanted_images = split_prompts(self.train_source, config)[1]
            ImageCaptions(config.reward.captions).require(prompt.image for prompt in wanted_images)
        roles = self.roles(verifier)
        source = self.train_source
        _, wanted = split_prompts(source, config)
        prompts = self._fitting("train", wanted)
        # Prompts are numbered for the batches: other ones that fit make another training.
        used = source.prompts
        if len(prompts) < len(wanted):
            used = PromptSet(source=used.source, prompts=tuple(prompts))
        if len(prompts) < (size := config.ppo.rollout_batch // config.ppo.samples_per_prompt):
            self._say(
                f"warning: PPO has {len(prompts)} prompts for batches of {size} prompts "
                f"(ppo.rollout_batch = {config.ppo.rollout_batch}): every batch holds the same "
                "ones, more than once; raise data.ppo_prompts or give more prompts"
            )
        data = PpoData(
            prompts=prompts,
            anchors=open_anchors(config, source, prompts, self._hashes.check_image),
            digest=used.digest,
            settings=stage_values(config, "train"),
            check_resumable=partial(check_resumable, config),
        )
        driver = PpoDriver(config, roles, data, self._segmenter, self._malformed)
        with (
            Tracker(
                folder,
                config.tracking,
                name=config.name,
                settings=config.model_dump(mode="json"),
                say=self._console.print,
            ) as tracker,
            StepDisplay(config.ppo.steps, config.kind_names, self._console) as display,
        ):
            for report in driver.run():
                if verifier is not None:
                    asked = verifier.rewards.metrics()
                    report = replace(report, metrics=report.metrics | asked)
                tracker.log(report)
                log.info("step %d/%d: %s", report.step, config.ppo.steps, step_line(report))
                display.update(report)
                if self._cluster.live:
                    self._cluster.live.step(report)
        self._save_adapter(roles, folder / "adapter")

    def _fitting(self, stage: Stage, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        """Prompts that the engine has room for; others are left out, said, and counted.

        Raises:
            DataError: there is room for none.
        """
        new = self._config.policy.max_new_tokens
        context = context_length(self._policy_path, self._config)
        fitting, skipped = split_by_length(
            prompts, lambda prompt: len(self._encoder.prompt_ids(prompt)), context - new
        )
        note_too_long(self._dir, stage, len(skipped))
        if not skipped:
            return fitting
        warning = skipped_warning(f"{stage}: prompts too long", len(fitting), skipped)
        said = (
            f"{warning}\n  a prompt with its image and policy.max_new_tokens = {new} must fit into "
            f"{context} tokens: shorten these prompts, lower policy.max_new_tokens, or raise "
            "cluster.engine.max_model_len as far as the model goes, and use --force to do the "
            "stage again"
        )
        if not fitting:
            raise DataError(said)
        self._say(said)
        return fitting

    def _save_adapter(self, roles: Roles, path: Path) -> None:
        """Write the adapter beside its place, then rename; that of fewer steps is moved aside."""
        partial = path.with_name(f".{path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed while it wrote
        roles.learner.save_adapter(partial).result()
        if path.exists():
            why = f"the training went on to ppo.steps = {self._config.ppo.steps}"
            name = path.relative_to(self._dir).as_posix()
            target = move_aside(self._dir, "train", [name], {"why": why})
            self._say(f"train: moved {name} to {target}: {why}")
        partial.rename(path)

    def _check_rewards(self, labeled: Sequence[LabeledResponse]) -> None:
        """Compare the reward models with the truth on the held-out images' sampled captions."""
        rewards = self._cluster.rewards(self._dir / "rewards")
        scores = rewards.score(
            [item.response for item in labeled], [item.segments for item in labeled]
        ).result()
        probs = np.concatenate([score.probs for score in scores])
        truth = np.concatenate([item.labels for item in labeled])
        metrics: Json = {
            kind: {
                **reward_metrics(probs[:, index], truth[:, index]).as_floats(),
                "calibration": calibration_bins(probs[:, index], truth[:, index]),
            }
            for index, kind in enumerate(self._config.kind_names)
        }
        write_json(self._dir / "eval" / "rewards.json", metrics)

    def _pope_questions(self, source: Source) -> list[PopeQuestion]:
        if source.scenes is None:
            return []
        return scene_questions(
            source.prompts.prompts,
            source.scene_of,
            per_image=self._config.eval.pope_questions_per_image,
            seed=self._config.eval.seed,
        )

    def _oracle(self) -> Oracle | None:
        if self._config.data.responses is not None or self.train_source.scenes is None:
            return None
        source = self.train_source
        return lambda response, fact: (
            oracle(source.scene_of(response.prompt), fact) if fact.kind in SCENE_KINDS else None
        )

    def _segmenter(self, response: Response) -> tuple[Segment, ...]:
        return segment_response(response, self._tokenizer, self._config.segment.least_words)

    def _sub_sentences(self, response: Response) -> tuple[Segment, ...]:
        """What figures are shares of where the truth is known, whatever unit is rewarded."""
        return segment_response(response, self._tokenizer, self._config.segment.min_words)

    def _malformed(self, response: Response, segments: Sequence[Segment]) -> Collection[int]:
        """Segments that are no sentences of the embedded world; unknown for other images."""
        if self._config.feedback.extractor != "scenes":
            return ()
        return SceneFacts(self._config.kind_names).parse(response, segments).malformed

    def _say(self, line: str) -> None:
        log.info("%s", line)
        self._console.print(line, markup=False, soft_wrap=True)

    def _open(self, name: str, limit: int) -> Source:
        source = open_source(name, self._config, limit, self._hashes.check_image)
        self._hashes.save()
        if warning := source.prompts.warning():
            self._console.print(f"[yellow]{warning}[/yellow]", highlight=False)
        return source


def _process_seconds() -> float:
    """Seconds since this process started, imports included."""
    return time.time() - psutil.Process().create_time()
