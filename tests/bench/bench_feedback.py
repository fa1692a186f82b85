"""The annotation job against a bare asyncio client, and its memory over the number of rows.

    python tests/bench/bench_feedback.py throughput [--rows 600] [--latency 0.1] [--concurrency 32]
    python tests/bench/bench_feedback.py memory [--rows 1000 20000]

A local server in a process of its own answers at once or after ``--latency`` seconds. The bare
client sends the very requests of the job, through the same openai package, and does nothing else.
Rates count from the first request to the last reply; rounds alternate, so that both meet the same
machine. Memory is the resident set of the worker and of the driver when the last row is labelled.
"""

import argparse
import asyncio
import hashlib
import json
import multiprocessing
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil
import ray
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from fault_server import Answer, FaultServer

from cluster.pipeline.annotate import annotate_responses
from fgaif.chat.images import DataUris
from fgaif.chat.store import ReplyStore
from fgaif.config import Config, parse_config
from fgaif.data.images import image_ref
from fgaif.feedback.store import label_store, response_store
from fgaif.scene_models.tokenizer import build_tokenizer
from fgaif.types import ImageRef, Json, Prompt, Response

IMAGES = 64
TOKENIZER = build_tokenizer()
_THINGS = re.compile(r"thing (\d+)")


def answer(body: Json) -> Answer:
    """Six facts per response, and yes or no by a hash of the statement."""
    content = body["messages"][-1]["content"]
    if isinstance(content, str):
        segments = content.rsplit("Description", 1)[-1].strip().splitlines()
        numbered = [line for line in segments if re.match(r"\d+\. ", line)]
        entries = [
            {"object": [f"There is thing {n}." for n in _THINGS.findall(line)]}
            | {"attribute": [], "relation": []}
            for line in numbered
        ]
        return Answer(text=json.dumps({"segments": entries}), usage=(400, 60))
    text = next(part["text"] for part in content if part["type"] == "text")
    yes = hashlib.sha256(text.encode()).digest()[0] % 4 > 0
    words = ("yes", "no") if yes else ("no", "yes")
    return Answer(text=words[0], first_token=((words[0], -0.1), (words[1], -2.4)), usage=(600, 1))


@contextmanager
def server(latency_s: float) -> Iterator[str]:
    """The server in a process of its own; yields its address."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(latency_s, theirs), daemon=True)
    process.start()
    yield ours.recv()
    process.terminate()
    process.join()


def _serve(latency_s: float, pipe: Any) -> None:
    with FaultServer(answer, latency_s=latency_s) as running:
        pipe.send(running.base_url)
        threading.Event().wait()


def make_responses(folder: Path, rows: int) -> list[Response]:
    """Responses of two segments with three things each; images of random colour."""
    rng = np.random.default_rng(0)
    images: list[ImageRef] = []
    for number in range(IMAGES):
        path = folder / f"{number}.png"
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        Image.new("RGB", (96, 96), colour).save(path)
        images.append(image_ref(path))
    return [_response(number, images[number % IMAGES]) for number in range(rows)]


def _response(number: int, image: ImageRef) -> Response:
    first, second = ([f"thing {6 * number + k}" for k in part] for part in ((0, 1, 2), (3, 4, 5)))
    text = f"Here we see {' and '.join(first)}. Beside them are {' and '.join(second)}."
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    return Response(
        prompt=Prompt(id=str(number), image=image, text="Describe this image in detail."),
        sample=0,
        text=text,
        token_ids=np.array([*ids, TOKENIZER.eos_token_id]),
        rollout_logprobs=np.zeros(len(ids) + 1, dtype=np.float32),
        finish="stop",
        policy_version=0,
    )


def job_config(folder: Path, name: str, base_url: str, concurrency: int) -> Config:
    """Extractor and verifier behind the local server."""
    endpoint = {"model": "bench", "base_url": base_url, "concurrency": concurrency}
    return parse_config(
        {
            "name": name,
            "dir": str(folder),
            "feedback": {"extractor": "api:local", "verifier": "api:local"},
            "endpoints": {"local": endpoint},
        }
    )


def run_job(config: Config, responses: list[Response]) -> tuple[float, float]:
    """Annotate; return requests per second (first request to last reply) and seconds in all."""
    response_store(config.run_dir / "responses" / "responses.jsonl").append(responses)
    labels = label_store(config.run_dir / "feedback" / "labels.jsonl")
    start = time.monotonic()
    annotate_responses(config, labels, TOKENIZER, None, "", lambda *_: None)
    seconds = time.monotonic() - start
    with ReplyStore(config.run_dir / "feedback" / "replies.sqlite") as store:
        moments = [_seconds(row["at"]) for row in store]
    return len(moments) / (moments[-1] - moments[0]), seconds


def _seconds(at: str) -> float:
    clock, fraction = at.rstrip("Z").split(".")
    return time.mktime(time.strptime(clock, "%Y-%m-%dT%H:%M:%S")) + float(f"0.{fraction}")


def run_bare(config: Config, concurrency: int, base_url: str) -> float:
    """Send the job's requests again with nothing around; return requests per second."""
    with ReplyStore(config.run_dir / "feedback" / "replies.sqlite") as store:
        rows = list(store)
    images = {item.prompt.image.sha256: item.prompt.image for item in _responses(config)}
    uris = DataUris(1024, 50_000_000)

    async def send() -> float:
        places = asyncio.Semaphore(concurrency)
        known = {sha: await uris.get(ref) for sha, ref in images.items()}

        async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:

            async def one(row: Json) -> None:
                async with places:
                    await client.chat.completions.create(**_arguments(row, known))

            start = time.monotonic()
            await asyncio.gather(*map(one, rows))
            return len(rows) / (time.monotonic() - start)

    return asyncio.run(send())


