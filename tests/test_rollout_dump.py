"""Dumped rollouts: read back bit by bit, shown, and computed anew."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes import prompts, response, two_segments
from typer.testing import CliRunner

from cluster.cli.main import app
from fgaif.config import Config, load_config
from fgaif.errors import DataError
from fgaif.feedback.spans import token_spans
from fgaif.lvlm.model import load_processor, resolve_checkpoint
from fgaif.ppo.batch import make_batch
from fgaif.ppo.rollout_dump import COMPUTED, PER_TOKEN, keep_rollouts, read_dump, recompute
from fgaif.reward.dense import RewardCenters, dense_rewards
from fgaif.types import DEFAULT_KINDS, Evaluation, Response, SegmentScores

CENTERS = RewardCenters(kinds=DEFAULT_KINDS, means=(0.25, None, -0.5))


def settings(folder: Path, *overrides: str) -> Config:
    return load_config(None, [f"dir={folder}", "tracking.rollouts=2", *overrides])


def write_step(
    config: Config, step: int = 4, *, answer: str = "", reward: float = 0.0
) -> tuple[Path, list[Response], list[SegmentScores]]:
    """Three responses of 4, 5 and 4 tokens with random numbers; the second segment is malformed.
    Each prompt has the ``answer``, each response the ``reward`` of a preference model."""
    rng = np.random.default_rng(0)
    asked = [replace(prompt, answer=answer) for prompt in prompts(3)]
    responses = [response(prompt, tokens=4 + i % 2) for i, prompt in enumerate(asked)]
    segments = [two_segments(one) for one in responses]
    scores = [
        SegmentScores(probs=rng.dirichlet([1, 1, 1], (2, 3)).astype(np.float32), reward=reward)
        for _ in responses
    ]
    malformed = [(), (1,), ()]
    rewards = dense_rewards(responses, segments, scores, malformed, config.ppo.shape, CENTERS)

    def noise(one: Response) -> np.ndarray:
        return rng.normal(size=len(one.token_ids)).astype(np.float32)

    batch = make_batch(
        responses,
        [noise(one) for one in responses],
        [Evaluation(reference_logprobs=noise(one), values=noise(one)) for one in responses],
        rewards.tokens,
        kl_coef=0.3,
        gamma=config.ppo.gamma,
        lam=config.ppo.lam,
    )
    folder = config.run_dir / "policy" / "rollouts"
    keep_rollouts(
        folder,
        config,
        step=step,
        kl_coef=0.3,
        centers=CENTERS,
        batch=batch,
        segments=segments,
        scores=scores,
        rewards=rewards,
        malformed=malformed,
    )
    path = folder / f"step_{step:06d}.jsonl"
    if path.is_file():
        dump = read_dump(path)
        for index, row in enumerate(dump.rows):
            length = len(row.response.token_ids)
            for name in set(PER_TOKEN) - {"rollout_logprobs"}:
                np.testing.assert_array_equal(
                    row.tokens[name], getattr(batch, name)[index][:length]
                )
            np.testing.assert_array_equal(row.segment_values, rewards.values[index])
            np.testing.assert_array_equal(row.penalties, rewards.penalties[index])
    return path, responses, scores


def test_what_is_read_is_what_training_had_bit_by_bit(tmp_path: Path) -> None:
    path, responses, scores = write_step(settings(tmp_path))
    dump = read_dump(path)
    assert (dump.header.step, dump.header.kl_coef, dump.header.centers) == (4, 0.3, CENTERS)
    for row, one, score in zip(dump.rows, responses, scores, strict=True):
        np.testing.assert_array_equal(row.probs, score.probs)
        np.testing.assert_array_equal(row.response.token_ids, one.token_ids)
        assert row.response.prompt == one.prompt
        assert (row.response.text, row.response.policy_version) == (one.text, one.policy_version)
        assert row.segments == two_segments(one)
    assert dump.rows[1].malformed == {1}


def test_only_every_nth_step_is_kept(tmp_path: Path) -> None:
    assert not write_step(settings(tmp_path), step=3)[0].exists()
    assert not write_step(settings(tmp_path, "tracking.rollouts=0"), step=4)[0].exists()


def test_the_same_configuration_computes_the_same_again(tmp_path: Path) -> None:
    config = settings(tmp_path)
    dump = read_dump(write_step(config)[0])
    fresh = recompute(dump, config.ppo)
    for name in COMPUTED:
        for row, array in zip(dump.rows, fresh[name], strict=True):
            np.testing.assert_array_equal(array, row.tokens[name])


def test_rewards_of_whole_responses_are_kept_and_computed_again(tmp_path: Path) -> None:
    config = settings(tmp_path, "ppo.shape.wrong_penalty=0.5")
    dump = read_dump(write_step(config, answer="no such word", reward=1.75)[0])
    assert [row.reward for row in dump.rows] == [1.75] * 3
    assert {row.response.prompt.answer for row in dump.rows} == {"no such word"}
    fresh = recompute(dump, config.ppo)
    for row, array in zip(dump.rows, fresh["task_rewards"], strict=True):
        np.testing.assert_array_equal(array, row.tokens["task_rewards"])
    without = recompute(dump, settings(tmp_path).ppo)["task_rewards"]
    for row, array in zip(dump.rows, without, strict=True):
        assert array[-1] - row.tokens["task_rewards"][-1] == pytest.approx(0.5, abs=1e-6)


def test_numbers_that_are_not_finite_come_back_as_nan(tmp_path: Path) -> None:
    path = write_step(settings(tmp_path))[0]
    lines = path.read_text().splitlines()
    row = json.loads(lines[1]) | {"values": [None, 1.5, 0.1, -2.0]}
    path.write_text("\n".join([lines[0], json.dumps(row)]) + "\n")
    values = read_dump(path).rows[0].tokens["values"]
    assert np.isnan(values[0])
    assert values[2] == np.float32(0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": [1.0]}, r":2: .*\(1,\) where \(4,\)"),
        ({"probs": {"object": []}}, ":2: "),
        ({"segments": [[0, 1], [1, 2]]}, ":2: .*TypeError"),
        ({"segments": [[0, 5, 0, 2], [5, 8, 2, 9]]}, ":2: .*segment 1 .* beyond"),
        ({"token_ids": "no"}, ":2: "),
    ],
)
def test_a_row_that_contradicts_itself_is_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = write_step(settings(tmp_path))[0]
    head, row, *_ = path.read_text().splitlines()
    path.write_text(head + "\n" + json.dumps(json.loads(row) | change) + "\n")
    with pytest.raises(DataError, match=message):
        read_dump(path)


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    for text in ("", "[]", '{"format": 9}', "{", "\n"):
        (tmp_path / "x.jsonl").write_text(text)
        with pytest.raises(DataError, match=r"x\.jsonl:1: not of a dump"):
            read_dump(tmp_path / "x.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_dump(tmp_path / "none.jsonl")


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["replay", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.exception
    return result.stdout


def test_replay_shows_segments_with_their_kinds_and_rewards(tmp_path: Path) -> None:
    path = write_step(settings(tmp_path))[0]
    dump = read_dump(path)
    text = run(path)
    assert "step 4, 3 responses, KL coefficient 0.3" in text
    assert "[1] p1#0" in text
    reward = dump.rows[0].tokens["task_rewards"][1]  # T of the first segment of two tokens
    line = next(one for one in text.splitlines() if one.strip().startswith("a b,  "))
    assert f"{reward:+.3f}" in line
    one = run(path, "--row", 1)
    assert "p0#0" not in one
    assert f"{dump.rows[1].tokens['advantages'][4]:+.3f}" in one  # its fifth token


def test_replay_shows_the_texts_of_tokens(tmp_path: Path) -> None:
    """By the tokenizer of the run's policy; without the run's configuration ids alone."""
    config = settings(tmp_path)
    path = write_step(config)[0]
    tokenizer = load_processor(resolve_checkpoint("scenes:policy")).tokenizer
    ids = read_dump(path).rows[1].response.token_ids.tolist()
    text, spans = token_spans(tokenizer, ids)
    words = [text[start:end].strip() for start, end in spans]
    assert any(words)

    def shown(printed: str) -> list[str]:
        """What stands behind the id of each token that has a text."""
        table = [line.split() for line in printed.splitlines()]
        return [
            next(row[2] for row in table if row[:2] == [str(t), str(token)])
            for t, token in enumerate(ids)
            if words[t]
        ]

    assert shown(run(path, "--row", 1)) != [word for word in words if word]
    (config.run_dir / "config.yaml").write_text(f"dir: {tmp_path}\n")
    assert shown(run(path, "--row", 1)) == [word for word in words if word]


def test_replay_writes_a_page(tmp_path: Path) -> None:
    path = write_step(settings(tmp_path))[0]
    assert run(path, "--out", tmp_path / "page.html") == ""
    page = (tmp_path / "page.html").read_text()
    assert "<html" in page
    assert "p2#0" in page
    assert "color:" in page


def test_replay_computes_anew_with_another_reward_shape(tmp_path: Path) -> None:
    config = settings(tmp_path)
    path = write_step(config)[0]
    (config.run_dir / "config.yaml").write_text(f"dir: {tmp_path}\n")
    assert "the same as in training" in run(path, "--recompute")
    other = run(path, "--recompute", "ppo.lam=0.5")
    assert "ppo.lam: 0.95 in training, 0.5 now" in other
    assert "largest: row" in other
    lines = {line.split()[1]: line for line in other.splitlines() if " of 13 " in line}
    assert "0 of 13" in lines["rewards"]  # lambda moves advantages, not rewards
    assert "13 of 13" in lines["advantages"]


def test_replay_says_what_is_missing(tmp_path: Path) -> None:
    path = write_step(settings(tmp_path))[0]
    outside = CliRunner().invoke(app, ["replay", str(path), "--row", "9"])
    assert "--row 9" in str(outside.exception)
    assert "responses 0 to 2" in str(outside.exception)
    without = CliRunner().invoke(app, ["replay", str(path), "--recompute"])
    assert "give the configuration with --config" in str(without.exception)


def test_responses_without_segments_survive(tmp_path: Path) -> None:
    config = settings(tmp_path)
    path = write_step(config)[0]
    head, row, *_ = path.read_text().splitlines()
    kinds: dict[str, list[object]] = {kind: [] for kind in ("object", "attribute", "relation")}
    empty = json.loads(row) | {
        "segments": [], "probs": kinds, "segment_values": [], "penalties": [], "malformed": [],
    }  # fmt: skip
    path.write_text(head + "\n" + json.dumps(empty) + "\n")
    dump = read_dump(path)
    assert dump.rows[0].probs.shape == (0, 3, 3)
    header = replace(dump.header, centers=RewardCenters.empty(DEFAULT_KINDS))
    assert len(recompute(replace(dump, header=header), config.ppo)["rewards"]) == 1
    run(path)


def test_a_run_without_rollouts_says_how_to_keep_some_and_one_with_shows_the_last(
    tmp_path: Path,
) -> None:
    step = write_step(settings(tmp_path / "other"))[0]
    for missing in (tmp_path, tmp_path / "policy" / "rollouts" / "step_000010.jsonl"):
        result = CliRunner().invoke(app, ["replay", str(missing)])
        assert "train with tracking.rollouts=10" in str(result.exception)
    folder = tmp_path / "policy" / "rollouts"
    folder.mkdir(parents=True)
    for name in ("step_000010.jsonl", "step_000020.jsonl"):
        (folder / name).write_bytes(step.read_bytes())
    assert CliRunner().invoke(app, ["replay", str(tmp_path)]).exit_code == 0
    result = CliRunner().invoke(app, ["replay", str(folder / "step_000015.jsonl")])
    assert "has step_000010.jsonl to step_000020.jsonl" in str(result.exception)
