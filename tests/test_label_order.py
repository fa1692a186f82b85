"""A label file that lost, doubled or moved lines is put right by the ids of its rows."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
from test_store import labeled_response

import cluster.pipeline.annotate as annotate
from cluster.pipeline.dry_run import plan_stages
from cluster.pipeline.stage_status import StageStatus
from fgaif.config import Config, load_config
from fgaif.errors import DataError
from fgaif.feedback.label_order import check_order, misplaced, repair_order
from fgaif.feedback.store import (
    JsonlStore,
    decode_labeled,
    encode_labeled,
    label_store,
    response_store,
)
from fgaif.types import LabeledResponse, Response

ROWS = 6


def stores(folder: Path) -> tuple[JsonlStore[LabeledResponse], JsonlStore[Response]]:
    return (
        label_store(folder / "feedback" / "labels.jsonl"),
        response_store(folder / "responses" / "responses.jsonl"),
    )


def made(folder: Path, rows: int = ROWS) -> list[str]:
    """Responses, all of them with labels; returns the label file's lines."""
    labels, responses = stores(folder)
    items = [labeled_response(name=f"p{number}") for number in range(rows)]
    responses.append(item.response for item in items)
    labels.append(items)
    return labels.path.read_text().splitlines(keepends=True)


def edited(line: str, **values: object) -> str:
    return json.dumps(json.loads(line) | values) + "\n"


