"""SFT and DPO through TRL on the embedded policy, with truth and lies about drawn scenes."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ppo_world import hf_logprobs
from rich.console import Console
from tiny_families import BUILDERS
from transformers import AutoProcessor

from cluster.pipeline import baselines
from cluster.pipeline.baselines import run_rounds, train_in
from fgaif.baselines.chat_text import ChatText
from fgaif.baselines.files import (
    Example,
    PairsCard,
    examples_of,
    read_preferences,
    read_sft,
    write_pairs,
)
from fgaif.baselines.pairs import Pairing, ScoredText, make_pairs
from fgaif.baselines.trainer import make_dataset, read_result, settings_of, train_baseline
from fgaif.config import Config, load_config, parse_config, with_overrides
from fgaif.data.images import image_ref
from fgaif.data.scenes.captions import BROAD, write_caption
from fgaif.data.scenes.files import read_scenes, write_split
from fgaif.data.scenes.questions import DESCRIBE
from fgaif.errors import DataError, DivergedError
from fgaif.feedback.external import given_response
from fgaif.lvlm.export import export_merged
from fgaif.lvlm.inputs import Encoder, load_encoder
from fgaif.lvlm.model import load_adapter, load_lvlm, resolve_checkpoint
from fgaif.lvlm.weights import manifest_from_adapter
from fgaif.types import GenerationRequest, Prompt, Response

POLICY = resolve_checkpoint("scenes:policy")
ROWS = 16


@pytest.fixture(scope="module")
def pairing(tmp_path_factory: pytest.TempPathFactory) -> Pairing:
    """Of each scene a caption that is right and one that is not."""
    folder = tmp_path_factory.mktemp("scenes")
    write_split(folder, "train", ROWS)
    scored = []
    for name, scene in read_scenes(folder / "scenes.jsonl").items():
        prompt = Prompt(id=name, image=image_ref(folder / "images" / f"{name}.png"), text=DESCRIBE)
        rng = random.Random(name)
        right, wrong = write_caption(scene, rng), write_caption(scene, rng, BROAD)
        scored += [
            ScoredText(prompt=prompt, text=f" {right}", score=1.0),
            ScoredText(prompt=prompt, text=f" {wrong}", score=-1.0),
        ]
    return make_pairs(scored)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder(POLICY)


def config(**baseline: Any) -> Config:
    chosen = {
        "batch_size": 8,
        "micro_batch": 8,
        "epochs": 4,
        "warmup": 0,
        "checkpoint_every": 100,
        "dpo_lr": 1e-3,
        "sft_lr": 2e-3,
        **baseline,
    }
    policy = {"model": "scenes:policy", "lora": {"r": 8, "alpha": 16}}
    return parse_config({"policy": policy, "baseline": chosen})


def sampled(encoder: Encoder, examples: Sequence[Example]) -> list[Response]:
    """The chosen texts as the policy would have sampled them."""
    found = []
    for example in examples:
        prompt = Prompt(id="x", image=example.image, text=example.turns[-1][1])
        found.append(given_response("x", prompt, " " + example.chosen, encoder.tokenizer))
    return found


def logprobs(encoder: Encoder, examples: list[Example], adapter: Path | None) -> np.ndarray:
    """Log-probability of each example's chosen text, by our engine's own path."""
    model: Any = load_lvlm(POLICY)
    if adapter is not None:
        model = load_adapter(model, adapter)
    return hf_logprobs(model, POLICY, sampled(encoder, examples)).sum(1).numpy()


def test_trl_reads_the_ids_that_the_policy_is_given_and_samples(
    encoder: Encoder, pairing: Pairing
) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    examples = examples_of(pairing)
    rows = make_dataset("dpo", examples, ChatText(encoder))
    collator = DataCollatorForVisionPreference(processor=AutoProcessor.from_pretrained(POLICY))
    batch = collator([rows[index] for index in range(3)])
    for at, pair in enumerate(
        [*(p.chosen for p in pairing.pairs[:3]), *(p.rejected for p in pairing.pairs[:3])]
    ):
        answer = batch["completion_mask"][at].bool()
        real = batch["attention_mask"][at].bool()
        sampled = given_response("x", pair.prompt, pair.text, encoder.tokenizer)
        assert batch["input_ids"][at][answer].tolist() == sampled.token_ids.tolist()
        assert batch["input_ids"][at][real & ~answer].tolist() == encoder.prompt_ids(pair.prompt)


def test_dpo_lowers_its_loss_and_our_engine_reads_the_adapter(
    tmp_path: Path, encoder: Encoder, pairing: Pairing
) -> None:
    told: list[tuple[int, int]] = []
    examples = list(examples_of(pairing))
    result = train_baseline(
        "dpo", examples, config(), tmp_path / "dpo", report=lambda *now: told.append(now[:2])
    )
    assert result["steps"] == 8
    assert told == [(step, 8) for step in range(1, 9)]
    assert result["first"]["loss"] == pytest.approx(np.log(2), abs=1e-3)  # B is zero at the start
    assert result["last"]["loss"] < 0.8 * result["first"]["loss"]
    assert read_result(tmp_path / "dpo")["done"]
    adapter = tmp_path / "dpo" / "adapter"
    assert sorted(p.name for p in adapter.iterdir() if p.suffix != ".md") == [
        "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip
    assert manifest_from_adapter(adapter, version=1).scaling == 2.0
    swapped = [replace(one, chosen=one.rejected, rejected=one.chosen) for one in examples]
    margin_before = logprobs(encoder, examples, None) - logprobs(encoder, swapped, None)
    margin_after = logprobs(encoder, examples, adapter) - logprobs(encoder, swapped, adapter)
    assert (margin_after > margin_before).mean() > 0.8
    assert not (tmp_path / "dpo" / "checkpoints").exists()
    export_merged(POLICY, adapter, tmp_path / "merged", dtype="float32")
    merged = hf_logprobs(load_lvlm(tmp_path / "merged"), POLICY, sampled(encoder, examples[:2]))
    served = hf_logprobs(
        load_adapter(load_lvlm(POLICY), adapter), POLICY, sampled(encoder, examples[:2])
    )
    np.testing.assert_allclose(merged.numpy(), served.numpy(), atol=1e-4)


def test_an_interrupted_training_goes_on_and_ends_the_same(
    tmp_path: Path, pairing: Pairing
) -> None:
    examples = list(examples_of(pairing))
    settings = config(checkpoint_every=2, epochs=2)
    whole = train_baseline("dpo", examples, settings, tmp_path / "whole")

    def stop(step: int, total: int, note: str) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_baseline("dpo", examples, settings, tmp_path / "cut", report=stop)
    assert not read_result(tmp_path / "cut")["done"]
    assert not (tmp_path / "cut" / "adapter").exists()
    (tmp_path / "cut" / "checkpoints" / "checkpoint-7").mkdir()  # cut while it was written
    steps: list[int] = []
    again = train_baseline(
        "dpo", examples, settings, tmp_path / "cut", report=lambda step, *_: steps.append(step)
    )
    assert steps == [3, 4]
    assert again["last"]["loss"] == whole["last"]["loss"]
    one, two = (
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
        for name in ("whole", "cut")
    )
    assert one == two


def test_sft_of_conversations_makes_the_answers_likelier(
    tmp_path: Path, encoder: Encoder, pairing: Pairing
) -> None:
    """LLaVA's form, with a second question about each image; then on from the adapter."""
    rows = [
        {
            "image": item.prompt.image.path,
            "conversations": [
                {"from": "human", "value": f"<image>\n{DESCRIBE}"},
                {"from": "gpt", "value": item.text.strip()},
                {"from": "human", "value": "Is there a dog?"},
                {"from": "gpt", "value": "No."},
            ],
        }
        for item in pairing.best
    ]
    file = tmp_path / "instruct.json"
    file.write_text(json.dumps(rows))
    examples = read_sft(file).rows
    assert len(examples) == 2 * ROWS
    result = train_baseline("sft", examples, config(epochs=1), tmp_path / "sft")
    assert result["last"]["loss"] < result["first"]["loss"]
    adapter = tmp_path / "sft" / "adapter"
    first = [one for one in examples if len(one.turns) == 1]
    asked = [replace(one, turns=(("user", DESCRIBE),)) for one in first]
    before, after = logprobs(encoder, asked, None), logprobs(encoder, asked, adapter)
    assert after.mean() > before.mean()
    on = train_baseline("sft", examples[:8], config(epochs=1), tmp_path / "on", start=adapter)
    assert on["first"]["loss"] < result["first"]["loss"]
    assert on["settings"]["start"] is not None


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path: Path, pairing: Pairing) -> None:
    with pytest.raises(DivergedError, match=r"baseline\.dpo_lr"):
        train_baseline(
            "dpo", examples_of(pairing), config(dpo_lr=1e30, max_grad_norm=1e30), tmp_path / "x"
        )
    assert not (tmp_path / "x" / "adapter").exists()


