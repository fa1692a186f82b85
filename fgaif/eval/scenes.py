"""Truth of the embedded world: judge captions by the scene graph, and ask POPE about scenes."""

from collections.abc import Callable, Sequence

import numpy as np

from fgaif.data.scenes.facts import SCENE_KINDS, oracle, oracle_classes, parse_facts
from fgaif.data.scenes.world import NOUNS, PARTNER, Scene
from fgaif.errors import ConfigError
from fgaif.eval.captions import JudgedCaption, segment_texts
from fgaif.eval.pope_questions import STRATEGIES, PopeQuestion, build_questions
from fgaif.eval.vocabulary import Vocabulary
from fgaif.types import (
    Answer,
    Fact,
    FactQuery,
    Kind,
    LabeledResponse,
    Prompt,
    Response,
    Segment,
    Verdict,
)

_VOCABULARY = Vocabulary.from_nouns(NOUNS)
_ANSWERS: dict[bool | None, Answer] = {True: "yes", False: "no", None: "unknown"}


class SceneJudge:
    """Judges captions of scenes by the oracle; ``scene_of`` finds the scene of a prompt.

    Raises:
        ConfigError: the oracle cannot judge one of the kinds.
    """

    def __init__(
        self,
        scene_of: Callable[[Prompt], Scene],
        split: Callable[[Response], Sequence[Segment]],
        kinds: tuple[Kind, ...] = SCENE_KINDS,
    ) -> None:
        if foreign := [kind for kind in kinds if kind not in SCENE_KINDS]:
            raise ConfigError(
                f"kinds: the embedded world does not know the truth of {', '.join(foreign)}, only "
                f"of {', '.join(SCENE_KINDS)}: judge captions by the reward models"
            )
        self._kinds = kinds
        self._columns = [SCENE_KINDS.index(kind) for kind in kinds]
        self._scene_of = scene_of
        self._split = split

    def __call__(self, responses: Sequence[Response]) -> list[JudgedCaption]:
        """Split, parse and look up each response, in order."""
        return [self._judge(response) for response in responses]

    def _judge(self, response: Response) -> JudgedCaption:
        scene = self._scene_of(response.prompt)
        segments = tuple(self._split(response))
        texts = segment_texts(response, segments)
        parsed = [parse_facts(text, index) for index, text in enumerate(texts)]
        facts = tuple(fact for found, _ in parsed for fact in found if fact.kind in self._kinds)
        classes = np.array(oracle_classes(scene, texts), np.int64).reshape(-1, len(SCENE_KINDS))
        labeled = LabeledResponse(
            response=response,
            kinds=self._kinds,
            segments=segments,
            facts=facts,
            verdicts=_verdicts(scene, facts, response.prompt),
            labels=classes[:, self._columns],
            provenance={"judge": "oracle"},
        )
        return JudgedCaption(
            labeled=labeled,
            malformed=tuple(not wellformed for _, wellformed in parsed),
            mentions=tuple(_VOCABULARY.mentions(response.text)),
            objects=frozenset(scene.nouns),
        )


def _verdicts(scene: Scene, facts: Sequence[Fact], prompt: Prompt) -> dict[str, Verdict]:
    return {
        text: Verdict(
            query=FactQuery(image=prompt.image, text=text), answer=_ANSWERS[oracle(scene, text)]
        )
        for text in dict.fromkeys(fact.text for fact in facts)
    }


def scene_questions(
    prompts: Sequence[Prompt], scene_of: Callable[[Prompt], Scene], *, per_image: int, seed: int
) -> list[PopeQuestion]:
    """Build POPE's questions about scenes, all three strategies.

    Adversarial negatives are the absent partners: they are what suggests itself in this world.
    """
    images = [(prompt.image, scene_of(prompt).nouns) for prompt in prompts]
    related = {noun: (partner,) for noun, partner in PARTNER.items()}
    return [
        question
        for strategy in STRATEGIES
        for question in build_questions(
            images, strategy, per_image=per_image, seed=seed, related=related
        )
    ]
