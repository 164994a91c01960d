"""From one line of JSONL to tokens and which of them count in the loss.

A line is an object in one of three forms; other keys are ignored:

    {"text": "..."}                                    loss on every token
    {"prompt": "...", "completion": "..."}             loss on the completion and the end token
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
                                                       loss on the assistant's turns

Tokens are those that `generate` will see. A text or a prompt is tokenized with the special tokens that the tokenizer
adds; a completion is tokenized on its own and put after it, so no token straddles the border; the tokenizer's end token
closes a text or a completion. Messages go through the tokenizer's chat template. If the template marks what the
assistant says ({% generation %}), the loss is on all of that; otherwise on the last turn, which must be the
assistant's: on what follows the rendering of the turns before it with the generation prompt.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from moe_lora_jax.train.tokenizer import prompt_ids

FORMS = (("text",), ("prompt", "completion"), ("messages",))
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
EXPECTED = "expected text, or prompt and completion, or messages"


class BadLine(Exception):
    """What is wrong with one line."""


class Encoder:
    """Tokenizes records: (ids, counted), where counted is true for the tokens that are targets.

    Raises:
        BadLine: the record is in none of the forms, or the tokenizer cannot serve it.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.forms: Mapping[tuple[str, ...], Callable[[Mapping[str, Any]], tuple[list[int], list[bool]]]] = {
            ("text",): self._text,
            ("prompt", "completion"): self._prompt,
            ("messages",): self._messages,
        }

    def __call__(self, record: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
        return self.forms[_form(record)](record)

    def _text(self, record: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
        ids = self._closed(self._ids(record["text"], special=True))
        return ids, [True] * len(ids)

    def _prompt(self, record: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
        prompt = prompt_ids(self.tokenizer, record["prompt"])
        completion = self._closed(self._ids(record["completion"], special=False))
        return prompt + completion, [False] * len(prompt) + [True] * len(completion)

    def _messages(self, record: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
        messages = record["messages"]
        try:
            template = self.tokenizer.get_chat_template()
        except ValueError:
            raise BadLine("messages need a chat template, and the tokenizer has none: use text or prompt") from None
        if _GENERATION.search(template):
            rendered = self._render(messages, return_assistant_tokens_mask=True)
            return list(rendered["input_ids"]), [bool(m) for m in rendered["assistant_masks"]]
        if messages[-1]["role"] != "assistant":
            raise BadLine(f"the last message is from {messages[-1]['role']!r}, expected 'assistant'")
        ids = list(self._render(messages)["input_ids"])
        before = list(self._render(messages[:-1], add_generation_prompt=True)["input_ids"]) if messages[1:] else []
        if ids[: len(before)] != before:
            raise BadLine(
                "the chat template renders the earlier turns differently once the answer follows, so the answer cannot "
                "be told apart: mark it with {% generation %} in the template, or use prompt and completion"
            )
        return ids, [False] * len(before) + [True] * (len(ids) - len(before))

    def _render(self, messages: list[dict[str, str]], **options: Any) -> Mapping[str, Any]:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
        except TemplateError as error:
            raise BadLine(f"the chat template refuses these messages: {error}") from None

    def _ids(self, text: str, *, special: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _closed(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]


def parse(raw: bytes) -> dict[str, Any]:
    """The object in a line, or BadLine."""
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadLine(f"not UTF-8 at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise BadLine(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise BadLine("not JSON that can be read: nested too deeply") from None
    if not isinstance(record, dict):
        raise BadLine(f"found {type(record).__name__}, expected an object")
    return record


def _form(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The one form of a record, with its values checked."""
    present = [form for form in FORMS if any(key in record for key in form)]
    if len(present) != 1:
        known = sorted(key for form in present for key in form if key in record)
        raise BadLine(f"found {', '.join(known or sorted(record)) or 'nothing'}; {EXPECTED}")
    for key in present[0]:
        if key not in record:
            raise BadLine(f"{key} is missing beside {', '.join(k for k in present[0] if k in record)}")
        value = record[key]
        if key == "messages":
            _check_messages(value)
        elif not isinstance(value, str):
            raise BadLine(f"{key}: found {type(value).__name__}, expected a string")
        elif not value:
            raise BadLine(f"{key}: empty")
    return present[0]


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise BadLine("messages: expected a list of at least one message")
    for i, message in enumerate(messages):
        fields = message if isinstance(message, dict) else {}
        for key in ("role", "content"):
            if not isinstance(fields.get(key), str):
                raise BadLine(f"messages[{i}]: expected an object with the strings role and content")
