"""Images by path and content hash: safe to open, decoded late, cached within a byte limit."""

import hashlib
import io
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fgaif.errors import DataError
from fgaif.types import ImageRef

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Formats that are opened; Pillow knows more, some of which start other programs (EPS)."""

MAX_PIXELS = 50_000_000

_JPEG_START, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"

# What Pillow's decoders raise on broken files, besides OSError.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)

_EXIF_ORIENTATION = 0x0112

Picture: TypeAlias = str | Path | bytes | Image.Image
"""An image as Python code has it: a path, a file's bytes, or Pillow's."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFile:
    """A file's bytes and what its header says: Pillow's format name, pixels, EXIF rotation."""

    content: bytes
    format: str
    width: int
    height: int
    upright: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageBytes(ImageRef):
    """An image that came without a file: its content travels along, no path is ever read.

    ``path`` is only a name for messages.
    """

    content: bytes = field(repr=False)


def image_bytes(content: bytes, name: str, max_pixels: int = MAX_PIXELS) -> ImageBytes:
    """Check an image's content like :func:`check_image` and keep it with its hash.

    Raises:
        DataError: the image is broken, of another format or has more than ``max_pixels``.
    """
    _header(name, content, max_pixels)
    return ImageBytes(path=name, sha256=hashlib.sha256(content).hexdigest(), content=content)


def as_image(image: Picture | ImageRef, max_pixels: int = MAX_PIXELS) -> ImageRef:
    """Turn a file, a file's bytes or a Pillow image into a checked image that holds its content.

    A reference is returned as it is.

    Raises:
        DataError: the file cannot be read, or its content as in :func:`image_bytes`.
    """
    if isinstance(image, ImageRef):
        return image
    if isinstance(image, str | Path):
        ref, content = _read(image, None)
        return image_bytes(content, ref.path, max_pixels)
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        _to_rgb(image).save(buffer, "PNG")  # PNG keeps neither EXIF's rotation nor all modes
        image = buffer.getvalue()
    return image_bytes(image, "given", max_pixels)


def image_ref(path: str | Path, root: Path | None = None) -> ImageRef:
    """Return an image's absolute path and the SHA-256 of its content; nothing is decoded.

    Args:
        path: the file, relative to ``root`` where that is given.
        root: folder that the file must lie in, after symbolic links are followed.

    Raises:
        DataError: missing, not a readable file, or outside ``root``.
    """
    return _read(path, root)[0]


def check_image(
    path: str | Path, root: Path | None = None, max_pixels: int = MAX_PIXELS
) -> ImageRef:
    """Like :func:`image_ref`, and see that the image is whole, so that a broken one is found early.

    A JPEG with a good header and its end marker in place is not decoded: Pillow decodes any such
    file, damaged or not, and 14,000 photographs are checked in seconds.

    Raises:
        DataError: as ``image_ref``, or the image is broken or has more than ``max_pixels``.
    """
    ref, content = _read(path, root)
    _header(ref.path, content, max_pixels)
    return ref


def read_image(ref: ImageRef, max_pixels: int = MAX_PIXELS) -> ImageFile:
    """Read an image's file, confirmed to be the content that ``ref`` names, and its header.

    Raises:
        DataError: as ``check_image``, or the file was changed since ``ref`` was made.
    """
    now, content = _read(ref.path, None)
    if now.sha256 != ref.sha256:
        raise DataError(
            f"image {ref.path}: changed since it was listed (SHA-256 {now.sha256[:12]}, was "
            f"{ref.sha256[:12]}); put the old file back or start a new run"
        )
    return _header(ref.path, content, max_pixels)


def load_image(ref: ImageRef, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image to RGB, upright (EXIF) and on white where it is transparent.

    The size is read from the header and checked before anything is decoded.

    Raises:
        DataError: missing, broken, unknown format, or more than ``max_pixels`` pixels.
    """
    content = ref.content if isinstance(ref, ImageBytes) else _read(ref.path, None)[1]
    return _decode(ref.path, content, max_pixels, _to_rgb)


class PixelCache:
    """Arrays by key, at most ``max_bytes`` in all; the least recently used go first."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._arrays: OrderedDict[str, NDArray[Any]] = OrderedDict()
        self.nbytes = 0

    def get(self, key: str, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """Return the array of ``key``, made by ``make()`` if it is not there.

        An array larger than the limit is returned but not kept.
        """
        if key in self._arrays:
            self._arrays.move_to_end(key)
            return self._arrays[key]
        array = np.asarray(make())
        if array.nbytes <= self._max_bytes:
            self._arrays[key] = array
            self.nbytes += array.nbytes
            while self.nbytes > self._max_bytes:
                self.nbytes -= self._arrays.popitem(last=False)[1].nbytes
        return array

    def __len__(self) -> int:
        return len(self._arrays)


def _read(path: str | Path, root: Path | None) -> tuple[ImageRef, bytes]:
    try:
        resolved = ((root or Path()) / path).resolve()
        outside = root is not None and not resolved.is_relative_to(root.resolve())
        content = b"" if outside else resolved.read_bytes()
    except FileNotFoundError as error:
        raise DataError(
            f"image {path}: no such file; correct the path or set data.image_root"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:  # a folder, a loop of links, a NUL
        raise DataError(f"image {str(path)!r}: cannot be read: {error}") from error
    if outside:
        raise DataError(f"image {path}: lies outside {root}; move it there or set data.image_root")
    return ImageRef(path=str(resolved), sha256=hashlib.sha256(content).hexdigest()), content


def _decode(path: str, content: bytes, max_pixels: int, decode: Callable[[Image.Image], T]) -> T:
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height <= max_pixels:
                return decode(image)
    except (*_BROKEN, Image.DecompressionBombError) as error:
        raise DataError(
            f"image {path}: cannot be decoded ({error}); give a whole file, one of "
            f"{', '.join(FORMATS)}"
        ) from error
    raise DataError(
        f"image {path}: {width} x {height} pixels, more than data.max_image_pixels = "
        f"{max_pixels}; shrink it or raise the limit"
    )


def _header(path: str, content: bytes, max_pixels: int) -> ImageFile:
    whole_jpeg = content.startswith(_JPEG_START) and content.endswith(_JPEG_END)

    def header(image: Image.Image) -> ImageFile:
        if not whole_jpeg:
            _to_rgb(image)
        return ImageFile(
            content=content,
            format=image.format or "",
            width=image.width,
            height=image.height,
            upright=image.getexif().get(_EXIF_ORIENTATION, 1) in (0, 1),
        )

    return _decode(path, content, max_pixels, header)


def _to_rgb(image: Image.Image) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return upright.convert("RGB")
