"""Damage to files: by bytes, and by what is special in text formats. Deterministic by the seed."""

import random

TOKENS = (
    b"null", b"NaN", b"Infinity", b"-1", b"1e999", b"18446744073709551616", b'""', b"[]", b"{}",
    b"true", b"\\ud800", b"\xff", b"\x00", b"\xef\xbb\xbf", b"\r\n", b"\n", b"\x1b[31m", b"[/red]",
    b"&a", b"*a", b"!!python/object:os.system", b"../../etc/passwd", b"9" * 400, b"[" * 3000,
    b"data:image/png;base64," + b"A" * 2000, b"version https://git-lfs.github.com/spec/v1\n",
)  # fmt: skip
"""What readers stumble over, put in anywhere."""


def damaged(content: bytes, seed: int) -> bytes:
    """The content with one to four faults, drawn by ``seed``."""
    draw = random.Random(seed)
    for _ in range(draw.randint(1, 4)):
        content = draw.choice(_FAULTS)(content, draw)
    return content


def _at(content: bytes, draw: random.Random) -> int:
    return draw.randrange(len(content) + 1)


def _flip(content: bytes, draw: random.Random) -> bytes:
    if not content:
        return content
    at = draw.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]


def _overwrite(content: bytes, draw: random.Random) -> bytes:
    at, new = _at(content, draw), draw.randbytes(draw.randint(1, 8))
    return content[:at] + new + content[at + len(new) :]


def _cut(content: bytes, draw: random.Random) -> bytes:
    return content[: _at(content, draw)]


def _drop(content: bytes, draw: random.Random) -> bytes:
    start, end = sorted((_at(content, draw), _at(content, draw)))
    return content[:start] + content[end:]


def _double(content: bytes, draw: random.Random) -> bytes:
    start, end = sorted((_at(content, draw), _at(content, draw)))
    return content[:end] + content[start:end] + content[end:]


def _token(content: bytes, draw: random.Random) -> bytes:
    at = _at(content, draw)
    return content[:at] + draw.choice(TOKENS) + content[at:]


def _replace_word(content: bytes, draw: random.Random) -> bytes:
    words = content.split(b" ")
    words[draw.randrange(len(words))] = draw.choice(TOKENS)
    return b" ".join(words)


_FAULTS = (_flip, _overwrite, _cut, _drop, _double, _token, _replace_word)
