"""torchvision's CUDA build imports beside a CPU torch, and a healthy pair is left alone."""

import subprocess
import sys
from importlib import metadata

import pytest
import torch

from fgaif import torchvision_cpu

cpu_torch = pytest.mark.skipif(torch.version.cuda is not None, reason="needs a CPU build of torch")


@pytest.fixture
def defined(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Schemas that would be declared, with no operator declared yet."""
    schemas: list[str] = []

    class FakeLibrary:
        def __init__(self, namespace: str, kind: str) -> None:
            assert (namespace, kind) == ("torchvision", "FRAGMENT")

        def define(self, schema: str) -> None:
            schemas.append(schema.split("(")[0])

    monkeypatch.setattr(torch.library, "Library", FakeLibrary)
    monkeypatch.setattr(torchvision_cpu, "_is_defined", lambda name: False)
    return schemas


def with_versions(
    monkeypatch: pytest.MonkeyPatch, *, cuda: str | None, torchvision: str | None
) -> None:
    def version(name: str) -> str:
        if torchvision is None:
            raise metadata.PackageNotFoundError(name)
        return torchvision

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torchvision_cpu.metadata, "version", version)


@cpu_torch
def test_declares_both_operators_for_a_cuda_build_beside_cpu_torch(
    monkeypatch: pytest.MonkeyPatch, defined: list[str]
) -> None:
    with_versions(monkeypatch, cuda=None, torchvision="0.28.0")
    torchvision_cpu.define_missing_operators()
    assert defined == ["nms", "qnms"]


@pytest.mark.parametrize(
    ("cuda", "torchvision"), [("13.0", "0.28.0"), (None, "0.28.0+cpu"), (None, None)]
)
def test_leaves_a_healthy_installation_alone(
    monkeypatch: pytest.MonkeyPatch, defined: list[str], cuda: str | None, torchvision: str | None
) -> None:
    with_versions(monkeypatch, cuda=cuda, torchvision=torchvision)
    torchvision_cpu.define_missing_operators()
    assert defined == []


@cpu_torch
def test_never_declares_twice(monkeypatch: pytest.MonkeyPatch, defined: list[str]) -> None:
    with_versions(monkeypatch, cuda=None, torchvision="0.28.0")
    monkeypatch.setattr(torchvision_cpu, "_is_defined", lambda name: name == "nms")
    torchvision_cpu.define_missing_operators()
    assert defined == ["qnms"]


def test_torchvision_imports_in_a_new_process() -> None:
    """The entry point runs inside ``import torch``, with no help from fgaif's own imports."""
    program = "import torchvision, sys; print('fgaif.config' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"


def test_it_is_registered_as_an_entry_point_of_torch() -> None:
    (entry,) = metadata.entry_points(group="torch.backends", name="fgaif_torchvision_cpu")
    assert entry.load() is torchvision_cpu.define_missing_operators
