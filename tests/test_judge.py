"""The judge answers in the order asked, however it batches."""

import json
from pathlib import Path
from typing import Any

import pytest
from engines import photo_prompts, rollout_actor

from actors.judge import JudgeActor
from fgaif.chat.messages import ChatRequest
from fgaif.feedback.verify import yes_probability
from fgaif.types import Prompt


def ask(text: str, **settings: Any) -> ChatRequest:
    return ChatRequest(prompt_version="test", subject=text, text=text, **settings)


def yes_no(prompt: Prompt, fact: str) -> ChatRequest:
    return ask(fact, image=prompt.image, yes_no=True)


def test_answers_come_in_the_order_asked(
    tiny_llava_dir: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Facts are asked image by image; here they arrive fact by fact."""
    engine = rollout_actor(tiny_llava_dir)._engine
    monkeypatch.setattr("actors.judge.VllmEngine", lambda *_: engine)
    judge = JudgeActor(tiny_llava_dir, None)
    facts = ("There is a dog.", "There is a cup.", "The cat is red.", "There is a star.")
    asked = [yes_no(p, fact) for fact in facts for p in photo_prompts(photos)]
    written = ask("Why?", max_tokens=4)
    replies = judge.answer([written, *asked, written])
    assert replies[0] == replies[-1] == judge.answer([written])[0]
    together = [yes_probability(reply.first_token) for reply in replies[1:-1]]
    alone = [yes_probability(judge.answer([one])[0].first_token) for one in asked[:8]]
    assert together[:8] == pytest.approx(alone, abs=1e-5)
    assert len(set(together)) > len(facts)
    assert all(0 < answer < 1 for answer in together)
    assert judge.answer([]) == []


def test_written_answers_satisfy_their_schema(tiny_llava_dir: Path, photos: Path) -> None:
    """A random model under a grammar can only say what the schema allows."""
    schema = {
        "type": "object",
        "properties": {"answer": {"enum": ["left", "right"]}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    engine = rollout_actor(tiny_llava_dir)._engine
    image = photo_prompts(photos)[0].image
    asked = [
        ask("Where?", schema=schema, max_tokens=48),
        ask("<image>", schema=schema, max_tokens=48, attempt=1),
        ask("Where?", schema=schema, max_tokens=48, image=image),
    ]
    for reply in engine.complete(asked):
        assert json.loads(reply.text)["answer"] in ("left", "right")
        assert not reply.cut
        assert reply.output_tokens > 0
    first, *_, image_reply = engine.complete(asked)
    assert image_reply.input_tokens > first.input_tokens


def test_answers_are_cut_at_their_limit_and_long_questions_refused(tiny_llava_dir: Path) -> None:
    engine = rollout_actor(tiny_llava_dir)._engine
    short, long = engine.complete([ask("Why?", max_tokens=2), ask("Why? " * 4000)])
    assert short.cut
    assert short.output_tokens == 2
    assert long is None
