"""Images as data URIs: encoded anew, without metadata, shrunk where needed, each once."""

import asyncio
import base64
import io
from collections import OrderedDict

from PIL import Image

from fgaif.data.images import MAX_PIXELS, decode_image, read_image
from fgaif.types import ImageRef

# What every endpoint takes.
_TYPES = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}

_MAX_BYTES = 4 * 2**20
"""A file larger than this is encoded anew whatever its size in pixels."""

_PNG_PIXELS = 512 * 512
"""A PNG up to this size stays one (drawings, text); above it a JPEG is a tenth of the bytes."""


def data_uri(
    ref: ImageRef, max_side: int, max_pixels: int = MAX_PIXELS, *, original: bool = False
) -> str:
    """Return an image as a data URI with at most ``max_side`` pixels on its longer side.

    It is encoded anew from the pixels that every role sees, so that no metadata (place, camera,
    date) leaves the machine. ``original`` sends a small enough upright JPEG, PNG or WebP as it is.

    Raises:
        DataError: missing, changed since it was listed, broken, or more than ``max_pixels``.
    """
    file = read_image(ref, max_pixels)
    small = max(file.width, file.height) <= max_side
    as_it_is = original and small and file.upright and len(file.content) <= _MAX_BYTES
    if as_it_is and file.format in _TYPES:
        return _uri(_TYPES[file.format], file.content)
    image = decode_image(ref.path, file.content, max_pixels)
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if file.format == "PNG" and image.width * image.height <= _PNG_PIXELS:
        image.save(buffer, "PNG")
        return _uri("image/png", buffer.getvalue())
    image.save(buffer, "JPEG", quality=95 if small else 90)
    return _uri("image/jpeg", buffer.getvalue())


def _uri(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


class DataUris:
    """Data URIs by content, made in threads, at most ``max_bytes`` kept; oldest use goes first.

    The questions about one image come together: it is encoded once for all that wait. Encoded are
    at most ``threads`` at a time, because each holds a decoded image.
    """

    def __init__(
        self,
        max_side: int,
        max_pixels: int = MAX_PIXELS,
        *,
        max_bytes: int = 64 * 2**20,
        threads: int = 4,
        original: bool = False,
    ) -> None:
        self._original = original
        self._max_side = max_side
        self._max_pixels = max_pixels
        self._max_bytes = max_bytes
        self._threads = asyncio.Semaphore(threads)
        self._kept: OrderedDict[str, str] = OrderedDict()
        self._making: dict[str, asyncio.Task[str]] = {}
        self.nbytes = 0
        self.made = 0

    async def get(self, ref: ImageRef) -> str:
        """Return the image's data URI; raises like :func:`data_uri`."""
        if (known := self._kept.get(ref.sha256)) is not None:
            self._kept.move_to_end(ref.sha256)
            return known
        task = self._making.get(ref.sha256)
        if task is None:
            task = self._making[ref.sha256] = asyncio.create_task(self._make(ref))
            task.add_done_callback(lambda _: self._making.pop(ref.sha256))
        # Whoever stops waiting does not take the image from the others.
        return await asyncio.shield(task)

    async def _make(self, ref: ImageRef) -> str:
        async with self._threads:
            uri = await asyncio.to_thread(
                data_uri, ref, self._max_side, self._max_pixels, original=self._original
            )
        self.made += 1
        if len(uri) <= self._max_bytes:
            self._kept[ref.sha256] = uri
            self.nbytes += len(uri)
            while self.nbytes > self._max_bytes:
                self.nbytes -= len(self._kept.popitem(last=False)[1])
        return uri
