"""Weight sync: its order with fakes, and the merge in a real engine against Hugging Face."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from engines import photo_prompts, requests, response_to, rollout_actor
from peft import PeftModel

from actors.rollout import RolloutActor
from cluster.weight_sync import Probe, check_version, sync
from fgaif.config import LoraConfig
from fgaif.errors import SyncError
from fgaif.lvlm.inputs import Encoder, image_token_count
from fgaif.lvlm.logprobs import response_logprobs
from fgaif.lvlm.model import attach_lora, load_lvlm, load_processor
from fgaif.lvlm.weights import make_manifest
from fgaif.pending import Pending, Ready, Then
from fgaif.types import FloatArray, ImageRef, Prompt, Response, WeightsManifest

LORA = LoraConfig(r=4, alpha=8.0)
PROBE = response_to(Prompt(id="p", image=ImageRef(path="-", sha256="0"), text="?"), [1, 2, 3])


@dataclass
class FakeRoles:
    """A learner and two replicas; ``events`` is the order of calls."""

    versions: Sequence[int] = (7, 7)
    offsets: Sequence[float] = (0.0, 0.0)
    events: list[str] = field(default_factory=list)
    probed: list[int] = field(default_factory=list)

    def publish(self, version: int) -> Pending[WeightsManifest]:
        self.events.append("publish")
        factors = {"m.lora_A.weight": np.ones((2, 3)), "m.lora_B.weight": np.ones((4, 2))}
        return Ready(make_manifest(factors, scaling=1.0, version=version))

    def load_weights(self, manifest: WeightsManifest, probe: Probe) -> Pending[list[float]]:
        self.events.append(f"load {manifest.version}")
        self.probed = [len(response.token_ids) for response in probe.responses]
        return Then(lambda: [self._one(n, manifest, probe) for n in range(len(self.versions))])

    def _one(self, number: int, manifest: WeightsManifest, probe: Probe) -> float:
        engine = f"rollout-{number}"
        check_version(engine, manifest.version, self.versions[number])
        self.events.append(f"probe {engine}")
        found = [self._scores(r) + self.offsets[number] for r in probe.responses]
        return probe.check(engine, manifest.version, found)

    def logprobs(self, responses: Sequence[Response]) -> Pending[list[FloatArray]]:
        self.events.append("probe learner")
        return Ready([self._scores(response) for response in responses])

    @staticmethod
    def _scores(response: Response) -> FloatArray:
        return -response.token_ids.astype(np.float32)


def test_publishes_loads_confirms_and_then_probes() -> None:
    roles = FakeRoles(offsets=(0.0, 5e-4))
    report = sync(roles, roles, [PROBE], version=7, tolerance=1e-3).result()
    assert roles.events == [
        "publish", "probe learner", "load 7", "probe rollout-0", "probe rollout-1",
    ]  # fmt: skip
    assert report.version == 7
    assert report.bytes == (2 * 3 + 4 * 2) * 4
    assert report.max_abs_diff == pytest.approx(5e-4, rel=1e-3)


def test_a_replica_with_another_version_stops_the_run_before_the_probe() -> None:
    roles = FakeRoles(versions=(7, 6))
    with pytest.raises(SyncError, match="version 7: rollout-1 confirmed version 6"):
        sync(roles, roles, [PROBE], version=7, tolerance=1e-3).result()
    assert "probe rollout-1" not in roles.events


@pytest.mark.parametrize("offset", [0.02, float("nan")])
def test_a_replica_that_disagrees_is_named_with_the_difference(offset: float) -> None:
    roles = FakeRoles(offsets=(0.0, offset))
    with pytest.raises(SyncError, match=r"version 7: .* differ by (0\.02|nan) .* rollout-1"):
        sync(roles, roles, [PROBE], version=7, tolerance=1e-3).result()


def test_only_the_head_of_a_long_probe_is_scored() -> None:
    roles = FakeRoles()
    sync(roles, roles, [response_to(PROBE.prompt, [1] * 500)], version=7, tolerance=1e-3)
    assert roles.probed == [64]


class HfLearner:
    """The learner's part of a sync, on a PEFT model without DeepSpeed."""

    def __init__(self, path: Path) -> None:
        model = load_lvlm(path, dtype="float32")
        count = image_token_count(model.config)
        self.encoder = Encoder(load_processor(path), image_tokens=count)
        self.model: PeftModel = attach_lora(model, LORA, seed=0)

    def randomise(self, seed: int, scale: float = 0.2) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, scale, generator=generator)

    def publish(self, version: int) -> Pending[WeightsManifest]:
        lora = {n: p.detach().numpy() for n, p in self.model.named_parameters() if "lora_" in n}
        return Ready(make_manifest(lora, scaling=LORA.scaling, version=version))

    @torch.no_grad()
    def logprobs(self, responses: Sequence[Response]) -> Pending[list[FloatArray]]:
        batch = self.encoder.encode(responses, next(self.model.parameters()))
        rows = response_logprobs(self.model, batch, temperature=1.0).numpy()
        return Ready([row[: len(r.token_ids)] for row, r in zip(rows, responses, strict=True)])


