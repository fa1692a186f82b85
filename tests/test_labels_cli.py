"""`fgaif labels` and `fgaif annotate --audit` over a run folder: no engine, no Ray."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_store import labeled_response, respond
from typer.testing import CliRunner

from cluster.cli.main import app
from fgaif.chat.messages import ChatRequest, Reply
from fgaif.chat.store import ReplyStore
from fgaif.data.images import image_ref
from fgaif.data.scenes.files import write_split
from fgaif.errors import ConfigError, DataError
from fgaif.feedback.store import label_store
from fgaif.types import ImageRef, LabeledResponse, Verdict

CLASSES = [[0, 1, 2], [1, 1, 0], [2, 0, 1], [0, 0, 0]]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with two labelled responses about one drawn scene, one of them not wholly judged."""
    write_split(tmp_path / "scenes", "test", 1)
    image = image_ref(next((tmp_path / "scenes" / "images").iterdir()))
    folder = tmp_path / "scenes_run"
    labeled = [with_labels("known", image, CLASSES), with_labels("not", image, [[-1] * 3] * 4)]
    label_store(folder / "feedback" / "labels.jsonl").append(labeled)
    return folder


def with_labels(name: str, image: ImageRef, labels: list[list[int]]) -> LabeledResponse:
    item = labeled_response(name=name)
    prompt = replace(respond(name=name).prompt, image=image)
    verdicts = {
        text: Verdict(query=replace(v.query, image=image), answer="yes" if i % 2 else "no")
        for i, (text, v) in enumerate(item.verdicts.items())
    }
    return replace(
        item,
        response=replace(item.response, prompt=prompt),
        labels=np.array(labels),
        verdicts=verdicts,
    )


