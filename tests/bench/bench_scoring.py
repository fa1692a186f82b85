"""Time and memory of scoring POPE answers and CHAIR captions from files, on one core.

    python tests/bench/bench_scoring.py [--answers 9000] [--captions 5000]

Makes seeded files in a temporary folder, then reads and scores them, the way the command line does:
three splits of POPE with model_vqa's answers, and captions of about 90 words with five reference
captions per image as ground truth. Prints a JSON object; seconds are of the wall clock and of the
processor, reading included, start of Python excluded.
"""

import argparse
import json
import random
import resource
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from fgaif.eval.answers import read_answers, read_captions
from fgaif.eval.benchmarks.chair import chair_truth, score_chair
from fgaif.eval.benchmarks.pope import score_pope
from fgaif.eval.pope_questions import STRATEGIES, build_rows, read_questions, write_questions
from fgaif.eval.scored import Scored
from fgaif.eval.vocabulary import coco_vocabulary, singular

CATEGORIES = sorted(coco_vocabulary().objects)
FILLERS = (
    "the image features several of them standing near each other while some more are visible in "
    "background and appear to be enjoying a sunny day with bright colors on their left side"
)
# Words that no dictionary knows, so that the cache of singular forms is not flattered
SYLLABLES = ("ba", "ko", "li", "mun", "ra", "ste", "vor", "wex")


def main() -> None:
    """Make the files, score them and print the times."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--answers", type=int, default=9000, help="POPE answers, over three splits")
    parser.add_argument("--captions", type=int, default=5000, help="CHAIR captions")
    arguments = parser.parse_args()
    rng = random.Random(0)
    with TemporaryDirectory() as folder:
        make_pope(Path(folder), arguments.answers // len(STRATEGIES), rng)
        references = make_chair(Path(folder), arguments.captions, rng)
        singular.cache_clear()
        report = {
            "pope": measure(lambda: pope(Path(folder))),
            "chair": measure(lambda: chair(Path(folder), references)),
        }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(report | {"peak_rss_mib": round(peak)}, indent=1))


def make_pope(folder: Path, count: int, rng: random.Random) -> None:
    images = [
        (f"COCO_val2014_{n:012d}.jpg", rng.sample(CATEGORIES, 5)) for n in range(-(-count // 6))
    ]
    for strategy in STRATEGIES:
        rows = build_rows(images, strategy, count=None)[:count]
        write_questions(folder / f"{strategy}.jsonl", rows)
        answers = [
            {
                "question_id": int(row.id),
                "prompt": row.text,
                "text": rng.choice(["Yes", "No", "No, there is none.", "I see one, on the left"]),
                "answer_id": f"a{row.id}",
                "model_id": "bench",
                "metadata": {},
            }
            for row in rows
        ]
        write_lines(folder / f"{strategy}_answers.jsonl", answers)


def make_chair(folder: Path, count: int, rng: random.Random) -> dict[str, list[str]]:
    """Write the captions; return the reference captions by image."""
    rows = [{"image_id": n, "caption": sentence(rng, 90)} for n in range(count)]
    write_lines(folder / "captions.jsonl", rows)
    return {str(n): [sentence(rng, 11) for _ in range(5)] for n in range(count)}


def sentence(rng: random.Random, words: int) -> str:
    """One word in eight names an object, one in thirty is rare."""
    names, fillers = rng.choices(CATEGORIES, k=words), FILLERS.split()
    rare = ["".join(rng.choices(SYLLABLES, k=3)) + rng.choice(["", "s"]) for _ in range(words)]
    pick = [rng.random() for _ in range(words)]
    return " ".join(
        names[i] + rng.choice(["", "s", ","])
        if pick[i] < 1 / 8
        else rare[i]
        if pick[i] > 29 / 30
        else rng.choice(fillers)
        for i in range(words)
    )


def write_lines(path: Path, rows: Iterable[object]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def pope(folder: Path) -> Scored:
    return score_pope(
        {name: read_questions(folder / f"{name}.jsonl") for name in STRATEGIES},
        {name: read_answers(folder / f"{name}_answers.jsonl") for name in STRATEGIES},
    )


def chair(folder: Path, references: dict[str, list[str]]) -> Scored:
    vocabulary = coco_vocabulary()
    truth = chair_truth({}, references, vocabulary)
    return score_chair(read_captions(folder / "captions.jsonl"), truth, vocabulary)


def measure(score: Callable[[], Scored]) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    scored = score()
    scored.metrics()
    return {
        "items": len(scored.ids),
        "wall_seconds": round(time.perf_counter() - wall, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
    }


if __name__ == "__main__":
    main()
