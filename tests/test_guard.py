"""Rejection of sub-sentences: the state of one response, and `fgaif generate` without engines."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from cluster.cli.main import app
from cluster.evaluation.decode import DecodeOptions, Decoder
from fgaif.config import Config, load_config, parse_config
from fgaif.data.scenes.captions import BROAD, write_caption
from fgaif.data.scenes.facts import oracle_classes
from fgaif.data.sources import Source, open_source
from fgaif.errors import ConfigError, DataError
from fgaif.eval.captions import segment_texts
from fgaif.feedback.external import given_response
from fgaif.feedback.segment import segment_response
from fgaif.lvlm.model import load_processor, resolve_checkpoint
from fgaif.serving.guard import Guarded, GuardSettings, segment_risks
from fgaif.serving.rewards import TextScores
from fgaif.types import DEFAULT_KINDS, GenerationRequest, Response, Segment

WORD = 3  # tokens of a segment in the tests of the state


def pieces(text: str) -> tuple[Segment, ...]:
    """A segment per word, of three tokens each."""
    found, at = [], 0
    for index, word in enumerate(text.split(" ")):
        end = at + len(word) + 1
        found.append(
            Segment(
                index=index, char_start=at, char_end=min(end, len(text)),
                token_start=index * WORD, token_end=(index + 1) * WORD,
            )
        )  # fmt: skip
        at = end
    return tuple(found)


def say(state: Guarded, text: str, bad: dict[str, float], finish: str = "stop") -> None:
    """What the policy says next; ``bad`` are the risks of words."""
    segments = pieces(text)
    ids = range(len(segments) * WORD)
    risks = np.array([bad.get(word, 0.1) for word in text.split(" ")], np.float32)
    state.take(text, list(ids), finish, segments, risks)  # type: ignore[arg-type]


def test_a_clean_response_is_taken_as_it_is() -> None:
    state = Guarded(settings=GuardSettings(), first_seed=7)
    assert state.seed == 7
    say(state, "a b c", {}, "length")
    assert (state.text, state.finish, state.resampled) == ("a b c", "length", 0)


def test_what_was_accepted_stays_and_the_rest_is_sampled_again() -> None:
    state = Guarded(settings=GuardSettings(tries=1), first_seed=7)
    say(state, "a b X c", {"X": 0.9})
    assert state.finish is None
    assert (state.text, state.prefix) == ("a b ", tuple(range(6)))
    assert state.seed != 7
    say(state, "a b d Y", {"Y": 0.6})  # one segment further: tries begin anew
    assert (state.text, len(state.prefix)) == ("a b d ", 9)
    say(state, "a b d e", {})
    assert (state.text, state.finish, state.resampled) == ("a b d e", "stop", 2)
    assert not state.unsafe


def test_after_too_many_tries_it_is_cut() -> None:
    state = Guarded(settings=GuardSettings(tries=2))
    seeds = []
    for _ in range(3):
        assert state.finish is None
        seeds.append(state.seed)
        say(state, "a X c", {"X": 0.9})
    assert (state.text, state.finish, state.unsafe) == ("a ", "cut", False)
    assert len(set(seeds)) == 3


def test_without_any_accepted_segment_the_least_risky_is_kept() -> None:
    state = Guarded(settings=GuardSettings(tries=2))
    for word, risk in (("X", 0.9), ("Y", 0.6), ("Z", 0.8)):
        say(state, f"{word} a", {word: risk})
    assert (state.text, state.finish, state.unsafe) == ("Y ", "cut", True)
    assert len(state.prefix) == WORD


def test_a_segment_is_at_risk_by_its_worst_kind() -> None:
    probs = np.array([[[0.1, 0.8, 0.1], [0.2, 0.1, 0.7]]], np.float32)
    assert segment_risks(probs).tolist() == pytest.approx([0.7])
    assert segment_risks(np.zeros((0, 2, 3), np.float32)).shape == (0,)


POLICY = resolve_checkpoint("scenes:policy")
TOKENIZER = load_processor(POLICY).tokenizer


class World:
    """A policy that lies about drawn scenes, and reward models that know the truth."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.calls = 0
        self.fail_at: int | None = None

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Response]:
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        return [self._answer(request) for request in requests]

    def _answer(self, request: GenerationRequest) -> Response:
        scene = self.source.scene_of(request.prompt)
        text = " " + write_caption(scene, random.Random(request.seed), BROAD)
        if request.prefix:  # one sentence more
            text = TOKENIZER.decode(request.prefix) + text.partition(".")[0] + "."
        answer = given_response("x", request.prompt, text, TOKENIZER)
        ids = np.array([*request.prefix, *answer.token_ids[len(request.prefix) :]], dtype=np.int64)
        assert ids.tolist() == answer.token_ids.tolist()
        return replace(answer, sample=request.sample)

    def score(self, responses: Sequence[Response]) -> list[TextScores]:
        return [self._score(response) for response in responses]

    def _score(self, response: Response) -> TextScores:
        segments = segment_response(response, TOKENIZER, 4)
        scene = self.source.scene_of(response.prompt)
        classes = oracle_classes(scene, segment_texts(response, segments))
        probs = np.eye(3, dtype=np.float32)[np.array(classes, np.int64).reshape(-1, 3)]
        values = probs[..., 1] - probs[..., 2]
        return TextScores(
            response=response, segments=segments, kinds=DEFAULT_KINDS, probs=probs,
            values=values, rewards=values.sum(axis=1),
        )  # fmt: skip


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("run")
    return load_config(None, [f"dir={folder}", "segment.min_words=4", "policy.temperature=1"])