def test_settings_tell_what_the_result_depends_on(pairing: Pairing) -> None:
    examples = examples_of(pairing)
    base = settings_of("dpo", examples, config(), None)
    assert base == settings_of("dpo", examples, config(checkpoint_every=3, rounds=9), None)
    assert base != settings_of("dpo", examples[1:], config(), None)
    assert base != settings_of("dpo", examples, config(beta=0.3), None)


def test_the_files_load_in_plain_trl(tmp_path: Path, pairing: Pairing) -> None:
    """Nothing of ours is used: datasets, transformers, TRL and one optimiser step each."""
    from datasets import Image, List, load_dataset
    from peft import LoraConfig
    from transformers import LlavaForConditionalGeneration
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    card = PairsCard(policy="p", policy_digest="d", score="labels", counts={})
    write_pairs(tmp_path / "pairs", pairing, card)
    for name, trainer, settings in (
        ("preference", DPOTrainer, DPOConfig),
        ("sft", SFTTrainer, SFTConfig),
    ):
        rows = load_dataset(
            "json",
            data_files=str(tmp_path / "pairs" / f"{name}.jsonl"),
            split="train",
            cache_dir=str(tmp_path / "cache"),
        ).cast_column("images", List(Image()))
        assert len(rows) == ROWS
        arguments = settings(
            output_dir=str(tmp_path / name), max_steps=1, per_device_train_batch_size=2,
            report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, logging_steps=1,
            gradient_checkpointing=False,
        )  # fmt: skip
        run = trainer(
            model=LlavaForConditionalGeneration.from_pretrained(POLICY),
            args=arguments,
            train_dataset=rows,
            processing_class=AutoProcessor.from_pretrained(POLICY),
            peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
        )
        run.train()
        assert np.isfinite(run.state.log_history[0]["loss"])


