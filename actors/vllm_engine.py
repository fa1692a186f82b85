"""A vLLM engine for prompts with one image, set up the same way for the policy and the verifier.

Requests enter with their token ids and preprocessed pixels, made by the ``Encoder`` that the
learner uses too: one preprocessing for all roles, done once per image, and none of vLLM's own
per-request text and image processing, which costs as much as a tiny model's forward pass.
"""

import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.numpy import save
from transformers import AutoConfig, BatchFeature

from actors.progress import advance
from actors.served_adapter import lora_settings, write_adapter
from actors.settings import EngineSettings
from fgaif.chat.messages import ChatRequest, Reply
from fgaif.errors import CheckpointError, ConfigError, DataError, SyncError
from fgaif.lvlm.allocator import set_allocator
from fgaif.lvlm.arrival import Sums, add_sums, arrived
from fgaif.lvlm.families.base import Family, require_served_adapters
from fgaif.lvlm.inputs import load_encoder
from fgaif.lvlm.sizes import read_facts
from fgaif.lvlm.weights import parts, split_tensors
from fgaif.types import Arrived, FloatArray, Json, Prompt, WeightsManifest

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.lora.request import LoRARequest

ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
# The engine runs in the actor's process: three processes would import vllm one after the other.
# Without TORCHDYNAMO_DISABLE the first request with log-probs compiles a helper for 15-20 s.
CPU_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    # Where the model runs in processes of its own: bound threads would all sit on core 0.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
RETRY_TEMPERATURE = 0.7
_SYNC: Json = {
    "worker_extension_cls": "actors.vllm_worker.WeightsCheck",
    "weight_transfer_config": {"backend": "host"},
}
_CPU_BLOCK = 32  # smallest that vLLM's fast CPU attention takes; its default of 128 wastes cache


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """What an engine did since it started: sampled tokens, seconds in calls, seconds to ready."""

    requests: int
    tokens: int
    seconds: float
    ready_seconds: float


