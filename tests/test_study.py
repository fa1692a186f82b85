"""A study: its arithmetic, what its runs share, failures as rows, its page; stages are faked."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import cluster.pipeline.study as study_module
from cluster.pipeline.keys import stage_values
from cluster.pipeline.stage_status import StageStatus
from cluster.pipeline.study import run_study, shared_config, variant_config
from fgaif.config import Config, load_config
from fgaif.errors import ActorError, ConfigError
from fgaif.eval.run_results import report_json
from fgaif.eval.study import (
    StudyRun,
    image_errors,
    interval,
    matched_steps,
    nearest_step,
    paired,
    paired_by_image,
    run_costs,
    study_json,
    verdict,
)
from fgaif.eval.study_page import console_tables, latex_table
from fgaif.types import CaptionMetrics, EvalReport, StepReport

CONFIG = Path(__file__).parents[1] / "configs" / "scenes_study.yaml"


def test_interval_of_three_runs() -> None:
    """Mean 2, standard deviation 1, so half-width = 4.303 / sqrt(3) = 2.484."""
    found = interval([1.0, 2.0, 3.0])
    assert (found["mean"], found["n"]) == (2.0, 3)
    assert found["half_width"] == pytest.approx(2.484, abs=1e-3)
    assert interval([5.0]) == {"mean": 5.0, "half_width": None, "n": 1}


def test_pairs_take_out_what_seeds_have_in_common() -> None:
    """Differences .1, .2, .3: t = .2 / (.1 / sqrt 3) = 3.464, p = .0742 with two degrees."""
    found = paired([1.0, 5.0, 9.0], [1.1, 5.2, 9.3])
    assert found["mean"] == pytest.approx(0.2)
    assert found["p"] == pytest.approx(0.0742, abs=1e-4)
    assert paired([1.0], [2.0])["p"] is None
    assert paired([1.0, 2.0], [2.0, 3.0])["p"] is None  # all differences are equal


def test_images_are_averaged_over_the_seeds_before_they_are_compared() -> None:
    images = [{"a": 0.0, "b": 0.5, "c": 1.0}, {"a": 1.0, "b": 0.5, "only here": 0.0, "c": 0.0}]
    first = [StudyRun(variant="x", seed=s, images=i) for s, i in enumerate(images)]
    shift = {"a": 0.1, "b": 0.2, "c": 0.6, "only here": 0.0}
    worse = [replace(r, images={k: v + shift[k] for k, v in r.images.items()}) for r in first]
    found = paired_by_image(first, worse)
    assert found is not None
    assert found["n"] == 3
    assert found["mean"] == pytest.approx((0.1 + 0.2 + 0.6) / 3)
    assert 0.09 < found["low"] < found["mean"] < found["high"] < 0.61
    # t = .3 / (.2646 / sqrt 3) = 1.964; with two degrees p = 1 - t / sqrt(2 + t^2) = .1885
    assert found["p"] == pytest.approx(0.1885, abs=1e-4)
    same = paired_by_image(first, first)
    assert same is not None
    assert same["p"] is None
    assert paired_by_image(first, [StudyRun(variant="y", seed=0, images={})] * 2) is None


def test_the_nearest_checkpoint_in_kl_and_the_earliest_of_equals() -> None:
    kl = {2: 1.0, 4: 3.0, 6: 3.0, 8: 6.0}
    assert nearest_step(kl, [2, 4, 6, 8], 2.9) == 4
    assert nearest_step(kl, [2, 8], 4.0) == 8
    assert matched_steps(kl, {2: 0.5, 4: 3.2}, [2, 4, 6, 8], [2, 4]) == (4, 4)


def test_what_a_reader_says_of_a_difference() -> None:
    assert verdict(paired([0.2, 0.3, 0.25], [0.1, 0.21, 0.14])) == "fewer errors"
    assert verdict(paired([0.1, 0.2, 0.1], [0.2, 0.1, 0.1])) == (
        "no difference that 3 seeds could show"
    )
    assert verdict(paired([0.1], [0.2])) == "one seed: no interval"


def test_errors_of_images_count_segments_with_facts(tmp_path: Path) -> None:
    def row(name: str, *segments: str, mode: str = "sampled") -> str:
        labels = [{"labels": dict(zip("oar", s.split(), strict=True))} for s in segments]
        return json.dumps({"mode": mode, "id": name, "segments": labels})

    path = tmp_path / "captions.jsonl"
    path.write_text(
        "\n".join(
            [
                row("a", "OK NONE HALLU", "NONE NONE NONE", "OK OK NONE"),
                row("b", "NONE NONE NONE"),
                row("c", "OK OK OK", mode="greedy"),
            ]
        )
    )
    assert image_errors(path) == {"a": 0.5}


def test_costs_count_the_responses_that_were_trained_on() -> None:
    steps = [
        StepReport(
            step=n, version=n,
            metrics={"length/tokens": 10.0, "rollout/set_aside": n - 1.0, "seconds/total": 2.0},
        )
        for n in (1, 2)
    ]  # fmt: skip
    assert run_costs(steps, batch=8, kinds=3) == {
        "samples": 15, "tokens": 150, "seconds": 4, "reward_calls": 45,
    }  # fmt: skip
    assert run_costs([], batch=8, kinds=3) == {}


def test_a_variant_has_its_overrides_seed_and_folder(tmp_path: Path) -> None:
    config = load_config(CONFIG, [f"dir={tmp_path}"])
    last = variant_config(config, "last", 2)
    assert (last.ppo.shape.placement, last.seed, last.name) == ("last", 2, "last-seed2")
    assert last.run_dir == tmp_path / "scenes_study" / "variants" / "last-seed2"
    assert last.ppo.keep_checkpoints >= last.ppo.steps // last.ppo.checkpoint_every


def test_variants_share_what_they_do_not_change(tmp_path: Path) -> None:
    config = settings(
        tmp_path,
        "study.variants={a: [], b: [ppo.lr=1e-3], noise: ['reward.noise_seed={seed}'],"
        " sentence: [segment.unit=sentence], again: [segment.unit=sentence, ppo.lr=1e-3]}",
    )

    def start(variant: str, seed: int) -> Config:
        return shared_config(config, variant_config(config, variant, seed))

    for variant in ("a", "b"):
        assert start(variant, 1) is config
    assert start("sentence", 0).run_dir == start("again", 1).run_dir != config.run_dir
    assert start("noise", 1).run_dir != start("noise", 2).run_dir
    assert start("noise", 1).seed == start("noise", 2).seed == config.seed


def test_one_seed_gives_no_interval_and_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"study\.seeds = \[0\]"):
        run_study(load_config(None, ["study.seeds=[0]"]), Console())


def test_a_command_of_no_variant_is_refused(tmp_path: Path) -> None:
    config = settings(tmp_path, "study.commands={dpo: [baseline dpo]}")
    with pytest.raises(ConfigError, match=r"study\.commands\.dpo: no such variant"):
        run_study(config, Console())


# --- whole studies over faked stages --------------------------------------------------------------


def settings(folder: Path, *overrides: str) -> Config:
    return load_config(
        None,
        [f"dir={folder}", "name=s", "ppo.steps=4", "study.seeds=[1, 2]", *overrides],
    )


def evaluation(error: float) -> EvalReport:
    sampled = CaptionMetrics(
        kinds={"object": error, "attribute": error, "relation": None}, any=error, chair_s=error,
        chair_i=error, recall=1 - error / 2, true_facts=5.0, length=30.0, repetition=0.0,
        malformed=0.0,
    )  # fmt: skip
    return EvalReport(greedy=sampled, sampled=sampled)


def write_evaluation(folder: Path, phase: str, error: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{phase}.json").write_text(json.dumps(report_json(evaluation(error))))
    rng = np.random.default_rng(3)
    rows = [
        {
            "mode": "sampled",
            "id": f"p{n}",
            "segments": [
                {"labels": {"object": "HALLU" if rng.random() < error else "OK"}} for _ in range(5)
            ],
        }
        for n in range(30)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{phase}_captions.jsonl").write_text(lines)


_ERRORS = {"fine": 0.1, "coarse": 0.3, "sentence": 0.2}


class Stages:
    """In place of ``run_stages``: writes what stages would; ``breaks`` names runs that fail.

    A variant's errors after training follow from its name and seed.
    """

    def __init__(self) -> None:
        self.done: list[tuple[str, tuple[str, ...]]] = []
        self.evaluated: list[tuple[str, tuple[int, ...]]] = []
        self.breaks: set[str] = set()

    def __call__(self, config: Config, stages: Sequence[Any], force: bool, console: Any) -> None:
        status = StageStatus(config.run_dir)
        todo = tuple(stage for stage in stages if status.status(config, stage) != "done")
        if not todo:
            return
        self.done.append((config.name, todo))
        if config.name in self.breaks:
            raise ActorError("rollout-0 died for good\nmore of it")
        run = config.run_dir
        for stage in todo:
            folder = {"sample": "responses", "annotate": "feedback", "train-reward": "rewards"}
            if stage in folder:
                (run / folder[stage]).mkdir(parents=True, exist_ok=True)
            if stage == "eval-before":
                write_evaluation(run / "eval", "before", 0.5)
                tree = {"object": {"f1_hallu": 0.9}}
                (run / "eval" / "rewards.json").write_text(json.dumps(tree))
            if stage == "train":
                self.train(config)
            if stage == "eval-after":
                name = config.name.partition("-")[0]
                write_evaluation(run / "eval", "after", _ERRORS[name] + config.seed / 100)
            status.adopt(config, stage)

    def train(self, config: Config) -> None:
        policy = config.run_dir / "policy"
        policy.mkdir(parents=True)
        speed = 2.0 if config.name.startswith("fine") else 1.0
        rows = [
            {
                "step": n,
                "version": n,
                "metrics": {"kl/response": speed * n, "length/tokens": 30.0, "seconds/total": 1.0},
            }
            for n in range(1, config.ppo.steps + 1)
        ]
        (policy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for n in (2, 4):
            (policy / "checkpoints" / f"step_{n:06d}").mkdir(parents=True)

    def evaluate(self, config: Config, steps: Sequence[int], console: Any) -> None:
        self.evaluated.append((config.name, tuple(steps)))
        for step in steps:
            folder = config.run_dir / "eval_steps" / f"step_{step:06d}"
            write_evaluation(folder, "after", 0.4 - step / 40)


@pytest.fixture
def stages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Stages:
    faked = Stages()
    if "page" not in request.fixturenames:  # drawing takes a second
        monkeypatch.setattr(study_module, "write_page", lambda run_dir, name, found: run_dir)
    monkeypatch.setattr(study_module, "run_stages", faked)
    monkeypatch.setattr(study_module, "_evaluate_steps", faked.evaluate)
    return faked


VARIANTS = "study.variants={fine: [], coarse: [ppo.shape.placement=last]}"


def read_study(config: Config) -> Any:
    return json.loads((config.run_dir / "study.json").read_text())


def test_a_study_runs_what_is_missing_and_compares_with_the_first(
    tmp_path: Path, stages: Stages
) -> None:
    config = settings(tmp_path, VARIANTS)
    run_study(config, Console(quiet=True))
    names = [name for name, _ in stages.done]
    assert names == ["s", "fine-seed1", "coarse-seed1", "fine-seed2", "coarse-seed2"]
    assert stages.done[1][1] == ("train", "eval-after")
    found = read_study(config)
    assert found["equal_steps"]["fine"]["any"]["mean"] == pytest.approx(0.115)
    against = found["against_first"]["coarse"]
    assert against["seeds"] == [1, 2]
    assert against["figures"]["any"]["mean"] == pytest.approx(0.2)
    assert against["images"]["n"] == 30
    assert against["p_holm"] == against["images"]["p"] < 0.05
    assert "relation" not in found["equal_steps"]["fine"]  # unknown there
    # fine reaches KL 8, coarse 4 at its end: fine is taken at step 2.
    assert stages.evaluated == [("fine-seed1", (2,)), ("fine-seed2", (2,))]
    matched = found["matched_kl"]["coarse"]["any"]
    assert matched["first"]["mean"] == pytest.approx(0.4 - 2 / 40)
    assert matched["mean"] == pytest.approx(0.315)
    assert found["costs"]["fine"]["samples"]["mean"] == 4 * config.ppo.rollout_batch
    assert found["reward_models"]["coarse"] == {"object": 0.9}
    assert set(found["made_with"]) == {"fgaif", "commit", "system"}
    run_study(config, Console(quiet=True))
    assert len(stages.done) == 5  # nothing is done twice
    assert len(stages.evaluated) == 2


def test_a_run_that_fails_is_a_row_and_the_next_call_tries_it_again(
    tmp_path: Path, stages: Stages
) -> None:
    config = settings(tmp_path, VARIANTS)
    stages.breaks = {"coarse-seed1"}
    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    run_study(config, console)
    failed = [run for run in read_study(config)["runs"] if run["failure"]]
    assert [(r["variant"], r["seed"], r["failure"]) for r in failed] == [
        ("coarse", 1, "rollout-0 died for good")
    ]
    assert read_study(config)["against_first"]["coarse"]["seeds"] == [2]
    assert "rollout-0 died for good" in console.export_text()
    stages.breaks = set()
    run_study(config, Console(quiet=True))
    assert not any(run["failure"] for run in read_study(config)["runs"])


def test_reward_models_that_cannot_be_made_fail_their_variant_alone(
    tmp_path: Path, stages: Stages
) -> None:
    config = settings(tmp_path, "study.variants={fine: [], sentence: [segment.unit=sentence]}")
    shared = shared_config(config, variant_config(config, "sentence", 1))
    stages.breaks = {shared.name}
    run_study(config, Console(quiet=True))
    failures = {(r["variant"], r["seed"]): r["failure"] for r in read_study(config)["runs"]}
    assert failures["fine", 1] is failures["fine", 2] is None
    assert failures["sentence", 1] == failures["sentence", 2] == "rollout-0 died for good"
    stages.breaks = set()
    run_study(config, Console(quiet=True))
    assert not any(run["failure"] for run in read_study(config)["runs"])


def test_a_summary_runs_nothing(tmp_path: Path, stages: Stages) -> None:
    config = settings(tmp_path, VARIANTS)
    run_study(config, Console(quiet=True))
    done = len(stages.done)
    wider = settings(
        tmp_path,
        "study.variants={fine: [], coarse: [ppo.shape.placement=last], grpo: "
        "[ppo.estimator=grpo, ppo.samples_per_prompt=4]}",
    )
    run_study(wider, Console(quiet=True), summary=True)
    assert len(stages.done) == done
    runs = {(run["variant"], run["seed"]): run["failure"] for run in read_study(wider)["runs"]}
    assert runs["grpo", 1] == "not run"
    assert runs["coarse", 2] is None


def test_a_variant_with_reward_models_of_its_own_makes_them_once(
    tmp_path: Path, stages: Stages
) -> None:
    config = settings(tmp_path, "study.variants={fine: [], sentence: [segment.unit=sentence]}")
    run_study(config, Console(quiet=True))
    shared = [entry for entry in stages.done if re.fullmatch("[0-9a-f]{12}", entry[0])]
    assert [todo for _, todo in shared] == [("annotate", "train-reward", "eval-before")]


def test_trainings_run_side_by_side_as_processes_of_their_own(
    tmp_path: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process is played by a call with ``only``; one of them dies without a word."""
    config = settings(tmp_path, VARIANTS, "study.parallel=2")
    both, seen = Barrier(2), set[str]()

    class Done:
        returncode = 0

    def run(line: list[str], check: bool, **_: Any) -> Done:
        if line[0] == "git":
            raise FileNotFoundError("no git here")
        assert line[1:4] == ["-m", "fgaif", "study"]
        both.wait(timeout=30)  # two are there at the same time
        seen.add(line[-1])
        done = Done()
        if line[-1] == "coarse:2":
            done.returncode = 137
        else:
            run_study(load_config(line[5]), Console(quiet=True), only=line[-1])
        return done

    monkeypatch.setattr(study_module.subprocess, "run", run)
    run_study(config, Console(quiet=True))
    assert seen == {"fine:1", "fine:2", "coarse:1", "coarse:2"}
    failures = {(r["variant"], r["seed"]): r["failure"] for r in read_study(config)["runs"]}
    assert "ended with exit code 137; see" in failures.pop(("coarse", 2))
    assert set(failures.values()) == {None}


