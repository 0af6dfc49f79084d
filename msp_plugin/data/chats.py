"""Conversations: recognise them in rows of chat data, and write them as text with a chat template."""

from __future__ import annotations

import ast
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from msp_plugin.errors import DataError, shown
from msp_plugin.runtime.documents import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: The roles of ShareGPT that have another name in chat templates.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}
#: Today in every chat template, so that equal data gives equal samples tomorrow: Llama 3's default.
_DATE = datetime.datetime(2024, 7, 26)


@dataclass(frozen=True)
class Chat:
    """A conversation: messages with ``role`` and ``content``; ``where`` names their row in errors.

    Args:
        tools: descriptions of the functions that the assistant may call, as chat templates take them.
    """

    messages: tuple[Mapping[str, Any], ...]
    where: str
    tools: tuple[Mapping[str, Any], ...] = ()

    def text(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return the conversation as text, written by the tokenizer's chat template.

        Raises:
            DataError: there is no template, or it refuses these messages.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"{self.where} is a conversation, and the tokenizer has no chat template",
                hint="give plain text, or use the tokenizer of the model's chat version",
            )
        try:
            messages = [dict(message) for message in self.messages]
            # Some tokenizers refuse arguments that they do not know.
            dated = "strftime_now" in str(tokenizer.chat_template)
            more: dict[str, Any] = {"strftime_now": _DATE.strftime} if dated else {}
            if self.tools:
                more["tools"] = [dict(tool) for tool in self.tools]
            return str(tokenizer.apply_chat_template(messages, tokenize=False, **more))
        except Exception as error:  # a template is code that comes with the model
            raise DataError(
                f"{self.where}: the tokenizer's chat template refuses the conversation: "
                f"{type(error).__name__}: {shown(str(error))}",
                hint="the template says which roles it takes, and in which order; leave such rows out",
            ) from error


def as_messages(value: object) -> list[dict[str, Any]] | None:
    """Return the messages of a value, each with ``role`` and ``content``; None if it is no conversation.

    A conversation is a list of objects with ``role`` and ``content``, or ``from`` and ``value`` as in
    ShareGPT. Older versions of datasets give an object of lists instead.
    """
    if isinstance(value, Mapping) and value and all(isinstance(v, list) for v in value.values()):
        lengths = {len(v) for v in value.values()}
        if len(lengths) == 1:
            value = [dict(zip(value, each, strict=True)) for each in zip(*value.values(), strict=True)]
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return None
    messages = []
    for part in value:
        message = _message(part)
        if message is None:
            return None
        messages.append(message)
    return messages


def as_tools(value: object) -> tuple[dict[str, Any], ...]:
    """Return the functions of a ``tools`` column, a list of objects or that as JSON; none for anything else."""
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError:
            return ()
    tools = value if isinstance(value, list) else []
    return tuple(_without_nulls(tool) for tool in tools if isinstance(tool, Mapping))


def written_messages(text: str) -> list[dict[str, Any]] | None:
    """Return the messages of a conversation written as JSON or in Python's form; none for null or a blank text.

    Tables without lists, such as csv, hold conversations so. None if the text is no conversation.
    """
    text = text.strip()
    if text in ("", "null", "None"):
        return []
    for parse in (parse_json, ast.literal_eval) if text.startswith(("[", "{")) else ():
        try:
            return as_messages(parse(text))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return None


def _message(part: object) -> dict[str, Any] | None:
    """Return a message with ``role`` and ``content``; None for anything else."""
    if not isinstance(part, Mapping):
        return None
    role, content = ("role", "content") if "role" in part else ("from", "value")
    if not isinstance(part.get(role), str) or content not in part:
        return None
    text = _content(part[content])
    if text is None and part[content] is not None:
        return None
    more = {key: _without_nulls(v) for key, v in part.items() if key not in (role, content) and v is not None}
    return {**more, "role": _ROLES.get(part[role], part[role]), "content": text or ""}


def _without_nulls(value: Any) -> Any:
    """Return a value without the null entries of its objects: tables hold null for keys that a row lacks."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(v) for key, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _content(value: object) -> str | None:
    """Return a message's text, joined if it is a list of parts; None if a part is not text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        return None
    texts = [
        part["text"] for part in value if isinstance(part, Mapping) and isinstance(part.get("text"), str)
    ]
    return "".join(texts) if len(texts) == len(value) else None
