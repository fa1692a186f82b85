"""Labelled responses to other forms and back, and responses that our policy did not sample."""

import contextlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny import byte_level_tokenizer, llama_tokenizer

from fgaif.data.images import image_ref
from fgaif.errors import DataError
from fgaif.feedback.external import look_at_responses, read_responses
from fgaif.feedback.interchange import (
    MAX_LITERAL,
    export_reference,
    export_stepwise,
    import_reference,
    import_stepwise,
    join_labels,
    parse_literal,
)
from fgaif.feedback.label_rows import Exported
from fgaif.feedback.parquet import LABELS, read_labels, write_labels
from fgaif.feedback.segment import segment_at, segment_response
from fgaif.feedback.store import encode_labeled, label_store
from fgaif.types import (
    DEFAULT_KINDS,
    UNKNOWN,
    Fact,
    FactQuery,
    LabeledResponse,
    Prompt,
    Response,
    SegmentClass,
    Verdict,
)

NONE, OK, HALLU = SegmentClass
DESCRIBE = "Describe this image in detail."
TEXT = "The image features a dog sitting on a couch, next to a green moon and a ball. Two cars."
PIECES = [
    "The image features a dog sitting on a couch, ",
    "next to a green moon and a ball. ",
    "Two cars.",
]
LABELS_SK = [[OK, NONE, HALLU], [HALLU, OK, NONE], [OK, NONE, NONE]]
TOKENIZERS = {"byte": byte_level_tokenizer(), "meta": llama_tokenizer()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for colour in ("red", "blue"):
        Image.new("RGB", (4, 4), colour).save(tmp_path / f"{colour}.png")
    return tmp_path


def respond(
    folder: Path, text: str = TEXT, image: str = "red.png", asked: str = DESCRIBE
) -> Response:
    tokenizer = TOKENIZERS["byte"]
    ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    return Response(
        prompt=Prompt(id="p", text=asked, image=image_ref(folder / image)),
        sample=0,
        text=text,
        token_ids=np.array(ids, dtype=np.int64),
        rollout_logprobs=np.random.default_rng(0).normal(size=len(ids)).astype(np.float32),
        finish="stop",
        policy_version=3,
    )


def label(response: Response, labels: object = LABELS_SK) -> LabeledResponse:
    return LabeledResponse(
        response=response,
        kinds=DEFAULT_KINDS,
        segments=segment_response(response, TOKENIZERS["byte"]),
        facts=(),
        verdicts={},
        labels=np.array(labels, dtype=np.int64).reshape(-1, 3),
    )


def pieces(item: LabeledResponse) -> list[str]:
    return [item.response.text[s.char_start : s.char_end] for s in item.segments]


def same(first: LabeledResponse, second: LabeledResponse) -> bool:
    return encode_labeled(first) == encode_labeled(second)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize("tokenizer", ["byte", "meta"])
def test_the_references_rows_hold_its_codes_and_come_back(
    folder: Path, name: str, tokenizer: str
) -> None:
    file = folder / name
    other = label(respond(folder, "A cat.", "blue.png", "What is it?"), [[OK, OK, OK]])
    item = label(respond(folder))
    assert export_reference([item, other], file, folder) == Exported(written=2, unknown=0, empty=0)
    text = file.read_text()
    first = json.loads(text)[0] if name == "rows.json" else json.loads(text.splitlines()[0])
    assert first == {
        "image": "red.png",
        "sub": PIECES,
        "labels": [[0, -1, 1], [1, 0, -1], [0, -1, -1]],
    }
    loaded = import_reference(file, TOKENIZERS[tokenizer])
    assert loaded.warning() == ""
    back, back2 = loaded.labeled
    assert back.response.text == TEXT
    assert pieces(back) == PIECES
    assert back.labels.tolist() == LABELS_SK
    assert back.response.prompt.image == item.response.prompt.image
    assert back.response.prompt.text == DESCRIBE
    assert back2.response.prompt.text == "What is it?"
    assert back.response.token_ids[-1] == TOKENIZERS[tokenizer].eos_token_id
    assert back.segments == segment_response(back.response, TOKENIZERS[tokenizer])


def test_segments_are_the_given_pieces_and_their_tokens_partition_the_ids(folder: Path) -> None:
    """Pieces without white space between them get a space; cuts need not be the splitter's."""
    row = {"image": "red.png", "sub": ["A dog", "and a cat.", " A ball"], "labels": [[0] * 3] * 3}
    (folder / "r.jsonl").write_text(json.dumps(row))
    for tokenizer in TOKENIZERS.values():
        (item,) = import_reference(folder / "r.jsonl", tokenizer).labeled
        assert item.response.text == "A dog and a cat. A ball"
        assert pieces(item) == ["A dog ", "and a cat.", " A ball"]
        bounds = [(s.token_start, s.token_end) for s in item.segments]
        assert bounds[0][0] == 0
        assert [end for _, end in bounds[:-1]] == [start for start, _ in bounds[1:]]
        assert bounds[-1][1] == len(item.response.token_ids) - 1
        for segment, piece in zip(item.segments, ["A dog", "and a cat.", "A ball"], strict=True):
            ids = item.response.token_ids[segment.token_start : segment.token_end]
            assert tokenizer.decode(ids).strip() == piece


def test_python_literals_are_parsed_and_never_evaluated(folder: Path, tmp_path: Path) -> None:
    file = folder / "reference.json"
    good = "{'image': 'red.png', 'sub': ['It isn\\'t red.'], 'labels': [[0, -1, 1]]}\n"
    file.write_text(good * 2)
    loaded = import_reference(file, TOKENIZERS["byte"]).labeled
    assert [item.response.text for item in loaded] == ["It isn't red."] * 2
    assert loaded[0].labels.tolist() == [[OK, NONE, HALLU]]
    target = tmp_path / "made"
    evil = f"{{'image': open({str(target)!r}, 'w'), 'sub': [], 'labels': []}}\n"
    file.write_text(good + evil)
    with pytest.raises(DataError, match=r"reference\.json:2: not valid JSON \(.*malformed"):
        import_reference(file, TOKENIZERS["byte"])
    assert not target.exists()


@pytest.mark.parametrize(
    "line",
    ["(" * 100_000, "[" * 300 + "]" * 300, "-" * 100_000 + "1", "{[]: 1}", "lambda: 1", "a.b", ""],
    ids=["open", "nested", "signs", "unhashable", "lambda", "name", "empty"],
)
def test_hostile_literals_are_value_errors(line: str) -> None:
    with contextlib.suppress(ValueError, RecursionError):
        assert parse_literal(line) is not None  # 300 brackets are deep but harmless JSON
    with pytest.raises(ValueError, match="more than"):
        parse_literal("'" + "a" * MAX_LITERAL + "'")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [[0, 0, 2]]}, r"labels\[0\] = \[0, 0, 2\]: expected 3 codes"),
        ({"labels": [[0, 0]]}, r"labels\[0\]"),
        ({"labels": [[0, 0, True]]}, r"labels\[0\]"),
        ({"labels": [0]}, r"labels\[0\] = 0: expected list"),
        ({"labels": []}, "1 pieces and 0 labels"),
        ({"sub": [], "labels": []}, "0 pieces and 0 labels"),
        ({"sub": "A dog."}, "column `sub`: 'A dog.': expected a list"),
        ({"sub": [""]}, r"sub\[0\] = ''"),
        ({"sub": [" "]}, r"sub\[0\] = ' ': expected str, not blank"),
        ({"image": 3}, "column `image`: 3"),
        ({"sub": ["A </s> dog."]}, "tokenizer writes"),
    ],
)
def test_bad_rows_are_named(folder: Path, change: dict[str, Any], message: str) -> None:
    row = {"image": "red.png", "sub": ["A dog."], "labels": [[0, 0, 0]]} | change
    (folder / "rows.jsonl").write_text("\n" + json.dumps(row))
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: .*({message})"):
        import_reference(folder / "rows.jsonl", TOKENIZERS["byte"])


