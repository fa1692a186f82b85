"""Models of the Hugging Face Hub by ``ORG/NAME@REVISION``: the folder in its cache, the commit.

A name without ``@`` is a folder and nothing else, so a mistyped path asks nobody. Revisions are
branches, tags or commits; a run pins them once (:func:`pin_models`), and what it writes names the
commit. ``HF_HUB_OFFLINE``, ``HF_HOME``, ``HF_TOKEN`` and ``HF_ENDPOINT`` are huggingface_hub's own.
"""

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from peft import LoraConfig, PeftModel

from fgaif.errors import CheckpointError, first_line
from fgaif.lvlm.checkpoint_files import EMBEDDED, SCENES

if TYPE_CHECKING:  # the measurements on a bare GPU machine do without pydantic
    from fgaif.config import Config

_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)@([A-Za-z0-9][\w./-]*)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SNAPSHOT = re.compile(r"models--(.+?)--(.+)")
FILES = ("*.safetensors", "*.json", "*.txt", "*.jinja")
"""What is taken of a repository's top folder: neither code nor pickled weights. Patterns with a
slash are of folders within."""


def split_name(name: str) -> tuple[str, str] | None:
    """``ORG/NAME@REVISION`` as (repository, revision); None for a folder or an embedded model."""
    found = _NAME.fullmatch(name)
    if found is None or Path(name).is_dir():
        return None
    return found[1], found[2]


def local_folder(name: str, files: tuple[str, ...] = FILES) -> Path:
    """The folder of a path, or that of ``ORG/NAME@REVISION`` in the hub's cache, with its ``files``
    downloaded.

    Raises:
        CheckpointError: the hub has no such model, does not give it, or cannot be reached and the
            cache lacks it.
    """
    parts = split_name(name)
    if parts is None:
        return Path(name).expanduser()
    return _folder(*parts, constants.HF_HUB_CACHE, files)


@cache
def _folder(repository: str, revision: str, cache_dir: str, files: tuple[str, ...]) -> Path:
    """One look per process: a branch that moves meanwhile does not change the model in use."""
    return Path(
        _asked(
            snapshot_download,
            repository,
            revision,
            cache_dir=cache_dir,
            allow_patterns=list(files),
            ignore_patterns=None if any("/" in pattern for pattern in files) else ["*/*"],
        )
    )


def pinned(name: str) -> str:
    """The name with its revision's commit; a folder or an embedded model as it is.

    Raises:
        CheckpointError: as :func:`local_folder`.
    """
    parts = split_name(name)
    if parts is None or _COMMIT.fullmatch(parts[1]):
        return name
    found = _asked(HfApi().resolve_revision, parts[0], parts[1])
    return f"{parts[0]}@{found.resolved}"


def pin_models(config: "Config") -> "Config":
    """The configuration with every model of the hub at a commit.

    So all processes of a run load the same files, ``config.yaml`` and cards name them, and a branch
    that has moved counts as another value of its key.

    Raises:
        CheckpointError: as :func:`local_folder`.
    """
    from fgaif.config import parse_config

    policy, backbone = config.policy.model, config.reward.backbone
    verifiers = [pinned(name) for name in config.feedback.verifiers]
    second = config.eval.second_verifier
    wanted = (pinned(policy), backbone and pinned(backbone), verifiers, second and pinned(second))
    if wanted == (policy, backbone, list(config.feedback.verifiers), second):
        return config
    tree = config.model_dump(mode="json")
    tree["policy"]["model"], tree["reward"]["backbone"] = wanted[:2]
    tree["eval"]["second_verifier"] = wanted[3]
    tree["feedback"]["verifier"] = verifiers[0] if len(verifiers) == 1 else verifiers
    return parse_config(tree)


def model_name(folder: Path) -> str:
    """What a checkpoint is called: ``ORG/NAME@COMMIT`` of one in the hub's cache, else the name of
    its folder."""
    found = hub_name(folder)
    return folder.name if found is None else "@".join(found)


def reference(folder: Path) -> str:
    """What finds a checkpoint again: ``ORG/NAME@COMMIT`` of one in the hub's cache, else its
    path."""
    return str(folder) if hub_name(folder) is None else model_name(folder)


def name_base(model: PeftModel, base: str) -> None:
    """Have a PEFT model save ``base``, a name as in a configuration, as what it was trained on.

    An embedded model is saved as its folder: PEFT and transformers know no ``scenes:NAME``.
    """
    parts = split_name(base)
    if base.startswith(SCENES):
        base = str(EMBEDDED / base.removeprefix(SCENES))
    for settings in model.peft_config.values():
        settings.base_model_name_or_path = parts[0] if parts else base
        settings.revision = parts[1] if parts else None


def check_base(adapter: Path, settings: LoraConfig, base: Path) -> None:
    """Refuse a base of the hub that is another commit than the adapter names.

    Raises:
        CheckpointError: with the name of the one that it was trained on.
    """
    found, named = hub_name(base), str(settings.revision)
    if found is None or settings.base_model_name_or_path != found[0]:
        return
    if _COMMIT.fullmatch(named) and named != found[1]:
        raise CheckpointError(
            f"{adapter}: was trained on {found[0]}@{named}, and {found[1]} is another commit: give "
            f"the base as {found[0]}@{named}"
        )


def hub_name(folder: Path) -> tuple[str, str] | None:
    """(repository, commit) of a folder in the hub's cache; None for any other."""
    found = _SNAPSHOT.fullmatch(folder.parents[1].name) if len(folder.parents) > 1 else None
    if found is None or folder.parent.name != "snapshots":
        return None
    return f"{found[1]}/{found[2]}", folder.name


def _asked(ask: Any, repository: str, revision: str, **options: Any) -> Any:
    """Ask the hub; every way in which it fails becomes a sentence with what to do."""
    what = f"model '{repository}@{revision}'"
    files = " ".join(f"--include '{pattern}'" for pattern in FILES)
    download = f"hf download {repository} --revision {revision} {files}"
    try:
        return ask(repository, revision=revision, **options)
    except GatedRepoError as error:
        raise CheckpointError(
            f"{what}: its owner asks for an agreement first: accept it at "
            f"{constants.ENDPOINT}/{repository}, and give your token in HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{what}: the repository has no such branch, tag or commit; its newest is "
            f"{repository}@main"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{what}: {constants.ENDPOINT} has no such repository, or it is private: correct the "
            "name, or give a token in HF_TOKEN that may read it"
        ) from error
    except IncompleteSnapshotError as error:
        raise CheckpointError(
            f"{what}: only some of its files are in {constants.HF_HUB_CACHE}, and the hub cannot "
            f"be reached: where it can, run `{download}`"
        ) from error
    except (LocalEntryNotFoundError, RevisionResolutionError) as error:
        why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else "the hub does not answer"
        raise CheckpointError(
            f"{what}: not in {constants.HF_HUB_CACHE}, and {why}: where the hub can be reached, "
            f"run `{download}`"
        ) from error
    except HFValidationError as error:
        raise CheckpointError(f"{what}: no name of a repository: {first_line(error)}") from error
    except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        raise CheckpointError(
            f"{what}: cannot be downloaded ({type(error).__name__}: {first_line(error)}); run this "
            "again, which goes on where it stopped"
        ) from error
