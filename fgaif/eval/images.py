"""Images that benchmark files name, found in the user's folder."""

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

from fgaif.data.images import check_image
from fgaif.eval.answers import image_finder, image_name
from fgaif.types import ImageRef


class ImageFolder:
    """A folder's images by path or, wherever they lie in it, by name (``image_name``).

    The files are listed once, when a path does not lead to one.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def find(self, name: str) -> Path:
        """Return the path in the folder; ``name`` itself where nothing is found."""
        if (self.root / name).is_file():
            return Path(name)
        return self._by_name.get(self._name_of(image_name(name)), Path(name))

    def check(self, name: str) -> ImageRef:
        """Find an image and see that it is whole.

        Raises:
            DataError: missing, broken, too large, or outside the folder.
        """
        return check_image(self.find(name), self.root)

    @cached_property
    def _name_of(self) -> Callable[[str], str]:
        return image_finder(self._by_name)

    @cached_property
    def _by_name(self) -> Mapping[str, Path]:
        files = sorted(path for path in self.root.rglob("*") if path.is_file())
        return {image_name(path.name): path.relative_to(self.root) for path in files}
