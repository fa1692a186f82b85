"""What ``fgaif push`` uploads: an adapter, reward models or an export, with a model card.

The card says what it is, of which base and under whose licence, from which data and how good: all
read from the folder and the run it belongs to, and what is not known is said. Paths of this
machine are left out.
"""

import filecmp
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import yaml
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, metadata_load
from huggingface_hub.errors import HfHubHTTPError

from fgaif import __version__
from fgaif.data.prompts import SCENES
from fgaif.errors import CheckpointError, ServiceError, first_line
from fgaif.eval.before_after import compare
from fgaif.eval.run_folder import RunOutcome, read_run
from fgaif.lvlm.adapters import ADAPTER_FILES, read_adapter, read_adapter_config
from fgaif.lvlm.checkpoint_files import EMBEDDED, check_weights, read_json
from fgaif.lvlm.hub import FILES, split_name
from fgaif.lvlm.model import resolve_checkpoint
from fgaif.reward.checkpoint import CARD, HEAD, RewardCard, read_card

_PAPER = "[FGAIF](https://arxiv.org/abs/2404.05046)"
_DIGITS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The checkpoint that something was trained on.

    ``name`` is for people; ``repository`` and ``revision`` are None where it is not of the hub.
    ``licence`` holds the keys of a card's header that say it, empty where the base says nothing.
    """

    name: str
    repository: str | None
    revision: str | None
    licence: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """Files by their paths in the repository, as they lie here or as they are written anew."""

    base: Base
    files: Mapping[str, Path | bytes]
    card: str

    def size(self) -> int:
        """Bytes of all files, the card included."""
        sizes = (
            len(content) if isinstance(content, bytes) else content.stat().st_size
            for content in self.files.values()
        )
        return sum(sizes) + len(self.card.encode())


def prepare(
    folder: Path, name: str, *, run_dir: Path | None = None, base: str | None = None
) -> Publication:
    """Gather what is uploaded of an adapter, of reward models or of an export, and write its card.

    ``name`` is the repository's. ``run_dir`` is the run that made it, by default the one that it
    lies in; ``base``, ``ORG/NAME@REVISION``, is where others find a base that lies in a folder.

    Raises:
        CheckpointError: the folder is none of the three, or damaged.
        DataError: ``run_dir`` is no run.
    """
    run_dir = run_dir or _run_of(folder)
    run = None if run_dir is None else read_run(run_dir)
    if (folder / CARD).is_file() or any(folder.glob(f"*/{CARD}")):
        return _rewards(folder, name, run, base)
    if (folder / ADAPTER_FILES[0]).is_file():
        found = _adapter_base(folder, base)
        read_adapter(folder)
        figures = _changes(run if _was_evaluated(folder, run_dir) else None)
        card = _card(name, _policy(found, merged=False), found, run, figures)
        return Publication(base=found, files=_adapter_files(folder, "", found), card=card)
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return _export(folder, name, run_dir, base)
    raise CheckpointError(
        f"{folder}: neither an adapter, nor reward models, nor an export: give RUN/policy/adapter, "
        "RUN/rewards, or what `fgaif export` wrote"
    )


def upload(publication: Publication, repository: str, *, private: bool) -> str:
    """Make the repository if there is none, upload all in one commit, and return its address.

    Raises:
        ServiceError: the hub refuses it or cannot be reached; then nothing of it is there.
    """
    api = HfApi()
    files = {**publication.files, "README.md": publication.card.encode()}
    operations = [
        CommitOperationAdd(path_in_repo=path, path_or_fileobj=content)
        for path, content in files.items()
    ]
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.create_commit(
            repository, operations, commit_message=f"Upload by fgaif {__version__}"
        )
    except HfHubHTTPError as error:
        raise ServiceError(
            f"--to {repository}: the hub refuses it ({first_line(error)}); give a token in "
            "HF_TOKEN that may write there"
        ) from error
    except (httpx2.HTTPError, OSError) as error:  # offline mode is one of these
        raise ServiceError(
            f"--to {repository}: the hub cannot be reached ({first_line(error)}); run this again "
            "where it can, without HF_HUB_OFFLINE"
        ) from error
    return str(done.commit_url)


# --- the three ------------------------------------------------------------------------------------


def _rewards(folder: Path, name: str, run: RunOutcome | None, base: str | None) -> Publication:
    alone = (folder / CARD).is_file()
    parts = [folder] if alone else sorted(file.parent for file in folder.glob(f"*/{CARD}"))
    cards = {part: read_card(part) for part in parts}
    found = _find_base(base or next(iter(cards.values())).backbone)
    files: dict[str, Path | bytes] = {}
    for part, card in cards.items():
        read_adapter(part)
        prefix = "" if alone else f"{part.name}/"
        files |= _adapter_files(part, prefix, found)
        files[prefix + HEAD] = part / HEAD
        told = card.model_copy(update={"backbone": found.name})
        files[prefix + CARD] = (told.model_dump_json(indent=2) + "\n").encode()
    kinds = [card.kind for card in cards.values()]
    what = (
        f"Reward models of {_PAPER} for {', '.join(kinds)}: LoRA adapters (PEFT) with a head each, "
        "that classify every sub-sentence of a response as correct, hallucinated or without such a "
        f"fact. They fit only the base whose digest is in `{CARD}`.\n\n"
        "`fgaif serve --rewards FOLDER` serves them from the folder into which they are downloaded."
    )
    text = _card(name, what, found, run, _metrics(list(cards.values())))
    return Publication(base=found, files=files, card=text)


def _export(folder: Path, name: str, run_dir: Path | None, base: str | None) -> Publication:
    check_weights(folder)
    run = None if run_dir is None else read_run(run_dir)
    adapter = folder / "adapter"
    if not (adapter / ADAPTER_FILES[0]).is_file():
        raise CheckpointError(
            f"{folder}: a checkpoint without adapter/, which `fgaif export` writes beside the "
            "weights; only what fgaif has trained is uploaded"
        )
    found = _adapter_base(adapter, base)
    files: dict[str, Path | bytes] = {
        file.name: file for pattern in FILES for file in sorted(folder.glob(pattern))
    }
    files |= _adapter_files(adapter, "adapter/", found)
    figures = _changes(run if _was_evaluated(adapter, run_dir) else None)
    card = _card(name, _policy(found, merged=True), found, run, figures, merged=True)
    return Publication(base=found, files=files, card=card)


def _policy(base: Base, *, merged: bool) -> str:
    if merged:
        how = (
            "exported with its LoRA adapter merged; load it with transformers or vLLM. The adapter "
            "itself is in `adapter/`."
        )
    else:
        how = f"as a LoRA adapter (PEFT): load it on `{base.name}`."
    return f"A vision-language model aligned against hallucination by {_PAPER}, {how}"


def _adapter_files(folder: Path, prefix: str, base: Base) -> dict[str, Path | bytes]:
    """Weights as they are, settings with the base's public name."""
    settings = read_json(folder / ADAPTER_FILES[0])
    settings["base_model_name_or_path"] = base.repository or base.name
    settings["revision"] = base.revision
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    return {
        prefix + ADAPTER_FILES[0]: text.encode(),
        prefix + ADAPTER_FILES[1]: folder / ADAPTER_FILES[1],
    }


