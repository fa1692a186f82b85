"""A file that was edited in place makes the stages that read it stale, and nothing else does."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from cluster.pipeline import contents
from cluster.pipeline.contents import Contents, Hashes
from cluster.pipeline.keys import ORDER, Stage
from cluster.pipeline.stage_status import StageStatus
from fgaif.config import Config, load_config
from fgaif.errors import DataError

YEAR_2001 = 1_000_000_000


class Data:
    """Small pictures with prompts, templates and labels, and a run on them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.prompts = root / "prompts.jsonl"
        self.images = [root / f"{index}.png" for index in range(6)]
        for index, image in enumerate(self.images):
            Image.new("RGB", (8, 8), (40 * index, 0, 0)).save(image)
        self.write_prompts([f"What is in picture {index}?" for index in range(6)])
        shutil.copy(self.prompts, root / "held_out.jsonl")
        shutil.copy(self.prompts, root / "questions.jsonl")
        for name in ("check.txt", "count.txt"):
            (root / name).write_text("Is this so? {fact}")
        (root / "counting.txt").write_text("How many there are in a picture.")
        shutil.copytree(contents.PROMPTS, root / "templates")
        self.labels = root / "run" / "feedback" / "labels.jsonl"
        self.labels.parent.mkdir(parents=True)
        self.labels.write_text("{}\n")

    def write_prompts(self, texts: list[str]) -> None:
        rows = (
            {"id": str(index), "image": f"{index}.png", "prompt": text}
            for index, text in enumerate(texts)
        )
        self.prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def config(self, *overrides: str) -> Config:
        return load_config(
            None,
            [
                f"dir={self.root}", "name=run", f"data.train={self.prompts}",
                f"data.held_out={self.root}/held_out.jsonl", "data.feedback_prompts=2",
                "data.ppo_prompts=2", "data.eval_prompts=2", "ppo.anchor.weight=1",
                f"ppo.anchor.prompts={self.root}/questions.jsonl",
                f"feedback.prompt={self.root}/check.txt", "feedback.extractor=model",
                f"feedback.prompts_dir={self.root}/templates",
                f"kinds=[object, {{name: counting, prompt: {self.root}/count.txt, "
                f"description: {self.root}/counting.txt}}]",
                *overrides,
            ],
        )  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data(tmp_path)


def finish(config: Config, *stages: Stage) -> None:
    for stage in stages or ORDER[:-1]:
        with StageStatus(config.run_dir).record(config, stage):
            pass


def statuses(config: Config) -> dict[Stage, str]:
    """Of those that are not done, by stage."""
    found = {stage: StageStatus(config.run_dir).status(config, stage) for stage in ORDER[:-1]}
    return {stage: status for stage, status in found.items() if status != "done"}


def edit(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"pict", b"PICT").replace(b"{fact}", b"{fact}!"))


def edit_prompt(data: Data) -> None:
    edit(data.prompts)


def edit_later_prompt(data: Data) -> None:
    data.write_prompts([f"What is in picture {n}?" for n in range(3)] + ["Else?"] * 3)


def edit_image(data: Data) -> None:
    Image.new("RGB", (8, 8), (0, 99, 0)).save(data.images[0])


def edit_held_out(data: Data) -> None:
    edit(data.root / "held_out.jsonl")


def edit_question(data: Data) -> None:
    edit(data.root / "questions.jsonl")


def edit_check(data: Data) -> None:
    edit(data.root / "check.txt")


def edit_template(data: Data) -> None:
    file = data.root / "templates" / "facts.txt"
    file.write_text(file.read_text() + "Be brief.\n")


def edit_kind_prompt(data: Data) -> None:
    edit(data.root / "count.txt")


def edit_description(data: Data) -> None:
    edit(data.root / "counting.txt")


def edit_label(data: Data) -> None:
    data.labels.write_text('{"other": 1}\n')


LABELS_ON = ("train-reward", "eval-before", "train", "eval-after")


@pytest.mark.parametrize(
    ("change", "stale", "words"),
    [
        (edit_prompt, ORDER[:-1], r"contents of data\.train = .*prompts\.jsonl were edited"),
        (edit_later_prompt, ("train", "eval-after"), r"data\.train = "),
        (edit_image, ORDER[:-1], r"data\.train = "),
        (edit_held_out, ("eval-before", "eval-after"), r"data\.held_out = "),
        (edit_question, ("train", "eval-after"), r"ppo\.anchor\.prompts = "),
        (edit_check, ("annotate", *LABELS_ON), r"feedback\.prompt = .*check\.txt were edited"),
        (edit_template, ("annotate", *LABELS_ON), r"feedback\.prompts_dir = "),
        (edit_kind_prompt, ("annotate", *LABELS_ON), r"kinds\.counting\.prompt = .*count\.txt"),
        (edit_description, ("annotate", *LABELS_ON), r"kinds\.counting\.description = "),
        (edit_label, LABELS_ON, r"feedback/labels\.jsonl = "),
    ],
)
def test_what_was_edited_makes_its_readers_stale(
    data: Data, change: Callable[[Data], None], stale: tuple[Stage, ...], words: str
) -> None:
    config = data.config()
    finish(config)
    assert statuses(config) == {}
    change(data)
    assert statuses(config) == dict.fromkeys(stale, "stale")
    why = StageStatus(config.run_dir).found(config, stale[0]).why

    assert re.search(words, why)


