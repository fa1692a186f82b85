"""The rollout engines as one."""

from collections.abc import Sequence

import ray

from cluster.handles import Pool
from fgaif.pending import Pending
from fgaif.types import FloatArray, GenerationRequest, Prompt, Response, WeightsManifest


class RolloutGroup(Pool):
    """All rollout engines as one."""

    def generate(self, requests: Sequence[GenerationRequest]) -> Pending[list[Response]]:
        """Split by expected length, sample everywhere, return in order."""
        costs = [float(request.max_new_tokens) for request in requests]
        return self.spread(lambda actor: actor.generate, requests, costs)

    def p_yes(self, prompts: Sequence[Prompt]) -> Pending[list[float]]:
        """Split evenly, ask everywhere, return in order."""
        return self.spread(lambda actor: actor.p_yes, prompts, [1.0] * len(prompts))

    def load_weights(self, manifest: WeightsManifest) -> Pending[list[int]]:
        """Send one copy to the object store; every replica loads it, later replacements too."""
        stored = ray.put(manifest)
        for handle in self.handles:
            handle.prepare = lambda actor: ray.get(actor.load_weights.remote(stored))
        return self.everywhere(lambda actor: actor.load_weights, stored)

    def probe_logprobs(self, responses: Sequence[Response]) -> Pending[list[list[FloatArray]]]:
        """Score the same responses on every replica."""
        return self.everywhere(lambda actor: actor.probe_logprobs, responses)
