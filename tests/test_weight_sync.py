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
from ppo_world import hf_logprobs

from actors.rollout import RolloutActor
from cluster.roles import Probe, SyncCheck
from cluster.weight_sync import check_load, sync
from fgaif.config import LoraConfig
from fgaif.errors import SyncError
from fgaif.lvlm.inputs import load_encoder
from fgaif.lvlm.model import attach_lora, load_lvlm
from fgaif.lvlm.weights import make_manifest
from fgaif.pending import Pending, Ready, Then
from fgaif.types import (
    Arrived,
    Evaluation,
    FloatArray,
    ImageRef,
    LoadedWeights,
    Prompt,
    Response,
    WeightsManifest,
)

LORA = LoraConfig(r=4, alpha=8.0)
PROBE = response_to(Prompt(id="p", image=ImageRef(path="-", sha256="0"), text="?"), [1, 2, 3])


@dataclass
class FakeRoles:
    """A learner and two replicas; ``events`` is the order of calls."""

    versions: Sequence[int] = (7, 7)
    offsets: Sequence[float] = (0.0, 0.0)
    noise: float = 0.0
    effect: float = 0.0
    arrived: Arrived = field(default_factory=Arrived)
    events: list[str] = field(default_factory=list)
    probed: list[int] = field(default_factory=list)

    def publish(self, version: int) -> Pending[WeightsManifest]:
        self.events.append("publish")
        factors = {"m.lora_A.weight": np.ones((2, 3)), "m.lora_B.weight": np.ones((4, 2))}
        return Ready(make_manifest(factors, scaling=1.0, version=version))

    def load_weights(self, manifest: WeightsManifest, probe: Probe) -> Pending[list[SyncCheck]]:
        self.events.append(f"load {manifest.version}")
        self.probed = [len(response.token_ids) for response in probe.responses]
        return Then(lambda: [self._one(n, manifest, probe) for n in range(len(self.versions))])

    def _one(self, number: int, manifest: WeightsManifest, probe: Probe) -> SyncCheck:
        loaded = LoadedWeights(
            version=self.versions[number],
            arrived=self.arrived,
            logprobs=tuple(self._scores(r) + self.offsets[number] for r in probe.responses),
            base_logprobs=tuple(self._scores(r) + self.noise for r in probe.responses),
        )
        return check_load(f"rollout-{number}", manifest.version, loaded, probe)

    def logprobs(self, responses: Sequence[Response]) -> Pending[list[FloatArray]]:
        self.events.append("probe learner")
        return Ready([self._scores(response) + self.effect for response in responses])

    def evaluate(self, responses: Sequence[Response]) -> Pending[list[Evaluation]]:
        self.events.append("probe reference")
        rows = [self._scores(response) for response in responses]
        return Ready([Evaluation(reference_logprobs=row, values=row) for row in rows])

    @staticmethod
    def _scores(response: Response) -> FloatArray:
        return -response.token_ids.astype(np.float32)


def test_publishes_loads_confirms_and_then_probes() -> None:
    roles = FakeRoles(offsets=(0.0, 5e-5))
    report = sync(roles, roles, roles, [PROBE], version=7).result()
    assert roles.events == ["publish", "probe learner", "probe reference", "load 7"]
    assert report.version == 7
    assert report.bytes == (2 * 3 + 4 * 2) * 4
    metrics = report.metrics()
    assert metrics["sync/max_abs_diff"] == pytest.approx(5e-5, rel=1e-2)
    assert metrics["sync/arrived"] == 1.0


def test_a_replica_with_another_version_stops_the_run() -> None:
    roles = FakeRoles(versions=(7, 6))
    with pytest.raises(SyncError, match="version 7: rollout-1 confirmed version 6"):
        sync(roles, roles, roles, [PROBE], version=7).result()


@pytest.mark.parametrize("offset", [0.02, float("nan")])
def test_a_replica_that_disagrees_is_named_with_the_difference(offset: float) -> None:
    roles = FakeRoles(offsets=(0.0, offset))
    with pytest.raises(SyncError, match=r"version 7: .* differ by (0\.02|nan) .* rollout-1"):
        sync(roles, roles, roles, [PROBE], version=7).result()