def test_what_changes_no_content_changes_no_stage(data: Data) -> None:
    config = data.config()
    finish(config)
    for path in data.root.glob("*.*"):
        os.utime(path, (YEAR_2001, YEAR_2001))
    with data.prompts.open("a") as file:  # beyond the rows that are used
        file.write('{"id": "more", "image": "5.png", "prompt": "More?"}\n')
    assert statuses(config) == {}
    data.prompts.unlink()  # nothing else could be made of it
    assert statuses(config) == {}


def test_rows_that_came_where_there_were_too_few_are_sampled_too(data: Data) -> None:
    config = data.config("data.feedback_prompts=10")
    finish(config, "sample", "annotate", "train-reward")
    with data.prompts.open("a") as file:
        file.write('{"id": "more", "image": "5.png", "prompt": "More?"}\n')
    found = StageStatus(config.run_dir).found(config, "sample")
    assert (found.status, found.why) == ("short", "usable rows of data.train was 6, is 7")
    assert StageStatus(config.run_dir).status(config, "train-reward") == "stale"


def test_fewer_or_more_prompts_than_before_are_no_edit(data: Data) -> None:
    finish(data.config(), "sample")
    for wanted, status in ((1, "long"), (4, "short")):
        config = data.config(f"data.feedback_prompts={wanted}")
        assert StageStatus(config.run_dir).status(config, "sample") == status


def test_a_stage_that_was_interrupted_does_not_go_on_with_edited_files(data: Data) -> None:
    config = data.config()
    with pytest.raises(KeyboardInterrupt), StageStatus(config.run_dir).record(config, "sample"):
        raise KeyboardInterrupt
    assert StageStatus(config.run_dir).status(config, "sample") == "partial"
    edit_prompt(data)
    assert StageStatus(config.run_dir).status(config, "sample") == "stale"


def test_an_edit_while_a_stage_runs_is_said_and_can_be_put_back(data: Data) -> None:
    config, before = data.config(), data.prompts.read_bytes()
    with (
        pytest.raises(DataError, match=r"sample: the contents of data\.train .* put back"),
        StageStatus(config.run_dir).record(config, "sample"),
    ):
        edit_prompt(data)
    assert StageStatus(config.run_dir).status(config, "sample") == "stale"
    data.prompts.write_bytes(before)
    assert StageStatus(config.run_dir).status(config, "sample") == "done"


def test_responses_of_another_tool_and_checkpoints_count_too(
    data: Data, tiny_llava_dir: Path
) -> None:
    given = data.root / "given.jsonl"
    row = {"image": "1.png", "prompt": "What?", "response": "A picture."}
    given.write_text(json.dumps(row) + "\n")
    model = shutil.copytree(tiny_llava_dir, data.root / "model")
    config = data.config(f"data.responses={given}", f"policy.model={model}")
    finish(config)
    given.write_text("\n" + json.dumps(row, indent=None, separators=(",", ":")) + "\n")
    assert statuses(config) == {}, "no word of it changed"
    given.write_text(json.dumps(row | {"response": "Another."}) + "\n")
    assert StageStatus(config.run_dir).status(config, "sample") == "stale"
    given.write_text(json.dumps(row) + "\n")
    assert statuses(config) == {}
    Image.new("RGB", (8, 8), (0, 99, 0)).save(data.images[1])
    assert StageStatus(config.run_dir).status(config, "sample") == "stale"
    template = next(model.glob("*.jinja"), model / "tokenizer_config.json")
    template.write_text(template.read_text() + "\n")
    found = StageStatus(config.run_dir).found(config, "eval-before")
    assert "policy.model" in found.why


def test_images_are_read_again_only_where_size_or_time_differ(
    data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    real = contents.check_image
    monkeypatch.setattr(
        contents,
        "check_image",
        lambda path, *rest: (looked.append(str(path)), real(path, *rest))[1],
    )
    for image in data.images:
        os.utime(image, (YEAR_2001, YEAR_2001))
    config = data.config()
    finish(config, "sample")
    assert sorted(looked) == ["0.png", "1.png"]
    looked.clear()
    kept = (data.root / "run" / "data" / "hashes.json").read_bytes()
    assert StageStatus(config.run_dir).status(config, "sample") == "done"
    assert looked == []
    edit_image(data)
    assert StageStatus(config.run_dir).status(config, "sample") == "stale"
    assert looked == ["0.png"]
    assert (data.root / "run" / "data" / "hashes.json").read_bytes() == kept, (
        "a look writes nothing"
    )


def test_remembered_images_must_lie_in_the_folder_too(data: Data) -> None:
    os.utime(data.images[0], (YEAR_2001, YEAR_2001))
    hashes = Hashes(data.root / "run")
    assert hashes.check_image("0.png", data.root, 10**6)
    with pytest.raises(DataError, match="outside"):
        hashes.check_image("../0.png", data.root / "templates", 10**6)
    with pytest.raises(DataError, match="cannot be read"):
        hashes.check_image("\0.png", data.root, 10**6)
    with pytest.raises(DataError, match="pixels"):
        hashes.check_image("0.png", data.root, 10)


def test_a_file_that_cannot_be_read_is_said_by_the_stage_and_not_before(data: Data) -> None:
    data.labels.unlink()
    config = data.config("data.train=gone.jsonl", "feedback.prompt=gone.txt")
    finish(config)
    assert statuses(config) == {}


def test_the_embedded_world_needs_no_digests(tmp_path: Path) -> None:
    config = load_config(None, [f"dir={tmp_path}"])
    assert all(Contents(config).of(stage) == {} for stage in ("sample", "train", "eval-before"))
    assert not config.run_dir.exists()