class OneReplica:
    """A single engine behind the rollouts' protocol."""

    def __init__(self, actor: RolloutActor) -> None:
        self.actor = actor

    def load_weights(self, manifest: WeightsManifest, probe: Probe) -> Pending[list[float]]:
        check_version("rollout-0", manifest.version, self.actor.load_weights(manifest))
        found = self.actor.probe_logprobs(probe.responses)
        return Ready([probe.check("rollout-0", manifest.version, found)])


@pytest.fixture
def actor(tiny_llava_dir: Path, learner: HfLearner) -> Iterator[RolloutActor]:
    actor = rollout_actor(tiny_llava_dir)
    yield actor
    learner.randomise(0, scale=0.0)
    actor.load_weights(learner.publish(0).result())


@pytest.fixture(scope="module")
def learner(tiny_llava_dir: Path) -> HfLearner:
    return HfLearner(tiny_llava_dir)


def test_engine_and_learner_agree_after_each_of_many_syncs(
    actor: RolloutActor, learner: HfLearner, photos: Path
) -> None:
    """Twenty versions without drift; a zero adapter then gives the base's log-probs again."""
    prompts = photo_prompts(photos)[:2]
    probe = [response_to(prompt, [40, 61, 17, 203, 9, 2]) for prompt in prompts]
    base = np.concatenate(actor.probe_logprobs(probe))
    memory = []
    for version in range(1, 21):
        learner.randomise(version)
        synced = sync(learner, OneReplica(actor), probe, version=version, tolerance=1e-3)
        report = synced.result()
        assert report.version == actor.version() == version
        memory.append(psutil.Process().memory_info().rss)
    moved = np.abs(np.concatenate(actor.probe_logprobs(probe)) - base).max()
    assert moved > 0.1
    assert memory[-1] - memory[4] < 8 * 2**20
    assert actor.generate(requests(prompts))[0].policy_version == 20
    learner.randomise(0, scale=0.0)
    sync(learner, OneReplica(actor), probe, version=21, tolerance=1e-3).result()
    np.testing.assert_allclose(np.concatenate(actor.probe_logprobs(probe)), base, atol=1e-5)


def test_samples_do_not_use_prefixes_cached_under_old_weights(
    actor: RolloutActor, learner: HfLearner, photos: Path
) -> None:
    """The prompt fills several cache blocks, so its keys and values are found again."""
    prompts = photo_prompts(photos, text="There is a small red star above the square. " * 12)[:1]
    assert len(learner.encoder.prompt_ids(prompts[0].text)) > 100
    actor.generate(requests(prompts))
    learner.randomise(5)
    actor.load_weights(learner.publish(1).result())
    response = actor.generate(requests(prompts))[0]
    expected = learner.logprobs([response]).result()[0]
    np.testing.assert_allclose(response.rollout_logprobs, expected, atol=0.02)


def test_a_version_that_does_not_fit_is_refused_and_changes_nothing(
    actor: RolloutActor, learner: HfLearner, photos: Path
) -> None:
    probe = [response_to(photo_prompts(photos)[0], [40, 61, 17])]
    base = actor.probe_logprobs(probe)[0]
    learner.randomise(3)
    good = learner.publish(9).result()
    name = next(iter(good.tensors)).rpartition(".")[0]
    a, b = good.tensors[f"{name}.lora_A"], good.tensors[f"{name}.lora_B"]
    wrong = {
        "model.language_model.layers.99.self_attn.q_proj": (a, b),
        "model.vision_tower.encoder.layers.0.self_attn.q_proj": (a, b),
        name: (a, b[1:]),
    }
    for module, (down, up) in wrong.items():
        factors = {f"{n}.weight": t for n, t in good.tensors.items() if not n.startswith(name)}
        factors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
        with pytest.raises(SyncError, match=f"version 9 does not fit .*{module}"):
            actor.load_weights(make_manifest(factors, scaling=1.0, version=9))
    with pytest.raises(SyncError, match="digest"):
        actor.load_weights(replace(good, tensors=good.tensors | {f"{name}.lora_A": a + 1}))
    assert actor.version() == 0
    np.testing.assert_array_equal(actor.probe_logprobs(probe)[0], base)
