"""Images that a scoring service may be sent to harm it: small to send, costly or odd to read.

Each is what stands in a request's ``image``. The service has to refuse them, or to answer where
only the metadata are bad; what it does with the requests beside them is in
``tests/test_hostile_images.py`` and ``tests/bench/bench_hostile.py``.
"""

import base64
import io
import random
import struct
import sys
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))

from damage import damaged

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def hostile_image(seed: int) -> str:
    """One of them, drawn by ``seed``: the first seeds give each kind once."""
    make = _KINDS[seed % len(_KINDS)]
    return make(random.Random(seed))


@lru_cache
def _png(
    width: int, height: int, *chunks: tuple[bytes, bytes], says: tuple[int, int] | None = None
) -> bytes:
    """A PNG of black and white zeros, which compress to almost nothing, with more chunks before its
    pixels. ``says`` is the size in its header, where that is not the true one."""
    rows = (b"\0" * (1 + -(-width // 8))) * min(height, 1024)
    packer = zlib.compressobj(9)
    pixels = b"".join(packer.compress(rows) for _ in range(-(-height // 1024))) + packer.flush()
    header = struct.pack(">IIBBBBB", *(says or (width, height)), 1, 0, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return _SIGNATURE + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )


def _uri(content: bytes, form: str = "png") -> str:
    return f"data:image/{form};base64,{base64.b64encode(content).decode()}"


def _photo(form: str, draw: random.Random, **options: object) -> bytes:
    file = io.BytesIO()
    picture = Image.new("RGB", (48, 32), (draw.randrange(256), 90, 40))
    picture.save(file, form, **options)
    return file.getvalue()


def _exif(draw: random.Random) -> str:
    """A rotated photograph with a tag of the wrong type, as cameras and editors leave them."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    Image.new("RGB", (48, 32)).save(file, "JPEG", exif=exif.tobytes())
    return _uri(file.getvalue().replace(b"\x01\x0f\x00\x02", b"\x01\x0f\x00\x05"), "jpeg")


def _canvas(draw: random.Random) -> str:
    """A GIF that says it is 65,535 pixels wide and high."""
    content = _photo("GIF", draw)
    return _uri(content[:6] + b"\xff\xff\xff\xff" + content[10:], "gif")


def _text_bomb(draw: random.Random) -> str:
    """A PNG whose comment unpacks to 64 MiB."""
    packed = zlib.compress(b"\0" * 2**26, 9)
    return _uri(_png(8, 8, (b"zTXt", b"Comment\0\0" + packed)))


def _damaged(form: str) -> Callable[[random.Random], str]:
    return lambda draw: _uri(damaged(_photo(form, draw), draw.randrange(10**6)), form.lower())


_KINDS: tuple[Callable[[random.Random], str], ...] = (
    lambda draw: _uri(_png(1, 60_000)),
    lambda draw: _uri(_png(60_000, 1)),
    lambda draw: _uri(_png(20_000, 20_000)),
    lambda draw: _uri(_png(8, 8, says=(2**31 - 1, 2**31 - 1))),
    lambda draw: _uri(_png(8, 8, (b"eXIf", draw.randbytes(40)))),
    lambda draw: _uri(_photo("JPEG", draw)[: draw.randint(1, 400)], "jpeg"),
    lambda draw: _uri(b""),
    lambda draw: _uri(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "svg+xml"),
    lambda draw: _uri(draw.randbytes(2**20)),
    lambda draw: "!" * 100,
    lambda draw: "http://127.0.0.1:8265/api/jobs",
    lambda draw: "file:///etc/passwd",
    _exif,
    _canvas,
    _text_bomb,
    *map(_damaged, ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")),
)
NUMBER_OF_KINDS = len(_KINDS)
