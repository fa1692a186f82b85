"""What error messages propose is tried: the change is made, and the work goes on.

Other files try the advice of single errors beside what raises them: redirects and refusals of APIs
(test_client, test_endpoint), damaged labels (test_label_order), prompts that are too long
(test_too_long), a loss that is no number and damaged checkpoints (test_stages), memory
(test_memory), LoRA ranks of engines (test_rollout), occupied folders (test_run_lock).
"""

import ast
import re
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import typer
from test_stages import Runs

import fgaif
from cluster.cli.main import app
from cluster.pipeline.keys import leaf_keys
from cluster.weight_sync import _check_arrived, check_version
from fgaif.config import Config, load_config
from fgaif.errors import ConfigError, FgaifError, SyncError
from fgaif.feedback.models import check_prompts
from fgaif.types import Arrived

ROOT = Path(fgaif.__file__).parents[1]
NAMED = re.compile(r"(?<![\w.])([a-z_]+(?:\.[a-z_0-9]+)+=[^\s,;:)]+)")
"""A change that a message names literally: KEY=VALUE."""

API = ["endpoints.mine.model=m", "endpoints.mine.base_url=http://127.0.0.1:9/v1"]
CONFIGURATIONS: tuple[tuple[list[str], list[str]], ...] = (
    # Refused with these overrides; accepted with each of those besides. None: those of the message.
    (["cluster.learner.gpus=2"], []),
    (["cluster.reference.gpus=3"], []),
    (["cluster.learner.gpus=0.5", "cluster.learner.replicas=2"], []),
    (["reward.gpus_per_worker=2"], []),
    (["reward.gpus_per_worker=0.5", "reward.workers=2", "reward.batch_size=8"], []),
    (["cluster.rollout.gpus=2"], []),
    (["cluster.rollout.gpus=1", "cluster.engine.tensor_parallel=2"], []),
    (["cluster.judge.gpus=1", "cluster.engine.tensor_parallel=2"], []),
    (["policy.dtype=bfloat16", "ppo.zero_stage=0"], []),
    (["policy.dtype=bfloat16", "reward.zero_stage=0"], []),
    (["reward.parallel=9"], []),
    (
        ["cluster.rollout.autoscale={min: 3, max: 2}"],
        ["cluster.rollout.autoscale.min=2", "cluster.rollout.autoscale.max=3"],
    ),
    (["ppo.minibatch=100", "ppo.rollout_batch=64"], ["ppo.minibatch=64", "ppo.rollout_batch=100"]),
    (["ppo.async_depth=2", "ppo.max_staleness=1"], ["ppo.max_staleness=2"]),
    (["reward.workers=3", "reward.batch_size=16"], ["reward.batch_size=18"]),
    (["policy.lora.dropout=0.1"], ["policy.lora.dropout=0"]),
    (["ppo.shape.order=[object,object]"], ["ppo.shape.order=[object]"]),
    (["feedback.verifier=[]"], ["feedback.verifier=[scenes:verifier]"]),
    (
        [*API, "feedback.verifier=[api:mine]", "feedback.extractor=model"],
        ["feedback.extractor=api:mine"],
    ),
    (["name=.."], ["name=mine"]),
)


@pytest.mark.parametrize(("wrong", "right"), CONFIGURATIONS, ids=lambda x: " ".join(x)[:40])
def test_a_configuration_is_accepted_with_each_change_that_is_proposed(
    wrong: list[str], right: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, wrong)
    named = [change for change in NAMED.findall(str(refused.value)) if "NAME" not in change]
    changes = right or [change for change in named if change not in wrong]
    assert changes, refused.value
    for change in changes:
        load_config(None, [*wrong, change])


def test_a_kind_that_the_embedded_extractor_does_not_state_is_accepted_as_proposed() -> None:
    kinds = "kinds=[object, {name: counting, description: How many there are., prompt: '{fact}?'}]"
    with pytest.raises(ConfigError, match=r"set feedback\.extractor=api:NAME or model"):
        check_prompts(load_config(None, [kinds]))
    for change in ([*API, "feedback.extractor=api:mine"], ["feedback.extractor=model"]):
        check_prompts(load_config(None, [kinds, *change]))


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(tmp_path, monkeypatch)


def unsynced(_: Runs) -> None:
    check_version("rollout-0", 1, 0)


def rounded(_: Runs) -> None:
    layer = dict.fromkeys(("weakest", "strongest"), 0.2)
    named = {"weakest_layer": "layers.0", "strongest_layer": "layers.1"}
    _check_arrived("rollout-0", 1, Arrived(share=0.2, **layer, **named))


