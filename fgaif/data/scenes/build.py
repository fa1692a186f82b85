"""Rebuild the shipped tiny models from nothing: ``python -m fgaif.data.scenes.build --out DIR``.

Stages, each resumable (a finished stage is loaded, not repeated) and with a fixed seed:
``vision`` the CLIP tower; ``ground`` a language model that sees; ``tell`` and ``polish`` one that
also captions well; then ``policy`` and ``verifier``, the two that are shipped.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from rich.progress import Progress, TimeElapsedColumn
from safetensors.torch import load_model, save_model
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from fgaif.data.scenes.measure import (
    answer_accuracy,
    caption,
    caption_report,
    scene_features,
)
from fgaif.data.scenes.model import random_model
from fgaif.data.scenes.pretrain import Heads, Report, Stage, train_language, train_vision
from fgaif.data.scenes.questions import sample_question
from fgaif.data.scenes.tokenizer import build_tokenizer
from fgaif.data.scenes.world import Scene, scene_at
from fgaif.types import KINDS

VISION_STEPS = 470
STAGES = {
    "ground": Stage(steps=900, lr=2e-3, captions=1 / 3, judged=1 / 3, early_open_share=0.8),
    "tell": Stage(steps=500, lr=1.2e-3, captions=1 / 2, judged=1 / 6),
    "polish": Stage(steps=650, lr=1.6e-3, captions=2 / 3, judged=1 / 6),
}
_TRAIN_SCENES = 12_000
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

    def run(self, name: str) -> None:
        """Load the stage's result, or train the stage and keep its result."""
        folder = self.out / name
        if (folder / "done.json").exists():
            load_model(self.model, folder / "model.safetensors")
            load_model(self.heads, folder / "heads.safetensors")
            return
        torch.manual_seed(self.seed)
        start = time.perf_counter()
        if name == "vision":
            with _progress(name, VISION_STEPS) as report:
                self.model.train()
                train_vision(
                    self.model, self.train[:_VISION_SCENES], steps=VISION_STEPS, report=report
                )
        else:
            self._language(name)
        self._save(folder)
        seconds = time.perf_counter() - start
        (folder / "done.json").write_text(json.dumps({"seconds": seconds}))
        print(f"{name}: {seconds:.0f} s", flush=True)

    def _language(self, name: str) -> None:
        features = scene_features(self.model, self.train)
        val_features = scene_features(self.model, self.val)
        start = time.perf_counter()

        def check(step: int, losses: dict[str, float]) -> None:
            bar(step, losses)
            if step % _CHECK_EVERY and step != STAGES[name].steps:
                return
            shown = " ".join(f"{k}={v:.3f}" for k, v in losses.items())
            print(f"{name} {step} {time.perf_counter() - start:.0f} s {shown}", flush=True)
            print(f"  {self.quality(self.val, val_features)}", flush=True)
            self._save(self.out / name / f"step-{step}")

        with _progress(name, STAGES[name].steps) as bar:
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

    def quality(self, scenes: list[Scene], features: torch.Tensor) -> str:
        """Return one line: yes/no accuracy per kind, and errors of sampled captions."""
        import random

        rng = random.Random("check")
        accuracy = {
            kind: answer_accuracy(
                self.model,
                self.tokenizer,
                features,
                [(i, sample_question(scene, rng, kind=kind)) for i, scene in enumerate(scenes)],
            )
            for kind in KINDS
        }
        captions = caption(self.model, self.tokenizer, features, temperature=1.0)
        report = caption_report(scenes, captions, self.tokenizer)
        return f"yes/no {_rounded(accuracy)} sampled {_rounded(report.wrong)} {report}"

    def _save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.model, str(folder / "model.safetensors"))
        save_model(self.heads, str(folder / "heads.safetensors"))


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in values.items()}


class _progress:
    """A rich progress bar whose value is a step report."""

    def __init__(self, name: str, steps: int) -> None:
        self._bar = Progress(*Progress.get_default_columns(), TimeElapsedColumn())
        self._task = self._bar.add_task(name, total=steps)

    def __enter__(self) -> Report:
        self._bar.start()
        return lambda step, losses: self._bar.update(self._task, completed=step)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def main() -> None:
    """Parse the command line and run the stages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for stages and models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", action="append", help="run only up to these stages (repeatable)")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    builder = Builder(arguments.out, arguments.seed)
    for name in arguments.stage or ["vision", *STAGES]:
        builder.run(name)


if __name__ == "__main__":
    main()
