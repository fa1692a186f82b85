"""Import ``actors`` and ``cluster`` of fgaif, although the working directory has packages so named.

Python puts the working directory before what is installed (``python -m``), and Ray does so in every
worker, where a user's own ``cluster/`` would be imported in place of ours.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

_NAMES = ("actors", "cluster")
_ROOT = Path(__file__).parents[1]


class _OwnFirst(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(_ROOT)]) if name in _NAMES else None


def own_packages_first() -> None:
    """Look for these packages where fgaif lies before anywhere else, in this process."""
    if not any(isinstance(finder, _OwnFirst) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OwnFirst())


def shadowed(folder: Path) -> bool:
    """Whether a folder that is not fgaif's own has a module or package of one of these names."""
    return folder.resolve() != _ROOT and any(
        (folder / name).is_dir() or (folder / f"{name}.py").is_file() for name in _NAMES
    )
