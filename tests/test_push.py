"""What is uploaded and what its card says, against a hub on loopback."""

import base64
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from fake_hub import FakeHub, online
from safetensors.torch import load_file, save_file
from serving_samples import TEXT, png, write_rewards

from cluster.cli.main import main
from fgaif.config import LoraConfig, dump_config, load_config
from fgaif.errors import CheckpointError, ServiceError
from fgaif.eval.publication import prepare, upload
from fgaif.eval.run_results import write_eval
from fgaif.lvlm.export import export_merged
from fgaif.lvlm.hub import name_base
from fgaif.lvlm.model import attach_lora, load_adapter, load_lvlm, split_model
from fgaif.serving.rewards import load_rewards
from fgaif.types import DEFAULT_KINDS, CaptionMetrics, EvalReport

BASE = f"someone/tiny-llava@{'1' * 40}"


def figures(errors: float) -> EvalReport:
    metrics = CaptionMetrics(
        kinds=dict.fromkeys(DEFAULT_KINDS, errors), any=errors, chair_s=0.5, chair_i=0.1,
        recall=0.9, true_facts=6.0, length=38.0, repetition=0.0, malformed=0.0,
    )  # fmt: skip
    return EvalReport(greedy=metrics, sampled=metrics, pope=None, pope_by_strategy={})


