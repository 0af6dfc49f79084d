"""Chat data: what rows call a conversation, and its text by the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from msp_plugin.errors import DataError, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: ShareGPT's names of the roles that chat templates call otherwise.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}


@dataclass(frozen=True)
class Chat:
    """A conversation: messages with ``role`` and ``content``, and the row that they come from."""

    messages: tuple[Mapping[str, Any], ...]
    where: str

    def text(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return the conversation as the tokenizer's chat template writes it.

        Raises:
            DataError: there is no template, or it refuses these messages.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"{self.where} is a conversation, and the tokenizer has no chat template",
                hint="give plain text, or use the tokenizer of the model's chat version",
            )
        try:
            return tokenizer.apply_chat_template([dict(m) for m in self.messages], tokenize=False)
        except Exception as error:  # a template is code of the model's
            raise DataError(
                f"{self.where}: the tokenizer's chat template refuses the conversation: {type(error).__name__}: "
                f"{shown(str(error))}",
                hint="the template says which roles it takes, and in which order; leave such rows out",
            ) from error


def as_messages(value: object) -> list[dict[str, Any]] | None:
    """Return the messages that a value holds, with ``role`` and ``content``; None if it holds something else.

    Messages are a list of objects with ``role`` and ``content``, or ``from`` and ``value`` as in ShareGPT.
    Older versions of datasets give an object of lists instead.
    """
    if isinstance(value, Mapping) and value and all(isinstance(v, list) for v in value.values()):
        lengths = {len(v) for v in value.values()}
        if len(lengths) == 1:
            value = [dict(zip(value, each, strict=True)) for each in zip(*value.values(), strict=True)]
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return None
    messages = [_message(part) for part in value]
    return None if None in messages else messages


def _message(part: object) -> dict[str, Any] | None:
    if not isinstance(part, Mapping):
        return None
    role, content = ("role", "content") if "role" in part else ("from", "value")
    if not isinstance(part.get(role), str) or content not in part:
        return None
    text = _content(part[content])
    if text is None and part[content] is not None:
        return None
    # Tables fill in null for what a message does not have; templates ask whether it is there.
    more = {key: v for key, v in part.items() if key not in (role, content) and v is not None}
    return {**more, "role": _ROLES.get(part[role], part[role]), "content": text or ""}


def _content(value: object) -> str | None:
    """Return a message's text, also of one in parts that are all text; None if there is something else."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        return None
    parts = [part.get("text") if isinstance(part, Mapping) else None for part in value]
    return "".join(parts) if all(isinstance(part, str) for part in parts) else None
