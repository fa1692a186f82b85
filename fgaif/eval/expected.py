"""Is a set-up that of published figures? What a result says of itself, held against a table.

``expected.json`` holds per benchmark the digests of the official files and of known lists of
images, the prompt, the length limit, and published figures with their source. docs/expected.md is
the same for people.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from fgaif.errors import DataError
from fgaif.eval.answers import image_name
from fgaif.eval.benchmark_results import benchmarks_in, figure_in
from fgaif.types import Json

Verdict = Literal["same", "differs", "not known"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that a figure depends on: what the result says, and what published ones had."""

    what: str
    found: str
    expected: str
    verdict: Verdict


def load_expected() -> Json:
    """Return the table of ``expected.json`` by benchmark."""
    text = (files("fgaif.eval") / "expected.json").read_text(encoding="utf-8")
    table: Json = json.loads(text)
    return table


def image_list_digest(images: Iterable[str]) -> str:
    """Number of distinct images, and a digest of their names (``image_name``), sorted, by line."""
    names = sorted({image_name(image) for image in images if image})
    return f"{len(names)} {hashlib.sha256(chr(10).join(names).encode()).hexdigest()[:16]}"


def check_setup(folder: Path) -> Json:
    """Compare every result of a folder with the table.

    Returns:
        Per benchmark ``checks`` (of ``Check``), ``remarks`` (warnings, and what was left out), and
        ``published``: models with their source and figures, each beside the one found here.

    Raises:
        DataError: there are no results, or one cannot be read.
    """
    table = load_expected()
    found: Json = {}
    for name in benchmarks_in(folder):
        path = folder / f"{name}.json"
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            about, counts = tree["provenance"], tree["counts"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a readable result ({error}); score again") from error
        entry = table.get(name, {})
        left_out = [
            f"{count} {reason.replace('_', ' ')}" for reason, count in counts.items() if count
        ]
        found[name] = {
            "about": entry.get("about", "no published figures are in the table"),
            "checks": [asdict(check) for check in _checks(entry, tree, about)],
            "remarks": [*left_out, *tree.get("warnings", [])],
            "published": [
                {
                    "model": row["model"],
                    "source": row["source"],
                    "figures": {
                        key: {"published": value, "here": figure_in(tree, key)}
                        for key, value in row["figures"].items()
                    },
                }
                for row in entry.get("published", [])
            ],
        }
    return found


def _checks(entry: Json, tree: Json, about: Mapping[str, str]) -> Iterator[Check]:
    for what, digests in entry.get("files", {}).items():
        yield _check(what, about.get(what), digests, "the official file")
    if known := entry.get("images"):
        yield _check("images", about.get("images"), list(known), " or ".join(known.values()))
    if items := entry.get("items"):
        yield _check("items", str(tree["items"]), [str(items)], str(items))
    if asked := entry.get("asked"):
        yield _check("prompt", about.get("asked"), asked, " or ".join(map(repr, asked)))
    if limit := entry.get("max_new_tokens"):
        yield _check("length limit", about.get("max_new_tokens"), [str(limit)], f"{limit} tokens")
    if entry:
        yield _check("decoding", about.get("decoding"), ["greedy"], "greedy")
    for what in ("judge", "prompt", "verifier", "extractor", "corruption"):
        if what in about:
            yield Check(
                what=what if what != "prompt" else "judge's prompt",
                found=about[what],
                expected="that of the figures you compare with",
                verdict="not known",
            )


def _check(what: str, found: str | None, known: list[str], said: str) -> Check:
    verdict: Verdict = "not known" if found is None else "same" if found in known else "differs"
    return Check(what=what, found=found or "not said", expected=said, verdict=verdict)


def setup_lines(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Write out what ``check_setup`` found: lines, each with a style for the console."""
    styles = {"same": "green", "differs": "red", "not known": "yellow"}
    for name, entry in found.items():
        yield f"{name}: {entry['about']}", "bold"
        for check in entry["checks"]:
            line = f"  {check['what']}: {check['verdict']}"
            if check["verdict"] != "same":
                line += f" (here {check['found']!r}, expected {check['expected']})"
            yield line, styles[check["verdict"]]
        for remark in entry["remarks"]:
            yield f"  beware: {remark}", "yellow"
        for row in entry["published"]:
            figures = ", ".join(
                f"{key} {figure['published']:g} ({_shown(figure['here'])})"
                for key, figure in row["figures"].items()
            )
            yield f"  {row['model']}: {figures} [{row['source']}]", ""
        if entry["published"]:
            yield "  in parentheses: here", "dim"


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