def call(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def settings(run_dir: Path, name: str | None = None) -> list[str]:
    return [f"dir={run_dir.parent}", f"name={name or run_dir.name}"]


@pytest.mark.parametrize(
    ("form", "file"),
    [("reference", "rows.jsonl"), ("reference", "rows.json"), ("parquet", "rows.parquet")],
)
def test_labels_go_out_and_come_back(run_dir: Path, form: str, file: str) -> None:
    path = run_dir.parent / file
    said = call("labels", "export", str(path), "--form", form, *settings(run_dir))
    count = 2 if form == "parquet" else 1
    assert f"wrote {count} responses" in said
    images = str(run_dir.parent)
    back = settings(run_dir, "imported")
    said = call("labels", "import", str(path), *back, "--form", form, "--image-root", images)
    assert f"imported {count} labelled responses" in said
    imported = list(label_store(run_dir.parent / "imported" / "feedback" / "labels.jsonl"))
    assert imported[0].labels.tolist() == CLASSES
    assert imported[0].response.text == labeled_response().response.text
    stages = json.loads((run_dir.parent / "imported" / "stages.json").read_text())
    assert set(stages) == {"sample", "annotate"}
    with pytest.raises(DataError, match="exists; import into another run"):
        call("labels", "import", str(path), *back, "--form", form, "--image-root", images)


def test_a_folder_of_somebody_else_s_is_no_place_to_import_into(run_dir: Path) -> None:
    theirs = run_dir.parent / "theirs"
    (theirs / "feedback").mkdir(parents=True)
    path = run_dir.parent / "rows.jsonl"
    call("labels", "export", str(path), "--form", "reference", *settings(run_dir))
    with pytest.raises(DataError, match="no run of fgaif"):
        call("labels", "import", str(path), *settings(run_dir, "theirs"), "--form", "reference")
    assert [child.name for child in theirs.rglob("*")] == ["feedback"]


def test_stepwise_rows_of_each_kind_are_joined(run_dir: Path) -> None:
    names = []
    for kind in ("object", "attribute", "relation"):
        path = run_dir.parent / f"{kind}.jsonl"
        call("labels", "export", str(path), "--form=stepwise", f"--kind={kind}", *settings(run_dir))
        names.append(f"{kind}:{path}")
    images = str(run_dir.parent)
    back = settings(run_dir, "joined")
    call("labels", "import", *names, *back, "--form=stepwise", f"--image-root={images}")
    (item,) = label_store(run_dir.parent / "joined" / "feedback" / "labels.jsonl")
    expected = np.where(np.array(CLASSES) == 2, 2, 1)  # TRL's rows know no NONE
    assert item.labels.tolist() == expected.tolist()


def test_wrong_names_are_refused_with_what_would_do(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match="--kind colour: give one of object"):
        call("labels", "export", "x.jsonl", "--form=stepwise", "--kind=colour", *settings(run_dir))
    with pytest.raises(ConfigError, match=r"x\.jsonl: for --form stepwise write KIND:FILE"):
        call("labels", "import", "x.jsonl", "--form=stepwise", *settings(run_dir, "new"))
    with pytest.raises(DataError, match="run `fgaif annotate` first"):
        call("labels", "export", "x.jsonl", *settings(run_dir, "none"))
    with pytest.raises(DataError, match="run `fgaif annotate` first"):
        call("labels", "replies", *settings(run_dir, "none"))


def test_replies_are_printed_as_lines(run_dir: Path) -> None:
    request = ChatRequest(prompt_version="check-1", subject="There is a dog.", text="Dog?")
    with ReplyStore(run_dir / "feedback" / "replies.sqlite") as store:
        store.add("m", request, Reply(text="Yes."))
        store.add("m", request, "timed out")
    first, second = map(json.loads, call("labels", "replies", *settings(run_dir)).splitlines())
    assert first["reply"]["text"] == "Yes."
    assert second["failure"] == "timed out"


def test_an_audit_is_written_answered_and_reported(run_dir: Path) -> None:
    said = call("annotate", "--audit", "--size", "10", *settings(run_dir))
    folder = run_dir / "feedback" / "audit"
    assert (folder / "audit.html").is_file()
    assert "--answers FILE" in said
    page = json.loads((folder / "audit_items.json").read_text())
    answers = folder / "answers.json"
    given = {item["id"]: "yes" for item in page["items"]}
    answers.write_text(json.dumps({"audit": page["audit"], "answers": given}))
    said = call("annotate", "--audit", "--answers", str(answers), *settings(run_dir))
    assert "accuracy" in said
    report = json.loads((folder / "report.json").read_text())
    assert report["truth"] == "people"
    assert report["unanswered"] == 0


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (["annotate", "--answers", "a.json"], ConfigError, "--answers goes with --audit"),
        (["annotate", "--audit", "--second", "b.jsonl"], ConfigError, "--second with --answers"),
        (["labels", "import", "no.jsonl", "--form", "parquet", "name=new"], DataError, "no such"),
    ],
)
def test_options_that_do_not_go_together_and_missing_files_are_refused(
    run_dir: Path, arguments: list[str], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        call(*arguments, f"dir={run_dir.parent}")


def test_a_second_label_file_must_be_there(run_dir: Path) -> None:
    where = settings(run_dir)
    call("annotate", "--audit", *where)
    items = json.loads((run_dir / "feedback" / "audit" / "audit_items.json").read_text())
    answers = run_dir / "answers.json"
    answers.write_text(json.dumps({"audit": items["audit"], "answers": {}}))
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file"):
        call("annotate", "--audit", "--answers", str(answers), "--second", "gone.jsonl", *where)


def test_labels_are_not_imported_beside_sampled_responses(run_dir: Path, tmp_path: Path) -> None:
    responses = tmp_path / "sampled" / "responses" / "responses.jsonl"
    responses.parent.mkdir(parents=True)
    responses.write_text("")
    with pytest.raises(DataError, match=r"responses\.jsonl: exists; import into another run"):
        call("labels", "import", "x.jsonl", f"dir={tmp_path}", "name=sampled")
