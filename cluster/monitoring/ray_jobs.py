"""Runs as Ray jobs: what is submitted, and what became of it, over Ray's job submission API."""

import os
import re
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from cluster.monitoring.upload import choose, copy
from fgaif.config import Config
from fgaif.errors import ActorError, ConfigError, first_line

ADDRESS = "http://127.0.0.1:8265"
"""Where a Ray head's dashboard listens unless told otherwise; RAY_API_SERVER_ADDRESS overrides."""

COMMANDS = ("run", "sample", "annotate", "train-reward", "train", "study", "report")
_CONFIG = "fgaif.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """A job as Ray takes it; ``left_out`` says what of the working folder is not uploaded."""

    entrypoint: str
    runtime_env: dict[str, Any]
    metadata: dict[str, str]
    left_out: Mapping[Path, str]


def job_request(
    config: Config,
    command: str,
    *,
    folder: Path,
    working_dir: Path | None = None,
    flags: Sequence[str] = (),
    python: str = "python",
) -> JobRequest:
    """Make the job that runs ``fgaif COMMAND`` with this configuration on a cluster.

    The resolved configuration is written to ``folder``, which alone is uploaded; with
    ``working_dir`` a copy of that folder is, without weights, data, runs, links and whatever may
    be secret (:mod:`cluster.monitoring.upload`). ``python`` is the interpreter on the head that has
    fgaif, a path or the name that its PATH finds.

    Raises:
        ConfigError: an unknown command, or a run folder that would vanish with the job.
    """
    if command not in COMMANDS:
        raise ConfigError(f"submit {command}: no such command; known: {', '.join(COMMANDS)}")
    if not config.dir.is_absolute():
        raise ConfigError(
            f"dir = {config.dir}: a job runs in a folder that is deleted after it; give an "
            "absolute path on storage that all nodes share, e.g. dir=/shared/runs"
        )
    left_out: Mapping[Path, str] = {}
    if working_dir is not None:
        upload = choose(working_dir)
        copy(upload, working_dir, folder)
        left_out = upload.left_out
    tree = config.model_dump(mode="json")
    tree["cluster"]["address"] = None  # a job joins the cluster that it runs on
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _CONFIG).write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return JobRequest(
        entrypoint=shlex.join([python, "-m", "fgaif", command, "--config", _CONFIG, *flags]),
        runtime_env={"working_dir": str(folder)},
        metadata={"fgaif": command, "run": config.name, "dir": str(config.run_dir)},
        left_out=left_out,
    )


class Jobs:
    """The jobs of a cluster.

    Raises:
        ActorError: the dashboard cannot be reached, or refuses (with what to do).
    """

    def __init__(self, address: str | None = None) -> None:
        self._address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or ADDRESS
        try:
            self._client = JobSubmissionClient(self._address)
        except AuthenticationError as error:
            raise _token_wanted(self._address) from error
        except (ConnectionError, RuntimeError) as error:
            raise ActorError(
                f"--address {self._address}: no Ray dashboard answers ({first_line(error)}); give "
                "the head's, e.g. http://HEAD:8265, or start one with `ray start --head`"
            ) from error

    def submit(self, request: JobRequest) -> str:
        """Submit a job and return its id."""
        return self._ask(
            lambda: self._client.submit_job(
                entrypoint=request.entrypoint,
                runtime_env=request.runtime_env,
                metadata=request.metadata,
            )
        )

    def list(self) -> list[JobDetails]:
        """Jobs that fgaif submitted, the newest first."""
        jobs = [job for job in self._ask(self._client.list_jobs) if "fgaif" in (job.metadata or {})]
        return sorted(jobs, key=lambda job: job.start_time or 0, reverse=True)

    def status(self, job: str) -> JobDetails:
        """What became of a job."""
        return self._ask(lambda: self._client.get_job_info(job))

    def logs(self, job: str) -> str:
        """What the job printed so far."""
        return self._ask(lambda: self._client.get_job_logs(job))

    def follow(self, job: str) -> Iterator[str]:
        """Yield what the job prints until it ends."""
        import asyncio

        stream = self._client.tail_job_logs(job)
        with asyncio.Runner() as runner:
            while True:
                try:
                    yield runner.run(anext(stream))
                except StopAsyncIteration:
                    return

    def stop(self, job: str) -> bool:
        """Stop a job; False if it had ended."""
        return self._ask(lambda: self._client.stop_job(job))

    def _ask(self, call: Any) -> Any:
        try:
            return call()
        except AuthenticationError as error:
            raise _token_wanted(self._address) from error
        except (RuntimeError, ConnectionError) as error:
            hint = ""
            if "No available agent" in str(error):
                hint = (
                    "; another Ray on that machine may hold the agent's port: start the head with "
                    "--dashboard-agent-listen-port=PORT"
                )
            raise ActorError(f"{self._address}: {first_line(error)}{hint}") from error


def _token_wanted(address: str) -> ActorError:
    return ActorError(
        f"{address}: this Ray lets nobody in without its token: set RAY_AUTH_MODE=token here and "
        "put the head's token, which `ray start` left there in ~/.ray/auth_token, into the same "
        "file here, or into a file that RAY_AUTH_TOKEN_PATH names"
    )


def why_it_failed(log: str) -> str:
    """What to do about a job whose python has no fgaif, or is not there; empty for other causes."""
    if (
        re.search(r"No module named '?(fgaif|cluster)\b|python\S*: (command )?not found", log)
        is None
    ):
        return ""
    return (
        "the head's python has no fgaif: name the one that has with --python, such as "
        "--python /opt/fgaif/.venv/bin/python, or start Ray in its environment"
    )


def temporary_folder() -> Path:
    """A folder for what is uploaded; Ray reads it when the job is submitted."""
    return Path(tempfile.mkdtemp(prefix="fgaif-job-"))
