"""Chat requests and replies in the chat-completions format, and what endpoints do not take."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from fgaif.chat.messages import ChatRequest, Reply
from fgaif.types import Json

RETRY_TEMPERATURE = 0.7
"""Temperature at which a question is put again whose reply could not be read."""

_SIMPLER: dict[str, Literal["json_object", "text"]] = {
    "json_schema": "json_object",
    "json_object": "text",
}
_FORMAT = re.compile(r"response_format|json[_ ]?schema|json_object|structured.?output", re.I)
_LOGPROBS = re.compile(r"log[ _-]?prob", re.I)
_THOUGHT = re.compile(r"<think(?:ing)?>", re.I)
_THOUGHT_END = re.compile(r"\A.*</think(?:ing)?>\s*", re.I | re.S)
_UNSUPPORTED = re.compile(r"not support|unsupported", re.I)


class Unreadable(ValueError):
    """A body that is no chat completion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """Which optional parameters an endpoint takes, as far as is known."""

    structured: Literal["json_schema", "json_object", "text"] = "json_schema"
    top_logprobs: int = 20
    limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    temperature: bool = True
    seed: bool = True

    def without(self, refused: str, sent: Mapping[str, Any]) -> "Dialect | None":
        """Return the dialect one step simpler in what ``refused`` complains about.

        Args:
            refused: parameter and message of a 400 or 422.
            sent: the arguments of the request; nothing else can be at fault.

        None if the complaint is about something else: then the request itself is wrong.
        """
        if "response_format" in sent and _FORMAT.search(refused):
            return replace(self, structured=_SIMPLER[self.structured])
        if "logprobs" in sent and _LOGPROBS.search(refused):
            return replace(self, top_logprobs=5 if self.top_logprobs > 5 else 0)
        # A text that is too long is refused with words about max_tokens as well.
        newer = "max_completion_tokens" in refused and _UNSUPPORTED.search(refused)
        if "max_tokens" in sent and newer:
            return replace(self, limit="max_completion_tokens")
        if "temperature" in sent and _names(refused, "temperature"):
            return replace(self, temperature=False)
        if "seed" in sent and _names(refused, "seed"):
            return replace(self, seed=False)
        return None


def arguments(request: ChatRequest, image: str | None, model: str, dialect: Dialect) -> Json:
    """Return the arguments of ``chat.completions.create``.

    The image comes before the text: models of the LLaVA family are trained so, and servers that
    cache prefixes then read an image once for all questions about it.
    """
    content: str | list[Json] = request.text
    if image is not None:
        content = [
            {"type": "image_url", "image_url": {"url": image}},
            {"type": "text", "text": request.text},
        ]
    messages: list[Json] = [{"role": "user", "content": content}]
    if request.system is not None:
        messages.insert(0, {"role": "system", "content": request.system})
    sent: Json = {"model": model, "messages": messages, dialect.limit: request.max_tokens}
    if dialect.temperature:
        lowest = RETRY_TEMPERATURE if request.attempt else 0.0
        sent["temperature"] = max(request.temperature, lowest)
    if request.attempt and dialect.seed:
        sent["seed"] = request.attempt
    if request.schema is not None and dialect.structured != "text":
        sent["response_format"] = _response_format(request.schema, dialect.structured)
    if request.yes_no and dialect.top_logprobs:
        sent |= {"logprobs": True, "top_logprobs": dialect.top_logprobs}
    return sent


def decode(content: bytes) -> Json:
    """Return a body's JSON object; raises Unreadable."""
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = f"the reply of {len(content)} bytes is no whole JSON ({error})"
        raise Unreadable(reason) from None
    if not isinstance(data, dict):
        raise Unreadable("the reply is no JSON object")
    return data


def read_usage(data: Json) -> tuple[int, int] | None:
    """Return input and output tokens as counted by the endpoint, or None if it does not say."""
    usage = data.get("usage")
    if not isinstance(usage, dict):
        return None
    read, written = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not isinstance(read, int) or not isinstance(written, int) or min(read, written) < 0:
        return None
    return read, written


def read_reply(data: Json, request: ChatRequest, input_tokens: int) -> Reply:
    """Return the reply in a chat completion.

    ``input_tokens`` is the estimate that stands in where the endpoint does not count. A message
    without content (a refusal, a filter, nothing but reasoning) is an empty reply if the choice
    says that it has ended. What a reasoning model thinks aloud before its answer, up to
    ``</think>``, is left out.

    Raises:
        Unreadable: no choice, no message, no text.
    """
    choices = data.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise Unreadable(f"the reply holds no choice with a message; error: {data.get('error')}")
    finish = choice.get("finish_reason")
    text = message.get("content")
    if text is None and isinstance(finish, str):
        text = message.get("refusal") or ""
    if not isinstance(text, str):
        raise Unreadable("the reply's message holds no text")
    used = read_usage(data) or (input_tokens, len(text.encode("utf-8", "replace")) // 4 + 1)
    return Reply(
        text=_THOUGHT_END.sub("", text, count=1),
        cut=finish == "length",
        first_token=_first_token(choice) if request.yes_no else (),
        input_tokens=used[0],
        output_tokens=used[1],
    )


def only_reasoning(data: Json, reply: Reply) -> bool:
    """Whether the model thought and did not come to its answer, for instance within the limit.

    ``data`` is the completion that the reply was read from.
    """
    message = data["choices"][0]["message"]
    text = reply.text.strip()
    thought = message.get("reasoning_content") or message.get("reasoning")
    return bool(_THOUGHT.match(text)) or (not text and bool(reply.cut or thought))


def _first_token(choice: Json) -> tuple[tuple[str, float], ...]:
    try:
        first = choice["logprobs"]["content"][0]
        items = [first, *(first.get("top_logprobs") or ())]
        found = {str(item["token"]): float(item["logprob"]) for item in items}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return ()  # some endpoints take the parameter and give nothing, or another form
    known = [(token, value) for token, value in found.items() if not math.isnan(value)]
    return tuple(sorted(known, key=lambda pair: (-pair[1], pair[0])))


def _response_format(schema: Json, structured: str) -> Json:
    if structured == "json_object":
        return {"type": "json_object"}
    return {
        "type": "json_schema",
        "json_schema": {"name": "reply", "schema": schema, "strict": True},
    }


def _names(refused: str, parameter: str) -> bool:
    """Whether a complaint names a parameter: as the first word, in quotes, after a word such as
    "argument", or as what is not supported.

    An ordinary word such as "temperature" may also be part of the text that was sent.
    """
    named = (
        rf"{parameter} |.*['\"`]{parameter}['\"`]"
        rf"|.*\b(?:argument|parameter|field|keyword|property)s?\b[^:;.]{{0,40}}[: ] ?{parameter}\b"
        rf"|.*\b{parameter}\b[^:;.]{{0,40}}\b(?:unsupported|unknown|unrecogni[sz]ed"
        r"|not\b.{0,12}\b(?:support|supported|permitted|allowed|accepted|available))\b"
    )
    return bool(re.match(named, refused, re.I | re.S))