def _responses(config: Config) -> Iterator[Response]:
    yield from response_store(config.run_dir / "responses" / "responses.jsonl")


def _arguments(row: Json, uris: dict[str, str]) -> dict[str, Any]:
    request = row["request"]
    content: Any = request["text"]
    if row["image"]:
        url = {"type": "image_url", "image_url": {"url": uris[row["image"]]}}
        content = [url, {"type": "text", "text": request["text"]}]
    arguments = {
        "model": "bench",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": request["max_tokens"],
        "temperature": 0.0,
    }
    if request["yes_no"]:
        arguments |= {"logprobs": True, "top_logprobs": 20}
    if "schema" in request:
        schema = {"name": "reply", "schema": request["schema"], "strict": True}
        arguments["response_format"] = {"type": "json_schema", "json_schema": schema}
    return arguments


def throughput(rows: int, latency_s: float, concurrency: int, rounds: int) -> Json:
    """Rates of job and bare client, side by side."""
    jobs, bares, walls = [], [], []
    with tempfile.TemporaryDirectory() as name, server(latency_s) as base_url:
        folder = Path(name)
        responses = make_responses(folder, rows)
        for number in range(rounds):
            config = job_config(folder, f"job{number}", base_url, concurrency)
            rate, wall = run_job(config, responses)
            jobs.append(rate)
            walls.append(wall)
            bares.append(run_bare(config, concurrency, base_url))
    ratios = [job / bare for job, bare in zip(jobs, bares, strict=True)]
    return {
        "rows": rows,
        "requests": rows * 7,
        "latency_s": latency_s,
        "concurrency": concurrency,
        "job_requests_per_s": [round(rate, 1) for rate in jobs],
        "bare_requests_per_s": [round(rate, 1) for rate in bares],
        "job_seconds_with_start": [round(wall, 1) for wall in walls],
        "ratio_median": round(statistics.median(ratios), 3),
    }


def memory(sizes: list[int], concurrency: int) -> Json:
    """Resident set of worker and driver at the end of jobs of several sizes."""
    result: Json = {}
    with tempfile.TemporaryDirectory() as name, server(0.0) as base_url:
        folder = Path(name)
        for rows in sizes:
            config = job_config(folder, f"rows{rows}", base_url, concurrency)
            responses = make_responses(folder, rows)
            peaks = {"worker": 0.0, "driver": 0.0}
            stop = threading.Event()
            watcher = threading.Thread(target=_watch, args=(config, peaks, stop))
            response_store(config.run_dir / "responses" / "responses.jsonl").append(responses)
            del responses
            watcher.start()
            labels = label_store(config.run_dir / "feedback" / "labels.jsonl")
            annotate_responses(config, labels, TOKENIZER, None, "", lambda *_: None)
            stop.set()
            watcher.join()
            result[str(rows)] = {key: round(mib, 1) for key, mib in peaks.items()}
    first, last = (result[str(rows)] for rows in (sizes[0], sizes[-1]))
    result["growth"] = {key: round(last[key] / first[key] - 1, 3) for key in first}
    return result


def _watch(config: Config, peaks: dict[str, float], stop: threading.Event) -> None:
    progress = config.run_dir / "feedback" / "progress.json"
    own = psutil.Process()
    while not stop.wait(0.5):
        peaks["driver"] = max(peaks["driver"], own.memory_info().rss / 2**20)
        if progress.exists():
            worker = json.loads(progress.read_text())["pid"]
            if psutil.pid_exists(worker):
                rss = psutil.Process(worker).memory_info().rss / 2**20
                peaks["worker"] = max(peaks["worker"], rss)


def main() -> None:
    """Parse, measure, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("throughput", "memory"))
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--latency", type=float, default=0.1)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[1])}},
    )
    if options.what == "memory":
        print(json.dumps(memory(options.rows or [1000, 20000], options.concurrency), indent=2))
        return
    rows = (options.rows or [600])[0]
    result = throughput(rows, options.latency, options.concurrency, options.rounds)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
