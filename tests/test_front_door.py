"""``import fgaif``: which names there are, what each costs to import, and the calls behind them."""

import ast
import asyncio
import importlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fgaif
from fgaif.data.scenes.files import read_scenes, write_split
from fgaif.data.scenes.world import NOUNS
from fgaif.errors import ConfigError
from fgaif.feedback.facts import SceneFacts
from fgaif.types import FactQuery, SegmentClass, Verdict

ROOT = Path(__file__).parents[1]
HEAVY = {"accelerate", "deepspeed", "matplotlib", "peft", "ray", "torch", "transformers", "vllm"}
TORCHLESS = {
    "Config", "FgaifError", "LabeledResponse", "Response", "RewardCenters", "RewardClient",
    "RewardShapeConfig", "Segment", "SegmentScores", "dense_rewards", "gae", "label_response",
    "load_config", "make_response", "run", "segment_response", "split",
}  # fmt: skip


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after ``code``."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=True, text=True
    )
    return {name.split(".")[0] for name in json.loads(done.stdout)}


def test_importing_fgaif_imports_nothing_but_the_standard_library() -> None:
    """Compared with a bare interpreter, which may hold what .pth files of this machine import."""
    added = loaded_by("import fgaif") - loaded_by("")
    assert added - set(sys.stdlib_module_names) == {"fgaif"}


def test_names_that_need_no_torch_import_none() -> None:
    code = f"import fgaif\nfor name in {sorted(TORCHLESS)}: getattr(fgaif, name)"
    assert loaded_by(code) & HEAVY == set()


def test_torch_is_imported_by_the_names_that_need_it_only_when_they_are_used() -> None:
    assert set(fgaif.__all__) - TORCHLESS - {"__version__"} == {
        "Rewards", "TextScores", "load_lvlm", "load_processor", "load_rewards", "train_rewards",
    }  # fmt: skip
    loaded = loaded_by("import fgaif\nfgaif.load_rewards")
    assert "torch" in loaded
    assert loaded & {"ray", "vllm", "deepspeed"} == set()


def test_the_stub_names_what_the_package_gives() -> None:
    """Type checkers read the stub alone, so it has to say where each name really comes from."""
    tree = ast.parse((ROOT / "fgaif" / "__init__.pyi").read_text(encoding="utf-8"))
    homes: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            assert [alias.asname for alias in node.names] == [alias.name for alias in node.names]
            homes |= {alias.name: str(node.module) for alias in node.names}
    assert {*homes, "__version__"} == set(fgaif.__all__)
    for name, module in homes.items():
        assert getattr(fgaif, name) is getattr(importlib.import_module(module), name)


def test_every_name_is_documented() -> None:
    page = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    for name in fgaif.__all__:
        assert f"`{name}" in page, name
        value = getattr(fgaif, name)
        assert isinstance(value, str) or (value.__doc__ or "").strip(), name


def test_names_can_be_listed_and_a_wrong_one_is_refused() -> None:
    assert dir(fgaif) == sorted(fgaif.__all__)
    with pytest.raises(AttributeError, match="module 'fgaif' has no attribute 'load_reward'"):
        fgaif.load_reward  # type: ignore[attr-defined]  # noqa: B018


def test_the_version_is_the_distributions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert fgaif.__version__ == project["version"]


def test_split_cuts_a_text_without_losing_a_character() -> None:
    text = "There is a dog on the red couch, and a cat sleeps under it. It is day."
    pieces = fgaif.split(text)
    assert pieces == [
        "There is a dog on the red couch, ",
        "and a cat sleeps under it. ",
        "It is day.",
    ]
    assert fgaif.split(text, min_words=9) == [text[:-10], text[-10:]]
    assert fgaif.split("") == []


