"""``fgaif eval``: one JSON object on standard output, results kept, comparisons, judges, plans."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from engines import response_to
from fault_server import FaultServer
from PIL import Image

from cluster.cli.main import main
from fgaif.errors import DataError
from fgaif.eval.images import ImageFolder
from fgaif.pending import Ready
from fgaif.types import GenerationRequest, Json, Response

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Call ``fgaif eval`` in an empty folder: exit code, standard output and error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fgaif", "eval", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        said = capsys.readouterr()
        return int(stop.value.code or 0), said.out, said.err.replace("\n", " ")

    return call


def write(path: Path, rows: Sequence[Json]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


QUESTIONS = [
    {"question_id": i, "image": f"{i // 2}.png", "text": f"Is it {i}?", "label": label}
    for i, label in enumerate(["yes", "no", "yes", "no", "yes", "no"])
]


def answers(text: str, model: str = "m") -> list[Json]:
    """model_vqa's rows: "y" and "n" for the six questions."""
    return [
        {"question_id": i, "prompt": f"Is it {i}?", "text": {"y": "Yes", "n": "No"}[c],
         "answer_id": "a", "model_id": model, "metadata": {}}
        for i, c in enumerate(text)
    ]  # fmt: skip


def test_pope_prints_one_object_with_its_keys(run: Run, tmp_path: Path) -> None:
    """Answers y n n n y y: 4 of 6 right; yes said 3 times, 2 of them right; 2 of 3 found."""
    questions = write(tmp_path / "q.jsonl", QUESTIONS)
    given = write(tmp_path / "a.jsonl", answers("ynnnyy"))
    code, out, err = run("pope", "--questions", questions, "--answers", given, "--json")
    tree = json.loads(out)
    assert (code, out.count("\n"), err) == (0, 1, "")
    assert [tree[key] for key in ("accuracy", "precision", "recall", "f1", "yes_ratio")] == (
        pytest.approx([4 / 6, 2 / 3, 2 / 3, 2 / 3, 3 / 6])
    )
    assert tree["intervals"]["accuracy"][0] < 4 / 6 < tree["intervals"]["accuracy"][1]
    assert (tree["items"], tree["units"]) == (6, 3)
    assert len(tree["provenance"]["questions q"]) == 16
    assert not list(tmp_path.glob("runs*"))