def test_only_names_a_run_of_the_study(tmp_path: Path, stages: Stages) -> None:
    config = settings(tmp_path, VARIANTS)
    with pytest.raises(ConfigError, match=r"--only coarse:3: no such run; .* coarse:1, "):
        run_study(config, Console(quiet=True), only="coarse:3")


def test_checkpoints_are_evaluated_for_the_plots_where_that_is_wanted(
    tmp_path: Path, stages: Stages
) -> None:
    config = settings(tmp_path, VARIANTS, "study.evaluate_every=2")
    run_study(config, Console(quiet=True))
    assert dict(stages.evaluated)["coarse-seed1"] == (2,)
    assert set(read_study(config)["runs"][0]["at"]) == {"2", "4"}


def test_a_variant_may_be_made_by_commands(
    tmp_path: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []

    class Done:
        returncode = 0

    def run(line: list[str], check: bool, **_: Any) -> Done:
        if line[0] == "git":
            raise FileNotFoundError("no git here")
        ran.append(line[2:])
        adapter = Path(line[-1]).parent / "baselines" / "dpo" / "adapter"
        if "dpo" in line:
            adapter.mkdir(parents=True, exist_ok=True)
            (adapter / "adapter_config.json").write_text("{}")
        return Done()

    class FakeRun:
        def __init__(self, config: Config, cluster: Any, console: Any) -> None:
            pass

        def evaluate(self, phase: str, *, adapter: Path, folder: Path) -> None:
            assert adapter.parts[-3:] == ("baselines", "dpo", "adapter")
            write_evaluation(folder, phase, 0.2)

    class FakeCluster:
        def __init__(self, *_: Any) -> None:
            pass

        def __enter__(self) -> "FakeCluster":
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(study_module.subprocess, "run", run)
    monkeypatch.setattr(study_module, "Run", FakeRun)
    monkeypatch.setattr(study_module, "Cluster", FakeCluster)
    config = settings(
        tmp_path,
        "study.variants={fine: [], dpo: []}",
        "study.commands={dpo: [pairs, baseline dpo]}",
    )
    run_study(config, Console(quiet=True))
    file = config.run_dir / "variants" / "dpo-seed1" / "config.yaml"
    assert ran[:2] == [
        ["fgaif", "pairs", "--config", str(file)],
        ["fgaif", "baseline", "dpo", "--config", str(file)],
    ]
    found = read_study(config)
    assert found["equal_steps"]["dpo"]["any"]["mean"] == pytest.approx(0.2)
    assert "dpo" not in found["matched_kl"]
    assert found["costs"]["dpo"] == {}
    Done.returncode = 2
    again = settings(
        tmp_path / "b", "study.variants={fine: [], dpo: []}", "study.commands={dpo: [pairs]}"
    )
    run_study(again, Console(quiet=True))
    failures = [run["failure"] for run in read_study(again)["runs"] if run["variant"] == "dpo"]
    assert all("ended with exit code 2; run it by hand" in failure for failure in failures)


@pytest.fixture
def page() -> None:
    """Asks for the real page."""


@pytest.mark.usefixtures("page")
def test_tables_page_and_latex_name_every_variant_and_what_failed(
    tmp_path: Path, stages: Stages
) -> None:
    config = settings(tmp_path, VARIANTS, "study.seeds=[1, 2, 3]")
    stages.breaks = {"coarse-seed3", "fine-seed3"}
    run_study(config, Console(quiet=True))
    found = read_study(config)
    console = Console(record=True, width=160, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in console_tables(found):
        console.print(table)
    text = console.export_text()
    for part in ("coarse", "more errors", "0.115", "cost of a training", "0.350"):
        assert part in text
    found["equal_steps"]["50%_x"] = found["equal_steps"].pop("coarse")
    latex = latex_table(found)
    assert "50\\%\\_x & $0.315 \\pm" in latex
    assert latex.count("\\\\") == 4
    page = (config.run_dir / "study.html").read_text()
    assert page.count("<svg") == 4
    assert "2 of 6 runs have no result" in page
    assert "rollout-0 died for good" in page
    assert not re.search(r"""(src|href)=["']?https?:""", page)


def test_without_two_variants_there_is_nothing_to_compare() -> None:
    run = StudyRun(variant="only", seed=0, figures={"any": 0.1}, costs={"samples": 1})
    found = study_json(evaluation(0.5), [run], {}, {})
    assert found["against_first"] == found["matched_kl"] == {}
    assert len(console_tables(found)) == 2


@pytest.mark.parametrize(
    "path", sorted((CONFIG.parent / "study").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_shipped_studies_make_every_variant(path: Path, tmp_path: Path) -> None:
    """Every override is accepted, and every variant trains otherwise or on something else."""
    config = load_config(path, [f"dir={tmp_path}"])
    assert config.name.startswith(path.stem)
    assert set(config.study.commands) <= set(config.study.variants)
    assert next(iter(config.study.variants)) == "fine"
    assert config.study.variants["fine"] == ()
    made = [variant_config(config, name, config.study.seeds[0]) for name in config.study.variants]
    ways = [
        (stage_values(run, "train"), config.study.commands.get(name))
        for name, run in zip(config.study.variants, made, strict=True)
    ]
    assert len({json.dumps(way, sort_keys=True) for way in ways}) == len(made)
    of = "scenes" if config.data.train.startswith("scenes:") else path.stem
    demo = load_config(CONFIG.parent / f"{of}.yaml")
    if of != "scenes":
        assert made[0].ppo == demo.ppo.model_copy(update={"keep_checkpoints": demo.ppo.steps})
        return
    assert made[0].ppo == demo.ppo.model_copy(
        update={"checkpoint_every": 2, "keep_checkpoints": demo.ppo.steps}
    )
