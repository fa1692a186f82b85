"""The configuration tree: shipped files load, unknown keys are refused with the nearest name."""

import pickle
import re
from pathlib import Path

import pytest
import yaml

from fgaif.config import Config, dump_config, load_config, parse_config
from fgaif.errors import LONGEST_MESSAGE, ActorError, ConfigError, DataError

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted([*FOLDER.glob("*.yaml"), *FOLDER.glob("paper/*.yaml")])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_loads(path: Path) -> None:
    load_config(path)


def test_there_are_shipped_configs() -> None:
    assert {"scenes.yaml", "my_images.yaml", "llava15_7b_4gpu.yaml"} <= {p.name for p in CONFIGS}


def test_overrides_win_over_the_file_and_floats_may_be_written_as_1e_6(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("ppo: {lr: 1e-6, steps: 5}\n")
    config = load_config(file, ["ppo.steps=7", "data.train=a.jsonl"])
    assert (config.ppo.lr, config.ppo.steps, config.data.train) == (1e-6, 7, "a.jsonl")


def test_dump_and_parse_round_trip() -> None:
    config = load_config(None, ["ppo.shape.weights={object: 1, attribute: 0, relation: 2}"])
    assert parse_config(yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("ppo.setps=3", ["ppo.setps = 3", "unknown key", "did you mean ppo.steps?"]),
        ("ppo.kl.coeff=3", ["ppo.kl.coeff", "did you mean ppo.kl.coef?"]),
        ("ppo.minibatch=9999", ["ppo.minibatch = 9999", "ppo.rollout_batch"]),
        ("reward.lora.r=0", ["reward.lora.r = 0", "greater than or equal to 1"]),
        ("ppo.shape.weights={object: 0, attribute: 0, relation: 0}", ["ppo.shape.weights"]),
        ("steps", ["KEY=VALUE"]),
        ("seed.x=1", ["seed"]),
        ("name=../escape", ["name", "pattern"]),
    ],
)
def test_wrong_keys_and_values_are_named(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["seed=1", override])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("endpoints.g.base_url=ftp://SECRET/v1", ["endpoints.g.base_url", "give an address"]),
        ("endpoints.g.base_url=https://a:SECRET@x/v1", ["endpoints.g.base_url", "password"]),
        ("endpoints.g.api_key=SECRET", ["endpoints.g.api_key: unknown", "g.api_key_env?"]),
        ("endpoints.g.api_key_env=sk-SECRET", ["endpoints.g.api_key_env", "pattern"]),
        ("endpoints.h.key=SECRET", ["endpoints.h.model: Field required"]),
        ("endpoints.g.model.api_key=SECRET", ["endpoints.g.model.api_key", "'model'"]),
    ],
)
def test_keys_in_the_wrong_place_are_not_repeated(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["endpoints.g.model=m", override])
    assert "SECRET" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n"])
def test_a_file_that_is_no_config_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load_config(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml.*existing file"):
        load_config(tmp_path / "nowhere.yaml")


def test_every_key_has_a_type_and_config_is_frozen() -> None:
    config = Config()
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["policy.lora.dropout=0.1"], ["policy.lora.dropout = 0.1", "reward.lora may stay"]),
        (["ppo.value_lora.dropout=0.1"], ["ppo.value_lora.dropout = 0.1"]),
        (["policy.dtype=bfloat16", "ppo.zero_stage=0"], ["set ppo.zero_stage=1"]),
        (["policy.dtype=bfloat16", "reward.zero_stage=0"], ["set reward.zero_stage=1"]),
    ],
)
def test_settings_that_cannot_work_are_refused(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, overrides)
    assert all(word in str(refused.value) for word in words)


def test_reward_models_may_train_with_dropout_and_float32_without_zero() -> None:
    config = load_config(None, ["reward.lora.dropout=0.1", "ppo.zero_stage=0"])
    assert config.reward.lora.dropout == 0.1


def test_a_key_that_is_gone_says_what_came_instead() -> None:
    with pytest.raises(ConfigError, match=r"ppo\.probe_tolerance = 0\.3: no such key any more"):
        load_config(None, ["ppo.probe_tolerance=0.3"])


def written(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    return path


def alias_bomb(levels: int = 12) -> bytes:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for n in range(1, levels):
        lines.append(f"a{n}: &a{n} [" + ", ".join([f"*a{n - 1}"] * 9) + "]")
    return "\n".join(lines).encode()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"ppo:\n  steps: 3\nseed: 1\nppo:\n  lr: 1.0e-5\n", "'ppo' is there twice, in line 1"),
        (b"ppo:\n  steps: 3\n  steps: 4\n", "'steps' is there twice"),
        ("name: café".encode("latin-1"), "not UTF-8"),
        (b"a: " + b"[" * 5000, "nested too deep"),
        (b"a: &a [*a]", "an alias within itself"),
        (alias_bomb(), "aliases multiply"),
        (b"seed: 1\n" + b"#" * 2**20, "larger than"),
        (b"seed: !!python/object/apply:os.system [ls]", "not valid YAML"),
        (b"- 1\n- 2\n", "expected keys and values"),
        (b"seed: 1\n---\nseed: 2\n", "not valid YAML"),
        (b"ppo: {lr: .inf}", "ppo.lr = inf"),
        (b"ppo: {lr: .nan}", "ppo.lr = nan"),
    ],
)
def test_a_file_that_is_no_configuration_is_named_in_few_words(
    tmp_path: Path, content: bytes, words: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        load_config(written(tmp_path, content))
    assert len(str(caught.value)) < 1000


def test_a_byte_order_mark_and_anchors_are_read(tmp_path: Path) -> None:
    text = "\ufeffpolicy: {lora: &l {r: 4}}\nreward: {lora: {<<: *l, alpha: 8}}\n"
    config = load_config(written(tmp_path, text.encode()))
    assert (config.policy.lora.r, config.reward.lora.r, config.reward.lora.alpha) == (4, 4, 8)


@pytest.mark.parametrize(
    "overrides",
    [["api_key=sk-very-secret"], ["feedback.token=sk-very-secret"], ["oops=AKIA0123456789ABCDEF"]],
)
def test_values_of_misplaced_keys_that_may_be_secret_are_not_shown(overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match="unknown key") as caught:
        load_config(None, overrides)
    assert "secret" not in str(caught.value)
    assert "AKIA" not in str(caught.value)


def test_a_long_value_is_cut() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"ppo.steps={'x' * 100_000}"])
    assert len(str(caught.value)) < 1000


def test_messages_neither_steer_the_terminal_nor_flood_it() -> None:
    message = str(DataError("a\x1b[2Jb\u202ec\nd\te" + "x" * 100_000 + "set ppo.lr"))
    assert message.startswith("a\\x1b[2Jb\\u202ec\nd\te")
    assert message.endswith("set ppo.lr")
    assert len(message) <= LONGEST_MESSAGE
    copy = pickle.loads(pickle.dumps(ActorError("one\ntwo")))
    assert (type(copy), str(copy)) == (ActorError, "one\ntwo")
