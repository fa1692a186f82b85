"""Runs as Ray jobs: what is uploaded, and one real submission through a dashboard's port."""

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
import ray
import ray.autoscaler
import yaml
from ray.cluster_utils import Cluster as RayCluster
from ray.dashboard.modules.job.pydantic_models import JobType
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails
from rich.console import Console
from typer.testing import CliRunner, Result

from actors.deepspeed_setup import free_port
from cluster.cli.main import app
from cluster.monitoring.ray_jobs import JobRequest, Jobs, job_request
from cluster.monitoring.upload import choose
from fgaif.config import Config, load_config
from fgaif.errors import ActorError, ConfigError

CLUSTER = Path(__file__).parents[1] / "cluster"
SCENES = Path(__file__).parents[1] / "configs" / "scenes.yaml"


def settings(folder: Path, *overrides: str) -> Config:
    return load_config(SCENES, [f"dir={folder}", "cluster.address=ray://elsewhere:1", *overrides])


def test_only_the_resolved_configuration_is_uploaded(tmp_path: Path) -> None:
    request = job_request(settings(tmp_path, "ppo.steps=3"), "run", folder=tmp_path / "job")
    assert request.entrypoint == "python -m fgaif run --config fgaif.yaml"
    assert [path.name for path in (tmp_path / "job").iterdir()] == ["fgaif.yaml"]
    tree = yaml.safe_load((tmp_path / "job" / "fgaif.yaml").read_text())
    assert tree["ppo"]["steps"] == 3
    assert tree["cluster"]["address"] is None
    assert request.metadata["dir"] == str(tmp_path / "scenes")
    json.dumps(request.runtime_env)


def test_a_working_folder_goes_along_without_weights_data_and_runs(tmp_path: Path) -> None:
    source = tmp_path / "mine"
    for name in ("own.py", "prompts/check.txt", "w.safetensors", "data/a.txt", "runs/x", "a.png"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("x")
    job_request(settings(tmp_path), "train", folder=tmp_path / "job", working_dir=source)
    files = {str(p.relative_to(tmp_path / "job")) for p in (tmp_path / "job").rglob("*.*")}
    assert files == {"own.py", "prompts/check.txt", "fgaif.yaml"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (".env", "A=1"), ("prod.env", "A=1"), (".aws/credentials", "x"), ("id_ed25519", "x"),
        ("server.pem", "x"), ("credentials.json", "{}"), (".ssh/config", "x"), (".netrc", "x"),
        ("notes.txt", "-----BEGIN OPENSSH PRIVATE KEY-----"),
        ("run.sh", "export OPENAI_API_KEY=sk-proj-abcdefghijklmnopqrstuvwx"),
        ("a.py", "TOKEN = 'hf_abcdefghijklmnopqrstuvwxyzABCDEFGH'"),
    ],
)  # fmt: skip
def test_nothing_that_may_be_secret_goes_along(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(content)
    (tmp_path / "own.py").write_text("x = 1")
    upload = choose(tmp_path)
    assert upload.files == (Path("own.py"),)
    assert len(upload.left_out) == 1


def test_targets_of_links_do_not_go_along(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "private.txt").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "own.py").write_text("x = 1")
    (tmp_path / "mine" / "file.txt").symlink_to(tmp_path / "elsewhere" / "private.txt")
    (tmp_path / "mine" / "folder").symlink_to(tmp_path / "elsewhere")
    upload = choose(tmp_path / "mine")
    assert upload.files == (Path("own.py"),)
    assert upload.left_out == {Path("file.txt"): "a link", Path("folder"): "a link"}


