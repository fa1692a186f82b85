"""``fgaif generate``: a policy's answers to prompts, the best of n, or guarded by reward models.

OUT/answers.jsonl   {"id", "image", "prompt", "response", "finish", "score"} per prompt
OUT/samples.jsonl   with --best-of: every sample with its score, also for `fgaif pairs`
OUT/summary.json    counts; with --best-of the curve over k, and best_of.png
OUT/parts/          what an interrupted call goes on from
"""

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from cluster.console import progress_bars
from cluster.evaluation.generate import ModelSpec, generation_config, policy_engines
from fgaif.config import Config, with_overrides
from fgaif.data.order import request_seed
from fgaif.data.prompts import SCENES
from fgaif.data.sources import Source, open_source
from fgaif.errors import ActorError, ConfigError, DataError
from fgaif.eval.best_of import best_of_curve, best_of_figure
from fgaif.eval.captions import caption_counts
from fgaif.eval.plots import save_png
from fgaif.eval.scenes import SceneJudge
from fgaif.feedback.segment import segment_response
from fgaif.feedback.store import JsonlStore, response_store
from fgaif.files import write_json, write_whole
from fgaif.lvlm.model import load_processor, resolve_checkpoint
from fgaif.reward.checkpoint import rewards_version, saved_kinds
from fgaif.serving.guard import Guarded, GuardSettings, segment_risks
from fgaif.serving.rewards import Rewards, TextScores, load_rewards
from fgaif.types import GenerationRequest, Json, Prompt, Response, SegmentClass

Generate = Callable[[Sequence[GenerationRequest]], Sequence[Response]]
Score = Callable[[Sequence[Response]], Sequence[TextScores]]

_ALL = 1_000_000_000
_AT_ONCE = 256
"""Prompts, or samples, between two writes."""
_FIGURES = {
    "reward": "reward of the response",
    "estimated": "hallucinated share, by the reward models",
    "truth": "hallucinated share, truth",
    "words": "words",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeOptions:
    """What ``fgaif generate`` was asked for; neither best-of nor guard is one greedy answer."""

    prompts: str
    out: Path
    rewards: Path | None = None
    best_of: int = 1
    guard: GuardSettings | None = None
    limit: int | None = None
    """Prompts at most; default: all, of the embedded world `data.eval_prompts`."""
    temperature: float | None = None
    """Default: 0 without, `policy.temperature` with reward models."""
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.best_of > 1 and self.guard is not None:
            raise ConfigError("--best-of and --guard are two ways; take one of them")
        if (self.best_of > 1 or self.guard is not None) and self.rewards is None:
            raise ConfigError("--best-of and --guard choose by reward models: give --rewards DIR")
        if self.rewards is not None and self.best_of == 1 and self.guard is None:
            raise ConfigError("--rewards goes with --best-of N or --guard")
        if self.temperature == 0 and self.rewards is not None:
            raise ConfigError("--temperature 0 samples the same response every time; give 1")


def run_generate(
    config: Config, model: ModelSpec, options: DecodeOptions, console: Console
) -> None:
    """Answer the prompts; what was sampled before by a call with the same settings is kept.

    Raises:
        DataError: the prompts cannot be read, or the folder holds answers of other settings.
        CheckpointError: the reward models do not fit.
    """
    settings = generation_config(config, model)
    drawn = options.prompts.startswith(SCENES)
    limit = options.limit or (settings.data.eval_prompts if drawn else _ALL)
    _check_own(options.out)
    # The embedded world is drawn into the answers' folder, not into that of a run.
    with TemporaryDirectory() if options.dry_run else nullcontext(options.out) as drawn_to:
        place = [f"dir={json.dumps(str(drawn_to))}", "name=parts"]
        source = open_source(options.prompts, with_overrides(settings, place), limit)
    if warning := source.prompts.warning():
        console.print(warning, style="yellow", markup=False)
    prompts = source.prompts.prompts[:limit]
    version = "" if options.rewards is None else _rewards_version(options.rewards)
    made_with = _made_with(settings, model, options, source.prompts.digest, version)
    _check_folder(options.out, made_with)
    how = "greedy" if options.rewards is None else "guarded"
    how = f"best of {options.best_of}" if options.best_of > 1 else how
    console.print(
        f"{len(prompts)} prompts of {options.prompts}, {how}, {model.name} -> {options.out}",
        markup=False,
        highlight=False,
    )
    if options.dry_run:
        return
    write_json(options.out / "parts" / "settings.json", made_with)
    with _Engines(settings, model) as engines:
        decoder = Decoder(settings, options, source, engines.generate, console)
        decoder.run(prompts)


class _Engines:
    """The policy's engines, started when the first answer is needed."""

    def __init__(self, config: Config, model: ModelSpec) -> None:
        self._config, self._model = config, model
        self._cluster: Any = nullcontext()
        self._pool: Any = None

    def __enter__(self) -> "_Engines":
        return self

    def __exit__(self, *error: Any) -> None:
        self._cluster.__exit__(*error)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Response]:
        """Sample; raises ActorError where requests keep killing engines."""
        if self._pool is None:
            from cluster.launch import Cluster

            self._cluster = Cluster(self._config, {"rollout"})
            self._cluster.__enter__()
            self._pool = policy_engines(self._cluster, self._model)
        found = self._pool.generate(requests).result()
        lost = [r for r, answer in zip(requests, found, strict=True) if answer is None]
        if lost:
            raise ActorError(
                f"{len(lost)} requests killed the engine more than once, the first about "
                f"{lost[0].prompt.image.path}; leave it out and run again: the others are kept"
            )
        return list(found)


