"""Messages in the forms that people have them, brought to the one that chat templates are written for.

"content": null                                       left as it is beside tool_calls
"content": [{"type": "text", "text": "..."}, ...]     the texts, joined
"arguments": "{\\"city\\": \\"Rome\\"}"                   of a tool call: parsed (OpenAI's own form)
{"from": "human", "value": "..."}                     ShareGPT's: {"role": "user", "content": "..."}
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from moe_lora_jax.train.errors import BadLine

Message = dict[str, Any]
_SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def read_messages(value: Any, name: str = "messages") -> list[Message]:
    """The messages, checked, each with a role and a content that is a string, or null beside tool calls.

    Raises:
        BadLine: what is wrong, by position.
    """
    if not isinstance(value, list) or not value:
        raise BadLine(f"{name}: expected a list of at least one message")
    return [_message(message, f"{name}[{i}]") for i, message in enumerate(value)]


def from_sharegpt(value: Any) -> Any:
    """A list of {"from", "value"} as messages; anything else unchanged."""
    if not isinstance(value, list):
        return value
    made = []
    for i, turn in enumerate(value):
        if not isinstance(turn, dict) or "from" not in turn:
            made.append(turn)
            continue
        role = _SHAREGPT.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None:
            known = ", ".join(sorted(_SHAREGPT))
            raise BadLine(f"conversations[{i}].from: found {turn['from']!r}, expected one of {known}: use messages")
        rest = {key: inner for key, inner in turn.items() if key not in ("from", "value")}
        made.append({"role": role, "content": turn.get("value"), **rest})
    return made


def check_text(value: Any, where: str = "") -> None:
    """Raises BadLine for half a character: a surrogate without its other half, which is in no text of whole ones."""
    if isinstance(value, str):
        found = next((i for i, c in enumerate(value) if "\ud800" <= c <= "\udfff"), None)
        if found is not None:
            half = f"half a character, \\u{ord(value[found]):04x}, at position {found + 1}"
            problem = f"found {half}: an emoji or the like was cut in two, or bytes are not UTF-8"
            raise BadLine(f"{where}: {problem}" if where else problem)
    elif isinstance(value, dict):
        for key, inner in value.items():
            check_text(key, f"a key of {where or 'the record'}")
            check_text(inner, f"{where}.{key}" if where else key)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            check_text(inner, f"{where}[{i}]")


def parsed(text: str, where: str) -> Any:
    """What JSON text within a record says, or BadLine."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadLine(f"{where}: not JSON: {error}") from None
    check_text(value, where)
    return value


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadLine(f"{where}: expected an object with the strings role and content")
    made = {key: value for key, value in message.items() if value is not None}
    calls = made.get("tool_calls")
    if calls is not None:
        made["tool_calls"] = [_call(call, f"{where}.tool_calls[{j}]") for j, call in enumerate(_list(calls, where))]
    content = message.get("content")
    if isinstance(content, list):
        made["content"] = "".join(_part(part, f"{where}.content[{j}]") for j, part in enumerate(content))
    elif content is None and calls:
        made["content"] = None
    elif not isinstance(content, str):
        raise BadLine(f"{where}: expected an object with the strings role and content")
    return made


def _list(calls: Any, where: str) -> list[Any]:
    if not isinstance(calls, list):
        raise BadLine(f"{where}.tool_calls: found {type(calls).__name__}, expected a list")
    return calls


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    found = f"a part of type {kind!r}" if kind != "text" and isinstance(part, dict) else repr(part)[:50]
    raise BadLine(f'{where}: found {found}, expected {{"type": "text", "text": "..."}}: models here read text alone')


def _call(call: Any, where: str) -> Any:
    """A tool call with its arguments as a mapping, wherever it has them."""
    if not isinstance(call, dict):
        raise BadLine(f"{where}: found {type(call).__name__}, expected an object")
    made = dict(call)
    if isinstance(call.get("function"), dict):
        made["function"] = _call(call["function"], f"{where}.function")
    if isinstance(call.get("arguments"), str):
        made["arguments"] = _arguments(call["arguments"], f"{where}.arguments")
    return made


def _arguments(text: str, where: str) -> Mapping[str, Any]:
    value = parsed(text or "{}", where)
    if not isinstance(value, dict):
        raise BadLine(f"{where}: found JSON of type {type(value).__name__}, expected an object")
    return value


def has_arguments(messages: list[Message]) -> bool:
    """Whether a tool call has arguments."""
    return any(_functions(messages))


def called(messages: Sequence[Message]) -> list[str]:
    """The names of the functions that tool calls call."""
    return [f["name"] for f in _functions(messages) if isinstance(f.get("name"), str)]


def spelled(messages: list[Message], *, null: str | None, as_text: bool, parts: bool) -> list[Message]:
    """The messages as some templates want them: a null content as "", the arguments of tool calls as JSON text, content
    as a list of parts.
    """
    made = []
    for message in messages:
        content = null if message["content"] is None else message["content"]
        copy = {**message, "content": [{"type": "text", "text": content}] if parts and content is not None else content}
        if as_text and "tool_calls" in message:
            copy["tool_calls"] = [_as_text(call) for call in message["tool_calls"]]
        made.append(copy)
    return made


def python_words(messages: list[Message]) -> set[str]:
    """What a template that prints a value without asking for JSON would show: Python's own spelling of arguments."""
    found = {str(function["arguments"]) for function in _functions(messages)}
    return {word for word in found if "'" in word or "True" in word or "False" in word or "None" in word}


def _functions(messages: Sequence[Message]) -> list[Mapping[str, Any]]:
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    return [f for call in calls for f in (call, call.get("function")) if isinstance(f, dict) and "arguments" in f]


def _as_text(call: Mapping[str, Any]) -> dict[str, Any]:
    made = dict(call)
    if isinstance(call.get("function"), dict):
        made["function"] = _as_text(call["function"])
    if "arguments" in call:
        made["arguments"] = json.dumps(call["arguments"], ensure_ascii=False)
    return made