def test_what_is_written_is_read_again(tmp_path: Path, pairing: Pairing) -> None:
    card = PairsCard(policy="p", policy_digest="d", score="labels", counts={})
    write_pairs(tmp_path, pairing, card)
    read = read_preferences(tmp_path / "preference.jsonl")
    assert list(read.rows) == list(examples_of(pairing))
    assert not read.warning()
    assert len(read_sft(tmp_path / "sft.jsonl").rows) == ROWS


def test_rows_without_their_image_are_left_out(tmp_path: Path, pairing: Pairing) -> None:
    card = PairsCard(policy="p", policy_digest="d", score="labels", counts={})
    write_pairs(tmp_path, pairing, card)
    lines = (tmp_path / "preference.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rows[1]["images"] = ["/nowhere/at/all.png"]
    file = tmp_path / "broken.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_preferences(file)
    assert len(read.rows) == ROWS - 1
    assert "broken.jsonl:2" in read.warning()
    assert "all.png" in read.warning()
    file.write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(DataError, match=r"all\.png"):
        read_preferences(file)


def test_a_second_call_finds_it_done_and_other_settings_move_it_aside(
    tmp_path: Path, pairing: Pairing
) -> None:
    settings = with_overrides(config(epochs=1, batch_size=16), [f"dir={tmp_path}", "name=run"])
    examples = examples_of(pairing)[:8]
    folder = settings.run_dir / "baselines" / "dpo"

    def train(now: Config) -> str:
        console = Console(record=True, width=200)
        train_in(now, "dpo", examples, folder, None, console)
        return console.export_text()

    assert "loss 0.693 -> 0.693 in 1 steps" in train(settings)
    adapter = folder / "adapter" / "adapter_model.safetensors"
    first = adapter.read_bytes()
    assert "up to date" in train(settings)
    told = train(with_overrides(settings, ["baseline.dpo_lr=0.01"]))
    assert "moved to" in told
    aside = settings.run_dir / "aside" / "baseline-dpo-1" / "baselines" / "dpo"
    assert (aside / "adapter" / "adapter_model.safetensors").read_bytes() == first
    assert adapter.read_bytes() != first


def test_rounds_of_dpo_go_on_where_they_stopped(
    tmp_path: Path, encoder: Encoder, pairing: Pairing
) -> None:
    """Each round samples from the adapter of the one before, which is its reference."""
    settings = with_overrides(
        config(epochs=1), [f"dir={tmp_path}", "name=run", "baseline.rounds=2",
                           "baseline.round_prompts=4", "baseline.samples=2"],
    )  # fmt: skip
    known = {pair.chosen.prompt.id: pair for pair in pairing.pairs}
    prompts = [pair.chosen.prompt for pair in pairing.pairs[:6]]
    folder = settings.run_dir / "baselines" / "dpo-iterative"
    asked: list[tuple[int, Path | None]] = []

    def sample(requests: Sequence[GenerationRequest], adapter: Path | None) -> list[Response]:
        asked.append((len(requests), adapter))
        found = []
        for request in requests:
            pair = known[request.prompt.id]
            text = (pair.chosen if request.sample else pair.rejected).text
            answer = given_response("x", request.prompt, text, encoder.tokenizer)
            found.append(replace(answer, sample=request.sample))
        return found

    def score(responses: Sequence[Response]) -> list[float]:
        if len(asked) == 2 and not (folder / "again").exists():
            (folder / "again").touch()
            raise KeyboardInterrupt
        return [float(response.sample) for response in responses]

    def go() -> Path:
        return run_rounds(settings, prompts, folder, None, sample, score, Console(quiet=True))

    with pytest.raises(KeyboardInterrupt):
        go()
    assert not (folder / "adapter").exists()
    last = go()
    first = folder / "round-1" / "dpo" / "adapter"
    assert asked == [(8, None), (8, first)]  # nothing is sampled twice
    used = {json.loads(line)["id"] for line in (folder / "round-2" / "preference.jsonl").open()}
    assert used == {prompts[at].id for at in (4, 5, 0, 1)}
    second = json.loads((folder / "round-2" / "dpo" / "baseline.json").read_text())
    assert second["settings"]["start"] is not None
    assert second["first"]["loss"] == pytest.approx(np.log(2), abs=1e-4)  # of its own reference
    assert manifest_from_adapter(last, version=1).tensors.keys()
    assert last == folder / "adapter"


QUICK = ("llava_onevision", "qwen2_5_vl")
FAMILIES = [
    pytest.param(name, marks=[] if name in QUICK else pytest.mark.long) for name in BUILDERS
]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_trained_on_the_ids_of_its_engine(family: str, tmp_path: Path) -> None:
    """Templates differ in where a question ends and an answer begins; images in their size."""
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    checkpoint = resolve_checkpoint(str(BUILDERS[family](tmp_path / family)))
    examples = []
    for index, size in enumerate(((64, 48), (40, 80))):
        file = tmp_path / f"{index}.png"
        Image.new("RGB", size, (90 * index, 40, 7)).save(file)
        turns = (("user", "What is it?"),)
        examples.append(
            Example(image=image_ref(file), turns=turns, chosen="A dog.", rejected="A red cat.")  # type: ignore[arg-type]
        )
    encoder = load_encoder(checkpoint)
    rows = make_dataset("dpo", examples, ChatText(encoder))
    batch = DataCollatorForVisionPreference(processor=encoder.processor)([rows[0], rows[1]])
    for at in range(4):
        answer = batch["completion_mask"][at].bool()
        real = batch["attention_mask"][at].bool()
        asked = Prompt(id="x", image=examples[at % 2].image, text="What is it?")
        assert batch["input_ids"][at][real & ~answer].tolist() == encoder.prompt_ids(asked)
        assert batch["input_ids"][at][answer][-1] == encoder.tokenizer.eos_token_id
    settings = with_overrides(
        config(batch_size=2, micro_batch=2, epochs=1), [f"policy.model={checkpoint}"]
    )
    result = train_baseline("dpo", examples, settings, tmp_path / "out")
    assert result["first"]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert manifest_from_adapter(tmp_path / "out" / "adapter", version=1).tensors


def test_iterative_dpo_begins_in_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's lock comes before the embedded world is drawn: a folder without is nobody's."""
    seen: list[int] = []

    def rounds(config: Config, prompts: Sequence[Prompt], *_: object) -> None:
        seen.append(len(prompts))

    monkeypatch.setattr(baselines, "run_rounds", rounds)
    monkeypatch.setattr(baselines, "read_cards", lambda *_: {})
    sizes = ["data.feedback_prompts=2", "data.ppo_prompts=3"]
    settings = load_config(None, [f"dir={tmp_path}", "name=it", *sizes])
    plan = baselines.BaselineOptions(rewards=tmp_path, dry_run=True)
    baselines.run_baseline(settings, "dpo-iterative", plan, Console(quiet=True))
    assert not (tmp_path / "it").exists()
    for _ in range(2):
        baselines.run_baseline(
            settings, "dpo-iterative", replace(plan, dry_run=False), Console(quiet=True)
        )
    assert seen == [3, 3]
