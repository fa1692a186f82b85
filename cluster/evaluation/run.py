"""Run prepared benchmarks: generate what is missing, ask the judges, score, write, print."""

import asyncio
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from cluster.console import progress_bars
from cluster.evaluation.settings import Settings, judge_settings
from fgaif.chat.store import ReplyStore
from fgaif.config import with_overrides
from fgaif.data.prompts import Skipped
from fgaif.errors import ConfigError, DataError
from fgaif.eval.benchmark import EvalContext, Judges, PreparedBenchmark
from fgaif.eval.benchmark_results import (
    benchmarks_in,
    comparison_json,
    read_scored,
    result_json,
    with_length_figures,
    write_scored,
)
from fgaif.eval.benchmarks import benchmark_names, load_benchmark
from fgaif.eval.checks import general_checks, warned
from fgaif.eval.coverage import bought_with_coverage
from fgaif.eval.expected import check_setup, image_list_digest, setup_lines
from fgaif.eval.rejudge import converted_lines, rejudge_lines, rejudged
from fgaif.eval.scored import Scored
from fgaif.eval.tables import (
    comparison_table,
    for_console,
    markdown,
    render_page,
    results_table,
    show_items,
)
from fgaif.eval.uncertainty import compare, intervals
from fgaif.files import write_whole
from fgaif.types import Json

if TYPE_CHECKING:
    from cluster.evaluation.generate import ModelSpec
    from cluster.groups.rollout_group import RolloutGroup

log = logging.getLogger(__name__)


def run_benchmarks(
    prepared: Sequence[PreparedBenchmark],
    settings: Settings,
    out: Console,
    err: Console,
    *,
    by_name: bool = False,
) -> None:
    """Do everything that a call of ``fgaif eval BENCHMARK`` asks for.

    Standard output carries the tables, or with ``as_json`` one JSON object and nothing else: that
    of the only benchmark, or, ``by_name``, those of all.

    Raises:
        FgaifError: whatever stopped it; generated answers and paid replies are kept.
    """
    for one in prepared:
        for questions in one.questions:
            _say_skipped(err, one.benchmark, questions.skipped)
    if settings.dry_run:
        _print_plan(prepared, settings, out)
        return
    if any(one.judged for one in prepared):
        judge_settings(settings.config, settings.judge)  # before an hour of generation
        if settings.rejudge is not None:
            judge_settings(settings.config, settings.rejudge)
    if settings.model is not None:
        _generate(prepared, settings, settings.model, err)
    scored = [
        _with_provenance(one, result, settings) for one, result in _score(prepared, settings, err)
    ]
    if settings.calibration is not None:
        scored = [
            replace(one, provenance=one.provenance | converted_lines(settings.calibration, one))
            if plan.judged
            else one
            for plan, one in zip(prepared, scored, strict=True)
        ]
    found = _rejudge(prepared, scored, settings, err) if settings.rejudge is not None else {}
    _report(scored, settings, out, err, by_name, found)


def _rejudge(
    prepared: Sequence[PreparedBenchmark],
    scored: Sequence[Scored],
    settings: Settings,
    err: Console,
) -> dict[str, Json]:
    """Have the second judge score the same answers, and compare the two by benchmark."""
    judged = [(plan, one) for plan, one in zip(prepared, scored, strict=True) if plan.judged]
    if not judged:
        raise ConfigError("--rejudge compares judges: no judge is asked here; give --judge too")
    second = replace(settings, judge=settings.rejudge)
    again = _score([plan for plan, _ in judged], second, err)
    found = {
        one.benchmark: rejudged(one, other, seed=settings.seed)
        for (_, one), (_, other) in zip(judged, again, strict=True)
    }
    if settings.out is not None:
        write_whole(settings.out / "rejudge.json", _dump(found))
    return found