# --- the base -------------------------------------------------------------------------------------


def _adapter_base(folder: Path, given: str | None) -> Base:
    settings = read_adapter_config(folder)
    recorded = str(settings.base_model_name_or_path)
    if settings.revision:
        recorded = f"{recorded}@{settings.revision}"
    return _find_base(given or recorded)


def _find_base(name: str) -> Base:
    parts = split_name(name)
    if parts is None:
        embedded = Path(name).parent == EMBEDDED
        short = name if name.startswith("scenes:") else Path(name).name
        short = f"scenes:{short}" if embedded else short
        readme = _read_licence(partial(_local_readme, name))
        return Base(name=short, repository=None, revision=None, licence=readme)
    repository, revision = parts
    licence = _read_licence(partial(hf_hub_download, repository, "README.md", revision=revision))
    return Base(name=name, repository=repository, revision=revision, licence=licence)


def _local_readme(name: str) -> Path:
    return resolve_checkpoint(name) / "README.md"


def _read_licence(readme: Callable[[], Path | str]) -> dict[str, Any]:
    """What a base's own card says of its licence; empty where there is none to be had."""
    try:
        header = metadata_load(readme()) or {}
    except (CheckpointError, HfHubHTTPError, httpx2.HTTPError, OSError, ValueError, yaml.YAMLError):
        return {}
    keys = ("license", "license_name", "license_link")
    return {key: header[key] for key in keys if isinstance(header.get(key), str)}


