"""The judge answers in the order asked, however it batches."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from engines import photo_prompts, rollout_actor

from actors.judge import JudgeActor
from fgaif.feedback.model_facts import TextRequest


def test_answers_come_in_the_order_asked(
    tiny_llava_dir: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Facts are asked image by image; here they arrive fact by fact."""
    engine = rollout_actor(tiny_llava_dir)._engine
    monkeypatch.setattr("actors.judge.VllmEngine", lambda *_: engine)
    judge = JudgeActor(tiny_llava_dir, None)
    facts = ("There is a dog.", "There is a cup.", "The cat is red.", "There is a star.")
    prompts = [replace(p, text=fact) for fact in facts for p in photo_prompts(photos)]
    together = judge.p_yes(prompts)
    alone = [judge.p_yes([prompt])[0] for prompt in prompts[:8]]
    assert together[:8] == pytest.approx(alone, abs=1e-5)
    assert len(set(together)) > len(facts)
    assert all(0 < answer < 1 for answer in together)
    assert judge.p_yes([]) == []


def test_written_answers_satisfy_their_schema(tiny_llava_dir: Path) -> None:
    """A random model under a grammar can only say what the schema allows."""
    schema = {
        "type": "object",
        "properties": {"answer": {"enum": ["left", "right"]}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    engine = rollout_actor(tiny_llava_dir)._engine
    asked = [
        TextRequest(prompt=text, schema=schema, max_tokens=48) for text in ("Where?", "<image>")
    ]
    for answer in engine.complete(asked):
        assert json.loads(answer)["answer"] in ("left", "right")