def prepare_all(
    data: Path, context: EvalContext, count: int, *, judged: bool
) -> tuple[list[PreparedBenchmark], list[str]]:
    """Prepare all benchmarks whose official files lie in a folder, and say why others are left out.

    Args:
        judged: a judge is named; without one the benchmarks that ask one are left out.

    Raises:
        DataError: there is no benchmark to run.
    """
    prepared: list[PreparedBenchmark] = []
    missing, unjudged = [], []
    for benchmark in map(load_benchmark, benchmark_names()):
        if benchmark.official is None:
            continue
        if benchmark.models and not judged:
            unjudged.append(benchmark.name)
            continue
        found = benchmark.official(data, context, count)
        if isinstance(found, Path):
            missing.append(f"{benchmark.name}: left out, {found} does not exist")
        else:
            prepared.append(found)
    if unjudged:
        missing.append(f"{', '.join(unjudged)}: left out, no judge given (--judge)")
    if not prepared:
        raise DataError(f"{data}: nothing to run there: {'; '.join(missing)}")
    return prepared, missing


def run_comparison(
    a: Path, b: Path, out: Path | None, *, seed: int, as_json: bool, console: Console
) -> None:
    """Compare two result folders on the benchmarks that both hold.

    Raises:
        DataError: a folder holds no results, or they have no benchmark in common.
    """
    theirs = benchmarks_in(b)
    names = [name for name in benchmarks_in(a) if name in theirs]
    if not names:
        raise DataError(f"{a} and {b} have no benchmark in common; run the same one for both")
    comparisons = [
        compare(
            with_length_figures(read_scored(a, name)),
            with_length_figures(read_scored(b, name)),
            seed=seed,
        )
        for name in names
    ]
    comparisons = [
        replace(found, warnings=(*found.warnings, *bought_with_coverage(found)))
        for found in comparisons
    ]
    table = comparison_table(f"A = {a}, B = {b}", comparisons)
    tree = {found.benchmark: comparison_json(found) for found in comparisons}
    whole: Json = {"a": str(a), "b": str(b), "benchmarks": tree}
    if out is not None:
        write_whole(out / "comparison.json", _dump(whole))
        write_whole(out / "comparison.md", markdown(table))
        write_whole(out / "comparison.html", render_page("fgaif: comparison", [table], {}))
    if as_json:
        _print_json(whole)
    else:
        console.print(for_console(table))


def run_check(folder: Path, *, as_json: bool, console: Console) -> None:
    """Hold the results of a folder against the table of expected set-ups and figures.

    Raises:
        DataError: the folder holds no results.
    """
    found = check_setup(folder)
    if as_json:
        _print_json(found)
        return
    for line, style in setup_lines(found):
        console.print(line, style=style or None, highlight=False, markup=False, soft_wrap=True)


