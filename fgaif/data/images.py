"""Images by path and content hash: safe to open, decoded late, cached within a byte limit."""

import hashlib
import io
import stat
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fgaif.errors import DataError
from fgaif.types import ImageRef

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Formats that are opened; Pillow knows more, some of which start other programs (EPS)."""

MAX_PIXELS = 50_000_000

MAX_ASPECT = 50
"""Longer side over shorter side. Image processors scale the shorter side to a few hundred pixels:
a strip of 1 x 60,000 pixels in a file of 200 bytes would become gigabytes."""

MAX_BYTES = 512 * 2**20
"""Larger files are not read."""

_JPEG_START, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_PNG_START = b"\x89PNG\r\n\x1a\n"
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image with this EXIF orientation upright."""
_SIDEWAYS = (5, 6, 7, 8)
"""Orientations of which the file's height is the image's width."""
_SHOWN = 200

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


def image_size(ref: ImageRef, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Height and width of an image as :func:`load_image` gives it, from the header alone.

    Raises:
        DataError: as ``load_image``.
    """
    content = ref.content if isinstance(ref, ImageBytes) else _read(ref.path, None)[1]

    def upright(image: Image.Image) -> tuple[int, int]:
        turned = _orientation(image) in _SIDEWAYS
        return (image.width, image.height) if turned else (image.height, image.width)

    return _decode(ref.path, content, max_pixels, upright)


def load_image(ref: ImageRef, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image to RGB, upright (EXIF) and on white where it is transparent.

    The size is read from the header and checked before anything is decoded.

    Raises:
        DataError: missing, broken, unknown format, or more than ``max_pixels`` pixels.
    """
    content = ref.content if isinstance(ref, ImageBytes) else _read(ref.path, None)[1]
    return decode_image(ref.path, content, max_pixels)


def decode_image(name: str, content: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a file's content as :func:`load_image` does; ``name`` is for messages."""
    return _decode(name, content, max_pixels, _to_rgb)


class PixelCache:
    """Groups of arrays by key, at most ``max_bytes`` in all; the least recently used go first."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._groups: OrderedDict[str, Mapping[str, NDArray[Any]]] = OrderedDict()
        self.nbytes = 0

    def get(
        self, key: str, make: Callable[[], Mapping[str, NDArray[Any]]]
    ) -> Mapping[str, NDArray[Any]]:
        """Return the group of ``key``, made by ``make()`` if it is not there.

        A group larger than the limit is returned but not kept.
        """
        if key in self._groups:
            self._groups.move_to_end(key)
            return self._groups[key]
        group = make()
        if (size := _nbytes(group)) <= self._max_bytes:
            self._groups[key] = group
            self.nbytes += size
            while self.nbytes > self._max_bytes:
                self.nbytes -= _nbytes(self._groups.popitem(last=False)[1])
        return group

    def __len__(self) -> int:
        return len(self._groups)


def _nbytes(group: Mapping[str, NDArray[Any]]) -> int:
    return sum(array.nbytes for array in group.values())


def _read(path: str | Path, root: Path | None) -> tuple[ImageRef, bytes]:
    shown = _shown(path)
    try:
        resolved = ((root or Path()) / path).resolve()
        outside = root is not None and not resolved.is_relative_to(root.resolve())
        content = b"" if outside else _content(resolved)
    except FileNotFoundError as error:
        raise DataError(f"image {shown}: no such file; {_advice(str(path))}") from error
    except (OSError, RuntimeError, ValueError) as error:  # a folder, a loop of links, a NUL
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"image {shown!r}: cannot be read: {why}; {_advice(str(path))}") from error
    if outside:
        raise DataError(f"image {shown}: lies outside {root}; move it there or set data.image_root")
    return ImageRef(path=str(resolved), sha256=hashlib.sha256(content).hexdigest()), content


def _content(path: Path) -> bytes:
    """The file's bytes, if it is a file (no pipe, which would never end) and not too large."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("a folder" if stat.S_ISDIR(status.st_mode) else "not a file")
    if status.st_size > MAX_BYTES:
        raise ValueError(f"{status.st_size:,} bytes, more than {MAX_BYTES:,}")
    return path.read_bytes()


def _shown(path: str | Path) -> str:
    """A path as messages show it: not the megabytes of an image that stands in its place."""
    text = str(path)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text):,} characters)"