@pytest.fixture(scope="module")
def source(settings: Config) -> Source:
    return open_source("scenes:test", settings, 12)


def decoder(settings: Config, source: Source, world: World, options: DecodeOptions) -> Decoder:
    console = Console(quiet=True)
    return Decoder(settings, options, source, world.generate, console, world.score)


def rows(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def hallucinated(world: World, out: Path) -> int:
    """Hallucinated segments of all answers."""
    scenes = {prompt.id: world.source.scene_of(prompt) for prompt in world.source.prompts.prompts}
    count = 0
    for row in rows(out / "answers.jsonl"):
        prompt = next(p for p in world.source.prompts.prompts if p.id == row["id"])
        answer = given_response("x", prompt, str(row["response"]), TOKENIZER)
        segments = segment_response(answer, TOKENIZER, 4)
        classes = oracle_classes(scenes[prompt.id], segment_texts(answer, segments))
        count += sum(2 in found for found in classes)
    return count


def test_the_best_of_n_is_chosen_and_the_curve_is_told(
    tmp_path: Path, settings: Config, source: Source
) -> None:
    world = World(source)
    options = DecodeOptions(prompts="scenes:test", out=tmp_path, rewards=Path("x"), best_of=4)
    decoder(settings, source, world, options).run(source.prompts.prompts)
    samples = rows(tmp_path / "samples.jsonl")
    assert len(samples) == 48
    for answer in rows(tmp_path / "answers.jsonl"):
        scores = [float(str(one["score"])) for one in samples if one["id"] == answer["id"]]
        assert answer["score"] == max(scores)
    curve = json.loads((tmp_path / "summary.json").read_text())["curve"]
    assert [row["k"] for row in curve] == [1, 2, 4]
    assert curve[0]["truth"] > curve[-1]["truth"]
    assert curve[0]["reward"] < curve[-1]["reward"]
    assert curve[0]["estimated"] == curve[0]["truth"]  # these reward models know it
    assert (tmp_path / "best_of.png").is_file()


def test_guarded_answers_hold_no_more_than_what_could_not_be_helped(
    tmp_path: Path, settings: Config, source: Source
) -> None:
    world = World(source)
    greedy = DecodeOptions(prompts="scenes:test", out=tmp_path / "greedy")
    decoder(settings, source, world, greedy).run(source.prompts.prompts)
    options = DecodeOptions(
        prompts="scenes:test", out=tmp_path / "guard", rewards=Path("x"),
        guard=GuardSettings(tries=8),
    )  # fmt: skip
    decoder(settings, source, world, options).run(source.prompts.prompts)
    summary = json.loads((tmp_path / "guard" / "summary.json").read_text())
    assert summary["resampled"] > 0
    assert hallucinated(world, tmp_path / "greedy") > summary["unsafe"]
    assert hallucinated(world, tmp_path / "guard") == summary["unsafe"]
    assert all(row["response"] for row in rows(tmp_path / "guard" / "answers.jsonl"))


def test_an_interrupted_call_goes_on(
    tmp_path: Path, settings: Config, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.evaluation.decode._AT_ONCE", 8)
    world = World(source)
    world.fail_at = 3
    options = DecodeOptions(prompts="scenes:test", out=tmp_path, rewards=Path("x"), best_of=2)
    with pytest.raises(KeyboardInterrupt):
        decoder(settings, source, world, options).run(source.prompts.prompts)
    decoder(settings, source, world, options).run(source.prompts.prompts)
    assert world.calls == 4  # three parts, one of them asked for twice
    whole = World(source)
    again = replace(options, out=tmp_path / "whole")
    decoder(settings, source, whole, again).run(source.prompts.prompts)
    assert rows(tmp_path / "samples.jsonl") == rows(tmp_path / "whole" / "samples.jsonl")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"best_of": 2}, "give --rewards"),
        ({"guard": GuardSettings()}, "give --rewards"),
        ({"best_of": 2, "guard": GuardSettings(), "rewards": Path("x")}, "two ways"),
        ({"rewards": Path("x")}, "goes with --best-of"),
        ({"best_of": 2, "rewards": Path("x"), "temperature": 0.0}, "the same response"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        DecodeOptions(prompts="p", out=Path("o"), **options)  # type: ignore[arg-type]


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    def call(*arguments: str) -> str:
        given = ["generate", "scenes:test", f"dir={tmp_path}", *arguments, "--limit", "2"]
        result = CliRunner().invoke(app, given, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    out = tmp_path / "out"
    told = call("--out", str(out), "--dry-run")
    assert "2 prompts of scenes:test, greedy, policy ->" in told
    assert not out.exists()
    assert not any(tmp_path.iterdir())  # nothing in the folder of a run, either
    (out / "parts").mkdir(parents=True)
    (out / "parts" / "settings.json").write_text(json.dumps({"seed": 5}))
    with pytest.raises(DataError, match="answers of another model, prompts"):
        call("--out", str(out))
    with pytest.raises(DataError, match="other files"):
        call("--out", str(tmp_path), "--dry-run")
    assert parse_config({}).seed == 0