class Decoder:
    """Answers prompts with whatever samples and scores."""

    def __init__(
        self,
        config: Config,
        options: DecodeOptions,
        source: Source,
        generate: Generate,
        console: Console,
        score: Score | None = None,
    ) -> None:
        self._config, self._options, self._source = config, options, source
        self._generate, self._console, self._score = generate, console, score
        self._models: Rewards | None = None

    def run(self, prompts: Sequence[Prompt]) -> None:
        """Answer them and write the folder."""
        if self._options.best_of > 1:
            self._best_of(prompts)
        elif self._options.guard is not None:
            self._guarded(prompts, self._options.guard)
        else:
            self._greedy(prompts)

    def _greedy(self, prompts: Sequence[Prompt]) -> None:
        temperature = self._options.temperature or 0.0
        responses = self._sampled([self._request(prompt, 0, temperature) for prompt in prompts])
        self._write_answers([_answer_row(response) for response in responses])
        self._finish({"prompts": len(prompts)})

    def _best_of(self, prompts: Sequence[Prompt]) -> None:
        count = self._options.best_of
        responses = self._sampled(
            [self._request(p, at, self._temperature) for p in prompts for at in range(count)]
        )
        scored = self._scored(responses)
        rows = [
            # As sampled: the text with its leading space has the sampled ids.
            _answer_row(one.response)
            | {"response": one.text, "sample": one.response.sample, "score": one.whole}
            for one in scored
        ]
        _write_rows(self._options.out / "samples.jsonl", rows)
        scores = np.array([one.whole for one in scored], dtype=np.float64).reshape(-1, count)
        best = scores.argmax(axis=1)
        chosen = [rows[at * count + int(choice)] for at, choice in enumerate(best)]
        self._write_answers([row | {"response": row["response"].strip()} for row in chosen])
        counts = {
            name: np.array(both, dtype=np.float64).reshape(-1, count, 2)
            for name, both in self._counts(scored).items()
        }
        curve = best_of_curve(scores, counts, seed=self._config.seed)
        save_png(best_of_figure(curve, _FIGURES), self._options.out / "best_of.png")
        self._console.print(_curve_table(curve))
        self._finish({"prompts": len(prompts), "samples": len(scored), "curve": curve})

    def _counts(self, scored: Sequence[TextScores]) -> dict[str, list[tuple[float, float]]]:
        """Numerator and denominator of each figure, sample by sample."""
        found = {
            "reward": [(one.whole, 1.0) for one in scored],
            "estimated": [_estimated(one) for one in scored],
            "words": [(float(len(one.text.split())), 1.0) for one in scored],
        }
        if self._source.scenes is not None:
            tokenizer = load_processor(resolve_checkpoint(self._config.policy.model)).tokenizer
            words = self._config.segment.min_words
            judge = SceneJudge(
                self._source.scene_of, lambda r: segment_response(r, tokenizer, words)
            )
            judged = judge([one.response for one in scored])
            found["truth"] = [caption_counts(one).get("any", (0.0, 0.0)) for one in judged]
        return found

    def _guarded(self, prompts: Sequence[Prompt], settings: GuardSettings) -> None:
        store: JsonlStore[Json] = JsonlStore(
            self._options.out / "parts" / "guarded.jsonl", lambda row: row, lambda row: row
        )
        known = {row["id"] for row in store}
        todo = [prompt for prompt in prompts if prompt.id not in known]
        with progress_bars(self._console, "guarded answers") as progress:
            progress(len(known), len(prompts))
            for start in range(0, len(todo), _AT_ONCE):
                part = todo[start : start + _AT_ONCE]
                store.append(self._guard_part(part, settings))
                progress(len(known) + start + len(part), len(prompts))
        rows = {row["id"]: row for row in store}
        answers = [rows[prompt.id] for prompt in prompts]
        self._write_answers(answers)
        finishes = [row["finish"] for row in answers]
        result = {
            "prompts": len(prompts),
            "resampled": sum(row["resampled"] for row in answers),
            "cut": finishes.count("cut"),
            "unsafe": sum(row["unsafe"] for row in answers),
            "length": finishes.count("length"),
        }
        self._console.print(
            f"{result['resampled']} segments sampled again, {result['cut']} answers cut, of which "
            f"{result['unsafe']} keep a first segment over the threshold",
            markup=False,
            highlight=False,
        )
        self._finish(result)

    def _guard_part(self, prompts: Sequence[Prompt], settings: GuardSettings) -> list[Json]:
        states = [
            (prompt, Guarded(settings=settings, first_seed=self._seed(prompt, 0)))
            for prompt in prompts
        ]
        while open_ones := [(p, state) for p, state in states if state.finish is None]:
            limit = self._config.policy.max_new_tokens
            responses = self._generate(
                [
                    GenerationRequest(
                        prompt=prompt,
                        seed=state.seed,
                        temperature=self._temperature,
                        max_new_tokens=limit - len(state.prefix),
                        prefix=state.prefix,
                    )
                    for prompt, state in open_ones
                ]
            )
            scored = self._score_all(responses)
            for (_, state), response, one in zip(open_ones, responses, scored, strict=True):
                ids, risks = response.token_ids.tolist(), segment_risks(one.probs)
                state.take(response.text, ids, response.finish, one.segments, risks)
        return [
            _row(prompt, state.text, str(state.finish))
            | {"resampled": state.resampled, "unsafe": state.unsafe}
            for prompt, state in states
        ]

    def _sampled(self, requests: Sequence[GenerationRequest]) -> list[Response]:
        """Sample what is not there yet, in parts that are kept."""
        store = response_store(self._options.out / "parts" / "responses.jsonl")
        known = {response.id for response in store}
        todo = [one for one in requests if f"{one.prompt.id}#{one.sample}" not in known]
        with progress_bars(self._console, "sampling") as progress:
            progress(len(known), len(requests))
            for start in range(0, len(todo), _AT_ONCE):
                part = todo[start : start + _AT_ONCE]
                store.append(self._generate(part))
                progress(len(known) + start + len(part), len(requests))
        found = {response.id: response for response in store}
        return [found[f"{one.prompt.id}#{one.sample}"] for one in requests]

    def _scored(self, responses: Sequence[Response]) -> list[TextScores]:
        found: list[TextScores] = []
        with progress_bars(self._console, "scoring") as progress:
            for start in range(0, len(responses), _AT_ONCE):
                found += self._score_all(responses[start : start + _AT_ONCE])
                progress(len(found), len(responses))
        return found

    def _score_all(self, responses: Sequence[Response]) -> Sequence[TextScores]:
        if self._score is not None:
            return self._score(responses)
        if self._models is None:
            assert self._options.rewards is not None, "checked with the options"
            self._models = load_rewards(
                self._options.rewards,
                policy=self._config.policy.model,
                dtype=self._config.policy.dtype,
                attention=self._config.policy.attention,
                micro_batch=self._config.reward.micro_batch,
            )
        return self._models.score_responses(responses)

    @property
    def _temperature(self) -> float:
        given = self._options.temperature
        return self._config.policy.temperature if given is None else given

    def _seed(self, prompt: Prompt, sample: int) -> int:
        return request_seed(self._config.seed, "generate", prompt.id, sample)

    def _request(self, prompt: Prompt, sample: int, temperature: float) -> GenerationRequest:
        return GenerationRequest(
            prompt=prompt,
            sample=sample,
            seed=self._seed(prompt, sample),
            temperature=temperature,
            max_new_tokens=self._config.policy.max_new_tokens,
        )

    def _write_answers(self, rows: Sequence[Json]) -> None:
        _write_rows(self._options.out / "answers.jsonl", rows)

    def _finish(self, summary: Json) -> None:
        write_json(self._options.out / "summary.json", summary)
        self._console.print(
            f"wrote {self._options.out / 'answers.jsonl'}", markup=False, highlight=False
        )


