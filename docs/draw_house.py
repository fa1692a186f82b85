"""Draw docs/house.svg from the imports of the code: `python docs/draw_house.py`.

A box is a package, or a module that stands directly in `cluster/`. An arrow goes from what imports
to what is imported; those that follow from others are left out. Boxes stand above everything that
they import, those of `cluster/` on the left. ``--check`` writes nothing and fails where the picture
is out of date.
"""

import argparse
import ast
from functools import cache
from graphlib import TopologicalSorter
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "house.svg"
_COLOURS = {"fgaif": "#e3f2e6", "actors": "#fdf0d5", "cluster": "#dfe9f7"}
_WIDTH, _BOX, _HIGH, _GAP, _ROW = 1120, 150, 36, 22, 84


def box_of(module: str) -> str:
    """The box that a module belongs to, such as ``fgaif.ppo``, ``actors`` or ``cluster.driver``."""
    parts = module.split(".")
    if parts[0] == "actors" or len(parts) == 1:
        return parts[0]
    if parts[0] == "fgaif" and (parts[1] == "config" or not (ROOT / "fgaif" / parts[1]).is_dir()):
        return "fgaif"  # the top modules and the configuration use each other
    return ".".join(parts[:2])


def modules() -> dict[str, Path]:
    """Every module of the three packages by its dotted name."""
    found = {}
    for path in sorted(p for name in _COLOURS for p in (ROOT / name).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports() -> dict[str, set[str]]:
    """Boxes by box that imports them; the entry points import everything and are left out."""
    known = modules()
    found: dict[str, set[str]] = {box_of(name): set() for name in known if name != "cluster"}
    for name, path in known.items():
        if name in ("cluster", "fgaif.__main__"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                targets = whole & known.keys() or {node.module or ""}
            else:
                continue
            found[box_of(name)] |= {box_of(t) for t in targets if t in known and t != "cluster"}
    return {box: others - {box} for box, others in found.items()}


def reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The graph without arrows that follow from two or more others."""

    @cache
    def reach(box: str) -> frozenset[str]:
        return frozenset(graph[box]).union(*(reach(other) for other in graph[box]))

    return {
        box: {o for o in others if not any(o in reach(p) for p in others - {o})}
        for box, others in graph.items()
    }


def rows(graph: dict[str, set[str]]) -> list[list[str]]:
    """Boxes by height: one above the highest that they import; raises CycleError on a circle."""
    height: dict[str, int] = {}
    for box in TopologicalSorter(graph).static_order():
        height[box] = 1 + max((height[other] for other in graph[box]), default=-1)
    return [
        sorted(b for b in height if height[b] == level) for level in range(max(height.values()) + 1)
    ]


def draw() -> str:
    """The picture as SVG."""
    graph = imports()
    levels = rows(graph)
    place: dict[str, tuple[float, float]] = {}
    for level, boxes in enumerate(levels):
        y = _GAP + (len(levels) - 1 - level) * _ROW
        sides = (
            [b for b in boxes if b.startswith("cluster")],
            [b for b in boxes if not b.startswith("cluster")],
        )
        for side, group in enumerate(sides):
            middle = _WIDTH * (1 + 2 * side) / 4
            left = middle - (len(group) * (_BOX + _GAP) - _GAP) / 2
            for number, box in enumerate(group):
                place[box] = left + number * (_BOX + _GAP), y
    height = _GAP + len(levels) * _ROW
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="sans-serif" font-size="13" text-anchor="middle">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="#777"/></marker></defs>',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
    ]
    for box, others in sorted(reduced(graph).items()):
        for other in sorted(others):
            (x, y), (to_x, to_y) = place[box], place[other]
            parts.append(
                f'<line x1="{x + _BOX / 2:g}" y1="{y + _HIGH:g}" x2="{to_x + _BOX / 2:g}" '
                f'y2="{to_y - 2:g}" stroke="#999" marker-end="url(#tip)"/>'
            )
    for box, (x, y) in sorted(place.items()):
        middle = x + _BOX / 2
        parts += [
            f'<rect x="{x:g}" y="{y:g}" width="{_BOX}" height="{_HIGH}" rx="6" '
            f'fill="{_COLOURS[box.split(".")[0]]}" stroke="#777"/>',
            f'<text x="{middle:g}" y="{y + 23:g}" font-weight="bold">{escape(box)}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    """Write the picture, or check it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="fail if the picture is out of date")
    wanted = draw()
    if not parser.parse_args().check:
        PICTURE.write_text(wanted, encoding="utf-8")
    elif not PICTURE.is_file() or PICTURE.read_text(encoding="utf-8") != wanted:
        raise SystemExit(
            f"{PICTURE.relative_to(ROOT)} is out of date: run python docs/draw_house.py"
        )


if __name__ == "__main__":
    main()
