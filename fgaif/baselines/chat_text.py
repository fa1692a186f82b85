"""Prompts and answers as the strings that TRL tokenises, so that their ids are the policy's.

TRL tokenises prompt and answer each by itself and adds no special tokens. What a policy samples
follows its prompt without a seam, and what it is asked begins with the tokenizer's start token:
both are seen to here, and tests hold the ids against those that engines get and sample.
"""

from collections.abc import Sequence
from typing import Any

from fgaif.baselines.files import Turn
from fgaif.errors import DataError
from fgaif.lvlm.inputs import Encoder
from fgaif.types import Json


class ChatText:
    """Renders conversations with an image by a checkpoint's chat template."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._processor: Any = encoder.processor
        self._tokenizer: Any = encoder.tokenizer
        if not self._tokenizer.eos_token:
            raise DataError("the policy's tokenizer has no EOS token: no answer could ever end")
        self._start: str = self._tokenizer.bos_token or ""
        ids = self._tokenizer("a")["input_ids"]
        self._adds_start = bool(self._start) and ids[:1] == [self._tokenizer.bos_token_id]

    def render(self, turns: Sequence[Turn], answer: str) -> tuple[str, str]:
        """Prompt and answer, whose ids one after the other are those of the conversation.

        The image stands in the user's first turn; special tokens in texts become plain text. The
        answer ends with EOS.
        """
        messages = self._messages(turns)
        prompt = self._template(messages, True)
        whole = self._template([*messages, self._message("assistant", answer)], False)
        eos = self._tokenizer.eos_token
        # Where the template ends a question otherwise than it begins an answer, as that of
        # LLaVA-OneVision does, the prompt is what the policy is asked with.
        behind = whole[len(prompt) :] if whole.startswith(prompt) else self._encoder.said(answer)
        text = self._seamless(prompt, behind.rstrip().removesuffix(eos).rstrip()) + eos
        return (self._start if self._needs_start(prompt) else "") + prompt, text

    def _needs_start(self, prompt: str) -> bool:
        return self._adds_start and not prompt.startswith(self._start)

    def _seamless(self, prompt: str, text: str) -> str:
        """The answer with or without its leading space, as its ids follow the prompt's."""
        together = self._ids(prompt + text)
        before = self._ids(prompt)
        forms = (text, text.lstrip())
        return next((form for form in forms if before + self._ids(form) == together), text)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _messages(self, turns: Sequence[Turn]) -> list[Json]:
        messages = [self._message(role, text) for role, text in turns]
        first = next((m for m in messages if m["role"] == "user"), None)
        if first is None:
            raise DataError("a conversation needs a turn of the user, in which the image stands")
        first["content"].insert(0, {"type": "image"})
        return messages

    def _message(self, role: str, text: str) -> Json:
        return {"role": role, "content": [{"type": "text", "text": self._encoder.said(text)}]}

    def _template(self, messages: Sequence[Json], ask: bool) -> str:
        return self._processor.apply_chat_template(list(messages), add_generation_prompt=ask)