@pytest.mark.parametrize(
    ("fails", "proposed", "change"),
    [
        (unsynced, "run the command again", []),
        (rounded, "cluster.engine.adapters=unmerged and run again", None),
    ],
)
def test_after_a_sync_that_failed_at_the_first_step_the_run_goes_on(
    fresh: Runs,
    monkeypatch: pytest.MonkeyPatch,
    fails: Callable[[Runs], None],
    proposed: str,
    change: list[str] | None,
) -> None:
    real, calls = type(fresh.roles).load_weights, []

    def load_weights(roles: object, *arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 1:  # before there is a checkpoint
            fails(fresh)
        return real(roles, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(type(fresh.roles), "load_weights", load_weights)
    with pytest.raises(SyncError, match=re.escape(proposed)) as stopped:
        fresh()
    assert not list((fresh.folder / "policy").glob("checkpoints/step_*"))
    fresh(*(NAMED.findall(str(stopped.value)) if change is None else change))
    assert fresh.done == ["train", "eval-after"]


MORE = "data.feedback_prompts=4"


@pytest.mark.parametrize(
    ("file", "follow"),
    [
        ("stages.json", lambda runs: (runs.folder / "stages.json").unlink()),
        ("responses/responses.jsonl", lambda runs: runs(MORE, only=["sample"], force=True)),
    ],
)
def test_a_damaged_file_of_a_run_is_put_right_as_proposed(
    fresh: Runs, file: str, follow: Callable[[Runs], None]
) -> None:
    fresh()
    path = fresh.folder / file
    path.write_text("{\n" + path.read_text())
    with pytest.raises(FgaifError, match=f"{re.escape(str(path))}.*(delete|fgaif sample --force)"):
        fresh(MORE)
    follow(fresh)
    fresh(MORE)
    assert fresh.done


# What messages name: options, keys, commands.

FOREIGN = {
    "--head", "--dashboard-agent-listen-port",  # of ray
    "--revision", "--include",  # of hf
    "--short",  # of git
    "--query-gpu", "--format",  # of nvidia-smi
    "--shm-size",  # of docker
    "--enable-lora",  # of vllm
    "--threads", "--stage", "--no-",  # of scripts that say so in their own usage
}  # fmt: skip
EARLIER = {"ppo.probe_tolerance"}
"""Keys of earlier versions, which are read in their runs."""


@cache
def command_line() -> tuple[set[str], set[str]]:
    """All options and all commands."""
    options, commands = set(), set()

    def walk(command: typer.core.TyperCommand, name: tuple[str, ...]) -> None:
        commands.add(" ".join(name))
        context = typer.Context(command)  # type: ignore[arg-type]
        for parameter in command.params:
            options.update([*parameter.opts, *parameter.secondary_opts])
        if isinstance(command, typer.core.TyperGroup):
            for each in command.list_commands(context):
                walk(command.get_command(context, each), (*name, each))

    walk(typer.main.get_command(app), ())
    return options, commands


def texts() -> Iterator[tuple[str, str]]:
    """Where, and all texts of the packages but docstrings; ``{}`` stands for what is put in."""
    for path in (
        path
        for package in ("fgaif", "actors", "cluster")
        for path in (ROOT / package).rglob("*.py")
    ):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        skipped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                skipped.update(map(id, node.values))
                parts = (v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
                yield f"{path.relative_to(ROOT)}:{node.lineno}", "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and id(node) not in skipped:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", str(node.value)


def is_key(name: str) -> bool:
    """Whether a dotted name is a key or a section; ``{}`` and names in capitals are any entry."""
    parts = name.removesuffix(".{}").split(".")
    if parts[-1].endswith("_"):  # keys that begin so
        return any(key.startswith(name) for key in leaf_keys())
    return any(
        len(known) >= len(parts)
        and all(
            k in ("*", p) or p.isupper() or "{" in p for k, p in zip(known, parts, strict=False)
        )
        for known in (key.split(".") for key in leaf_keys())
    )


def is_file(name: str) -> bool:
    """A file's name, or that of a module or of something in one."""
    modules = (ROOT / name.replace(".", "/"), (ROOT / name.replace(".", "/")).parent)
    if Path(name).suffix in (".html", ".tex", ".json", ".jsonl", ".md", ".png", ".txt", ".yaml"):
        return True
    return any(path.with_suffix(".py").is_file() for path in modules)


def test_options_keys_and_commands_in_messages_exist() -> None:
    options, commands = command_line()
    sections = "|".join(Config.model_fields)
    keys = re.compile(rf"(?<![\w./{{])((?:{sections})(?:\.[a-zA-Z_{{}}]+)+)(?![\w(/])")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    wrong = []
    for where, text in texts():
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - options - FOREIGN
        named |= {key for key in keys.findall(text) if not is_key(key) and not is_file(key)}
        said = re.findall(r"`fgaif ([a-z-]+(?: [a-z-]+)?)", text)
        named |= {each for each in said if not {each, each.split()[0]} & commands}
        named |= set(re.findall(r"'fgaif\[([a-z]+)\]'", text)) - set(extras)
        wrong += [f"{where}: {each}" for each in named]
    assert [each for each in wrong if each.rpartition(" ")[2] not in EARLIER] == []
