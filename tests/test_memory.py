"""The memory plan over devices: packing, sums, refusal, the nearest setting that fits."""

from pathlib import Path

import pytest
from transformers import LlamaConfig, LlavaConfig

from cluster.memory.actors import GIB, Models
from cluster.memory.devices import Devices, parse_assumed
from cluster.memory.plan import check_memory, memory_table, pack, plan_memory
from cluster.placement import Bundle
from fgaif.config import Config, load_config, with_overrides
from fgaif.errors import ConfigError
from fgaif.lvlm.sizes import config_facts, read_facts

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(scope="module")
def llava15() -> Models:
    """LLaVA-1.5 of both sizes by the names in the shipped configurations, from shapes alone."""
    small = LlamaConfig(vocab_size=32064, max_position_embeddings=4096)
    large = LlamaConfig(
        vocab_size=32064,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        max_position_embeddings=4096,
    )
    return {
        "checkpoints/llava-1.5-7b-hf": config_facts(LlavaConfig(text_config=small)),
        "checkpoints/llava-1.5-13b-hf": config_facts(LlavaConfig(text_config=large)),
    }


@pytest.fixture
def one_gpu() -> Config:
    """Engine, three scorers, reference and learner of a 7B on one GPU, which was once advised."""
    return load_config(
        CONFIGS / "my_images.yaml",
        [
            "cluster.rollout={gpus: 0.5}",
            "cluster.judge={gpus: 0.5}",
            "cluster.reward={gpus: 0.1, shared: false}",
            "cluster.reference={gpus: 0.1}",
            "cluster.learner={gpus: 0.1}",
            "cluster.engine={max_model_len: 2048, gpu_memory_utilization: 0.4}",
            "reward.gpus_per_worker=0.5",
            "reward.parallel=1",
            "ppo.micro_batch=16",
            "policy.max_new_tokens=512",
        ],
    )


def bundle(name: str, gpus: float) -> Bundle:
    return Bundle(role="reward", name=name, cpus=1, gpus=gpus)


def test_facts_of_llava15_are_those_of_the_public_checkpoints(llava15: Models) -> None:
    sizes = [facts.parameters for facts in llava15.values()]
    assert sizes == [7_063_427_072, 13_351_494_656]
    assert [facts.image_tokens for facts in llava15.values()] == [576, 576]


def test_headers_and_configuration_give_the_same_facts(tiny_llava_dir: Path) -> None:
    config = LlavaConfig.from_pretrained(tiny_llava_dir)
    read, computed = read_facts(tiny_llava_dir), config_facts(config)
    assert sorted(read.linears) == sorted(computed.linears)
    fields = {name: getattr(read, name) for name in read.__slots__ if name != "linears"}
    assert fields == {name: getattr(computed, name) for name in fields}


@pytest.mark.parametrize(
    ("text", "gpus"),
    [
        ("4x80", (80 * 10**9,) * 4),
        ("1x24", (24 * 10**9,)),
        ("2x141,1x48GB", (141 * 10**9, 141 * 10**9, 48 * 10**9)),
        ("1x79.5GiB", (int(79.5 * GIB),)),
    ],
)
def test_assumed_devices(text: str, gpus: tuple[int, ...]) -> None:
    assert parse_assumed(text).gpus == gpus


@pytest.mark.parametrize("text", ["80", "x80", "4x", "0x80", "4x0", "4x80TB", "four", ""])
def test_assumed_devices_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected COUNTxGB"):
        parse_assumed(text)


def test_shares_go_to_the_fullest_device_with_room() -> None:
    """0.5 opens GPU 0, 0.6 does not fit there and opens 1, 0.4 completes 1, 0.5 completes 0."""
    shares = {"a": 0.5, "b": 0.6, "c": 0.4, "d": 0.5, "e": 0.1}
    places, lacking = pack([bundle(name, share) for name, share in shares.items()], 2)
    assert places == {"a": (0,), "b": (1,), "c": (1,), "d": (0,)}
    assert [b.name for b in lacking] == ["e"]


def test_whole_gpus_need_free_ones() -> None:
    bundles = [bundle("a", 0.3), bundle("b", 2), bundle("c", 0), bundle("d", 1)]
    places, lacking = pack(bundles, 3)
    assert places == {"a": (0,), "b": (1, 2), "c": ()}
    assert [b.name for b in lacking] == ["d"]
    assert pack(bundles, None) == ({"a": (0,), "b": (1, 2), "c": (), "d": (3,)}, [])


def test_three_thirds_share_a_device() -> None:
    places, lacking = pack([bundle(name, 0.33) for name in "abc"], 1)
    assert not lacking
    assert set(places.values()) == {(0,)}