def _estimated(one: TextScores) -> tuple[float, float]:
    """Segments that some kind's most likely class calls hallucinated, of those with facts."""
    classes = one.probs.argmax(axis=2)
    wrong = (classes == SegmentClass.HALLU).any(axis=1)
    stated = (classes != SegmentClass.NONE).any(axis=1)
    return float(wrong.sum()), float(stated.sum())


def _answer_row(response: Response) -> Json:
    return _row(response.prompt, response.text, response.finish)


def _row(prompt: Prompt, text: str, finish: str) -> Json:
    return {
        "id": prompt.id,
        "image": prompt.image.path,
        "prompt": prompt.text,
        "response": text.strip(),
        "finish": finish,
    }


def _write_rows(path: Path, rows: Sequence[Json]) -> None:
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _rewards_version(folder: Path) -> str:
    return rewards_version(folder, saved_kinds(folder))


def _made_with(
    config: Config, model: ModelSpec, options: DecodeOptions, prompts: str, version: str
) -> Json:
    return {
        "model": model.digest,
        "prompts": prompts,
        "rewards": version,
        "best_of": options.best_of,
        "guard": options.guard and options.guard.model_dump(),
        "temperature": options.temperature,
        "policy": config.policy.model_dump(mode="json", include={"max_new_tokens", "temperature"}),
        "seed": config.seed,
    }


def _check_own(out: Path) -> None:
    """Refuse a folder that holds something but no answers of ours."""
    if (out / "parts" / "settings.json").is_file() or not out.exists():
        return
    if any(path.name != "parts" for path in out.iterdir()):
        raise DataError(f"{out}: holds other files; give --out a folder of its own")


def _check_folder(out: Path, made_with: Json) -> None:
    file = out / "parts" / "settings.json"
    if not file.is_file():
        return
    there = json.loads(file.read_text(encoding="utf-8"))
    if differ := [key for key, value in made_with.items() if there.get(key) != value]:
        raise DataError(
            f"{out}: holds answers of another {', '.join(differ)}; give --out another folder"
        )


def _curve_table(rows: Sequence[Json]) -> Table:
    names = [name for name in _FIGURES if rows[0].get(name) is not None]
    table = Table("k", *(_FIGURES[name] for name in names), "KL at most")
    for row in rows:
        cells = [_cell(row, name) for name in names]
        table.add_row(str(row["k"]), *cells, f"{row['kl_bound']:.2f}")
    return table


def _cell(row: Json, name: str) -> str:
    low, high = row.get(f"{name}_interval", (row[name], row[name]))
    return f"{row[name]:.3f} [{low:.3f}, {high:.3f}]"