Damage = Callable[[list[str]], list[str]]
DAMAGES: dict[str, tuple[Damage, int, str]] = {
    "doubled": (lambda x: [*x[:3], x[2], *x[3:]], 6, "jsonl:4: labels of 'p2#1' where those of"),
    "doubled last": (lambda x: [*x, x[5]], 6, "jsonl:7: labels of p5#1 after those of all"),
    "deleted": (lambda x: [*x[:2], *x[3:]], 2, "jsonl:3: labels of 'p3#1' where those of 'p2#1'"),
    "deleted and doubled": (lambda x: [*x[:2], x[3], *x[3:]], 2, "jsonl:3: "),
    "swapped": (lambda x: [x[1], x[0], *x[2:]], 6, "jsonl:1: "),
    "garbage": (lambda x: [*x[:4], "{\n", *x[5:]], 4, "jsonl:5: malformed"),
    "label of 7": (
        lambda x: [edited(x[0], labels=[[7, 0, 0]] * 4), *x[1:]], 0, "jsonl:1: malformed"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_right_stays_and_the_damaged_file_lies_beside(tmp_path: Path, name: str) -> None:
    damage, kept, message = DAMAGES[name]
    lines = made(tmp_path)
    labels, responses = stores(tmp_path)
    damaged = "".join(damage(lines))
    labels.path.write_text(damaged)
    labels.reopen()
    with pytest.raises(DataError, match=r"run `fgaif annotate`") as refused:
        check_order(labels, responses)
    assert message in str(refused.value)
    said = repair_order(labels, responses)
    assert message in said
    assert f"kept as labels.damaged-1.jsonl; {kept} rows stay, the other {ROWS - kept} are" in said
    assert "\n" not in said
    assert labels.path.read_text() == "".join(lines[:kept])
    assert len(labels) == kept
    assert labels.path.with_name("labels.damaged-1.jsonl").read_text() == damaged
    assert repair_order(labels, responses) == ""


def test_a_second_damaged_file_does_not_replace_the_first(tmp_path: Path) -> None:
    lines = made(tmp_path)
    labels, responses = stores(tmp_path)
    for line in lines[1:3]:
        labels.path.write_text(line)
        labels.reopen()
        repair_order(labels, responses)
    kept = [labels.path.with_name(f"labels.damaged-{n}.jsonl").read_text() for n in (1, 2)]
    assert kept == lines[1:3]


def test_right_files_are_left_alone(tmp_path: Path) -> None:
    lines = made(tmp_path)
    for count in (ROWS, 3, 0):
        path = stores(tmp_path)[0].path
        path.write_text("".join(lines[:count]))
        labels, responses = stores(tmp_path)
        assert misplaced(labels, responses) == repair_order(labels, responses) == ""
    assert sorted(item.name for item in path.parent.iterdir()) == ["labels.jsonl"]


def test_labels_of_another_text_of_that_id_are_not_right(tmp_path: Path) -> None:
    made(tmp_path)
    labels, responses = stores(tmp_path)
    other = [labeled_response("There is a dog.", name=f"p{number}") for number in range(ROWS)]
    responses.path.unlink()
    responses = stores(tmp_path)[1]
    responses.append(item.response for item in other)
    assert "labels of another text where those of 'p0#1' belong" in misplaced(labels, responses)


def test_a_response_that_stands_twice_is_refused_and_named(tmp_path: Path) -> None:
    lines = made(tmp_path)
    labels, responses = stores(tmp_path)
    responses.append([labeled_response(name="p1").response])
    with pytest.raises(DataError, match=r"responses\.jsonl:7: .*'p1#1' stands at line 2 already"):
        repair_order(labels, stores(tmp_path)[1])
    assert labels.path.read_text() == "".join(lines)


def test_annotation_puts_it_right_and_goes_on_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(None, [f"dir={tmp_path}", "name=run"])
    lines = made(config.run_dir)
    path = stores(config.run_dir)[0].path
    path.write_text("".join([*lines[:2], *lines[3:], lines[5]]))  # as many as there were
    asked: list[int] = []

    class Asked(Exception):
        pass

    def dataset(_config: Config, _tokenizer: object, chunks: list, *_: object) -> None:
        asked.extend(count for _, count in chunks)
        raise Asked

    monkeypatch.setattr(annotate, "_models", Mock())
    monkeypatch.setattr(annotate, "_dataset", dataset)
    labels = label_store(path)
    with caplog.at_level(logging.WARNING), pytest.raises(Asked):
        annotate.annotate_responses(config, labels, None, None, "", lambda *_: None)
    assert sum(asked) == 4
    assert "kept as labels.damaged-1.jsonl; 2 rows stay, the other 4" in caplog.text


@pytest.mark.parametrize("damage", ["deleted", "doubled", "cut"])
def test_a_finished_annotation_goes_on_where_its_file_was_damaged(
    tmp_path: Path, damage: str
) -> None:
    config = load_config(None, [f"dir={tmp_path}", "name=run"])
    lines = made(config.run_dir)
    status = StageStatus(config.run_dir)
    status.adopt(config, "annotate")
    (plan,) = plan_stages(status, config, ["annotate"], force=False)
    assert not plan.runs
    cut = {"deleted": lines[:1] + lines[2:], "doubled": [lines[0], *lines], "cut": lines[:4]}
    stores(config.run_dir)[0].path.write_text("".join(cut[damage]))
    (plan,) = plan_stages(status, config, ["annotate"], force=False)
    assert plan.runs
    assert plan.goes_on
    assert "labels.jsonl" in plan.why


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[7, 0, 0]] * 4, r"labels\[0\] = \[7, 0, 0\]: expected 3 of \(-1, 0, 1, 2\)"),
        ([[0, 0, 0]] * 3 + [[0, 1.9, 0]], r"labels\[3\] = \[0, 1\.9, 0\]"),
        ([[True, 0, 0]] * 4, r"labels\[0\]"),
        ([[1, 0]] * 4, r"expected 3"),
        ([[0, 0, 0]] * 3, "3 rows of labels for 4 segments"),
        ([[0, 0, 0, 0, 0, 0]] * 2, "2 rows of labels for 4 segments"),
    ],
)
def test_values_that_are_no_labels_are_refused_with_file_and_line(
    tmp_path: Path, labels: object, message: str
) -> None:
    item = encode_labeled(labeled_response())
    assert len(item["segments"]) == 4
    with pytest.raises(ValueError, match=message):
        decode_labeled(item | {"labels": labels})
    path = tmp_path / "labels.jsonl"
    path.write_text(json.dumps(item) + "\n" + json.dumps(item | {"labels": labels}) + "\n")
    with pytest.raises(DataError, match=rf"labels\.jsonl:2: malformed.*{message}.*fgaif annotate"):
        list(label_store(path))
