"""Rebuild the shipped tiny models from nothing: ``python -m fgaif.scene_models.build --out DIR``.

Stages, each resumable (a finished stage is loaded, not repeated) and with a fixed seed:
``vision`` the CLIP tower; ``ground`` a language model that sees; ``tell`` and ``polish`` one that
also captions well; ``policy`` and ``verifier``, the two made from it; ``models`` writes them as
they are shipped and measures what was written.
"""

import argparse
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TimeElapsedColumn
from safetensors.torch import load_model, save_model
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from fgaif.data.scenes.facts import SCENE_KINDS
from fgaif.data.scenes.questions import sample_question
from fgaif.data.scenes.world import scene_at
from fgaif.scene_models.card import measure_models, write_card
from fgaif.scene_models.measure import (
    answer_accuracy,
    caption,
    caption_report,
    scene_features,
)
from fgaif.scene_models.model import random_model, save_checkpoint
from fgaif.scene_models.policy import PolicyStage, train_policy
from fgaif.scene_models.pretrain import Heads, Report, Stage, train_language, train_vision
from fgaif.scene_models.tokenizer import build_processor, build_tokenizer
from fgaif.scene_models.verifier import distract_vision

VISION_STEPS = 470
STAGES = {
    "ground": Stage(steps=900, lr=2e-3, captions=1 / 3, judged=1 / 3, early_open_share=0.8),
    "tell": Stage(steps=500, lr=1.2e-3, captions=1 / 2, judged=1 / 6),
    "polish": Stage(steps=650, lr=1.6e-3, captions=2 / 3, judged=1 / 6),
}
POLICY_STAGE = PolicyStage()
VERIFIER_STRENGTH = 7.8
_TRAIN_SCENES = 12_000
_POLICY_SCENES = 4_000
_VISION_SCENES = 10_000
_CHECK_EVERY = 50
_CHECK_SCENES = 200


class Builder:
    """Runs the stages in order and keeps each one's result under ``out``."""

    def __init__(self, out: Path, seed: int) -> None:
        torch.manual_seed(seed)
        self.out, self.seed = out, seed
        self.tokenizer: PreTrainedTokenizerFast = build_tokenizer()
        self.model: LlavaForConditionalGeneration = random_model(len(self.tokenizer), seed)
        self.heads = Heads()
        self.train = [scene_at("train", index) for index in range(_TRAIN_SCENES)]
        self.val = [scene_at("val", index) for index in range(_CHECK_SCENES)]
        self.seconds: dict[str, float] = {}

    def run(self, name: str) -> None:
        """Load the stage's result, or train the stage and keep its result."""
        folder = self.out / name
        if not (folder / "done.json").exists():
            torch.manual_seed(self.seed)
            start = time.perf_counter()
            {"vision": self._vision, "policy": self._policy, "verifier": self._verifier}.get(
                name, lambda: self._language(name)
            )()
            self._save(folder)
            seconds = time.perf_counter() - start
            (folder / "done.json").write_text(json.dumps({"seconds": seconds}))
            print(f"{name}: {seconds:.0f} s", flush=True)
        load_model(self.model, folder / "model.safetensors")
        load_model(self.heads, folder / "heads.safetensors")
        self.seconds[name] = json.loads((folder / "done.json").read_text())["seconds"]

    def _vision(self) -> None:
        with _Steps("vision", VISION_STEPS) as report:
            self.model.train()
            train_vision(self.model, self.train[:_VISION_SCENES], steps=VISION_STEPS, report=report)

    def _language(self, name: str) -> None:
        features = scene_features(self.model, self.train)
        val_features = scene_features(self.model, self.val)

        def check(step: int, losses: dict[str, float]) -> None:
            show(step, losses)
            if step % _CHECK_EVERY == 0 or step == STAGES[name].steps:
                shown = " ".join(f"{k}={v:.3f}" for k, v in losses.items())
                print(f"{name} {step} {shown}\n  {self._quality(val_features)}", flush=True)

        with _Steps(name, STAGES[name].steps) as show:
            self.model.train()
            train_language(
                self.model,
                self.tokenizer,
                self.heads,
                self.train,
                features,
                STAGES[name],
                seed=self.seed + sorted(STAGES).index(name),
                report=check,
            )

    def _policy(self) -> None:
        scenes = self.train[:_POLICY_SCENES]
        with _Steps("policy", POLICY_STAGE.steps) as report:
            self.model = train_policy(
                self.model,
                self.tokenizer,
                self.heads,
                scenes,
                scene_features(self.model, scenes),
                POLICY_STAGE,
                seed=self.seed,
                report=report,
            )

    def _verifier(self) -> None:
        load_model(self.model, self.out / "polish" / "model.safetensors")
        distract_vision(self.model, VERIFIER_STRENGTH, self.seed)

    def _quality(self, features: torch.Tensor) -> str:
        """Return one line: yes/no accuracy per kind, and errors of sampled captions."""
        rng = random.Random("check")
        accuracy = {
            kind: answer_accuracy(
                self.model,
                self.tokenizer,
                features,
                [(i, sample_question(scene, rng, kind=kind)) for i, scene in enumerate(self.val)],
            )
            for kind in SCENE_KINDS
        }
        captions = caption(self.model, self.tokenizer, features, temperature=1.0)
        report = caption_report(self.val, captions, self.tokenizer)
        return f"yes/no {_rounded(accuracy)} captions {_rounded(asdict(report))}"

    def _save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.model, str(folder / "model.safetensors"))
        save_model(self.heads, str(folder / "heads.safetensors"))

    def ship(self) -> None:
        """Write both models as they are shipped, then measure what was written."""
        models = self.out / "models"
        for name in ("policy", "verifier"):
            load_model(self.model, self.out / name / "model.safetensors")
            save_checkpoint(self.model, build_processor(), models / name)
        measured = measure_models(models)
        for name in ("policy", "verifier"):
            card = write_card(name, measured, self.seconds, self.seed)
            (models / name / "README.md").write_text(card, encoding="utf-8")
        print(json.dumps(measured, indent=1), flush=True)


def _rounded(values: Mapping[Any, Any]) -> dict[str, Any]:
    return {
        name: _rounded(value) if isinstance(value, Mapping) else round(value, 3)
        for name, value in values.items()
    }


class _Steps:
    """A rich progress bar, as a function to report steps to."""

    def __init__(self, name: str, steps: int) -> None:
        self._bar = Progress(*Progress.get_default_columns(), TimeElapsedColumn())
        self._task = self._bar.add_task(name, total=steps)

    def __enter__(self) -> Report:
        self._bar.start()
        return lambda step, losses: self._bar.update(self._task, completed=step)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run the stages."""
    names = ["vision", *STAGES, "policy", "verifier", "models"]
    parser = argparse.ArgumentParser(description="Rebuild the embedded world's tiny models.")
    parser.add_argument("--out", type=Path, required=True, help="folder for stages and models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", choices=names, default="models", help="stop after this stage")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    builder = Builder(options.out, options.seed)
    for name in names[: names.index(options.stage) + 1]:
        if name == "models":
            builder.ship()
        else:
            builder.run(name)


if __name__ == "__main__":
    main()