def _advice(path: str) -> str:
    scheme = path.partition(":")[0].lower()
    if scheme == "data" or len(path) > 4096:
        return "images inside a row are not read: save it to a file and give its path"
    if scheme in ("http", "https", "s3", "gs", "hf"):
        return "addresses are not fetched: download it and give its path"
    if scheme == "file":
        return "give a path, without file://"
    if "\\" in path:
        return "paths are written with /"
    return "correct the path or set data.image_root"


def _decode(path: str, content: bytes, max_pixels: int, decode: Callable[[Image.Image], T]) -> T:
    """Open an image, check its size by its header, and decode it, if need be without metadata."""
    try:
        return _opened(path, content, max_pixels, decode)
    except DataError:
        raise
    except Exception as error:  # decoders of broken files raise whatever they like
        bare = _bare_png(content)
        if bare is not None and bare != content:
            return _decode(path, bare, max_pixels, decode)
        raise DataError(
            f"image {_shown(path)}: cannot be decoded ({str(error) or type(error).__name__}); give "
            f"a whole file, one of {', '.join(FORMATS)}"
        ) from error


def _opened(path: str, content: bytes, max_pixels: int, decode: Callable[[Image.Image], T]) -> T:
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise DataError(
                f"image {_shown(path)}: {width} x {height} pixels, more than "
                f"data.max_image_pixels = {max_pixels}; shrink it or raise the limit"
            )
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise DataError(
                f"image {_shown(path)}: {width} x {height} pixels, a strip of more than "
                f"{MAX_ASPECT} to 1; crop it"
            )
        return decode(image)


def _bare_png(content: bytes) -> bytes | None:
    """A PNG without the chunks that hold metadata, which may be damaged beside whole pixels."""
    if not content.startswith(_PNG_START):
        return None
    kept, at = [_PNG_START], len(_PNG_START)
    while at + 12 <= len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        name, end = content[at + 4 : at + 8], at + 12 + length
        if name[:1].isupper() or name == b"tRNS":  # critical chunks begin with a capital
            kept.append(content[at:end])
        at = end
    return b"".join(kept)


def _header(path: str, content: bytes, max_pixels: int) -> ImageFile:
    whole_jpeg = content.startswith(_JPEG_START) and content.endswith(_JPEG_END)

    def header(image: Image.Image) -> ImageFile:
        orientation = _orientation(image)
        if not whole_jpeg:
            _to_rgb(image)
        return ImageFile(
            content=content,
            format=image.format or "",
            width=image.width,
            height=image.height,
            upright=orientation not in _UPRIGHT,
        )

    return _decode(path, content, max_pixels, header)


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation; 1, upright, where the metadata are damaged."""
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # metadata of any kind; the pixels count
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    turn = _UPRIGHT.get(_orientation(image))
    upright = _eight_bits(image)
    if turn is not None:
        upright = upright.transpose(turn)
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return upright.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey images of more than 8 bits a pixel scaled to 8, where Pillow would clip them to white.

    16 bits keep their upper half. Floating-point pixels are taken for shares of 1 if none is
    larger, else for 0 to 255.

    Raises:
        ValueError: pixels outside the range.
    """
    if not image.mode.startswith("I") and image.mode != "F":
        return image
    with np.errstate(invalid="ignore"):  # a NaN is refused below
        pixels = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        top = 1.0 if pixels.max(initial=0.0) <= 1 else 255.0
        scaled = pixels * (255 / top)
    else:
        top = 65535.0
        scaled = np.floor(pixels / 256)
    if not (np.isfinite(pixels).all() and pixels.min(initial=0.0) >= 0 and pixels.max() <= top):
        raise ValueError(f"pixels of mode {image.mode} outside 0 to {top:g}; save it with 8 bits")
    return Image.fromarray(np.round(scaled).astype(np.uint8), "L")
