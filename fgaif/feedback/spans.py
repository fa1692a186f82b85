"""Which characters of a text each sampled token id stands for."""

from collections.abc import Sequence, Set
from itertools import accumulate, takewhile
from operator import lt
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers.decoders import DecodeStream

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class _Pieces(dict[int, str]):
    """What each token id adds to a text that has begun, found when it is first asked for.

    That is U+FFFD where the token's bytes are only parts of characters.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __missing__(self, token_id: int) -> str:
        once, twice = (
            self._backend.decode([token_id] * times, skip_special_tokens=True) for times in (1, 2)
        )
        whole = REPLACEMENT not in twice
        self[token_id] = piece = twice[len(once) :] if whole else REPLACEMENT
        return piece


_pieces_of: "WeakKeyDictionary[Any, _Pieces]" = WeakKeyDictionary()


def special_ids(tokenizer: Any) -> Set[int]:
    """Ids of the special tokens, which are no part of any text."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return {number for number, token in added.items() if token.special}


def token_spans(
    tokenizer: Any,
    token_ids: Sequence[int],
    *,
    specials: Set[int] | None = None,
    expected: str | None = None,
) -> tuple[str, list[tuple[int, int]]]:
    """Decode sampled ids one by one: the text without special tokens, and each token's characters.

    A special token has an empty span. Tokens that only together make a character (byte-level BPE,
    byte fallback) share its span; bytes that never become one share the replacement characters at
    the end. Starts never decrease, and the spans cover the text.

    Args:
        tokenizer: a ``PreTrainedTokenizerFast`` (its Rust backend decodes, without clean-up).
        token_ids: (T,) ids as sampled; they are never re-tokenised.
        specials: what ``special_ids`` gives, for who asks often.
        expected: the text as an engine has decoded it: ids whose own texts make it are not
            decoded again.
    """
    backend = tokenizer.backend_tokenizer
    if specials is None:
        specials = special_ids(tokenizer)
    ordinary = [token_id for token_id in token_ids if token_id not in specials]
    pieces = _pieces(tokenizer, ordinary)
    joined = "".join(pieces)
    whole = REPLACEMENT not in joined
    decoded: str = joined
    if not whole or joined != expected:
        decoded = backend.decode(ordinary, skip_special_tokens=True)
    if whole and joined == decoded:
        ends: list[int] | None = list(accumulate(map(len, pieces)))
    else:
        ends = _stream_ends(backend, ordinary, decoded)
    if ends is None:
        ends = _prefix_ends(backend, ordinary, decoded)
    shared = _shared_spans([*ends[:-1], len(decoded)] if ends else [])
    if len(ordinary) == len(token_ids):
        return decoded, shared
    spans: list[tuple[int, int]] = []
    position = len(decoded)
    for token_id in reversed(token_ids):
        span = (position, position) if token_id in specials else shared.pop()
        spans.append(span)
        position = span[0]
    spans.reverse()
    return decoded, spans


def _pieces(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """What each token adds to the text, if it always adds the same; the first may lose a space."""
    if not token_ids:
        return []
    backend = tokenizer.backend_tokenizer
    known = _pieces_of.get(tokenizer)
    if known is None:
        known = _pieces_of[tokenizer] = _Pieces(backend)
    first: str = backend.decode(token_ids[:1], skip_special_tokens=True)
    return [first, *map(known.__getitem__, token_ids[1:])]


def _stream_ends(backend: Any, token_ids: Sequence[int], decoded: str) -> list[int] | None:
    """Characters that are final after each token; None where bytes go wrong on the way.

    Byte fallback turns a whole run of byte tokens into replacement characters when one of them
    does not fit, characters that were already final among them; the stream then raises.
    """
    stream = DecodeStream(skip_special_tokens=True)
    try:
        chunks = [stream.step(backend, token_id) or "" for token_id in token_ids]
    except Exception:  # the only type that the library raises
        return None
    text = "".join(chunks)
    if not decoded.startswith(text) or decoded[len(text) :].strip(REPLACEMENT):
        return None
    return list(accumulate(map(len, chunks)))


def _prefix_ends(backend: Any, token_ids: Sequence[int], decoded: str) -> list[int]:
    """Like ``_stream_ends`` for any ids, in quadratic time: decode every prefix."""
    ends = [0]
    for count in range(1, len(token_ids) + 1):
        prefix = backend.decode(token_ids[:count], skip_special_tokens=True)
        same = takewhile(lambda pair: pair[0] == pair[1], zip(prefix, decoded, strict=False))
        ends.append(max(ends[-1], sum(1 for _ in same)))
    return ends[1:]


def _shared_spans(ends: Sequence[int]) -> list[tuple[int, int]]:
    """Spans from ends: tokens that complete nothing share the span of the one that does."""
    starts = [0, *ends][:-1]
    if all(map(lt, starts, ends)):
        return list(zip(starts, ends, strict=True))
    spans: list[tuple[int, int]] = []
    position = 0
    for count, end in enumerate(ends, start=1):
        if end > position or count == len(ends):
            spans += [(position, end)] * (count - len(spans))
            position = end
    return spans