def test_a_recipe_for_one_gpu_that_cannot_fit_is_refused_with_a_setting_that_does(
    one_gpu: Config, llava15: Models
) -> None:
    """Six copies of a 7B in bfloat16 are 79 GiB alone; the engine takes 0.4 of the device."""
    check_memory(one_gpu, devices=parse_assumed("1x192"), models=llava15)
    device = parse_assumed("1x141")
    with pytest.raises(ConfigError) as caught:
        check_memory(one_gpu, devices=device, models=llava15)
    message = str(caught.value)
    assert "PPO: GPU 0 would hold" in message
    for actor in ("rollout-0", "reward-object-0", "learner-0", "reference-0"):
        assert actor in message
    proposal = message.partition("this fits: ")[2].split()
    assert proposal
    assert not plan_memory(
        with_overrides(one_gpu, proposal), devices=device, models=llava15
    ).problems


def test_where_no_setting_fits_larger_devices_are_named(one_gpu: Config, llava15: Models) -> None:
    with pytest.raises(
        ConfigError, match=r"no smaller setting fits; 1 GPU\(s\) of \d+ GB would do"
    ):
        check_memory(one_gpu, devices=parse_assumed("1x80"), models=llava15)


def test_an_engine_takes_its_share_of_the_device_whatever_its_model_needs(
    one_gpu: Config, llava15: Models
) -> None:
    for size in (80, 141):
        plan = plan_memory(one_gpu, {"rollout"}, parse_assumed(f"1x{size}"), llava15)
        (engine,) = plan.loads[0].actors
        assert engine.memory.total - engine.memory.process == pytest.approx(0.4 * size * 1e9)


def test_an_engine_that_serves_adapters_unmerged_has_a_slot_for_one(
    one_gpu: Config, llava15: Models
) -> None:
    """r 20 takes a slot of 32: (4 (H + H) + 3 (H + I)) r in each of 32 layers, in bfloat16."""
    slot = 2 * 32 * 32 * (8 * 4096 + 3 * (4096 + 11008))
    for adapters, expected in (("auto", slot), ("merged", 0)):
        config = with_overrides(
            one_gpu, ["policy.lora.r=20", f"cluster.engine.adapters={adapters}"]
        )
        for role, held in (("rollout", expected), ("judge", 0)):
            plan = plan_memory(config, {role}, parse_assumed("1x80"), llava15)
            assert plan.loads[0].actors[0].memory.adapters == held


def test_an_engine_without_room_for_one_sequence_says_so(one_gpu: Config, llava15: Models) -> None:
    plan = plan_memory(one_gpu, {"rollout"}, parse_assumed("1x24"), llava15)
    assert any("one sequence of 2048 tokens" in problem for problem in plan.problems)


def test_reward_training_is_planned_per_worker(one_gpu: Config, llava15: Models) -> None:
    config = with_overrides(
        one_gpu, ["reward.parallel=2", "reward.workers=2", "reward.gpus_per_worker=1"]
    )
    plan = plan_memory(config, {"trainer"}, parse_assumed("4x80"), llava15)
    names = [[a.bundle.name for a in load.actors] for load in plan.loads if load.gpu is not None]
    assert names == [[f"trainer-{index}"] for index in range(4)]
    plan = plan_memory(config, {"trainer"}, parse_assumed("3x80"), llava15)
    assert plan.problems == (
        "reward training: no room among 3 GPUs (assumed: 3x80) for trainer-3 (1 GPU)",
    )


def test_unknown_devices_are_said_in_a_line(one_gpu: Config, llava15: Models) -> None:
    plan = check_memory(one_gpu, models=llava15)
    assert not plan.problems
    assert "\n" not in plan.unknown
    assert "--assume" in plan.unknown
    assert not plan.fits


def test_actors_without_gpus_share_the_host(tiny_llava_dir: Path) -> None:
    name = str(tiny_llava_dir)
    config = load_config(None, [f"policy.model={name}", f"feedback.verifier={name}"])
    plan = plan_memory(config, devices=Devices(gpus=(), host=64 * GIB, found="made up"))
    assert {load.gpu for load in plan.loads} == {None}
    assert not plan.problems
    assert (plan.fits, plan.unknown) == ("fits (made up)", "")
    small = Devices(gpus=(), host=2 * GIB, found="made up")
    with pytest.raises(ConfigError, match=r"host would hold .* of 2\.0: .*Ray and the driver"):
        check_memory(config, devices=small)


def test_the_table_has_every_actor_and_the_sums(one_gpu: Config, llava15: Models) -> None:
    table = memory_table(plan_memory(one_gpu, devices=parse_assumed("1x141"), models=llava15))
    cells = [str(cell) for column in table.columns for cell in column.cells]
    for name in ("rollout-0", "judge-0", "trainer-0", "learner-0", "PPO, GPU 0", "131.3"):
        assert name in cells
