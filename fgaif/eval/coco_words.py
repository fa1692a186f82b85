"""Words for the 80 categories of COCO, in our own table or the user's, and phrases that mislead.

``coco_words.txt`` has CHAIR's format and can be copied and edited. ``coco_phrases.json`` holds the
rules of the official script: "baby elephant" names no person, "home plate" no plate.
"""

import json
from importlib.resources import files
from itertools import product
from pathlib import Path

from fgaif.errors import DataError
from fgaif.eval.chair import Vocabulary


def coco_vocabulary(synonyms: Path | None = None) -> Vocabulary:
    """Read a synonym table, by default ours, and apply the rules for phrases.

    Raises:
        DataError: the file cannot be read or names no object.
    """
    data = files("fgaif.eval")
    try:
        text = (synonyms or data / "coco_words.txt").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{synonyms}: cannot be read ({error}); give a text file, one object per line"
        ) from error
    rules = json.loads((data / "coco_phrases.json").read_text(encoding="utf-8"))
    same_as: dict[str, str | None] = {
        **dict.fromkeys(rules["name_nothing"]),
        **rules["same_as"],
        **{
            f"{qualifier} {word}": word
            for rule in rules["qualified"]
            for qualifier, word in product(rule["by"], rule["words"])
        },
    }
    return Vocabulary.from_lines(text.split("\n"), same_as, rules["dropped_beside"])
