"""Guards: results of lmms-eval and VLMEvalKit, read, compared, set beside our own."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_calls import eval_command

from fgaif.errors import DataError
from fgaif.eval.guards import Guard, compare_guards, read_guards
from fgaif.types import Json

__all__ = ["eval_command"]
Run = Callable[..., tuple[int, str, str]]


def lmms(path: Path, star: float, vet: float, error: float | str = "N/A") -> Path:
    results: Json = {
        "mmstar": {"alias": "mmstar", "average,none": star, "average_stderr,none": error},
        "mmvet": {"gpt_eval_score,none": vet, "gpt_eval_score_stderr,none": "N/A"},
        "other": {"acc,none": 0.5},
    }
    path.write_text(json.dumps({"results": results, "config": {}}))
    return path


def test_figures_become_shares(tmp_path: Path) -> None:
    found = read_guards([lmms(tmp_path / "r.json", 0.33, 31.5, 0.01)])
    assert found == {"MMStar": Guard(value=0.33, error=0.01), "MM-Vet": Guard(value=0.315)}
    for name, value in (("MMBench_DEV_EN", 0.64), ("MMBench_DEV_EN_V11", 0.6)):
        (tmp_path / f"m_{name}_acc.csv").write_text(f'"split","Overall"\n"dev","{value}"\n')
    (tmp_path / "m_HallusionBench_score.csv").write_text(
        "split,aAcc,fAcc,qAcc\nOverall,46.9,24.9,10.6\nVS,40.0,20.0,10.0\n"
    )
    (tmp_path / "m_MMVet_gpt-4-turbo_score.csv").write_text(
        "Category,tot,acc\nrec,9,40.0\nOverall,18,31.1\n"
    )
    found = read_guards(sorted(tmp_path.glob("*.csv")))
    assert {name: round(guard.value, 6) for name, guard in found.items()} == {
        "MMBench": 0.64, "MMBench 1.1": 0.6, "HallusionBench aAcc": 0.469, "MM-Vet": 0.311,
    }  # fmt: skip


def test_a_drop_is_more_than_chance_or_a_point() -> None:
    """Errors of .003 and .004 reach 1.96 * .005 = .0098; without errors a point is the measure."""
    before = {"a": Guard(value=0.5, error=0.003), "b": Guard(value=0.5), "c": Guard(value=0.1)}
    after = {"a": Guard(value=0.491, error=0.004), "b": Guard(value=0.485), "d": Guard(value=0.1)}
    found = compare_guards(before, after)
    assert found["guards"]["a"]["reach"] == pytest.approx(0.0098)
    assert [found["guards"][name]["dropped"] for name in "ab"] == [False, True]
    assert found["only_in_one"] == ["c", "d"]
    with pytest.raises(DataError, match="no guard in common: c and d"):
        compare_guards({"c": before["c"]}, {"d": after["d"]})


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"results": {"other": {}}}')
    with pytest.raises(DataError, match=r"none of the tasks mmvet, .* is in it, only other"):
        read_guards([tmp_path / "x.json"])
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(DataError, match="not a result of lmms-eval"):
        read_guards([tmp_path / "x.json"])
    (tmp_path / "x.csv").write_text("")
    with pytest.raises(DataError, match="its name holds none of the data sets"):
        read_guards([tmp_path / "x.csv"])
    (tmp_path / "m_MMStar_acc.csv").write_text("split,other\nval,1\n")
    with pytest.raises(DataError, match="no number under 'Overall'"):
        read_guards([tmp_path / "m_MMStar_acc.csv"])
    one = lmms(tmp_path / "r.json", 0.3, 30)
    with pytest.raises(DataError, match="MM-Vet, MMStar is in another file too"):
        read_guards([one, one])


def test_the_command_sets_guards_beside_our_figures(run: Run, tmp_path: Path) -> None:
    before, after = lmms(tmp_path / "a.json", 0.33, 31.0), lmms(tmp_path / "b.json", 0.30, 31.5)
    questions = [{"question_id": 0, "image": "0.png", "text": "Is it?", "label": "yes"}]
    Path("q.jsonl").write_text(json.dumps(questions[0]) + "\n")
    for name, text in (("A", "No"), ("B", "Yes")):
        Path(f"{name}.jsonl").write_text(json.dumps({"question_id": 0, "text": text}) + "\n")
        code, _, err = run(
            "pope", "--questions", "q.jsonl", "--answers", f"{name}.jsonl", "--out", name
        )
        assert code == 0, err
    call = ("guard", "--before", before, "--from", after, "--beside", "A", "B")
    code, out, err = run(*call, "--json", "--out", "o")
    tree = json.loads(out)
    assert code == 0, err
    assert tree["guards"]["MMStar"]["dropped"]
    assert not tree["guards"]["MM-Vet"]["dropped"]
    assert tree["beside"]["pope"]["accuracy"] == {"before": 0, "after": 1}
    assert json.loads(Path("o/guard.json").read_text()) == tree
    out = run(*call)[1]
    assert "dropped" in out
    assert "pope accuracy" in out
    assert json.loads(run("guard", "--from", after, "--json")[1])["after"]["MM-Vet"] == 0.315
