"""Reads the images of requests, which are data URIs, base64 or URLs, in a small thread pool."""

import asyncio
import base64
import binascii
import re
from concurrent.futures import ThreadPoolExecutor

from fgaif.config import ServeConfig
from fgaif.data.images import ImageBytes, image_bytes
from fgaif.errors import DataError
from fgaif.serving.api_errors import ApiError, image_problem, invalid
from fgaif.serving.fetch import fetch

MIB = 2**20
_DATA_URI = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)
_URL = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_DECODERS = 2


class ImageReader:
    """Reads and checks images; at most two are decoded at a time."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._max_bytes = int(config.max_body_mib * MIB)
        self._threads = ThreadPoolExecutor(_DECODERS, "decode")

    async def read(self, image: str) -> ImageBytes:
        """Turn the ``image`` of a request into checked content.

        Raises:
            ApiError: 422 naming ``image``, or 413 for a URL with too much behind it.
        """
        if _DATA_URI.match(image) is None and _URL.match(image):
            return await self.check(await self._fetch(image))
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._decode, image)

    async def check(self, content: bytes) -> ImageBytes:
        """Check a file's content; raises ApiError 422 naming ``image``."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._check, content)

    def _decode(self, image: str) -> ImageBytes:
        start = _DATA_URI.match(image)
        try:
            content = base64.b64decode(image[start.end() if start else 0 :], validate=True)
        except (binascii.Error, ValueError):
            raise invalid(
                "neither a data URI (data:image/png;base64,...) nor base64", "image"
            ) from None
        return self._check(content)

    def _check(self, content: bytes) -> ImageBytes:
        try:
            return image_bytes(content, "of the request", self._config.max_image_pixels)
        except DataError as error:
            raise invalid(image_problem(error), "image") from None

    async def _fetch(self, url: str) -> bytes:
        if not self._config.allow_urls:
            raise invalid("URLs are not fetched here; send a data URI or base64", "image")
        try:
            return await fetch(url, max_bytes=self._max_bytes, timeout_s=self._config.url_timeout_s)
        except UnicodeError:
            raise ApiError(422, "invalid_request", "URL: not a URL", field="image") from None
