"""``fgaif submit`` and ``fgaif jobs``: runs on a Ray cluster from anywhere."""

import shutil
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from cluster.cli.options import ConfigFile, Overrides
from fgaif.config import SCENES_CONFIG, dump_config, load_config

if TYPE_CHECKING:  # Ray takes a second to import
    from ray.job_submission import JobDetails

    from cluster.monitoring.ray_jobs import Jobs

Address = Annotated[
    str | None,
    typer.Option(
        help="The head's dashboard; default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265."
    ),
]
JobId = Annotated[str, typer.Argument(help="Id that `fgaif submit` printed.")]
jobs_app = typer.Typer(name="jobs", no_args_is_help=True, help="Jobs that were submitted.")
out = Console()
_LISTED = 100
_LAST_LINES = 15
_LOOK_S = 8.0
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


def submit(
    command: Annotated[str, typer.Argument(help="run, or one stage: annotate, train, ...")] = "run",
    overrides: Overrides = None,
    config: ConfigFile = None,
    address: Address = None,
    working_dir: Annotated[
        Path | None,
        typer.Option(help="Folder to upload with it (your code, prompts); never weights or data."),
    ] = None,
    python: Annotated[
        str, typer.Option(metavar="PATH", help="Interpreter on the head that has fgaif.")
    ] = "python",
    follow: Annotated[bool, typer.Option(help="Print the job's log until it ends.")] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the job; submit nothing.")
    ] = False,
) -> None:
    """Run on a Ray cluster: submit `fgaif COMMAND` as a Ray job.

    fgaif must be installed on the nodes. `dir`, checkpoints and data are paths that all nodes see.
    The same by hand: ray job submit --working-dir FOLDER -- python -m fgaif run --config FILE
    """
    from cluster.monitoring.ray_jobs import (
        Jobs,
        job_request,
        temporary_folder,
        why_it_failed,
    )

    if "=" in command:  # overrides alone: everything is run
        overrides, command = [command, *(overrides or [])], "run"
    settings = load_config(config or SCENES_CONFIG, overrides or [])
    folder = temporary_folder()
    try:
        request = job_request(
            settings, command, folder=folder, working_dir=working_dir, python=python
        )
        if dry_run:
            out.print(dump_config(settings), highlight=False)
        out.print(request.entrypoint, markup=False, highlight=False)
        for line in _uploaded(folder, request.left_out):
            out.print(line, markup=False, highlight=False, soft_wrap=True)
        if dry_run:
            return
        jobs = Jobs(address)
        job = jobs.submit(request)
    finally:
        shutil.rmtree(folder)
    out.print(f"submitted {job}", markup=False)
    if follow:
        for text in jobs.follow(job):
            out.print(text, end="", markup=False, highlight=False)
    details = jobs.status(job) if follow else _first_seconds(jobs, job)
    if follow or details.status in _ENDED:
        out.print(f"{job}: {details.status.lower()}", markup=False)
    if details.status == "FAILED":
        log = jobs.logs(job)
        if not follow:
            out.print("\n".join(log.splitlines()[-_LAST_LINES:]), markup=False, highlight=False)
        if fix := why_it_failed(log):
            out.print(fix, style="yellow", markup=False, soft_wrap=True)
    if follow or details.status in _ENDED:
        raise typer.Exit(0 if details.status == "SUCCEEDED" else 1)


def _first_seconds(jobs: "Jobs", job: str) -> "JobDetails":
    """What becomes of a job at once: one that cannot start ends in its first seconds."""
    end = time.monotonic() + _LOOK_S
    while (details := jobs.status(job)).status not in _ENDED and time.monotonic() < end:
        time.sleep(0.5)
    return details


def _uploaded(folder: Path, left_out: Mapping[Path, str]) -> Iterator[str]:
    """Lines that name what is uploaded, and what of the working folder is not."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files)
    yield f"uploads {len(files)} files, {size:,} bytes:"
    yield from (f"  {path.relative_to(folder)}" for path in files[:_LISTED])
    if len(files) > _LISTED:
        yield f"  and {len(files) - _LISTED} more"
    secret = {path: why for path, why in left_out.items() if "weights" not in why}
    yield from (f"  not {path}: {why}" for path, why in secret.items())
    if len(left_out) > len(secret):
        yield f"  not {len(left_out) - len(secret)} others: weights, data or runs"


@jobs_app.command("list")
def list_jobs(address: Address = None) -> None:
    """Jobs that fgaif submitted, the newest first."""
    from cluster.monitoring.ray_jobs import Jobs

    table = Table()
    for column in ("job", "command", "run", "status", "started", "minutes"):
        table.add_column(column)
    for job in Jobs(address).list():
        metadata = job.metadata or {}
        started = (job.start_time or 0) / 1000
        ended = (job.end_time or time.time() * 1000) / 1000
        table.add_row(
            job.submission_id,
            metadata.get("fgaif", ""),
            metadata.get("dir", ""),
            str(job.status).removeprefix("JobStatus.").lower(),
            datetime.fromtimestamp(started).isoformat(" ", "seconds"),
            f"{(ended - started) / 60:.1f}",
        )
    out.print(table)


@jobs_app.command()
def status(job: JobId, address: Address = None) -> None:
    """Say what became of a job."""
    from cluster.monitoring.ray_jobs import Jobs

    details = Jobs(address).status(job)
    out.print(f"{job}: {details.status.lower()}", markup=False)
    if details.message:
        out.print(details.message, markup=False)


@jobs_app.command()
def logs(
    job: JobId,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends.")] = False,
) -> None:
    """Print what a job printed."""
    from cluster.monitoring.ray_jobs import Jobs

    jobs = Jobs(address)
    for text in jobs.follow(job) if follow else [jobs.logs(job)]:
        out.print(text, end="", markup=False, highlight=False)


@jobs_app.command()
def stop(job: JobId, address: Address = None) -> None:
    """Stop a job; `fgaif submit` with the same run folder goes on where it stopped."""
    from cluster.monitoring.ray_jobs import Jobs

    stopped = Jobs(address).stop(job)
    out.print(f"{job}: {'stopping' if stopped else 'had ended'}", markup=False)
