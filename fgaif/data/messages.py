"""Prompts as lists of messages: the rows of TRL, verl and Qwen, as one question about one image.

{"images": ["a.png"], "prompt": [{"role": "user", "content": [{"type": "image"},
                                  {"type": "text", "text": "What is it?"}]}]}
{"images": [{"image": "a.png"}], "prompt": [{"role": "user", "content": "<image>What is it?"}]}
{"messages": [{"role": "user", "content": [{"type": "image", "image": "file:///data/a.png"},
                                           {"type": "text", "text": "What is it?"}]}]}
"""

from typing import Any

from fgaif.errors import DataError
from fgaif.types import Json

MARK = "<image>"
"""Where data of many models say that the image stands; it comes first here."""
_PATHS = ("image", "path", "image_url", "url")


def as_question(where: str, row: Json) -> Json:
    """The row with ``image`` and ``prompt`` as texts, where it has messages; else as it is.

    Raises:
        DataError: a video, several images or turns, a system message, or parts of another kind.
    """
    for column in ("video", "videos"):
        if row.get(column):
            raise DataError(
                f"{where}: column `{column}`: videos are not supported; give a frame as `image`"
            )
    column = "messages" if row.get("messages") is not None else "prompt"
    messages = row.get(column)
    if not isinstance(messages, list):
        return row
    place = f"{where}: column `{column}`"
    asked = [message for message in messages if _role(place, message) == "user"]
    if len(messages) != 1 or len(asked) != 1:
        roles = ", ".join(_role(place, message) for message in messages) or "none"
        raise DataError(f"{place}: messages of {roles}; one of the user is supported, a question")
    images, text = _parts(place, asked[0].get("content"))
    images += [_path(f"{where}: column `images`", item) for item in row.get("images") or ()]
    if row.get("image") is not None:
        images.append(row["image"])
    if len(images) != 1:
        raise DataError(f"{place}: {len(images)} images; one per prompt is supported")
    return {**row, "image": images[0], "images": None, "prompt": text}


def _role(place: str, message: Any) -> str:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(f"{place}: {message!r:.80}: expected messages with `role` and `content`")
    role: str = message["role"]
    return role


def _parts(place: str, content: Any) -> tuple[list[Any], str]:
    """Images named in a message's parts, and its text."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise DataError(f"{place}: content {content!r:.80}: expected a text or a list of parts")
    images: list[Any] = []
    texts: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"].replace(f"{MARK}\n", "").replace(MARK, ""))
        elif kind in ("image", "image_url"):
            images += [_path(place, part)] if any(part.get(name) for name in _PATHS) else []
        elif kind == "video":
            raise DataError(f"{place}: videos are not supported; give a frame as an image")
        else:
            raise DataError(f"{place}: {part!r:.80}: expected parts of type `text` or `image`")
    return images, "\n".join(texts)


def _path(place: str, item: Any) -> str:
    """A path, given as a text or by the name that a library has for it."""
    while isinstance(item, dict):
        item = next((item[name] for name in _PATHS if item.get(name)), None)
    if not isinstance(item, str):
        raise DataError(f"{place}: {item!r:.80}: expected the path of an image")
    return item.removeprefix("file://")
