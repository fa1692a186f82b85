"""Where lmms-eval's POPE figures differ from ours on the same answers (docs/evaluation.md).

Its rule, restated from version 0.7.3: an answer is its text, stripped and lower-cased; right is
what equals the label; a yes is "yes" and a no is "no", all else is neither; the yes ratio is that
of the labels.
"""

import pytest

from fgaif.eval.answers import AnswerRow
from fgaif.eval.benchmarks.pope import score_pope
from fgaif.eval.yes_no import YesNoQuestion

LABELS = [True, True, True, False, False, False]


def lmms_eval(texts: list[str]) -> dict[str, float]:
    said = [text.strip().lower() for text in texts]
    names = ["yes" if label else "no" for label in LABELS]
    pairs = list(zip(names, said, strict=True))
    hits, false, missed = (
        pairs.count(pair) for pair in (("yes", "yes"), ("no", "yes"), ("yes", "no"))
    )
    precision = hits / (hits + false) if hits + false else 0.0
    recall = hits / (hits + missed) if hits + missed else 0.0
    return {
        "accuracy": sum(name == answer for name, answer in pairs) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes_ratio": names.count("yes") / len(names),
    }


def ours(texts: list[str], rule: str = "") -> dict[str, float]:
    rows = [
        YesNoQuestion(where="q", id=str(i), image=f"{i}.jpg", text=f"Q{i}?", label=label)
        for i, label in enumerate(LABELS)
    ]
    answers = [AnswerRow(where="a", id=str(i), text=text) for i, text in enumerate(texts)]
    metrics = score_pope({"random": rows}, {"random": answers}).metrics()
    names = ("accuracy", "precision", "recall", "f1", "yes_ratio")
    return {name: metrics[rule + name] for name in names}


def test_bare_words_give_the_same_but_for_the_yes_ratio() -> None:
    texts = ["Yes", "yes", "no", "yes", "No", "yes"]
    mine, theirs = ours(texts), lmms_eval(texts)
    assert (mine.pop("yes_ratio"), theirs.pop("yes_ratio")) == (4 / 6, 3 / 6)
    assert mine == pytest.approx(theirs)
    assert mine == pytest.approx({"accuracy": 0.5, "precision": 0.5, "recall": 2 / 3, "f1": 4 / 7})


def test_its_yes_ratio_is_that_of_the_labels_whatever_is_answered() -> None:
    assert lmms_eval(["yes"] * 6)["yes_ratio"] == lmms_eval(["no"] * 6)["yes_ratio"] == 0.5
    assert [ours([text] * 6)["yes_ratio"] for text in ("yes", "no")] == [1, 0]


def test_sentences_are_wrong_there_and_read_here() -> None:
    """All six are right in words; only one of them is a bare word, a no."""
    texts = ["Yes.", "Yes, there is a dog.", "yes!", "No.", "There is no dog.", "no"]
    assert lmms_eval(texts) == {
        "accuracy": 1 / 6, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0.5,
    }  # fmt: skip
    assert ours(texts)["accuracy"] == 1
    assert ours(texts, "strict_")["accuracy"] == 5 / 6  # one begins with neither word


def test_answers_that_are_not_bare_leave_its_recall() -> None:
    """One bare yes of three questions with the label yes, the others in sentences: 1/1 there.

    Here the official rule hears a yes in all three, the strict one in two.
    """
    texts = ["yes", "Certainly, a dog.", "Yes, two.", "no", "no", "no"]
    assert lmms_eval(texts)["recall"] == 1
    assert lmms_eval(texts)["accuracy"] == pytest.approx(4 / 6)
    assert ours(texts)["recall"] == 1
    assert ours(texts, "strict_")["recall"] == pytest.approx(2 / 3)
