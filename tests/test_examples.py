"""The notebooks in examples/: they run, and what is stored of them is what they give."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.append(str(EXAMPLES))
from execute import run_cell  # noqa: E402

NOTEBOOKS = {path.stem: path for path in EXAMPLES.glob("*.ipynb")}
_MACHINE = re.compile(r"/(root|home|work|tmp|usr|opt)/|0x[0-9a-f]{6,}|\d{4}-\d\d-\d\d")


def stored(name: str) -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads(NOTEBOOKS[name].read_text(encoding="utf-8"))
    return notebook


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def executed(name: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "execute.py"), name],
        capture_output=True,
        check=False,
        cwd=EXAMPLES.parent,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    notebook: dict[str, Any] = json.loads(done.stdout)
    return notebook


def shapes(notebook: dict[str, Any]) -> list[list[tuple[str, list[str]]]]:
    """Sorts of output of each code cell, with their forms."""
    return [
        [(output["output_type"], sorted(output.get("data", {}))) for output in cell["outputs"]]
        for cell in code_cells(notebook)
    ]


def texts(notebook: dict[str, Any]) -> list[str]:
    return [
        "".join(output.get("text") or output["data"]["text/plain"])
        for cell in code_cells(notebook)
        for output in cell["outputs"]
    ]


def test_the_documentation_lists_the_notebooks() -> None:
    page = (EXAMPLES.parent / "docs" / "library.md").read_text(encoding="utf-8")
    named = re.findall(r"examples/(\w+)\.ipynb", page)
    assert sorted(named) == sorted(NOTEBOOKS)
    assert len(named) == 3


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_are_stored_without_a_trace_of_the_machine(name: str) -> None:
    notebook = stored(name)
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(bool(cell["outputs"]) for cell in cells) >= 4
    for text in texts(notebook):
        assert not _MACHINE.search(text), text
    assert NOTEBOOKS[name].stat().st_size < 150_000


def test_a_caption_is_shown_coloured() -> None:
    shown = [
        "".join(output["data"]["text/html"])
        for cell in code_cells(stored("score_a_caption"))
        for output in cell["outputs"]
        if "text/html" in output.get("data", {})
    ]
    assert any("background:" in html and "✗" in html for html in shown)


def test_the_reward_by_hand_gives_the_same_numbers_everywhere() -> None:
    found = executed("reward_by_hand")
    assert shapes(found) == shapes(stored("reward_by_hand"))
    assert texts(found) == texts(stored("reward_by_hand"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["score_a_caption", pytest.param("whole_loop", marks=[pytest.mark.long, pytest.mark.ci])],
)
def test_a_notebook_runs_and_gives_the_sorts_of_output_that_are_stored(name: str) -> None:
    """Its own assertions say that the models learn; digits differ from machine to machine."""
    assert shapes(executed(name)) == shapes(stored(name))


def test_a_cell_gives_what_it_prints_and_its_last_value() -> None:
    source = "import asyncio\nprint('a\\nb')\nawait asyncio.sleep(0)\nx = 2\nx + 1"
    names: dict[str, Any] = {}
    printed, value = run_cell(source, "cell 7", names)
    assert printed == {"output_type": "stream", "name": "stdout", "text": ["a\n", "b\n"]}
    assert (value["data"], value["execution_count"]) == ({"text/plain": ["3"]}, 7)
    assert run_cell("x;", "cell 8", names) == []
    assert run_cell("y = await asyncio.sleep(0, 5)", "cell 9", names) == []
    assert run_cell("# nothing", "cell 10", names) == []
    assert names["y"] == 5
    with pytest.raises(ZeroDivisionError):
        run_cell("1 / 0", "cell 11", names)
