"""Counting ("There are two stars.") as a kind of the embedded world: its configuration, scenes in
which a shape is there twice, and a model that states and checks such facts."""

import base64
import hashlib
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fault_server import Answer

import fgaif
from fgaif.chat.messages import ChatRequest
from fgaif.data.images import image_ref
from fgaif.data.scenes.draw import draw_scene
from fgaif.data.scenes.facts import SCENE_KINDS, oracle, parse_facts
from fgaif.data.scenes.world import Scene, Thing, scene_at
from fgaif.lvlm.model import load_processor, resolve_checkpoint
from fgaif.types import DEFAULT_KINDS

ALL = (*DEFAULT_KINDS, "counting")
COLOUR = "#0a7d6b"
DESCRIPTION = 'how many of one shape there are. Write "There are NUMBER NOUNs."'
KINDS: list[Any] = [
    *DEFAULT_KINDS,
    {
        "name": "counting",
        "description": DESCRIPTION,
        "prompt": "Count, then judge: {fact}",
        "colour": COLOUR,
    },
]
NUMBERS = {"one": 1, "two": 2, "three": 3}
COUNTED = re.compile(r"There (?:is|are) (one|two|three) ([a-z]+?)s?\.")


class CountingWorld:
    """Scenes of the embedded world with one shape drawn again, and a model that counts shapes."""

    def __init__(self, folder: Path, count: int) -> None:
        self.tokenizer = load_processor(resolve_checkpoint("scenes:policy")).tokenizer
        self.responses: list[fgaif.Response] = []
        self.truths: list[bool] = []
        self._scenes: dict[str, Scene] = {}
        for index in range(count):
            scene = _with_a_twin(scene_at("train", index))
            draw_scene(scene).save(folder / f"{index}.png")
            noun = scene.things[0].noun
            claimed = "two" if index % 2 else "three"
            text = f"There is a {scene.things[0].colour} {noun}. There are {claimed} {noun}s."
            response = fgaif.make_response(image_ref(folder / f"{index}.png"), text, self.tokenizer)
            prompt = replace(response.prompt, id=f"{index}")
            self.responses.append(replace(response, prompt=prompt))
            self.truths.append(claimed == "two")
            self._scenes[response.prompt.image.sha256] = scene

    def answer(self, request: ChatRequest) -> str:
        """What a perfect model replies: facts of numbered segments as JSON, or yes and no."""
        if request.schema is not None:
            assert f"- counting: {DESCRIPTION}" in request.text
            return _facts(request.subject)
        assert request.image is not None
        return self._verdict(request.image.sha256, request.text)

    def reply(self, body: dict[str, Any]) -> Answer:
        """The same over HTTP, by a request's JSON body."""
        content = body["messages"][-1]["content"]
        if isinstance(content, str):
            return Answer(text=_facts(content.rpartition("numbered segments:\n")[2]))
        url = next(part["image_url"]["url"] for part in content if part["type"] == "image_url")
        text = next(part["text"] for part in content if part["type"] == "text")
        sha256 = hashlib.sha256(base64.b64decode(url.partition(",")[2])).hexdigest()
        return Answer(text=self._verdict(sha256, text))

    def _verdict(self, sha256: str, asked: str) -> str:
        scene = self._scenes[sha256]
        if asked.startswith("Count, then judge: "):
            counted = COUNTED.fullmatch(asked.removeprefix("Count, then judge: "))
            assert counted is not None
            there = sum(thing.noun == counted[2] for thing in scene.things)
            return "yes" if there == NUMBERS[counted[1]] else "no"
        fact = asked.removeprefix("Statement: ").removesuffix(" Is this right?")
        return "no" if oracle(scene, fact) is False else "yes"


def _with_a_twin(scene: Scene) -> Scene:
    first = scene.things[0]
    taken = {(thing.row, thing.column) for thing in scene.things}
    row, column = next((r, c) for r in range(3) for c in range(3) if (r, c) not in taken)
    twin = Thing(**{**asdict(first), "row": row, "column": column})
    return Scene(seed=scene.seed, things=(*scene.things, twin))


def _facts(numbered: str) -> str:
    lines = [line.partition(". ") for line in numbered.splitlines()]
    stated = [_stated(text) for number, _, text in lines if number.isdecimal()]
    return json.dumps({"segments": stated})


def _stated(text: str) -> dict[str, list[str]]:
    facts = parse_facts(text)[0] if not COUNTED.fullmatch(text) else []
    entry = {kind: [fact.text for fact in facts if fact.kind == kind] for kind in SCENE_KINDS}
    return entry | {"counting": [text] if COUNTED.fullmatch(text) else []}
