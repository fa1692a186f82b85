import json
import random
import re
from collections.abc import Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from fgaif.config import SegmentConfig
from fgaif.errors import DataError
from fgaif.feedback import segment
from fgaif.feedback import spans as decoding
from fgaif.feedback.segment import (
    segment_response,
    segment_responses,
    settled_offsets,
    split,
    split_offsets,
)
from fgaif.feedback.spans import token_spans
from fgaif.types import FinishReason, ImageRef, Prompt, Response

CORPUS = [
    "There is a red moon, and a café with 日本語 on its 😀 sign – the naïve text.",
    "The image shows two dogs; one of them is brown, the other one is white and small!",
]
SPECIALS = ["<unk>", "<s>", "</s>", "<image>"]


@cache
def byte_level() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")


@cache
def metaspace() -> PreTrainedTokenizerFast:
    """As Llama's: a word begins with its space, unknown characters fall back to bytes."""
    draft = Tokenizer(models.BPE())
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    draft.normalizer = normalizers.Sequence(spaces)
    trainer = trainers.BpeTrainer(vocab_size=150, limit_alphabet=40, show_progress=False)
    draft.train_from_iterator([word for text in CORPUS for word in text.split()], trainer)
    trained = json.loads(draft.to_str())["model"]
    pieces = sorted(trained["vocab"], key=trained["vocab"].__getitem__)
    names = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    bpe = Tokenizer(
        models.BPE(
            vocab={name: number for number, name in enumerate(dict.fromkeys(names))},
            merges=[tuple(merge) for merge in trained["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    bpe.normalizer = draft.normalizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    bpe.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    bpe.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")


TOKENIZERS = pytest.mark.parametrize("tokenizer", [byte_level(), metaspace()], ids=["byte", "meta"])


def respond(ids: list[int], text: str, finish: FinishReason = "length") -> Response:
    return Response(
        prompt=Prompt(id="p", image=ImageRef(path="a.png", sha256="0" * 64), text="Describe."),
        sample=0,
        text=text,
        token_ids=np.array(ids, dtype=np.int64),
        rollout_logprobs=np.zeros(len(ids), dtype=np.float32),
        finish=finish,
        policy_version=0,
    )


def say(tokenizer: PreTrainedTokenizerFast, text: str) -> Response:
    """A response that ends: the tokens of a text, then EOS."""
    ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    return respond(ids, tokenizer.decode(ids, skip_special_tokens=True), "stop")


def pieces(text: str, min_words: int = 5) -> list[str]:
    return [text[start:end].strip() for start, end in pairwise(split_offsets(text, min_words))]


@pytest.mark.parametrize(
    "expected",
    [
        # The reference's own examples: the last short item and a short tail are never split off.
        ["Additionally, there are two chairs near the table,", "one on the left side of the room."],
        [
            "A man is riding a red bicycle down the street, cars, buses,",
            "and trucks can be seen in the far distance behind him.",
        ],
        ["The image features a dog sitting on a couch, a cat, and a ball."],
        [
            "The room has a bed, a lamp, a desk, a chair,",
            "and a television that is mounted on the wall near the window.",
        ],
    ],
)
def test_reference_examples(expected: list[str]) -> None:
    assert pieces(" ".join(expected)) == expected


@pytest.mark.parametrize(
    "expected",
    [
        ["There is a dog.", "It is brown."],
        ["there is a small red moon .", "from the moon the house is left ."],
        ["Is there a dog?", "Yes!", "No.", "There is one."],
        [
            "Mr. Smith and Dr. J. F. Kennedy stand near St. Paul, vs. others, e.g. a car.",
            "He waits.",
        ],
        ["It costs 3.5 dollars at no. 5.", "2 cats are there."],
        ["The letter on it is a B.", "The sign is red."],
        ['The sign reads "Stop."', "A man said “Look!” and ran.", "(He is tall.)", "The end."],
        [
            "There are cats, dogs, etc. on the table.",
            "It is 10 a.m. in the U.S. today, etc.",
            "Ok.",
        ],
        ["Wait... there is more…  and more.", "The end...", "Or not?!", "It is."],
        [
            "Objects:",
            "- a red dog",
            "- a blue cat",
            "1. A dog sits.",
            "2. A cat sleeps.",
            "3) A bird",
        ],
        ["A photo\nof a dog on a wall.", "A title", "The picture"],
    ],
)
def test_sentences(expected: list[str]) -> None:
    glue = "\n\n" if "A title" in expected else "\n" if "Objects:" in expected else " "
    assert pieces(glue.join(expected)) == expected


def test_white_space_belongs_to_the_piece_before_and_the_first_starts_at_zero() -> None:
    assert split_offsets("  A dog. \n\n A cat.\n") == [0, 12, 19]
    assert split_offsets("") == [0]
    assert split_offsets(" \n ") == [0, 3]


def test_min_words_is_where_a_piece_may_end() -> None:
    text = "There is a moon, from the sun the moon is left."
    assert pieces(text, 5) == [text]  # the first piece has four words
    assert pieces(text, 4) == ["There is a moon,", "from the sun the moon is left."]


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("sub-sentence", ["One two three four five, ", "six seven a b c d e f. ", "Two."]),
        ("sentence", ["One two three four five, six seven a b c d e f. ", "Two."]),
        ("response", ["One two three four five, six seven a b c d e f. Two."]),
    ],
)
def test_a_unit_is_a_piece(unit: Any, expected: list[str]) -> None:
    words = SegmentConfig(unit=unit).least_words
    text = "".join(expected)
    offsets = [0, *accumulate(map(len, expected))]
    assert split_offsets(text, words) == offsets
    assert split_offsets("", words) == [0]
    longer = segment.settled_offsets(text + " Three", words)
    assert longer == (offsets[:-1] if unit != "response" else [0])


@TOKENIZERS
def test_spans_are_the_characters_of_each_token(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "a café, 日本語 🐶."
    ids = tokenizer.encode(text, add_special_tokens=False)
    decoded, spans = token_spans(tokenizer, ids)
    assert decoded == text
    for token_id, (start, end) in zip(ids, spans, strict=True):
        alone = tokenizer.decode([token_id])
        if "\N{REPLACEMENT CHARACTER}" not in alone:
            assert alone.strip() == text[start:end].strip()
        else:
            assert start < end
    emoji = [span for span in spans if text[span[0] : span[1]].strip() == "🐶"]
    assert len(emoji) > 1  # its bytes are several tokens, which share its span
    assert len(set(emoji)) == 1


@TOKENIZERS
def test_special_tokens_have_empty_spans(tokenizer: PreTrainedTokenizerFast) -> None:
    dog, image = tokenizer.encode("dog"), tokenizer.convert_tokens_to_ids("<image>")
    text, spans = token_spans(tokenizer, [image, *dog, image])
    assert text == "dog"
    assert (spans[0], spans[-1]) == ((0, 0), (3, 3))


def test_byte_fallback_that_goes_wrong_late_still_gives_spans() -> None:
    """The run <37><9D> is no UTF-8: the 7, first decoded as such, becomes a replacement too."""
    tokenizer = metaspace()
    ids = tokenizer.convert_tokens_to_ids(["a", "<0x37>", "<0x9D>", "▁is"])
    text, spans = token_spans(tokenizer, ids)
    assert text == "a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER} is"
    assert spans[0] == (0, 1)
    assert spans[-1][1] == len(text)


@TOKENIZERS
def test_each_segment_ends_with_the_last_token_that_begins_in_it(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    response = say(
        tokenizer, "There is a red moon, and the other dog is white. The text shows one."
    )
    segments = segment_response(response, tokenizer)
    texts = [response.text[s.char_start : s.char_end] for s in segments]
    assert texts == ["There is a red moon, ", "and the other dog is white. ", "The text shows one."]
    read = [
        tokenizer.decode(response.token_ids[s.token_start : s.token_end].tolist()).strip()
        for s in segments
    ]
    assert read == ["There is a red moon,", "and the other dog is white.", "The text shows one."]
    assert segments[-1].token_end == len(response.token_ids) - 1  # EOS belongs to none
    assert [s.index for s in segments] == [0, 1, 2]


def test_a_piece_in_which_no_token_begins_joins_the_one_before() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("A dog", add_special_tokens=False)
    merged = tokenizer.backend_tokenizer
    merged.add_tokens([AddedToken(". No. ", normalized=False)])
    ids = [*ids, tokenizer.convert_tokens_to_ids(". No. "), *tokenizer.encode("One is.")]
    segments = segment_response(respond(ids, "A dog. No. One is."), tokenizer)
    assert [(s.char_start, s.char_end) for s in segments] == [(0, 11), (11, 18)]
    assert segments[0].token_end == segments[1].token_start


def test_an_engine_may_keep_the_first_space_and_leave_out_an_unfinished_character() -> None:
    tokenizer = metaspace()
    ids = tokenizer.encode("The dog. The moon.", add_special_tokens=False)
    plain = segment_response(respond(ids, "The dog. The moon."), tokenizer)
    spaced = segment_response(respond(ids, " The dog. The moon."), tokenizer)
    assert [s.token_end for s in spaced] == [s.token_end for s in plain]
    assert [s.char_end for s in spaced] == [10, 19]
    cut = [*ids, tokenizer.convert_tokens_to_ids("<0xF0>")]
    for text in ("The dog. The moon.", "The dog. The moon.\N{REPLACEMENT CHARACTER}"):
        segments = segment_response(respond(cut, text), tokenizer)
        assert (segments[-1].char_end, segments[-1].token_end) == (len(text), len(cut))


def test_a_text_of_other_ids_is_refused() -> None:
    response = respond(byte_level().encode("A dog."), "A cat.")
    with pytest.raises(DataError, match=r"p#0: its text 'A cat\.' is not .* 'A dog\.'"):
        segment_response(response, byte_level())


def check_partition(tokenizer: PreTrainedTokenizerFast, response: Response, min_words: int) -> None:
    segments = segment_response(response, tokenizer, min_words)
    if not response.text:
        assert segments == ()
        return
    tokens = len(response.token_ids) - (response.finish == "stop")
    assert [s.index for s in segments] == list(range(len(segments)))
    for spans, total in (
        ([(s.char_start, s.char_end) for s in segments], len(response.text)),
        ([(s.token_start, s.token_end) for s in segments], tokens),
    ):
        assert [spans[0][0], spans[-1][1]] == [0, total]
        assert all(start < end for start, end in spans)
        assert all(first[1] == second[0] for first, second in pairwise(spans))


SENTENCES = st.lists(
    st.sampled_from([*CORPUS, "</s>", "<image>", ". ", ", ", "\n\n", " ", "...", "1. ", "é", "😀"])
    | st.text(max_size=12),
    max_size=8,
).map("".join)


@TOKENIZERS
@settings(max_examples=150, deadline=None)
@given(text=SENTENCES, min_words=st.integers(1, 6))
def test_spans_partition_any_text(
    tokenizer: PreTrainedTokenizerFast, text: str, min_words: int
) -> None:
    check_partition(tokenizer, say(tokenizer, text), min_words)


@TOKENIZERS
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_spans_partition_any_ids(tokenizer: PreTrainedTokenizerFast, data: st.DataObject) -> None:
    """Sampled ids need not be the encoding of any text, and may stop within a character."""
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=25))
    text, spans = token_spans(tokenizer, ids)
    assert text == tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True)
    assert all(first[0] <= second[0] for first, second in pairwise(spans))
    assert {c for span in spans for c in range(*span)} == set(range(len(text)))
    check_partition(tokenizer, respond(ids, text), 5)


