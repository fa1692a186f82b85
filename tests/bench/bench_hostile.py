"""The scoring service with hostile images among the requests: is any other request harmed?

    python tests/bench/bench_hostile.py [--seconds 60] [--clients 32] [--share 0.01] [--json FILE]

Starts ``fgaif serve`` on loopback with reward models that were never trained, on the backbone of
the embedded world's policy, and drives it by clients that send their next request when they have
the answer to the one before: in turn three requests of one image and one of four. First without,
then with a share of images from ``tests/hostile_images.py``, each kind as often as the others. Each
answer to a good image, in the same request as a hostile one or not, is compared with the one that a
lone client got; nothing is sent twice. Prints the table of docs/reliability.md, and JSON; exit code
1 if any good image was not answered rightly, or a hostile one by anything but scores or a refusal.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parent))

from bench_serve import MIB, TOLERANCE, Bench, Sample, Setting, answers, commit, processor, samples
from hostile_images import hostile_image

from fgaif.client import AsyncRewardClient, ScoreItem, ScoringError, ScoringRefused
from fgaif.serving.schema import ScoreResponse


@dataclass(kw_only=True)
class Counts:
    """What the clients of one load saw; milliseconds are of requests without a hostile image."""

    share: float
    images: int = 0
    harmed: int = 0
    hostile: Counter[str] = field(default_factory=Counter)
    milliseconds: list[float] = field(default_factory=list)
    peak_mib: float = 0.0

    def row(self) -> str:
        """A line of the table."""
        p50, p95, p99 = np.percentile(self.milliseconds, [50, 95, 99])
        sent = sum(self.hostile.values())
        refused, scored = self.hostile["refused"], self.hostile["scored"]
        cells = [f"{self.share:.0%}", self.images, self.harmed, sent, refused, scored]
        cells += [sent - refused - scored, f"{p50:.0f}", f"{p95:.0f}", f"{p99:.0f}"]
        return " | ".join(["", *map(str, cells), f"{self.peak_mib:.0f}", ""]).strip()


def main() -> None:
    """Drive the service twice and print what came back."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of each of the two loads")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--share", type=float, default=0.01, help="of images that are hostile")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    good = samples()
    with TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.seconds, [options.clients], None)
        with bench._running(Setting(name="hostile")) as (process, url):
            expected = asyncio.run(answers(url, good))
            loads = [
                asyncio.run(
                    drive(url, good, expected, options.clients, options.seconds, share, process)
                )
                for share in (0.0, options.share)
            ]
    print(f"{processor()}, commit {commit()}, {options.clients} clients, {options.seconds:g} s")
    print(
        "| hostile | good images | harmed | hostile images | refused | scored | anything else "
        "| p50 ms | p95 ms | p99 ms | memory MiB |\n|" + "---|" * 11
    )
    print(*(load.row() for load in loads), sep="\n")
    if options.json:
        options.json.write_text(json.dumps([vars(load) for load in loads]) + "\n")
    wrong = sum(sum(load.hostile.values()) for load in loads)
    wrong -= sum(load.hostile["refused"] + load.hostile["scored"] for load in loads)
    raise SystemExit(bool(wrong or any(load.harmed for load in loads)))


async def drive(
    url: str,
    good: Sequence[Sample],
    expected: Sequence[float],
    clients: int,
    seconds: float,
    share: float,
    process: psutil.Process,
) -> Counts:
    """Let clients ask for ``seconds``."""
    counts, end = Counts(share=share), time.perf_counter() + seconds
    seeds = iter(range(10**9))

    async def one(client: AsyncRewardClient, draw: random.Random) -> None:
        for turn in range(10**9):
            if time.perf_counter() > end:
                return
            chosen = [draw.randrange(len(good)) for _ in range(4 if turn % 4 == 3 else 1)]
            bad = [draw.random() < share for _ in chosen]
            items = [
                ScoreItem(
                    image=hostile(next(seeds)) if bad_one else good[index].image,
                    text=good[index].text,
                )
                for index, bad_one in zip(chosen, bad, strict=True)
            ]
            start = time.perf_counter()
            results = await ask(client, items)
            for index, bad_one, result in zip(chosen, bad, results, strict=True):
                if bad_one:
                    counts.hostile[outcome(result)] += 1
                    continue
                counts.images += 1
                if not right(result, expected[index]):
                    counts.harmed += 1
                    print(f"harmed: {result}"[:500], file=sys.stderr)
            if not any(bad):
                counts.milliseconds.append(1e3 * (time.perf_counter() - start))

    async def watch() -> None:
        while time.perf_counter() < end:
            held = [child.memory_info().rss for child in process.children(recursive=True)]
            counts.peak_mib = max(counts.peak_mib, sum(held) / MIB)
            await asyncio.sleep(0.5)

    async with AsyncRewardClient(url, attempts=1) as client:
        await asyncio.gather(watch(), *(one(client, random.Random(n)) for n in range(clients)))
    return counts


def hostile(seed: int) -> str:
    """A hostile image, which the client takes for no path of its own."""
    image = hostile_image(seed)
    return image if image.startswith(("data:", "http:")) else f"data:image/png;base64,{image}"


async def ask(
    client: AsyncRewardClient, items: Sequence[ScoreItem]
) -> list[ScoreResponse | ScoringError]:
    """Ask once, in a request of the sort that the number of items says."""
    try:
        if len(items) > 1:
            return await client.score_batch(items)
        return [await client.score(items[0].image, items[0].text)]
    except ScoringError as error:
        return [error] * len(items)


def right(result: ScoreResponse | ScoringError, expected: float) -> bool:
    """Whether a good image got the score that it has alone."""
    if isinstance(result, ScoringError):
        return False
    return abs(result.results[0].total - expected) < TOLERANCE


def outcome(result: ScoreResponse | ScoringError) -> str:
    """What became of a hostile image, in a word."""
    if isinstance(result, ScoreResponse):
        return "scored"
    if isinstance(result, ScoringRefused):
        return "refused"
    print(f"hostile: {result}"[:500], file=sys.stderr)
    return "failed"


if __name__ == "__main__":
    main()