def test_the_probe_is_held_against_the_noise_of_the_base_and_the_effect() -> None:
    """The same difference is a fault between quiet engines, and nothing between noisy ones."""
    quiet = FakeRoles(offsets=(0.008, 0.008), noise=0.001, effect=0.3)
    with pytest.raises(SyncError, match=r"checkpoint's own differ by 0\.001 .* by 0\.3"):
        sync(quiet, quiet, quiet, [PROBE], version=7).result()
    noisy = FakeRoles(offsets=(0.308, 0.308), noise=0.003, effect=0.3)
    metrics = sync(noisy, noisy, noisy, [PROBE], version=7).result().metrics()
    assert metrics["sync/mean_abs_diff"] == pytest.approx(0.008, rel=1e-3)
    assert metrics["sync/noise"] == pytest.approx(0.003, rel=1e-3)
    assert metrics["sync/effect"] == pytest.approx(0.3, rel=1e-3)


@pytest.mark.parametrize(
    "arrived",
    [
        Arrived(share=0.06, weakest=0.01, weakest_layer="q"),  # rounded away
        Arrived(share=4.0, strongest=4.0, strongest_layer="q"),  # scaling forgotten
        Arrived(share=0.96, weakest=0.0, weakest_layer="q"),  # one layer left out
        Arrived(share=float("nan")),
    ],
)
def test_an_engine_that_does_not_hold_the_update_is_refused(arrived: Arrived) -> None:
    roles = FakeRoles(arrived=arrived)
    with pytest.raises(SyncError, match=r"of the update is in rollout-0's weights.*unmerged"):
        sync(roles, roles, roles, [PROBE], version=7).result()


def test_only_the_head_of_a_long_probe_is_scored() -> None:
    roles = FakeRoles()
    sync(roles, roles, roles, [response_to(PROBE.prompt, [1] * 500)], version=7)
    assert roles.probed == [64]


class HfLearner:
    """The learner's and the reference's part of a sync, on a PEFT model without DeepSpeed."""

    def __init__(self, path: Path, dtype: str = "float32") -> None:
        self.path = path
        model = load_lvlm(path, dtype=dtype)
        self.encoder = load_encoder(path)
        # PEFT keeps adapters of a bfloat16 base in float32; DeepSpeed casts them.
        self.model: PeftModel = attach_lora(model, LORA, seed=0).to(model.dtype)

    def randomise(self, seed: int, scale: float = 0.2) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, scale, generator=generator)

    def publish(self, version: int) -> Pending[WeightsManifest]:
        lora = {
            n: p.detach().float().numpy() for n, p in self.model.named_parameters() if "lora_" in n
        }
        return Ready(make_manifest(lora, scaling=LORA.scaling, version=version))

    @torch.no_grad()
    def logprobs(self, responses: Sequence[Response]) -> Pending[list[FloatArray]]:
        rows = hf_logprobs(self.model, self.path, responses).numpy()
        return Ready([row[: len(r.token_ids)] for row, r in zip(rows, responses, strict=True)])

    def evaluate(self, responses: Sequence[Response]) -> Pending[list[Evaluation]]:
        with self.model.disable_adapter():
            rows = self.logprobs(responses).result()
        return Ready([Evaluation(reference_logprobs=row, values=row) for row in rows])


class OneReplica:
    """A single engine behind the rollouts' protocol."""

    def __init__(self, actor: RolloutActor) -> None:
        self.actor = actor

    def load_weights(self, manifest: WeightsManifest, probe: Probe) -> Pending[list[SyncCheck]]:
        loaded = self.actor.load_weights(manifest, probe.responses)
        return Ready([check_load("rollout-0", manifest.version, loaded, probe)])


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
        report = sync(learner, learner, OneReplica(actor), probe, version=version).result()
        assert report.version == actor.version() == version
        memory.append(psutil.Process().memory_info().rss)
    moved = np.abs(np.concatenate(actor.probe_logprobs(probe)) - base).max()
    assert moved > 0.1
    assert memory[-1] - memory[4] < 8 * 2**20
    assert actor.generate(requests(prompts))[0].policy_version == 20
    learner.randomise(0, scale=0.0)
    sync(learner, learner, OneReplica(actor), probe, version=21).result()
    np.testing.assert_allclose(np.concatenate(actor.probe_logprobs(probe)), base, atol=1e-5)


def test_samples_do_not_use_prefixes_cached_under_old_weights(
    actor: RolloutActor, learner: HfLearner, photos: Path
) -> None:
    """The prompt fills several cache blocks, so its keys and values are found again."""
    prompts = photo_prompts(photos, text="There is a small red star above the square. " * 12)[:1]
    assert len(learner.encoder.prompt_ids(prompts[0])) > 100
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