@settings(max_examples=200, deadline=None)
@given(text=SENTENCES, min_words=st.integers(1, 6))
def test_offsets_rise_from_zero_to_the_end_and_stand_at_words(text: str, min_words: int) -> None:
    offsets = split_offsets(text, min_words)
    assert (offsets[0], offsets[-1]) == (0, len(text))
    assert all(start < end for start, end in pairwise(offsets))
    assert all(text[at - 1].isspace() and not text[at].isspace() for at in offsets[1:-1])


def test_many_responses_give_what_each_gives_alone() -> None:
    responses = [say(byte_level(), text) for text in (*CORPUS, "", "No.")]
    assert segment_responses(responses, byte_level()) == [
        segment_response(response, byte_level()) for response in responses
    ]


ODD = [
    "é", "日本語", "😀", " – ", "\n\n", "\n- ", "1. ", "e.g. ", "Dr. J. F. ", "...", "\t", "  ",
    '"No." ', "“Look!” ", "*a.* ", "(so.) ", "no. 5 ", "; ", "\x1c", "\u3000", "</s>",
    "<image>", "\N{REPLACEMENT CHARACTER}",
]  # fmt: skip


def wild_ids(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> list[int]:
    """Ids of any kind, unknown ones too, or of a text that is cut and has other ids put in."""
    anything = range(len(tokenizer) + 3)
    if rng.random() < 0.2:
        return rng.choices(anything, k=rng.randint(1, 40))
    words = [f"{word} " for text in CORPUS for word in text.split()]
    odd = rng.choice([0.0, 0.05, 0.5])
    text = "".join(rng.choice(ODD if rng.random() < odd else words) for _ in range(40))
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    for _ in range(rng.choice([0, 0, 2])):
        ids.insert(rng.randint(0, len(ids)), rng.choice([*anything[:4], *anything]))
    if rng.random() < 0.1:
        ids.insert(0, anything[-1])  # what comes second then loses its space
    return ids[: rng.randint(1, len(ids))]


@TOKENIZERS
def test_shortcuts_give_what_the_plain_definitions_give(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plainly: every token is decoded after those before it, every word and token looked at."""
    rng = random.Random(0)
    cases = []
    for _ in range(300):
        ids = wild_ids(tokenizer, rng)
        text = token_spans(tokenizer, ids)[0]
        spaced = rng.choice(["", "", " "]) + text
        cases.append((ids, respond(ids, spaced), rng.randint(1, 6), rng.randint(0, len(text))))

    def found() -> list[Any]:
        return [
            (
                token_spans(tokenizer, ids),
                segment_response(response, tokenizer, min_words),
                settled_offsets(response.text[:cut], min_words),
            )
            for ids, response, min_words, cut in cases
        ]

    def tokens_before(text: str, spans: Sequence[tuple[int, int]], offset: int, first: int) -> int:
        begins = (segment._begin(text, *span) < offset for span in spans[first:])
        return next((first + k for k, begun in enumerate(begins) if not begun), len(spans))

    quick = found()
    with monkeypatch.context() as plain:
        plain.setattr(decoding, "_pieces", lambda *_: ["\N{REPLACEMENT CHARACTER}"])
        plain.setattr(segment, "_tokens_before", tokens_before)
        plain.setattr(segment, "_CUT", re.compile(r"\s+"))
        assert found() == quick
    joined = ["".join(decoding._pieces(tokenizer, ids)) for ids, *_ in cases]
    shortcuts = sum(text == whole[0] for text, (whole, *_) in zip(joined, quick, strict=True))
    assert 50 < shortcuts < 250  # both ways are taken


@TOKENIZERS
def test_a_text_of_whole_characters_needs_no_stream(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shortcut is what makes a step's segmentation cheap."""
    expected = segment_response(say(tokenizer, CORPUS[1]), tokenizer)
    monkeypatch.delattr(decoding, "_stream_ends")
    monkeypatch.delattr(decoding, "_prefix_ends")
    assert segment_response(say(tokenizer, CORPUS[1]), tokenizer) == expected
    assert len(expected) == 3


def test_settled_offsets_hold_whatever_follows() -> None:
    """Every prefix of random texts settles only what the whole text has, and most of it."""
    rng = random.Random(0)
    words = [
        "a",
        "dog,",
        "the",
        "is.",
        "Big",
        "red!",
        "1.",
        "\n- ",
        "\n\n",
        "e.g.",
        "Dr.",
        "A.",
        "so;",
    ]
    settled = whole = 0
    for _ in range(300):
        text = "".join(rng.choice(words) + rng.choice([" ", " ", "\n", ""]) for _ in range(40))
        min_words = rng.choice([1, 2, 5])
        offsets = split_offsets(text, min_words)
        for end in range(0, len(text) + 1, 3):
            found = settled_offsets(text[:end], min_words)
            assert found == offsets[: len(found)]
        settled += len(settled_offsets(text, min_words))
        whole += len(offsets)
    assert settled > 0.8 * whole


def test_a_piece_is_settled_once_its_successor_cannot_move() -> None:
    text = "There is a small red dog, and it sits on the big"
    assert settled_offsets(text, 2) == [0, 26]  # six words have begun after the comma
    assert settled_offsets(text[:33], 2) == [0]
    assert settled_offsets("It is day. The", 5) == [0]  # "The" may still grow
    assert settled_offsets("It is day. The ", 5) == [0, 11]
    assert settled_offsets("", 5) == [0]


@pytest.mark.parametrize(
    "pieces",
    [
        ["这是一只狗。", "猫在床上！", "真的？", "是的。"],
        ["これは「犬です。」", "猫もいます。"],
        ["यह एक कुत्ता है। ", "बिल्ली सो रही है।"],
        ["A dog is here。 ", "A man is there。"],
        ["The TV is 42 in. wide. ", "It is on."],
        ["It has 9 sq. feet. ", "The dept. store is max. ten minutes away."],
        ["There are: 1. A dog on the mat. ", "2. A cat on the bed. ", "3. A red ball."],
        ["هل هذا كلب صغير جدا؟ ", "نعم هو كلب."],
        ["The board is approx. 3 m long. ", "It is brown."],
        ["It says Jan. 5 in red. ", "It is brown."],
    ],
)
def test_full_stops_of_other_scripts_units_and_inline_lists(pieces: list[str]) -> None:
    text = "".join(pieces)
    assert split(text) == pieces
    for length in range(len(text)):  # what is settled early stays
        assert set(settled_offsets(text[:length])) <= set(split_offsets(text))