def run_plots(folders: Sequence[Path], out: Path | None, *, seed: int, console: Console) -> None:
    """Draw the benchmarks that all folders hold, a colour per folder, into ``plots`` or ``out``.

    Raises:
        ConfigError, DataError: two folders of one name, or no benchmark in all of them.
    """
    from fgaif.eval.paper_plots import draw_all, save_all  # matplotlib

    names = [folder.name or str(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise ConfigError(f"--plots: two folders are named alike ({', '.join(names)}); rename one")
    shared = [b for b in benchmarks_in(folders[0]) if all(b in benchmarks_in(f) for f in folders)]
    if not shared:
        raise DataError(f"{', '.join(map(str, folders))}: no benchmark is in all of them")
    target = out or folders[0] / "plots"
    for benchmark in shared:
        models = {
            name: read_scored(folder, benchmark)
            for name, folder in zip(names, folders, strict=True)
        }
        for path in save_all(draw_all(models, seed), target):
            console.print(str(path), highlight=False, soft_wrap=True)


def shared_prompt(prompts: Iterable[str]) -> str:
    """Return the prompt of all questions, or where they differ the last lines that all end in."""
    texts = set(prompts)
    if len(texts) == 1:
        return texts.pop()
    backwards = zip(*(text[::-1] for text in texts), strict=False)
    shared = "".join(letters[0] for letters in takewhile(lambda row: len(set(row)) == 1, backwards))
    return "".join(shared[::-1].partition("\n")[1:])


def write_tables(folder: Path, images: Path | None, seed: int = 0) -> None:
    """Write ``results.{json,md,html}`` over all benchmarks of a result folder."""
    scored = [read_scored(folder, name) for name in benchmarks_in(folder)]
    full = [with_length_figures(one) for one in scored]
    results = [(one, intervals(one, seed=seed)) for one in full]
    table = results_table(f"Results in {folder.name}", results)
    models = {one.provenance.get("model", "not known") for one in scored}
    if len(models) > 1:
        beware = f"beware: these benchmarks are of several models: {', '.join(sorted(models))}"
        table = replace(table, notes=(*table.notes, beware))
    tree = {one.benchmark: result_json(one, estimates, seed) for one, estimates in results}
    worst = {f"Worst of {one.benchmark}": show_items(one, images) for one in scored}
    write_whole(folder / "results.json", _dump(tree))
    write_whole(folder / "results.md", markdown(table))
    write_whole(folder / "results.html", render_page(f"fgaif: {folder.name}", [table], worst))


def _generate(
    prepared: Sequence[PreparedBenchmark], settings: Settings, model: "ModelSpec", err: Console
) -> None:
    from cluster.evaluation.generate import (
        REQUESTS,
        generate_answers,
        generation_config,
        policy_engines,
    )
    from cluster.launch import Cluster

    questions = [part for one in prepared for part in one.questions]
    cache = questions[0].file.parent / "answers.jsonl"
    config = generation_config(settings.config, model)
    with ExitStack() as stack:
        # The cluster starts when the first engine is needed: not if all answers are known.
        def engines() -> "RolloutGroup":
            return policy_engines(stack.enter_context(Cluster(config, {"rollout"})), model)

        report = stack.enter_context(progress_bars(err, "answers", passing=True))
        chunk = REQUESTS * config.cluster.rollout.replicas
        new = generate_answers(model, questions, cache, engines, chunk=chunk, progress=report)
    total = sum(len(part.prompts) for part in questions)
    err.print(f"answers: {new} generated for {total} questions", highlight=False)


def _score(
    prepared: Sequence[PreparedBenchmark], settings: Settings, err: Console
) -> Iterator[tuple[PreparedBenchmark, Scored]]:
    with ExitStack() as stack:
        verifier = None
        if settings.verifier is not None:
            from cluster.evaluation.settings import local_verifier
            from cluster.launch import Cluster
            from fgaif.lvlm.model import resolve_checkpoint

            verifier_key = f"feedback.verifier={json.dumps(settings.verifier)}"
            config = with_overrides(settings.config, [verifier_key])
            cluster = stack.enter_context(Cluster(config, {"judge"}))
            store = stack.enter_context(ReplyStore(settings.replies))
            verifier = local_verifier(cluster, resolve_checkpoint(settings.verifier), store)
        judges = Judges(verifier=verifier)
        for one in prepared:
            with progress_bars(err, f"scoring {one.benchmark}", passing=True) as report:
                yield one, asyncio.run(_score_one(one, judges, settings, err, report))


async def _score_one(
    prepared: PreparedBenchmark,
    judges: Judges,
    settings: Settings,
    err: Console,
    report: Callable[[int, int], None],
) -> Scored:
    async with AsyncExitStack() as stack:
        if prepared.judged:
            from cluster.evaluation.settings import open_judge

            def print_usage(line: str) -> None:
                err.print(f"judge: {line}", highlight=False)

            chat = open_judge(settings.config, settings.judge, settings.replies, print_usage)
            judges = replace(judges, judge=await stack.enter_async_context(chat))
        return await prepared.score(judges, report)


def _with_provenance(prepared: PreparedBenchmark, scored: Scored, settings: Settings) -> Scored:
    about = dict(scored.provenance) | file_digests(prepared.files)
    if images := [str(item["image"]) for item in scored.items if item.get("image")]:
        about["images"] = image_list_digest(images)
    if settings.model is not None:
        about |= {"model": f"{settings.model.name} {settings.model.digest}"}
        if prepared.questions:
            about["max_new_tokens"] = str(prepared.questions[0].max_new_tokens)
            about["decoding"] = "greedy"
            about["asked"] = shared_prompt(prompt.text for prompt in prepared.questions[0].prompts)
    if settings.corruption is not None:
        about["corruption"] = f"{settings.corruption} seed {settings.seed}"
    skipped = sum(len(part.skipped) for part in prepared.questions)
    counted = replace(
        scored, provenance=about, counts={**scored.counts, "images_unusable": skipped}
    )
    descriptions = load_benchmark(scored.benchmark).descriptions
    general = warned(log, general_checks(counted, descriptions=descriptions))
    return replace(counted, warnings=(*counted.warnings, *general))


def _report(
    scored: Sequence[Scored],
    settings: Settings,
    out: Console,
    err: Console,
    by_name: bool,
    judges: Mapping[str, Json],
) -> None:
    results = [
        (full, intervals(full, seed=settings.seed))
        for full in (with_length_figures(one) for one in scored)
    ]
    if settings.out is not None:
        for one, (_, estimates) in zip(scored, results, strict=True):
            write_scored(settings.out, one, estimates, settings.seed)
        write_tables(settings.out, settings.images, settings.seed)
        err.print(f"results: {settings.out / 'results.html'}", highlight=False)
    if settings.as_json:
        trees = {full.benchmark: result_json(full, found, settings.seed) for full, found in results}
        for name, comparison in judges.items():
            trees[name]["rejudged"] = comparison
        _print_json(trees if by_name else next(iter(trees.values())))
    else:
        out.print(for_console(results_table("results", results)))
        for line in (line for found in judges.values() for line in rejudge_lines(found)):
            out.print(line, highlight=False, markup=False, soft_wrap=True)


def _print_plan(prepared: Sequence[PreparedBenchmark], settings: Settings, out: Console) -> None:
    from cluster.evaluation.generate import pending_answers

    for one in prepared:
        out.print(f"[bold]{one.benchmark}[/bold]: {one.items or 'all'} items", highlight=False)
        for name, path in one.files.items():
            state = "" if path.is_file() else " (to be written)"
            out.print(f"  {name}: {path}{state}", highlight=False, soft_wrap=True)
        if settings.model is not None and one.questions:
            cache = one.questions[0].file.parent / "answers.jsonl"
            pending = pending_answers(settings.model, one.questions, cache)
            out.print(f"  {settings.model.name}: {pending} answers to generate", highlight=False)
        if one.judged:
            _print_cost(one, settings, out)


def _print_cost(prepared: PreparedBenchmark, settings: Settings, out: Console) -> None:
    from cluster.evaluation.settings import CountingJudge

    counting = CountingJudge(judge_settings(settings.config, settings.judge))
    missing = [path for path in prepared.files.values() if not path.is_file()]
    if missing:
        out.print(
            f"  judge: about {prepared.items} requests; the cost is known once answers are there"
        )
        return
    try:
        asyncio.run(prepared.score(Judges(judge=counting), lambda done, total: None))
    except DataError as error:
        if not counting.requests:
            raise
        del error  # nothing could be read, because nothing was asked
    spend, price = counting.spend, counting.settings.price_input or counting.settings.price_output
    out.print(
        f"  judge {settings.judge} ({counting.settings.model}): {counting.requests} requests, at "
        f"most about {spend.tokens:,} tokens"
        + (f", cost {spend.cost:.4g}" if price else "; set its prices for the cost"),
        highlight=False,
    )
    if prepared.cost_note:
        out.print(f"  {prepared.cost_note}", highlight=False)


def file_digests(files: Mapping[str, Path]) -> dict[str, str]:
    """SHA-256 of the files that a score depends on, in short, by what they are.

    Raises:
        DataError: one cannot be read.
    """
    found = {}
    for name, path in files.items():
        try:
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; give an existing file") from error
    return found


def _say_skipped(err: Console, benchmark: str, skipped: Sequence[Skipped]) -> None:
    if skipped:
        err.print(
            f"{benchmark}: {len(skipped)} questions left out, their images cannot be used; the "
            f"first: {skipped[0].reason}",
            style="yellow",
            highlight=False,
            markup=False,
        )


def _dump(tree: Mapping[str, object] | Json) -> str:
    return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"


def _print_json(tree: Mapping[str, object]) -> None:
    sys.stdout.write(json.dumps(tree, ensure_ascii=False) + "\n")