def test_a_dry_run_names_what_is_sent_and_what_is_not(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("x = 1")
    (tmp_path / ".env").write_text("A=1")
    arguments = ["submit", f"dir={tmp_path}/runs", "--working-dir", str(tmp_path), "--dry-run"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0
    assert "  own.py\n" in done.output
    assert "  not .env: may hold a secret" in done.output


def test_what_cannot_work_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dir = runs: .*absolute"):
        job_request(load_config(SCENES, []), "run", folder=tmp_path)
    with pytest.raises(ConfigError, match="submit fly: no such command"):
        job_request(settings(tmp_path), "fly", folder=tmp_path)
    with pytest.raises(ActorError, match=r"--address http://127\.0\.0\.1:9: no Ray dashboard"):
        Jobs("http://127.0.0.1:9")


def test_the_cluster_file_satisfies_ray_s_schema() -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    tree = yaml.safe_load((CLUSTER / "ray_cluster.yaml").read_text())
    jsonschema.validate(tree, schema)
    assert tree["head_node_type"] in tree["available_node_types"]


def test_the_rayjob_is_one_that_kuberay_and_fgaif_take(tmp_path: Path) -> None:
    tree = yaml.safe_load((CLUSTER / "kuberay_rayjob.yaml").read_text())
    assert (tree["apiVersion"], tree["kind"]) == ("ray.io/v1", "RayJob")
    spec = tree["spec"]
    assert spec["rayClusterSpec"]["rayVersion"] == ray.__version__
    groups = [spec["rayClusterSpec"]["headGroupSpec"], *spec["rayClusterSpec"]["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert container["resources"]["requests"] == container["resources"]["limits"]
    command = shlex.split(spec["entrypoint"])
    assert command[:4] == ["python", "-m", "fgaif", "run"]
    overrides = [word for word in command[4:] if "=" in word]
    assert load_config(SCENES, overrides).dir == Path("/shared/runs")


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A head node with its dashboard and job agent on free ports; jobs find this Python first."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    port, agent = free_port(), free_port()
    arguments = {"num_cpus": 1, "include_dashboard": True, "dashboard_port": port}
    cluster = RayCluster(
        initialize_head=True,
        connect=False,
        head_node_args=arguments | {"dashboard_agent_listen_port": agent},
    )
    yield f"http://127.0.0.1:{port}"
    cluster.shutdown()


@pytest.mark.long
def test_a_job_is_submitted_followed_and_listed(dashboard: str, tmp_path: Path) -> None:
    config = settings(tmp_path, "policy.model=/no/such/checkpoint")
    jobs = Jobs(dashboard)
    job = jobs.submit(job_request(config, "sample", folder=tmp_path / "job"))
    said = "".join(jobs.follow(job))
    assert "/no/such/checkpoint" in said  # fgaif ran there, with this configuration
    assert jobs.status(job).status == "FAILED"
    assert [item.submission_id for item in jobs.list()] == [job]
    assert "/no/such/checkpoint" in jobs.logs(job)
    assert jobs.stop(job) is False
    with pytest.raises(ActorError, match="does not exist"):
        jobs.status("raysubmit_gone")


class FakeJobs:
    """A cluster's jobs of which one ends as told after two looks."""

    def __init__(self, ends: str, log: str) -> None:
        self.ends, self.log, self.looks = ends, log, 0
        self.entrypoint = ""

    def submit(self, request: JobRequest) -> str:
        self.entrypoint = request.entrypoint
        return "raysubmit_1"

    def status(self, job: str) -> JobDetails:
        self.looks += 1
        status = "RUNNING" if self.looks < 3 else self.ends
        return JobDetails(type=JobType.SUBMISSION, entrypoint=self.entrypoint, status=status)

    def logs(self, job: str) -> str:
        return self.log

    def follow(self, job: str) -> Iterator[str]:
        self.looks = 9
        yield self.log


def submitted(monkeypatch: pytest.MonkeyPatch, folder: Path, jobs: FakeJobs, *flags: str) -> Result:
    monkeypatch.setattr("cluster.monitoring.ray_jobs.Jobs", lambda address: jobs)
    monkeypatch.setattr("cluster.cli.jobs.time.sleep", lambda seconds: None)
    monkeypatch.setattr("cluster.cli.jobs.out", Console(width=200))
    call = ["submit", "train", "-c", str(SCENES), f"dir={folder}", *flags]
    return CliRunner().invoke(app, call)


@pytest.mark.parametrize("flag", ["--follow", "--no-follow"])
def test_a_job_whose_python_lacks_fgaif_is_seen_and_the_advice_works(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flag: str
) -> None:
    log = "Running entrypoint\n/usr/bin/python: No module named fgaif\n"
    result = submitted(monkeypatch, tmp_path, FakeJobs("FAILED", log), flag)
    assert result.exit_code == 1
    assert "raysubmit_1: failed" in result.stdout
    assert result.stdout.count("No module named fgaif") == 1
    told = re.search(r"such as --python (\S+), or", result.stdout)
    assert told is not None
    jobs = FakeJobs("SUCCEEDED", "done\n")
    assert submitted(monkeypatch, tmp_path, jobs, flag, "--python", told[1]).exit_code == 0
    assert jobs.entrypoint == f"{told[1]} -m fgaif train --config fgaif.yaml"


def test_a_job_that_goes_on_is_left_alone_after_some_seconds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("cluster.cli.jobs._LOOK_S", 0.0)
    result = submitted(monkeypatch, tmp_path, FakeJobs("RUNNING", ""), "--no-follow")
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "submitted raysubmit_1")
    other = submitted(monkeypatch, tmp_path, FakeJobs("FAILED", "ValueError: no\n"), "--follow")
    assert "--python" not in other.stdout


def test_a_cluster_that_wants_its_token_says_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: str) -> None:
        raise AuthenticationError("Token authentication is enabled " * 20)

    monkeypatch.setattr("cluster.monitoring.ray_jobs.JobSubmissionClient", refuse)
    with pytest.raises(ActorError, match=r"RAY_AUTH_MODE=token .*~/\.ray/auth_token") as refused:
        Jobs("http://127.0.0.1:1")
    assert len(str(refused.value)) < 400
