"""Training rows of the tiny models: captions to say, captions to judge, questions to answer."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerFast

from fgaif.data.scenes.captions import Noise, write_caption
from fgaif.data.scenes.questions import DESCRIBE, Question
from fgaif.data.scenes.world import Scene
from fgaif.scene_models.measure import pieces, prompt_ids
from fgaif.scene_models.targets import Targets, annotate, choice_target
from fgaif.scene_models.tokenizer import EOS_ID, chat_prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Token ids (L,), whether each is to be predicted (L,), and dense targets."""

    ids: list[int]
    predicted: list[bool]
    targets: Targets = field(default_factory=Targets)


class RowWriter:
    """Writes rows with one tokenizer; encodings of prompts and pieces are kept."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._encoded: dict[str, tuple[list[int], list[str]]] = {}
        self._describe = prompt_ids(tokenizer, chat_prompt(DESCRIBE))
        self._judge = prompt_ids(tokenizer, f"<image>\nPrompt: {DESCRIBE} \n")

    def caption(self, scene: Scene, rng: random.Random, noise: Noise) -> Row:
        """A caption to say after the describe prompt, with all dense targets."""
        ids, words = self._join(pieces(" " + write_caption(scene, rng, noise)))
        offset = len(self._describe)
        targets = annotate(words, scene, offset)
        first = choice_target(scene, set(), scene.nouns)
        targets.sets.append((offset - 1, first))
        return Row(
            ids=[*self._describe, *ids, EOS_ID],
            predicted=[False] * offset + [True] * (len(ids) + 1),
            targets=targets,
        )

    def judged(self, scene: Scene, rng: random.Random, noise: Noise) -> Row:
        """A caption laid out as reward models read it, ``s_1 </s> s_2 </s> ...``, to be judged."""
        ids, words = [], []
        for piece in pieces(" " + write_caption(scene, rng, noise)):
            piece_ids, piece_words = self._encode(piece)
            ids += [*piece_ids, EOS_ID]
            words += [*piece_words, "</s>"]
        targets = annotate(words, scene, len(self._judge))
        return Row(
            ids=self._judge + ids,
            predicted=[False] * (len(self._judge) + len(ids)),
            targets=Targets(nouns=targets.nouns, relations=targets.relations, ends=targets.ends),
        )

    def questions(self, scene: Scene, questions: Sequence[Question]) -> Row:
        """Several questions with their answers, as turns of one conversation."""
        ids: list[int] = []
        predicted: list[bool] = []
        targets = Targets()
        for number, question in enumerate(questions):
            before = "USER: \n" if number else "USER: <image>\n"
            start = prompt_ids(self._tokenizer, before)[1 if number else 0 :]
            asked, words = self._encode(question.text)
            after = self._encode(" ASSISTANT:")[0]
            answer = self._encode(f" {question.answer}")[0]
            found = annotate(words, scene, len(ids) + len(start))
            targets.nouns += found.nouns
            targets.relations += found.relations
            if question.answer in ("yes", "no"):
                targets.ends += found.ends
            ids += [*start, *asked, *after, *answer, EOS_ID]
            told = len(answer) + 1
            predicted += [False] * (len(ids) - len(predicted) - told) + [True] * told
        return Row(ids=ids, predicted=predicted, targets=targets)

    def _join(self, parts: Sequence[str]) -> tuple[list[int], list[str]]:
        encoded = [self._encode(part) for part in parts]
        return [i for ids, _ in encoded for i in ids], [w for _, words in encoded for w in words]

    def _encode(self, text: str) -> tuple[list[int], list[str]]:
        """Return the ids of a text and its tokens as plain words."""
        if text not in self._encoded:
            ids = self._tokenizer.encode(text, add_special_tokens=False)
            words = [self._tokenizer.decode([i]).strip() for i in ids]
            self._encoded[text] = (ids, words)
        return self._encoded[text]
