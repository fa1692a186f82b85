"""Run these notebooks without Jupyter: `python examples/execute.py [--write] [NAME]`.

The cells of a notebook run in order in one namespace, each notebook in a process of its own. What a
cell prints, its last value and its pyplot figures are its outputs, which ``--write`` stores.
"""

import argparse
import ast
import asyncio
import base64
import inspect
import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
Output = dict[str, Any]


def execute(notebook: dict[str, Any]) -> None:
    """Run the code cells of a notebook and put their outputs into it."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    code_cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code_cells, start=1):
        print(f"cell {number} of {len(code_cells)}", file=sys.stderr)
        cell["execution_count"] = number
        cell["outputs"] = run_cell("".join(cell["source"]), f"cell {number}", namespace)


def run_cell(source: str, name: str, namespace: dict[str, Any]) -> list[Output]:
    """Run one cell, which may await; returns its outputs in the notebook format."""
    *body, last = ast.parse(source, name).body or [ast.Pass()]
    shows = isinstance(last, ast.Expr) and not source.rstrip().endswith(";")
    body = body if shows else [*body, last]
    printed, outputs = io.StringIO(), []
    value = None
    with redirect_stdout(printed):
        _run(ast.Module(body, []), name, namespace)
        if shows:
            value = _run(ast.Expression(last.value), name, namespace)  # type: ignore[attr-defined]
    if text := printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(True)})
    if value is not None:
        data = _bundle(value)
        outputs.append({"output_type": "execute_result", "data": data, "metadata": {}})
        outputs[-1]["execution_count"] = int(name.split()[-1])
    return outputs + _figures()


def _run(tree: ast.Module | ast.Expression, name: str, namespace: dict[str, Any]) -> Any:
    mode = "eval" if isinstance(tree, ast.Expression) else "exec"
    tree = ast.fix_missing_locations(tree)
    code = compile(tree, name, mode, flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    result = eval(code, namespace)
    return asyncio.run(result) if inspect.iscoroutine(result) else result


def _bundle(value: Any) -> dict[str, Any]:
    """The forms in which a value shows itself, text always."""
    data: dict[str, Any] = {"text/plain": _lines(repr(value))}
    if hasattr(value, "_repr_html_"):
        data["text/html"] = _lines(value._repr_html_())
    if hasattr(value, "_repr_png_"):
        data["image/png"] = base64.b64encode(value._repr_png_()).decode()
        data["text/plain"] = [f"<{type(value).__name__}>"]  # without its address in memory
    return data


def _figures() -> list[Output]:
    """Figures that pyplot holds, as Jupyter shows them at a cell's end; they are closed."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    outputs: list[Output] = []
    for number in pyplot.get_fignums() if pyplot else []:
        file = io.BytesIO()
        pyplot.figure(number).savefig(file, format="png", dpi=72, bbox_inches="tight")
        png = base64.b64encode(file.getvalue()).decode()
        data = {"image/png": png, "text/plain": ["<Figure>"]}
        outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
    if pyplot:
        pyplot.close("all")
    return outputs


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main() -> None:
    """Run the named notebooks, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="without .ipynb; default: all")
    parser.add_argument("--write", action="store_true", help="store the outputs")
    options = parser.parse_args()
    names = options.names or sorted(path.stem for path in HERE.glob("*.ipynb"))
    if len(names) > 1:
        for name in names:
            command = [sys.executable, __file__, name, *["--write"] * options.write]
            subprocess.run(command, check=True)
        return
    os.environ.setdefault("MPLBACKEND", "Agg")
    path = HERE / f"{names[0]}.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    execute(notebook)
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    if options.write:
        path.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