def test_a_reward_by_hand_reaches_the_last_token_of_its_segment() -> None:
    """Segment 0 is right (+1 for object), segment 1 hallucinated (-1); gamma = lambda = 1 sums up.

    Rewards: 0 before T_0, +1 at T_0, -1 at T_1, nothing at EOS. With V = 0 the advantages are the
    rewards still to come: 0 up to T_0, then -1 up to T_1, then 0.
    """
    tokenizer = fgaif.load_processor("scenes:policy").tokenizer
    response = fgaif.make_response(
        Image.new("RGB", (8, 8)), "There is a dog. There is a red cat.", tokenizer
    )
    segments = fgaif.segment_response(response, tokenizer, min_words=4)
    assert len(segments) == 2
    probs = np.zeros((2, 3, 3), np.float32)
    probs[..., SegmentClass.NONE] = 1
    probs[0, 0], probs[1, 0] = (0, 1, 0), (0, 0, 1)
    rewards = fgaif.dense_rewards(
        [response],
        [segments],
        [fgaif.SegmentScores(probs=probs)],
        [()],
        fgaif.RewardShapeConfig(center=False),
        fgaif.RewardCenters.empty(),
    )
    (tokens,) = rewards.tokens
    first, second = (segment.token_end - 1 for segment in segments)
    wanted = np.zeros(len(response.token_ids), np.float32)
    wanted[first], wanted[second] = 1, -1
    assert tokens.tolist() == wanted.tolist()
    mask = np.ones((1, len(tokens)), np.float32)
    advantages, _ = fgaif.gae(tokens[None], np.zeros_like(mask), mask, gamma=1.0, lam=1.0)
    assert advantages[0, : first + 1].tolist() == [0] * (first + 1)
    assert advantages[0, first + 1 : second + 1].tolist() == [-1] * (second - first)
    assert advantages[0, second + 1 :].tolist() == [0] * (len(tokens) - second - 1)


class Oracle:
    """A verifier that knows the scene."""

    name, prompt_version = "oracle", "none"

    def __init__(self, true: set[str]) -> None:
        self._true = true

    async def verify(self, query: FactQuery) -> Verdict:
        return Verdict(query=query, answer="yes" if query.text in self._true else "no")


def test_label_response_labels_segments_by_their_facts(tmp_path: Path) -> None:
    prompts = write_split(tmp_path, "test", 1)
    row = json.loads(prompts.read_text(encoding="utf-8"))
    (scene,) = read_scenes(tmp_path / "scenes.jsonl").values()
    here = scene.things[0].noun
    absent = next(noun for noun in NOUNS if noun not in scene)
    tokenizer = fgaif.load_processor("scenes:policy").tokenizer
    text = f"There is a {here}. There is a {absent}."
    response = fgaif.make_response(tmp_path / row["image"], text, tokenizer)
    segments = fgaif.segment_response(response, tokenizer, min_words=4)
    verifier = Oracle({f"There is a {here}."})
    labelled = asyncio.run(fgaif.label_response(response, segments, SceneFacts(), verifier))
    assert labelled.labels[:, 0].tolist() == [SegmentClass.OK, SegmentClass.HALLU]


def test_a_configuration_is_loaded_by_its_path_in_either_form() -> None:
    file = ROOT / "configs" / "scenes.yaml"
    assert fgaif.load_config(str(file)) == fgaif.load_config(file)
    with pytest.raises(ConfigError, match=r"--config missing\.yaml"):
        fgaif.load_config("missing.yaml")


def test_run_passes_on_what_the_command_line_would(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stages = importlib.import_module("cluster.pipeline.stages")
    calls = []
    monkeypatch.setattr(stages, "run_stages", lambda *told: calls.append(told))
    file = ROOT / "configs" / "scenes.yaml"
    folder = fgaif.run(str(file), [f"dir={tmp_path}", "ppo.steps=3"], stages=["train", "sample"])
    config, chosen, force, _ = calls.pop()
    assert folder == tmp_path / "scenes"
    assert (config.ppo.steps, list(chosen), force) == (3, ["sample", "train"], False)
    assert fgaif.run(config, ["name=b"], force=True) == tmp_path / "b"
    config, chosen, force, _ = calls.pop()
    assert (config.name, config.ppo.steps, chosen[0], force) == ("b", 3, "sample", True)
    with pytest.raises(ConfigError, match="no stage 'trian'; the stages are sample, annotate"):
        fgaif.run(config, stages=["trian"])
    assert calls == []