@pytest.mark.parametrize(
    "bad",
    [
        {"sub": ["A</s>", "B."], "labels": [[0, 0, 0]] * 2},
        {"sub": ["A."], "labels": [[0, 0, 2.0]]},
        {"sub": ["A."], "labels": [[0, 0, 0.5]]},
        [1],
    ],
)
def test_a_bad_row_among_good_ones_is_skipped_and_counted(folder: Path, bad: Any) -> None:
    good = {"image": "red.png", "sub": ["A dog.", "A cat."], "labels": [[0.0, 1.0, -1.0]] * 2}
    if isinstance(bad, dict):
        bad = {"image": "red.png"} | bad
    (folder / "rows.jsonl").write_text("\ufeff" + "\n".join(map(json.dumps, (good, bad, good))))
    found = import_reference(folder / "rows.jsonl", TOKENIZERS["byte"])
    assert [item.labels.tolist() for item in found.labeled] == [[[1, 2, 0]] * 2] * 2
    assert found.labeled[0].labels.dtype == np.int64
    assert re.search(r"skipped 1 of 3 rows\n  .*rows\.jsonl:2: ", found.warning())


def test_a_list_with_a_byte_order_mark_is_read(folder: Path) -> None:
    rows = [{"image": "red.png", "sub": ["A dog."], "labels": [[0, 0, -1]], "id": 7.0}]
    (folder / "rows.json").write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    (item,) = import_reference(folder / "rows.json", TOKENIZERS["byte"]).labeled
    assert (item.response.prompt.id, item.labels.tolist()) == ("7", [[1, 1, 0]])


