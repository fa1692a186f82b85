"""AMBER's descriptions against a tagger and lemmatiser, and the time that all of it takes.

    python tests/bench/bench_amber.py AMBER [--captions FILE.jsonl --spacy MODEL --wordnet DIR]

AMBER holds the official files. Without more it scores made-up answers to all of them in a
process of its own and prints CPU seconds and peak memory. With captions (rows of ``text``) it also
compares the nouns: those that spaCy's MODEL tags as nouns, in WordNet's singular (DIR holds NLTK's
``corpora/wordnet``), with those of ``fgaif.eval.nouns``; each caption is scored against the AMBER
image that it fits best. spaCy and NLTK are no dependencies: install them for this.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from fgaif.eval import amber_rules
from fgaif.eval.amber_files import AmberRow, AmberWords, read_annotations, read_words
from fgaif.eval.nouns import nouns_among


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("amber", type=Path)
    parser.add_argument("--captions", type=Path)
    parser.add_argument("--spacy")
    parser.add_argument("--wordnet", type=Path)
    options = parser.parse_args()
    file = options.amber / "annotations.json"
    rows = read_annotations(file)
    print(speed(file, rows))
    if options.captions is not None:
        words = read_words(rows, file.with_name("relation.json"), file.with_name("safe_words.txt"))
        lines = options.captions.read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        nouns = tagged(texts, words, options.spacy, options.wordnet)
        compare(texts, nouns, [row for row in rows.values() if row.part is None], words)


def speed(file: Path, rows: dict[str, AmberRow]) -> str:
    """Answer everything, score it with the command, and say what that took."""
    answers = [
        {
            "id": identity,
            "response": ("No" if row.no else "Yes")
            if row.part is not None
            else "".join(f"There is a {word} in the image. " for word in row.truth + row.hallu),
        }
        for identity, row in rows.items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "answers.json"
        given.write_text(json.dumps(answers))
        call = [sys.executable, "-m", "fgaif", "eval", "amber", "--json", "--annotations"]
        subprocess.run([*call, str(file), "--answers", str(given)], check=True, capture_output=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = used.ru_utime + used.ru_stime
    return f"{len(rows)} answers: {seconds:.1f} s of CPU, {used.ru_maxrss // 1024} MiB at the peak"


def tagged(texts: list[str], words: AmberWords, model: str, wordnet: Path) -> list[list[str]]:
    """Nouns by spaCy's tags, in NLTK's singular, that are AMBER's objects."""
    import nltk  # type: ignore[import-not-found]
    import spacy  # type: ignore[import-not-found]
    from nltk.stem import WordNetLemmatizer  # type: ignore[import-not-found]

    nltk.data.path.insert(0, str(wordnet))
    lemma: Any = WordNetLemmatizer().lemmatize
    nlp = spacy.load(model, disable=["ner", "parser", "lemmatizer"])
    return [
        [w for t in doc if t.tag_.startswith("NN") for w in [lemma(t.text)] if w in words.objects]
        for doc in nlp.pipe(texts)
    ]


def compare(
    texts: list[str], nouns: list[list[str]], images: list[AmberRow], words: AmberWords
) -> None:
    """Print how many nouns are the same, and the figures by both."""
    ours = [nouns_among(text, words.objects) for text in texts]
    same = sum((Counter(a) & Counter(b)).total() for a, b in zip(ours, nouns, strict=True))
    print(f"nouns: {sum(map(len, ours))} by rule, {sum(map(len, nouns))} tagged, {same} the same")
    known = [{w for t in row.truth for w in (t, *words.synonyms.get(t, ()))} for row in images]
    fits = [images[int(np.argmax([_fit(own, names) for names in known]))] for own in nouns]
    for name, given in (("rules", ours), ("tagger", nouns)):
        by_text = dict(zip(texts, given, strict=True))
        with patch.object(amber_rules, "nouns_among", lambda text, _: by_text[text]):  # noqa: B023
            pairs = zip(texts, fits, strict=True)
            sums = sum(
                np.array(amber_rules.describe_stats(text, row, words)[0]) for text, row in pairs
            )
        figures = amber_rules.amber_figures(np.concatenate([sums, np.zeros(5 * 9)]))
        shown = ("chair", "cover", "hal", "cog")
        print(name, {key: round(100 * float(figures[f"generative/{key}"]), 1) for key in shown})


def _fit(nouns: list[str], names: set[str]) -> float:
    right = sum(noun in names for noun in nouns)
    return right - (len(nouns) - right) / 2


if __name__ == "__main__":
    main()
