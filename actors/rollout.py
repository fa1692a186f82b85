"""The policy's vLLM engine: samples responses and takes new versions of the weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from actors.settings import EngineSettings
from actors.vllm_engine import EngineStats, VllmEngine, sampling_parameters
from fgaif.checkpoint import arrays_digest
from fgaif.errors import SyncError
from fgaif.types import (
    FloatArray,
    GenerationRequest,
    LoadedWeights,
    Prompt,
    Response,
    WeightsManifest,
)

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams

_BANNED = -100.0  # logit bias of the image placeholder: a sampled one could not be scored again


class RolloutActor:
    """One replica of the policy under sampling."""

    def __init__(self, model_dir: Path, config: EngineSettings) -> None:
        self._engine = VllmEngine(model_dir, config, adapters=True)
        self._temperature = config.policy.temperature
        self._version = 0

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Response]:
        """Sample one response per request, in order, stamped with the version of the weights.

        Log-probs are those of the distribution sampled from: after temperature, image token banned.
        Those of a request's prefix are zero. The same requests give the same responses, bit for bit
        on the CPU, whatever this or another engine did before.

        Raises:
            DataError: prompt and response together could exceed the engine's context.
        """
        with self._engine.awake():
            return self._generate(requests)

    def _generate(self, requests: Sequence[GenerationRequest]) -> list[Response]:
        self._engine.forget()
        for request in requests:
            new_tokens = len(request.prefix) + request.max_new_tokens
            self._engine.check_length(request.prompt, new_tokens)
        outputs = self._engine.run(
            (self._engine.encode(request.prompt, request.prefix), self._parameters(request))
            for request in requests
        )
        texts = self._engine.encoder.tokenizer.batch_decode(
            [
                [*request.prefix, *output.outputs[0].token_ids]
                for request, output in zip(requests, outputs, strict=True)
            ],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return [
            self._response(request, output, text)
            for request, output, text in zip(requests, outputs, texts, strict=True)
        ]

    def p_yes(self, prompts: Sequence[Prompt]) -> list[float]:
        """Probability of answering yes rather than no, per prompt."""
        with self._engine.awake():
            return self._engine.p_yes(prompts)

    def load_weights(
        self, manifest: WeightsManifest, probe: Sequence[Response] = ()
    ) -> LoadedWeights:
        """Load a published version into the engine; say what is loaded, and how it scores a probe.

        Raises:
            SyncError: damaged on the way, or it names weights that the engine does not have; the
                version loaded before stays in place.
        """
        with self._engine.awake():
            return self._load_weights(manifest, probe)

    def _load_weights(self, manifest: WeightsManifest, probe: Sequence[Response]) -> LoadedWeights:
        if arrays_digest(manifest.tensors) != manifest.digest:
            raise SyncError(
                f"weights version {manifest.version}: the digest does not match the tensors; "
                "publish the version again"
            )
        base = self._probe_base(probe)
        problems = self._engine.load_weights(manifest)
        if problems:
            raise SyncError(
                f"weights version {manifest.version} does not fit the engine "
                f"({len(problems)} problems): {'; '.join(problems[:3])}"
            )
        self._version = manifest.version
        return LoadedWeights(
            version=self._version,
            arrived=self._engine.arrived,
            logprobs=tuple(self.probe_logprobs(probe)),
            base_logprobs=base,
        )

    def _probe_base(self, probe: Sequence[Response]) -> tuple[FloatArray, ...] | None:
        """Log-probs under the checkpoint itself, as long as the engine still has it."""
        if not self._engine.answers_as_base:
            return None
        return tuple(self.probe_logprobs(probe, base=True))

    def probe_logprobs(
        self, responses: Sequence[Response], *, base: bool = False
    ) -> list[FloatArray]:
        """Teacher-forced log-probs (T,) of responses under the loaded weights.

        ``base``: without the adapter, on an engine that serves it unmerged.
        """
        # vLLM scores prompts at temperature 1; another one needs the whole vocabulary's scores.
        scores = 0 if self._temperature == 1.0 else -1
        parameters = sampling_parameters(temperature=0.0, max_tokens=1, prompt_logprobs=scores)
        outputs = self._engine.run(
            (
                (self._engine.encode(response.prompt, response.token_ids.tolist()), parameters)
                for response in responses
            ),
            base=base,
        )
        return [
            _forced(output, len(response.token_ids), self._temperature)
            for output, response in zip(outputs, responses, strict=True)
        ]

    def version(self) -> int:
        """Version of the loaded weights; 0 is the checkpoint."""
        return self._version

    def stats(self) -> EngineStats:
        """Work done so far."""
        return self._engine.stats()

    def _parameters(self, request: GenerationRequest) -> "SamplingParams":
        return sampling_parameters(
            temperature=request.temperature,
            seed=request.seed,
            max_tokens=request.max_new_tokens,
            logprobs=0,
            logit_bias={self._engine.encoder.image_token_id: _BANNED},
        )

    def _response(self, request: GenerationRequest, output: "RequestOutput", text: str) -> Response:
        completion = output.outputs[0]
        before = len(request.prefix)
        return Response(
            prompt=request.prompt,
            sample=request.sample,
            text=text,
            token_ids=np.asarray([*request.prefix, *completion.token_ids], dtype=np.int64),
            rollout_logprobs=np.asarray(
                [0.0] * before + list(completion.logprobs.logprobs), dtype=np.float32
            ),
            finish="stop" if completion.finish_reason == "stop" else "length",
            policy_version=self._version,
        )


def _forced(output: "RequestOutput", length: int, temperature: float) -> FloatArray:
    """Log-probs of the last ``length`` prompt tokens; each position lists its own token first."""
    flat = output.prompt_logprobs
    starts, ends = flat.start_indices[-length:], flat.end_indices[-length:]
    if temperature == 1.0:
        return np.asarray([flat.logprobs[start] for start in starts], dtype=np.float32)
    # The first entry repeats a token of the vocabulary that follows it.
    rows = np.asarray([flat.logprobs[start:end] for start, end in zip(starts, ends, strict=True)])
    scaled = rows / temperature
    top = scaled[:, 1:].max(axis=1)
    total = np.log(np.exp(scaled[:, 1:] - top[:, None]).sum(axis=1)) + top
    return (scaled[:, 0] - total).astype(np.float32)