@pytest.fixture(scope="module")
def run_dir(tiny_llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over a base of the hub: adapter, evaluations, reward models of a local base."""
    folder = tmp_path_factory.mktemp("runs") / "photos"
    folder.mkdir()
    config = load_config(None, [f"dir={folder.parent}", "name=photos", "data.held_out=held.jsonl"])
    (folder / "config.yaml").write_text(dump_config(config))
    settings = json.loads(config.model_dump_json())
    contents = {"data.train": {"rows": 4, "sha256": "5a" * 32}}
    entry = {"seconds": 1.0, "config": settings, "contents": contents}
    (folder / "stages.json").write_text(json.dumps({"train": entry, "eval-after": entry}))
    nothing: Any = type("None_", (), {"of": staticmethod(lambda mode: ())})
    write_eval(folder / "eval", "before", figures(0.4), nothing)
    write_eval(folder / "eval", "after", figures(0.1), nothing)
    policy = attach_lora(load_lvlm(tiny_llava_dir), LoraConfig(r=4), 0)
    for weight in (value for value in policy.parameters() if value.requires_grad):
        torch.nn.init.normal_(weight)
    name_base(policy, BASE)
    policy.save_pretrained(folder / "policy" / "adapter", save_embedding_layers=False)
    write_rewards(tiny_llava_dir, folder / "rewards")
    return folder


def header(card: str) -> dict[str, Any]:
    return dict(yaml.safe_load(card.split("---")[1]))


def test_an_adapter_goes_with_base_data_and_figures(run_dir: Path) -> None:
    found = prepare(run_dir / "policy" / "adapter", "me/aligned")
    assert set(found.files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert header(found.card)["base_model"] == "someone/tiny-llava"
    assert header(found.card)["base_model_relation"] == "adapter"
    assert "license" not in header(found.card)
    for said in (
        "# aligned", f"Base: `{BASE}`, which states no licence", "| object errors | 40.0 % | 10.0",
        "(`held.jsonl`)", f"| data.train | {'5a' * 8} |", "The run `photos`, seed 0.",
    ):  # fmt: skip
        assert said in found.card
    assert str(run_dir.parent) not in found.card


def test_reward_models_go_by_kind_and_name_a_base_that_others_can_find(run_dir: Path) -> None:
    found = prepare(run_dir / "rewards", "me/rewards", base=BASE)
    names = {"adapter_config.json", "adapter_model.safetensors", "reward.json"}
    names |= {"reward_head.safetensors"}
    assert set(found.files) == {f"{kind}/{name}" for kind in DEFAULT_KINDS for name in names}
    written = [json.loads(text) for text in found.files.values() if isinstance(text, bytes)]
    assert {card["backbone"] for card in written if "backbone" in card} == {BASE}
    bases = {(c["base_model_name_or_path"], c["revision"]) for c in written if "r" in c}
    assert bases == {("someone/tiny-llava", "1" * 40)}
    assert "| f1_hallu | 0.5000 | 0.5000 | 0.5000 |" in found.card
    unnamed = prepare(run_dir / "rewards", "me/rewards")
    assert unnamed.base.repository is None
    texts = [unnamed.card.encode(), *(b for b in unnamed.files.values() if isinstance(b, bytes))]
    assert not any(b"/tmp" in text or str(run_dir.parent).encode() in text for text in texts)


def test_an_export_takes_licence_and_base_from_its_base(
    run_dir: Path, tiny_llava_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, origin = tmp_path / "out", tmp_path / "origin"
    export_merged(tiny_llava_dir, run_dir / "policy" / "adapter", out, dtype="float32")
    origin.mkdir()
    (origin / "README.md").write_text("---\nlicense: llama2\n---\n# tiny")
    fake = FakeHub("someone/tiny-llava")
    fake.folders["1" * 40] = origin
    with online(fake, tmp_path / "cache", monkeypatch):
        found = prepare(out, "me/merged", run_dir=run_dir)
    assert {"config.json", "model.safetensors", "adapter/adapter_config.json"} <= set(found.files)
    assert header(found.card)["license"] == "llama2"
    assert header(found.card)["base_model_relation"] == "finetune"
    assert "licence `llama2`" in found.card
    assert "| any error | 40.0 % | 10.0 % |" in found.card
    assert "data and settings are not known" in prepare(out, "me/merged").card


def test_figures_are_of_the_adapter_that_was_evaluated_alone(run_dir: Path) -> None:
    """One of a baseline in the same run does not get PPO's."""
    other = run_dir / "baselines" / "dpo" / "adapter"
    shutil.copytree(run_dir / "policy" / "adapter", other)
    weights = load_file(other / "adapter_model.safetensors")
    save_file(
        {name: 2 * value for name, value in weights.items()}, other / "adapter_model.safetensors"
    )
    found = prepare(other, "me/dpo").card
    assert "Not known: no run was found" in found
    assert "any error" not in found
    assert "The run `photos`, seed 0." in found


def test_all_goes_in_one_commit(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = prepare(run_dir / "policy" / "adapter", "me/aligned")
    fake = FakeHub("me/aligned")
    with online(fake, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        address = upload(found, "me/aligned", private=True)
    assert address.endswith(f"/me/aligned/commit/{'c' * 40}")
    (made, _), *_, (_, commit) = fake.sent
    assert made == "/api/repos/create"
    files = {row["value"]["path"]: row["value"] for row in commit if row["key"] == "file"}
    assert set(files) == {*found.files, "README.md"}
    assert base64.b64decode(files["README.md"]["content"]).decode() == found.card


def test_offline_nothing_is_uploaded(run_dir: Path) -> None:
    found = prepare(run_dir / "policy" / "adapter", "me/aligned")
    with pytest.raises(ServiceError, match=r"cannot be reached .*without HF_HUB_OFFLINE"):
        upload(found, "me/aligned", private=False)


def test_other_folders_are_refused(tmp_path: Path, tiny_llava_dir: Path) -> None:
    for folder, said in ((tmp_path, "neither an adapter"), (tiny_llava_dir, "without adapter/")):
        with pytest.raises(CheckpointError, match=said):
            prepare(folder, "me/x")


def test_a_dry_run_prints_files_and_card(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def push(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fgaif", "push", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        said = capsys.readouterr()
        return int(stop.value.code or 0), said.out + said.err

    adapter = str(run_dir / "policy" / "adapter")
    code, said = push(adapter, "--to", "me/aligned", "--dry-run")
    assert code == 0
    assert "3 files" in said
    assert prepare(Path(adapter), "me/aligned").card.strip() in said
    code, said = push(str(run_dir / "rewards"), "--to", "me/rewards", "--dry-run")
    assert code == 0
    assert "--base ORG/NAME@REVISION says where they find it" in said
    assert push(adapter, "--to", "aligned", "--dry-run")[0] == 2
    assert push(adapter, "--to", "me/a", "--base", "folder", "--dry-run")[0] == 2


def test_what_was_uploaded_loads_again_by_its_name(
    run_dir: Path, tiny_llava_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reward model scores as it did, an adapter is read, from what a hub gives back."""
    for what in ("rewards", "policy/adapter"):
        found = prepare(run_dir / what, "me/x", base=BASE)
        fake = FakeHub("me/x")
        fake.folders["2" * 40] = origin = tmp_path / "origin" / what
        fake.branches["main"] = "2" * 40
        for path, content in (*found.files.items(), ("README.md", found.card.encode())):
            (origin / path).parent.mkdir(parents=True, exist_ok=True)
            text = content if isinstance(content, bytes) else content.read_bytes()
            (origin / path).write_bytes(text)
        with online(fake, tmp_path / "cache" / what, monkeypatch):
            if what == "rewards":
                uploaded = load_rewards("me/x@main", backbone=tiny_llava_dir)
                kept = load_rewards(run_dir / what, backbone=tiny_llava_dir)
                scores = [each.score(png(), TEXT).probs for each in (uploaded, kept)]
                np.testing.assert_array_equal(*scores)
            else:
                checkpoint, adapter = split_model(f"{tiny_llava_dir}+me/x@main", "--model")
                assert checkpoint == tiny_llava_dir
                assert adapter is not None
                load_adapter(load_lvlm(checkpoint), adapter)