class VllmEngine:
    """vLLM with prompts as token ids and images as preprocessed pixels."""

    def __init__(self, model_dir: Path, config: EngineSettings, *, adapters: bool = False) -> None:
        """``adapters``: LoRA adapters are to be loaded, and are served as configured."""
        start = time.perf_counter()
        engine, on_gpu = config.cluster.engine, torch.cuda.is_available()
        for name, value in (ENVIRONMENT if on_gpu else ENVIRONMENT | CPU_ENVIRONMENT).items():
            os.environ.setdefault(name, value)
        from vllm import LLM
        from vllm.multimodal import MULTIMODAL_REGISTRY

        if not on_gpu:
            set_allocator(read_facts(model_dir).parameters)
        self.encoder = load_encoder(model_dir, **config.data.image_limits)
        self.max_model_len = context_length(model_dir, config)
        self._unmerged = adapters and not config.merges_adapters
        settings = engine_settings(config, self.max_model_len, on_gpu)
        settings |= image_settings(self.encoder.family, config)
        if self._unmerged:
            require_served_adapters(self.encoder.family)
            settings |= lora_settings(config.policy.lora.r)
        self._sleeps = engine.sleep and on_gpu and adapters
        if self._sleeps:
            settings |= {"enable_sleep_mode": True}
        try:
            llm = LLM(str(model_dir), **settings, **_SYNC)
        except ValueError as error:
            raise ConfigError(
                f"vLLM refuses {model_dir} with cluster.engine = {engine.model_dump()}: {error}"
            ) from error
        self._llm = llm.llm_engine
        self._room = 2 * engine.max_num_seqs
        self._like = torch.empty(0, dtype=getattr(torch, config.policy.dtype))
        self._processor = MULTIMODAL_REGISTRY.create_processor(llm.model_config)
        self._adapter: LoRARequest | None = None
        self._adapters = 0
        self.arrived = Arrived()
        """How much of the version loaded last is in the weights that requests are answered with."""
        self._pristine = True
        self._served = self._tokens = 0
        self._seconds = 0.0
        if self._sleeps:
            self._llm.sleep(level=1)
        self._ready_seconds = time.perf_counter() - start

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Wake up for what is done within, and go to sleep after it, where engines sleep."""
        if not self._sleeps:
            yield
            return
        self._llm.wake_up()
        try:
            yield
        finally:
            self.forget()  # what is cached goes with the cache
            self._llm.sleep(level=1)

    def encode(self, prompt: Prompt, response: Sequence[int] = ()) -> Json:
        """Make vLLM's multimodal input of a prompt and of response ids that follow it."""
        from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange

        ids = self.encoder.prompt_ids(prompt)
        tensors = BatchFeature(dict(self.encoder.tensors(prompt.image, self._like)))
        # vLLM's own rules for joining the images of several requests.
        fields = self._processor._get_mm_fields_config(tensors, {})
        placeholders = np.asarray(ids) == self.encoder.image_token_id
        (places,) = placeholders.nonzero()
        start, end = int(places[0]), int(places[-1]) + 1
        within = torch.from_numpy(placeholders[start:end])
        place = PlaceholderRange(
            offset=start, length=end - start, is_embed=None if within.all() else within
        )
        return {
            "type": "multimodal",
            "prompt_token_ids": [*ids, *response],
            "mm_kwargs": MultiModalKwargsItems.from_hf_inputs(tensors, fields),
            "mm_hashes": {"image": [prompt.image.sha256]},
            "mm_placeholders": {"image": [place]},
        }

    def check_length(self, prompt: Prompt, new_tokens: int) -> None:
        """Raise DataError if prompt and response together could exceed the context."""
        length = len(self.encoder.prompt_ids(prompt)) + new_tokens
        if length > self.max_model_len:
            raise DataError(
                f"prompt {prompt.id}: {length - new_tokens} tokens with the image, plus "
                f"{new_tokens} new ones, exceed the engine's {self.max_model_len}; shorten the "
                "prompt, lower policy.max_new_tokens or raise cluster.engine.max_model_len"
            )

    def run(
        self, requests: Iterable[tuple[Json, "SamplingParams"]], *, base: bool = False
    ) -> "list[RequestOutput]":
        """Complete the requests and return the outputs in order; ``base`` leaves out the adapter.

        Requests are drawn when the engine has room, so that only a few images are held at a time.
        """
        start, engine = time.perf_counter(), self._llm
        adapter = None if base else self._adapter
        first = self._served
        waiting = enumerate(requests, first)
        outputs: dict[int, RequestOutput] = {}
        while True:
            free = max(0, self._room - engine.get_num_unfinished_requests())
            for number, (item, parameters) in islice(waiting, free):
                engine.add_request(str(number), item, parameters, lora_request=adapter)
                self._served = number + 1
            if not engine.has_unfinished_requests():
                break
            advance(min(engine.get_num_unfinished_requests(), self._room // 2))  # a token for each
            outputs |= {int(done.request_id): done for done in engine.step() if done.finished}
        ordered = [outputs[number] for number in range(first, self._served)]
        self._tokens += sum(len(output.outputs[0].token_ids) for output in ordered)
        self._seconds += time.perf_counter() - start
        return ordered

    def p_yes(self, prompts: Sequence[Prompt]) -> list[float]:
        """P(yes) / (P(yes) + P(no)) of the first answer token, per prompt.

        Prompts are asked image by image, so that an image is encoded once and, where prompts are
        longer than a cache block, its keys and values are shared.
        """
        for prompt in prompts:
            self.check_length(prompt, 1)
        yes, no = answer_ids(self.encoder.tokenizer)
        parameters = sampling_parameters(
            temperature=0.0,
            max_tokens=1,
            logprobs=len(yes | no),
            allowed_token_ids=sorted(yes | no),
        )
        order = sorted(range(len(prompts)), key=lambda index: prompts[index].image.sha256)
        outputs = self.run((self.encode(prompts[index]), parameters) for index in order)
        answers = [0.0] * len(prompts)
        for index, output in zip(order, outputs, strict=True):
            first = output.outputs[0].logprobs
            scores = dict(zip(first.token_ids, first.logprobs, strict=True))
            answers[index] = min(1.0, sum(math.exp(scores[token]) for token in yes))
        return answers

    def complete(self, requests: Sequence[ChatRequest]) -> list[Reply | None]:
        """Write one answer per request, held to its JSON schema where it has one.

        An answer that reaches ``max_tokens`` is ``cut``; a question that does not fit the context
        gets None. Repeated attempts are sampled, each with its own seed.
        """
        from vllm.sampling_params import StructuredOutputsParams

        inputs = [self._question(request) for request in requests]
        fits = [i for i, (_, length) in enumerate(inputs) if length < self.max_model_len]
        limits = [
            min(request.max_tokens, self.max_model_len - length)
            for request, (_, length) in zip(requests, inputs, strict=True)
        ]
        outputs = self.run(
            (
                inputs[i][0],
                sampling_parameters(
                    temperature=asked.temperature if asked.attempt == 0 else RETRY_TEMPERATURE,
                    seed=asked.attempt,
                    max_tokens=limits[i],
                    structured_outputs=(
                        StructuredOutputsParams(json=asked.schema) if asked.schema else None
                    ),
                ),
            )
            for i in fits
            if (asked := requests[i])
        )
        replies: list[Reply | None] = [None] * len(requests)
        for i, output in zip(fits, outputs, strict=True):
            written = output.outputs[0]
            ids = written.token_ids
            replies[i] = Reply(
                text=self.encoder.tokenizer.decode(ids, skip_special_tokens=True),
                cut=written.finish_reason == "length",
                input_tokens=inputs[i][1],
                output_tokens=len(ids),
            )
        return replies

    def _question(self, request: ChatRequest) -> tuple[Json, int]:
        """Make the engine's input of a request, and its length in tokens."""
        text = f"{request.system}\n\n{request.text}" if request.system else request.text
        if request.image is None:
            ids = self.encoder.text_ids(text)
            return {"type": "token", "prompt_token_ids": ids}, len(ids)
        item = self.encode(Prompt(id=request.subject, image=request.image, text=text))
        return item, len(item["prompt_token_ids"])

    def load_weights(self, manifest: WeightsManifest) -> list[str]:
        """Load a version in every worker and forget what was computed with the weights before.

        Returns the problems that kept the version from being loaded: then nothing has changed.
        """
        shapes = {name: list(array.shape) for name, array in manifest.tensors.items()}
        check = self._llm.collective_rpc("weights_problems", args=(shapes, self._unmerged))
        problems: list[str] = check[0]
        if problems:
            return problems
        whole, _ = split_tensors(manifest.tensors)
        if self._unmerged:
            if whole or not self._pristine:
                self._transfer(whole, 1.0)
            sums = self._serve(manifest)
        else:
            self._transfer(manifest.tensors, manifest.scaling)
            sums = self._llm.collective_rpc("merged_sums")
        self.arrived = arrived(add_sums(sums))
        self._pristine = self._unmerged and self._pristine and not whole
        self.forget()
        return []

    def _transfer(self, tensors: Mapping[str, FloatArray], scaling: float) -> None:
        """Load whole weights, and factors merged into theirs, over the checkpoint's."""
        call = self._llm.collective_rpc
        call("start_weight_update")
        for part in parts(tensors):
            # As bytes: between processes vLLM would turn arrays into lists.
            call("update_weights", args=({"tensors": save(part), "scaling": scaling},))
        call("finish_weight_update")

    def _serve(self, manifest: WeightsManifest) -> list[Sums]:
        """Load the version's factors as a vLLM adapter, and drop the one before.

        Each version is an adapter of its own name: vLLM salts cached prefixes with it. Returns what
        each worker holds of it. The folder that it is read from is gone afterwards, so that an
        engine that is killed leaves nothing behind in shared memory.
        """
        from vllm.lora.request import LoRARequest

        before, self._adapter = self._adapter, None
        if before is not None:
            self._llm.remove_lora(before.lora_int_id)
        folder = write_adapter(manifest)
        if folder is None:
            return []
        self._adapters += 1
        number, path = self._adapters, str(folder)
        try:
            request = LoRARequest(f"v{manifest.version}-{number}", number, path)
            self._llm.add_lora(request)
            sums: list[Sums] = self._llm.collective_rpc("served_sums", args=(path, number))
        finally:
            shutil.rmtree(folder)
        self._adapter = request
        return sums

    @property
    def answers_as_base(self) -> bool:
        """Whether ``run(..., base=True)`` answers with the checkpoint that it was started from."""
        return self._pristine

    def forget(self) -> None:
        """Drop cached image features and prefixes: what follows depends on its requests alone.

        A prefix or feature from the cache was computed in another batch, and differs in the last
        bits from one computed in this.

        Raises:
            SyncError: requests are running, so their keys and values cannot be dropped.
        """
        self._llm.reset_encoder_cache()
        if not self._llm.reset_prefix_cache():
            raise SyncError("the engine's caches cannot be emptied while it answers requests")

    def stats(self) -> EngineStats:
        """Work done so far."""
        return EngineStats(
            requests=self._served,
            tokens=self._tokens,
            seconds=self._seconds,
            ready_seconds=self._ready_seconds,
        )


def sampling_parameters(**settings: Any) -> "SamplingParams":
    """vLLM sampling parameters without decoding, intermediate outputs and copying."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        detokenize=False,
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
        **settings,
    )


def answer_ids(tokenizer: Any) -> tuple[set[int], set[int]]:
    """Ids of the tokens that begin the answers yes and no, in any case, with or without a space.

    Whole-word tokens where the tokenizer has them, else first pieces of one of the answers only.

    Raises:
        CheckpointError: the two answers cannot be told apart by their first token.
    """
    yes, no = (_first_ids(tokenizer, word) for word in ("yes", "no"))
    yes, no = yes - no, no - yes
    if not yes or not no:
        raise CheckpointError(
            "the tokenizer begins 'yes' and 'no' with the same token, so answers cannot be "
            "read from the first one; use another checkpoint"
        )
    return yes, no


def _first_ids(tokenizer: Any, word: str) -> set[int]:
    cases = (word, word.capitalize(), word.upper())
    forms = [form for case in cases for form in (case, f" {case}")]
    pieces = [tokenizer(form, add_special_tokens=False)["input_ids"] for form in forms]
    return {ids[0] for ids in pieces if len(ids) == 1} or {ids[0] for ids in pieces}


def context_length(model_dir: Path, config: EngineSettings) -> int:
    """Tokens of prompt and answer together: as configured, as far as the model goes."""
    model = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    return min(config.cluster.engine.max_model_len, model.text_config.max_position_embeddings)


def image_settings(family: Family, config: EngineSettings) -> Json:
    """vLLM's arguments for the largest image: what it makes room for, and shrinks others to."""
    pixels = config.data.image_pixels
    if pixels is None or family.bound is None:
        return {}
    return {"mm_processor_kwargs": family.bound(pixels)}


def engine_settings(config: EngineSettings, max_model_len: int, on_gpu: bool) -> Json:
    """vLLM's engine arguments, here and in the server."""
    engine = config.cluster.engine
    device: Json = (
        {"gpu_memory_utilization": engine.gpu_memory_utilization}
        if on_gpu
        else {
            "kv_cache_memory_bytes": engine.kv_cache_mib * 2**20,
            "block_size": _CPU_BLOCK,
            # A prompt that is cut has vLLM set its random generator back, which torch can only do
            # on GPUs: with long prompts a seeded batch would end in an error.
            "enable_chunked_prefill": False,
        }
    )
    # By itself vLLM takes Ray's executor inside a placement group, and looks there for a bundle of
    # one GPU per rank. Processes beside the actor use the GPUs that the actor was given.
    ranks: Json = {"distributed_executor_backend": "mp"} if engine.tensor_parallel > 1 else {}
    return (
        device
        | ranks
        | {
            "dtype": config.policy.dtype,
            "seed": config.seed % 2**32,
            "max_model_len": max_model_len,
            "max_num_seqs": engine.max_num_seqs,
            "tensor_parallel_size": engine.tensor_parallel,
            "enforce_eager": engine.enforce_eager,
            "limit_mm_per_prompt": {"image": 1},
            "mm_processor_cache_gb": 0,
            # Of some models vLLM takes raw pixels and normalises them itself: ours would be twice.
            "mm_device_do_normalize": False,
            "skip_mm_profiling": not on_gpu,
            "logprobs_mode": "processed_logprobs",
            "max_logprobs": -1,
            # Free white space is where small models get lost in JSON.
            "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        }
    )