def test_a_cut_in_which_no_token_begins_is_refused(folder: Path) -> None:
    response = respond(folder, "There is a dog.")
    assert len(segment_at(response, TOKENIZERS["byte"], [6, 15])) == 2
    with pytest.raises(DataError, match=r"response p#0: 15 pieces, but tokens begin in \d+ "):
        segment_at(response, TOKENIZERS["byte"], range(1, 16))


def test_images_must_lie_in_the_root_and_missing_ones_are_counted(folder: Path) -> None:
    inner = folder / "inner"
    inner.mkdir()
    (inner / "red.png").write_bytes((folder / "red.png").read_bytes())
    names = ["red.png", "../blue.png", str(folder / "blue.png"), "gone.png"]
    rows = [{"image": name, "sub": ["A dog."], "labels": [[0, 0, 0]]} for name in names]
    (inner / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    loaded = import_reference(inner / "rows.jsonl", TOKENIZERS["byte"])
    assert len(loaded.labeled) == 1
    assert ["outside" in item.reason for item in loaded.skipped] == [True, True, False]
    assert "skipped 3 of 4 rows" in loaded.warning()


def test_unknown_and_empty_rows_are_left_out_and_counted(folder: Path) -> None:
    unsure = label(respond(folder), [[OK, NONE, UNKNOWN], [HALLU, OK, NONE], [OK, NONE, NONE]])
    empty = label(respond(folder, ""), [])
    rows, file = [label(respond(folder)), unsure, empty], folder / "rows.jsonl"
    exported = export_reference(rows, file, folder)
    assert exported == Exported(written=1, unknown=1, empty=1)
    assert "left out 2 of 3" in exported.warning()
    assert len(file.read_text().splitlines()) == 1
    assert export_stepwise(rows, file, "object", folder).written == 2
    assert export_stepwise(rows, file, "relation", folder).unknown == 1
    assert export_stepwise(rows, file, "any", folder).unknown == 1
    sure_anyway = label(respond(folder), [[HALLU, NONE, UNKNOWN], [OK] * 3, [OK] * 3])
    assert export_stepwise([sure_anyway], file, "any", folder).written == 1


def test_an_image_outside_the_root_is_not_exported(folder: Path) -> None:
    (folder / "inner").mkdir()
    with pytest.raises(DataError, match=r"response p#0: image .*red\.png lies outside"):
        export_reference([label(respond(folder))], folder / "rows.jsonl", folder / "inner")
    with pytest.raises(DataError, match=r"name it \.jsonl, \.json$"):
        export_reference([], folder / "rows.parquet")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_stepwise_rows_are_trls_and_come_back_by_kind(folder: Path, name: str) -> None:
    """NONE becomes True and comes back as OK; that is all that is lost."""
    item = label(respond(folder))
    files = {kind: folder / f"{kind}-{name}" for kind in ("object", "attribute", "relation")}
    for kind, file in files.items():
        export_stepwise([item, item], file, kind, folder)  # type: ignore[arg-type]
    row = (
        pq.read_table(files["object"]).to_pylist()[0]
        if name == "rows.parquet"
        else json.loads(files["object"].read_text().splitlines()[0])
    )
    expected = {"image": "red.png", "prompt": DESCRIBE, "completions": PIECES}
    assert row == expected | {"labels": [True, False, True]}
    tokenizer = TOKENIZERS["byte"]
    sets = [import_stepwise(f, k, tokenizer).labeled for k, f in files.items()]  # type: ignore[arg-type]
    assert sets[0][0].labels.tolist() == [
        [OK, UNKNOWN, UNKNOWN],
        [HALLU, UNKNOWN, UNKNOWN],
        [OK, UNKNOWN, UNKNOWN],
    ]
    joined = join_labels(sets)
    assert len(joined) == 2
    for back in joined:
        assert back.labels.tolist() == [[OK, OK, HALLU], [HALLU, OK, OK], [OK, OK, OK]]
        assert back.segments == item.segments
        assert back.response.text == TEXT


def test_any_is_false_where_some_kind_is_wrong(folder: Path) -> None:
    export_stepwise([label(respond(folder))], folder / "any.jsonl", "any", folder)
    assert json.loads((folder / "any.jsonl").read_text())["labels"] == [False, False, True]


def full(folder: Path) -> LabeledResponse:
    """A record in which every field holds something."""
    response = respond(folder)
    image = response.prompt.image
    said = {
        text: Verdict(query=FactQuery(image=image, text=text), **fields)  # type: ignore[arg-type]
        for text, fields in {
            "There is a dog.": {"answer": "yes", "p_yes": 0.75, "votes": ("yes", "no", "yes")},
            "The dog is red.": {"answer": "unknown", "problem": "unreadable"},
        }.items()
    }
    facts = (
        Fact(kind="object", text="There is a dog.", segment=0),
        Fact(kind="attribute", text="The dog is red.", segment=1, requires=("There is a dog.",)),
    )
    return replace(label(response), facts=facts, verdicts=said, provenance={"verifier": "v"})


@pytest.mark.parametrize("count", [1, 2500])
def test_our_rows_come_back_from_parquet_bit_by_bit(folder: Path, count: int) -> None:
    item, empty = full(folder), label(respond(folder, ""), [])
    file = folder / "labels.parquet"
    assert write_labels([item] * count + [empty], file) == count + 1
    back = list(read_labels(file))
    assert len(back) == count + 1
    assert same(back[0], item)
    assert same(back[count - 1], item)
    assert same(back[-1], empty)
    assert back[0].response.rollout_logprobs.dtype == np.float32
    label_store(folder / "labels.jsonl").append(back[:1])
    assert same(next(read_labels(folder / "labels.jsonl")), item)


def test_the_parquet_schema_has_every_stored_field(folder: Path) -> None:
    """A field that the store gains and the schema lacks would be lost in silence."""

    def check(value: Any, kind: pa.DataType) -> None:
        if pa.types.is_struct(kind):
            assert set(value) == {field.name for field in kind}
            for field in kind:
                check(value[field.name], field.type)
        elif pa.types.is_list(kind):
            check(value[0], kind.value_type) if value else None

    row = encode_labeled(full(folder))
    assert set(row) == set(LABELS.names)
    row["verdicts"] = [{"fact": fact, **said} for fact, said in row["verdicts"].items()]
    row["provenance"] = [{"key": key, "value": value} for key, value in row["provenance"].items()]
    for name in row:
        check(row[name], LABELS.field(name).type)


def test_datasets_reads_our_parquet(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    item = full(folder)
    write_labels([item] * 3, folder / "labels.parquet")
    table = datasets.Dataset.from_parquet(
        str(folder / "labels.parquet"), cache_dir=str(folder / "cache")
    )
    assert len(table) == 3
    verdicts = {one["fact"]: one["answer"] for one in table[0]["verdicts"]}
    assert verdicts == {fact: said.answer for fact, said in item.verdicts.items()}


def test_parquet_of_earlier_versions_with_maps_is_read(folder: Path) -> None:
    item = full(folder)
    old = {"verdicts": LABELS.field("verdicts").type.value_type, "provenance": None}
    answer = pa.struct([field for field in old["verdicts"] if field.name != "fact"])
    kinds = {"verdicts": pa.map_(pa.string(), answer), "provenance": pa.map_(*[pa.string()] * 2)}
    schema = pa.schema({f.name: kinds.get(f.name, f.type) for f in LABELS})
    row = encode_labeled(item)
    row |= {name: list(row[name].items()) for name in kinds}
    pq.write_table(pa.Table.from_pylist([row], schema=schema), folder / "labels.parquet")
    assert same(next(read_labels(folder / "labels.parquet")), item)


def test_a_malformed_parquet_row_is_named(folder: Path) -> None:
    table = pa.Table.from_pylist([{"response": {"text": "a"}, "labels": [[1, 1, 1]]}])
    pq.write_table(table, folder / "labels.parquet")
    with pytest.raises(DataError, match=r"labels\.parquet:1: malformed"):
        list(read_labels(folder / "labels.parquet"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_given_responses_are_tokenised_with_the_policys_tokenizer(folder: Path, kind: str) -> None:
    rows = [
        {"id": "a", "image": "red.png", "prompt": "What?", "response": TEXT},
        {"id": "a", "image": "red.png", "prompt": "What?", "response": "Naïve 日本 😀."},
        {"id": None, "image": "blue.png", "prompt": "Why?", "response": "Two\nlines, here."},
    ]
    file = folder / f"given.{kind}"
    if kind == "jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    for tokenizer in TOKENIZERS.values():
        given = read_responses(file, tokenizer)
        assert [response.id for response in given.responses] == ["a#0", "a#1", "given-3#0"]
        for response, row in zip(given.responses, rows, strict=True):
            assert response.text == row["response"]
            assert tokenizer.decode(response.token_ids, skip_special_tokens=True) == response.text
            assert response.token_ids[-1] == tokenizer.eos_token_id
            assert not response.rollout_logprobs.any()
            assert response.finish == "stop"
            segments = segment_response(response, tokenizer)
            assert segments[-1].token_end == len(response.token_ids) - 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"response": "A <image> dog."}, r"tokenizer writes 'A  dog\.' for 'A <image> dog\.'"),
        ({"response": " "}, "column `response`: ' '"),
        ({"text": None}, "column `response`|column `text`"),
        ({"response": "A.", "prompt": 1}, "column `prompt`: 1"),
        ({"response": "A.", "id": "x", "prompt": "Other?"}, "id 'x' was used for another image"),
        ({"response": "A.", "id": "x", "image": "blue.png"}, "id 'x' was used for another image"),
        ({"response": "A.", "id": [1]}, "column `id`"),
        ({"response": "cut \ud83d"}, "column `response`: half a character .* at place 4"),
    ],
)
def test_a_bad_given_row_is_skipped_and_named(
    folder: Path, row: dict[str, object], message: str
) -> None:
    first = {"id": "x", "image": "red.png", "prompt": "What?", "text": "A dog."}
    second = {"image": "red.png", "prompt": "What?"} | row
    (folder / "given.jsonl").write_text(f"{json.dumps(first)}\n{json.dumps(second)}")
    given = read_responses(folder / "given.jsonl", TOKENIZERS["byte"])
    assert [response.text for response in given.responses] == ["A dog."]
    look_at_responses(folder / "given.jsonl")
    assert re.search(rf"skipped 1 of 2 rows\n  .*given\.jsonl:2: .*({message})", given.warning())


def test_given_rows_without_a_usable_image_are_an_error_with_the_reason(folder: Path) -> None:
    row = {"image": "gone.png", "prompt": "What?", "text": "A dog."}
    (folder / "given.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"skipped 1 of 1 rows\n.*no such file"):
        read_responses(folder / "given.jsonl", TOKENIZERS["byte"])