# --- the card -------------------------------------------------------------------------------------


def _card(
    name: str,
    what: str,
    base: Base,
    run: RunOutcome | None,
    figures: str,
    *,
    merged: bool = False,
) -> str:
    header = {
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": ["fgaif", "hallucination"],
        **base.licence,
    }
    if base.repository:
        header |= {
            "base_model": base.repository,
            "base_model_relation": "finetune" if merged else "adapter",
        }
    licence = base.licence.get("license_name") or base.licence.get("license")
    terms = f"licence `{licence}`" if licence else "which states no licence where this was made"
    return f"""---
{yaml.safe_dump(header, sort_keys=True).strip()}
---
# {name.rpartition("/")[2]}

{what}

Base: `{base.name}`, {terms}. Its terms hold for this as well.

## Figures

{figures}

## Made from

{_made_from(run)}
"""


def _made_from(run: RunOutcome | None) -> str:
    if run is None:
        return "The run that made it was not at hand: data and settings are not known."
    rows = [f"| settings | {run.provenance['config_digest']} |"]
    contents: dict[str, str] = {}
    for stage in run.provenance.get("stages", {}).values():
        contents |= {key: value for key, value in stage["contents"].items() if value}
    rows += [f"| {key} | {digest[:_DIGITS]} |" for key, digest in sorted(contents.items())]
    versions = ", ".join(f"{key} {value}" for key, value in run.provenance["versions"].items())
    own = not contents and str(run.provenance["held_out"]).startswith(SCENES)
    drawn = " Its images and prompts are those that come with fgaif." if own else ""
    table = "\n".join(["| | SHA-256, first digits |", "|---|---|", *rows])
    return f"The run `{run.name}`, seed {run.seed}.{drawn}\n\n{table}\n\nWith {versions}."


def _changes(run: RunOutcome | None) -> str:
    """The evaluation before and after, as a table."""
    if run is None or set(run.evals) != {"before", "after"}:
        return "Not known: no run was found that was evaluated before and after training it."
    sides = [run.evals["before"], run.evals["after"]]
    rows = [
        f"| {row.figure.title} | {row.before} | {row.after} |"
        for row in compare(*(side.sampled for side in sides))
    ]
    rows += [
        f"| POPE {row.figure.title} | {row.before} | {row.after} |"
        for row in compare(*(side.pope for side in sides))
    ]
    held_out = Path(str(run.provenance["held_out"])).name
    return "\n".join(
        [
            f"On held-out images (`{held_out}`), sampled:", "",
            "| | base | this |", "|---|---|---|", *rows,
        ]
    )  # fmt: skip


def _metrics(cards: list[RewardCard]) -> str:
    """What the reward models reach on the images held out of their training."""
    names = sorted({name for card in cards for name in card.metrics})
    rows = [
        " | ".join([name, *(_shown(card.metrics.get(name)) for card in cards)]) for name in names
    ]
    head = " | ".join(["", *(card.kind for card in cards)])
    digests = ", ".join(f"{card.kind} {card.input_digest[:_DIGITS]}" for card in cards)
    return "\n".join(
        [
            "On images held out of the training data, against the feedback's labels:", "",
            f"|{head} |", "|---" * (len(cards) + 1) + "|", *(f"| {row} |" for row in rows), "",
            f"Digests of all that the trainings depended on: {digests}.",
        ]
    )  # fmt: skip


def _shown(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value.is_integer() else f"{value:.4f}"  # counts are among them


def _was_evaluated(adapter: Path, run_dir: Path | None) -> bool:
    """Whether the run's figures are of this adapter: a run may hold others, of baselines and
    earlier steps."""
    if run_dir is None:
        return False
    name = ADAPTER_FILES[1]
    own = run_dir / "policy" / "adapter" / name
    return own.is_file() and filecmp.cmp(own, adapter / name, shallow=False)


def _run_of(folder: Path) -> Path | None:
    """The run folder that this lies in."""
    parents = folder.absolute().parents
    return next((path for path in parents if (path / "stages.json").is_file()), None)