def test_scoring_starts_neither_torch_nor_ray_nor_an_api_client(tmp_path: Path) -> None:
    """They take seconds to import, and a machine that only scores need not have them."""
    questions = write(tmp_path / "q.jsonl", QUESTIONS)
    given = write(tmp_path / "a.jsonl", answers("ynynyn"))
    script = (
        "import sys; from cluster.cli.main import main\n"
        f"sys.argv = ['fgaif', 'eval', 'pope', '--questions', {str(questions)!r},"
        f" '--answers', {str(given)!r}]\n"
        "try: main()\n"
        "finally: print([m for m in ('torch', 'ray', 'openai') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.endswith("[]\n"), done.stderr


def test_splits_are_paired_by_name_and_averaged(run: Run, tmp_path: Path) -> None:
    questions = write(tmp_path / "q.jsonl", QUESTIONS)
    good = write(tmp_path / "good.jsonl", answers("ynynyn"))
    bad = write(tmp_path / "bad.jsonl", answers("nnnnnn"))
    code, out, _ = run(
        "pope", "--questions", f"a={questions}", "--questions", f"b={questions}",
        "--answers", f"b={bad}", "--answers", f"a={good}", "--json",
    )  # fmt: skip
    tree = json.loads(out)
    assert (code, tree["a/accuracy"], tree["b/accuracy"], tree["accuracy"]) == (0, 1, 0.5, 0.75)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pope"], ["--questions", "build-pope"]),
        (
            ["pope", "--questions", "q.jsonl"],
            ["--questions alone leave nothing to score", "--answers FILE"],
        ),
        (["pope", "--questions", "a=q.jsonl", "--questions", "a=q.jsonl"], ["given before"]),
        (["pope", "--questions", "no.jsonl", "--answers", "a.jsonl"], ["no.jsonl"]),
        (["pope", "--questions", "q.jsonl", "--answers", "broken.jsonl"], ["broken.jsonl:2"]),
        (["pope", "--questions", "q.jsonl", "--model", "scenes:policy"], ["--model needs --im"]),
        (
            ["pope", "--questions", "q.jsonl", "--model", "no", "--images", ".", "--out", "o"],
            ["checkpoint"],
        ),
        (["pope", "--questions", "q.jsonl", "--corrupt", "fog:3"], ["--corrupt", "--model"]),
        (["--json", "pope", "--questions", "q.jsonl"], ["after its name", "pope ... --json"]),
        (["--compare", "o1", "o2", "pope"], ["stands alone"]),
        (
            [
                "pope",
                "--questions",
                "q.jsonl",
                "--answers",
                "a.jsonl",
                "--model",
                "scenes:policy",
                "--images",
                ".",
                "--out",
                "o",
            ],
            ["--model", "a.jsonl", "one of the two"],
        ),
        (["pope", "--questions", "q.jsonl", "--answers", "q.jsonl"], ["q.jsonl:1", "repeats"]),
        (["chair", "--captions", "a.jsonl"], ["--annotations"]),
        (["mmhal"], ["--questions or --answers"]),
        (["mmhal", "--answers", "mmhal.json"], ["--judge"]),
        (["mmhal", "--answers", "mmhal.json", "--judge", "x"], ["--judge x", "known: none"]),
        (["mmhal", "--answers", "m", "--judge", "x", "--judge-model", "y"], ["not both"]),
        (["llava-bench", "--questions", "q.jsonl"], ["--references"]),
        (["faithscore", "--answers", "a.jsonl"], ["--images"]),
        (["all", "--data", "."], ["--model"]),
        (["build-pope", "--out", "x"], ["--annotations", "--scenes"]),
        (["corrupt", "--images", ".", "--out", "x", "--kind", "rain"], ["rain", "fog"]),
        (["--compare", "o1", "o2"], ["o2", "no results"]),
    ],
)
def test_mistakes_exit_with_2_and_name_the_remedy(
    run: Run, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    write(tmp_path / "q.jsonl", QUESTIONS)
    write(tmp_path / "a.jsonl", answers("ynynyn"))
    (tmp_path / "broken.jsonl").write_text(json.dumps(answers("y")[0]) + "\n{\n")
    (tmp_path / "mmhal.json").write_text(json.dumps([mmhal_item(0, "A cat.")]))
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    for word in words:
        assert word in err


def test_results_are_kept_and_compared_without_scoring_again(run: Run, tmp_path: Path) -> None:
    questions = write(tmp_path / "q.jsonl", QUESTIONS)
    for name, text in (("a", "nynyny"), ("b", "ynynyn")):
        given = write(tmp_path / f"{name}.jsonl", answers(text))
        code, out, err = run(
            "pope", "--questions", questions, "--answers", given, "--out", f"out_{name}"
        )
        assert code == 0
        assert "accuracy" in out
        assert "results.html" in err
        given.unlink()
    questions.unlink()
    names = {path.name for path in (tmp_path / "out_a").iterdir()}
    assert names == {
        "pope.json", "pope_items.jsonl", "results.html", "results.json", "results.md",
    }  # fmt: skip
    page = (tmp_path / "out_a" / "results.md").read_text()
    assert "beware" not in page
    code, out, _ = run("--compare", "out_a", "out_b", "--out", "cmp", "--json")
    figure = json.loads(out)["benchmarks"]["pope"]["figures"]["accuracy"]
    assert (code, figure["a"], figure["b"], figure["difference"]) == (0, 0, 1, 1)
    assert figure["p"] == 2 / 8  # three images: of eight swaps, two are as extreme
    assert {path.name for path in (tmp_path / "cmp").iterdir()} == {
        "comparison.html", "comparison.json", "comparison.md",
    }  # fmt: skip
    code, out, _ = run("--compare", "out_a", "out_b")
    assert "+100.0 pt" in out


def test_the_embedded_world_goes_through_the_same_code(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("build-pope", "--scenes", "test", "--count", "12", "--out", "w")
    assert code == 0
    rows = [json.loads(x) for x in Path("w/coco_pope_popular.jsonl").read_text().splitlines()]
    assert f"popular: {len(rows)} questions" in out
    assert sum(row["label"] == "yes" for row in rows) * 2 == len(rows)
    truth = json.loads(Path("w/instances.json").read_text())
    names = {c["id"]: c["name"] for c in truth["categories"]}
    captions = [
        {
            "image_id": image["file_name"],
            "caption": " ".join(
                f"There is a {names[a['category_id']]}."
                for a in truth["annotations"]
                if a["image_id"] == image["id"]
            )
            + " There is a zebra, which no noun here names.",
        }
        for image in truth["images"]
    ]
    given = write(tmp_path / "c.jsonl", captions)
    code, out, _ = run(
        "chair", "--annotations", "w/instances.json", "--synonyms", "w/synonyms.txt",
        "--captions", given, "--json",
    )  # fmt: skip
    tree = json.loads(out)
    assert (tree["chair_i"], tree["chair_s"], tree["recall"]) == (0, 0, 1)
    assert tree["segments_6_15/items"] >= 0


def mmhal_item(index: int, answer: str) -> Json:
    return {
        "question_type": "attribute", "question_topic": "t", "image_id": f"i{index}",
        "image_src": f"http://x/{index}.png", "image_content": ["cat"],
        "question": f"What {index}?",
        "gt_answer": "A cat.", "model_answer": answer,
    }  # fmt: skip


def test_a_judge_is_asked_once_and_its_replies_kept(run: Run, tmp_path: Path) -> None:
    """Ratings 6 and 1: score 3.5, one of two hallucinates."""
    items = [mmhal_item(0, "A cat."), mmhal_item(1, "A dog.")]
    (tmp_path / "r.json").write_text(json.dumps(items))

    def rate(body: Json) -> str:
        return f"Rating: {1 if 'A dog.' in str(body['messages']) else 6}"

    with FaultServer(rate) as server:
        call = (
            "mmhal", "--answers", "r.json", "--judge-model", "judge-1", "--judge-url",
            server.base_url, "--out", "o", "--json",
        )  # fmt: skip
        code, out, err = run(*call)
        tree = json.loads(out)
        assert (code, tree["score"], tree["hallucination_rate"]) == (0, 3.5, 0.5)
        assert tree["provenance"]["judge"].startswith("judge-1@127.0.0.1")
        assert tree["provenance"]["prompt"].startswith("mmhal-")
        assert "2 replies" in err
        assert (tmp_path / "o" / "judge.sqlite").is_file()
        code, out, err = run(*call)
        assert json.loads(out)["score"] == 3.5
        assert sum(server.requests.values()) == 2


def test_a_dry_run_counts_requests_and_cost_and_asks_nobody(run: Run, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps([mmhal_item(i, "A cat.") for i in range(3)]))
    (tmp_path / "c.yaml").write_text(
        "endpoints: {gpt: {model: big, base_url: 'http://127.0.0.1:9/v1', price_input: 1000000}}"
    )
    code, out, _ = run("mmhal", "--answers", "r.json", "--judge", "gpt", "-c", "c.yaml",
                       "--dry-run")  # fmt: skip
    assert code == 0
    assert "3 items" in out
    assert "3 requests" in out.replace("\n", " ")
    assert "cost" in out
    assert {path.name for path in tmp_path.iterdir()} == {"r.json", "c.yaml"}


def test_faithscore_runs_its_three_stages_on_one_judge(run: Run, tmp_path: Path) -> None:
    """Two facts of one answer, one of them wrong: 1/2."""
    Image.new("RGB", (40, 40), "red").save(tmp_path / "0.png")
    write(
        tmp_path / "a.jsonl", [{"answer": "There is a red cat and a blue dog.", "image": "0.png"}]
    )

    def reply(body: Json) -> str:
        text = str(body["messages"])
        if "descriptive" in text:
            return '{"labels": ["descriptive"]}'
        if "Statement" in text:
            return "No" if "dog" in text.rpartition("Statement")[2] else "Yes"
        facts = [{"text": f"There is a {x}.", "kind": "object"} for x in ("cat", "dog")]
        return facts_reply(facts)

    with FaultServer(reply) as server:
        code, out, err = run(
            "faithscore", "--answers", "a.jsonl", "--images", ".", "--judge-model", "j",
            "--judge-url", server.base_url, "--json",
        )  # fmt: skip
    tree = json.loads(out)
    assert (code, tree["faithscore"], tree["facts"]) == (0, 0.5, 2), err


def facts_reply(facts: Sequence[Json]) -> str:
    """One segment's facts in the form that the extraction prompt asks for."""
    kinds = ("object", "attribute", "relation")
    lists = {kind: [f["text"] for f in facts if f["kind"] == kind] for kind in kinds}
    return json.dumps({"segments": [lists]})


def test_all_runs_what_its_folder_holds_and_says_what_it_leaves_out(
    run: Run, tmp_path: Path
) -> None:
    run("build-pope", "--scenes", "test", "--count", "6", "--out", "w")
    shutil.copy("w/instances.json", "w/instances_val.json")
    code, out, err = run(
        "all", "--data", "w", "--model", "scenes:policy", "--images", "w", "--out", "o",
        "--dry-run",
    )  # fmt: skip
    assert code == 0
    assert "answers to generate" in out
    assert "no judge given" in err
    for name in ("pope", "chair", "pope_random_answers.jsonl", "chair_answers.jsonl"):
        assert name in out
    assert not (tmp_path / "o").exists()


def test_corrupted_copies_are_made_by_command(run: Run, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (40, 40), "red").save(tmp_path / "in" / "0.png")
    (tmp_path / "in" / "1.png").write_bytes(b"broken")
    code, out, err = run("corrupt", "--images", "in", "--out", "x", "--kind", "noise",
                         "--strength", "2")  # fmt: skip
    assert code == 0
    assert "1 copies made" in out
    assert "1 images left out" in err
    assert (tmp_path / "x" / "0.png").is_file()


class FakeCluster:
    """Stands in for the cluster: engines that answer at once."""

    started = 0

    def __init__(self, config: object, roles: set[str]) -> None:
        assert roles == {"rollout"}

    def __enter__(self) -> "FakeCluster":
        FakeCluster.started += 1
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def rollouts(self) -> "FakeCluster":
        return self

    def generate(self, requests: Sequence[GenerationRequest], chunk: int) -> Ready[list[Response]]:
        return Ready([replace(response_to(r.prompt, [1]), text="Yes, a cat.") for r in requests])


def official_files(folder: Path) -> None:
    """Two images, each with two questions of every benchmark."""
    for number in range(2):
        Image.new("RGB", (40, 40), "red").save(folder / f"{number}.png")
    for split in ("random", "popular", "adversarial"):
        write(folder / f"coco_pope_{split}.jsonl", QUESTIONS[:4])
    annotations = {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in range(2)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [{"image_id": n, "category_id": n + 1} for n in range(2)],
    }
    (folder / "instances_val.json").write_text(json.dumps(annotations))
    items = [mmhal_item(n, "") for n in range(2)]
    (folder / "mmhal-bench_answer_template.json").write_text(json.dumps(items))
    asked = [
        {"question_id": n, "image": f"{n % 2}.png", "text": f"What is {n}?", "category": category}
        for n, category in enumerate(["conv", "detail", "complex", "conv"])
    ]
    write(folder / "qa90_questions.jsonl", asked)
    write(folder / "qa90_gpt4_answer.jsonl", [row | {"text": "A cat."} for row in asked])
    contexts = [{"id": n, "image": f"{n}.png", "captions": ["c"], "instances": []} for n in (0, 1)]
    write(folder / "caps_boxes_coco2014_val_80.jsonl", contexts)


def judge_of_all(body: Json) -> str:
    text = str(body["messages"])
    if "Rating" in text or "rating" in text:
        return "Rating: 4"
    if "analytical" in text:
        return '{"labels": ["descriptive"]}'
    if "Statement" in text:
        return "Yes"
    if "atomic facts" in text:
        return facts_reply([{"text": "There is a cat.", "kind": "object"}])
    return "10 5"


def test_all_five_from_one_checkpoint(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model says "Yes, a cat." to everything: right on half of POPE's questions and images."""
    monkeypatch.setattr("cluster.launch.Cluster", FakeCluster)
    monkeypatch.setattr(FakeCluster, "started", 0)
    official_files(tmp_path)
    with FaultServer(judge_of_all) as server:
        call = (
            "all", "--data", ".", "--model", "scenes:policy", "--images", ".", "--out", "o",
            "--judge-model", "j", "--judge-url", server.base_url, "--json",
        )  # fmt: skip
        code, out, err = run(*call)
        assert code == 0, err
        found = json.loads(out)
        again = run(*call)
    assert list(found) == ["pope", "chair", "faithscore", "mmhal", "llava-bench"]
    assert (found["pope"]["accuracy"], found["pope"]["yes_ratio"]) == (0.5, 1)
    assert (found["chair"]["chair_s"], found["chair"]["recall"]) == (0.5, 0.5)
    assert found["faithscore"]["faithscore"] == 1
    assert (found["mmhal"]["score"], found["mmhal"]["hallucination_rate"]) == (4, 0)
    assert (found["llava-bench"]["all"], found["llava-bench"]["model_grade"]) == (50, 5)
    assert all("policy " in tree["provenance"]["model"] for tree in found.values() if tree)
    assert FakeCluster.started == 1  # the second call knew every answer
    assert json.loads(again[1]) == found
    assert "data:image/" in (tmp_path / "o" / "results.html").read_text()


def test_images_are_found_by_name_and_only_in_their_folder(tmp_path: Path) -> None:
    (tmp_path / "set" / "val").mkdir(parents=True)
    for path in (tmp_path / "set" / "val" / "COCO_val2014_000000000042.png", tmp_path / "out.png"):
        Image.new("RGB", (8, 8)).save(path)
    (tmp_path / "set" / "link.png").symlink_to(tmp_path / "out.png")
    folder = ImageFolder(tmp_path / "set")
    for name in ("val/COCO_val2014_000000000042.png", "42", "000000000042.jpg"):
        assert folder.check(name).path.endswith("set/val/COCO_val2014_000000000042.png")
    for name in ("../out.png", "link.png", str(tmp_path / "out.png")):
        with pytest.raises(DataError, match="outside"):
            folder.check(name)


def test_chair_finds_images_by_number_and_by_file_name(run: Run, tmp_path: Path) -> None:
    tree = {
        "images": [{"id": 7, "file_name": "a/cat.png"}, {"id": 8, "file_name": "dog.png"}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"image_id": 7, "category_id": 1}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(tree))
    given = write(
        tmp_path / "c.jsonl",
        [{"image_id": 7, "caption": "A cat."}, {"image_id": "dog.png", "caption": "A cat."}],
    )
    annotations = tmp_path / "instances.json"
    code, out, _ = run("chair", "--annotations", annotations, "--captions", given, "--json")
    found = json.loads(out)
    assert (code, found["items"], found["chair_i"], found["recall"]) == (0, 2, 0.5, 1)
