"""From one record to tokens and which of them count in the loss.

A record is an object in one of three forms. Null is absent. A key that is used by nothing is counted and named.

    {"text": "..."}                                    loss on every token
    {"prompt": "...", "completion": "..."}             loss on the completion and the end token
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
                                                       loss on the assistant's turns, see `turns`

`prompt` and `completion` may also be lists of messages: loss on the assistant's turns of the completion. `messages`
wins over a prompt that is alone; `conversations` is another name for it, also with ShareGPT's from and value. Beside
messages, `tools`, `documents` and `chat_template_kwargs` go to the chat template.

Tokens are those that `generate` will see. A text or a prompt is tokenized with the special tokens that the tokenizer
adds, unless it has them already; a completion is tokenized on its own and put after it, so no token straddles the
border; the tokenizer's end token closes a text or a completion. Messages go through the tokenizer's chat template.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from moe_lora_jax.train.errors import BadLine
from moe_lora_jax.train.messages import check_text, from_sharegpt, parsed, read_messages
from moe_lora_jax.train.template import ChatTemplate, Conversation
from moe_lora_jax.train.tokenizer import bare_ids, prompt_ids, text_ids
from moe_lora_jax.train.turns import encode_turns

FORMS = (("text",), ("prompt", "completion"), ("messages",))
EXPECTED = "expected text, or prompt and completion, or messages"
_BESIDE_MESSAGES = ("tools", "documents", "chat_template_kwargs")


@dataclass(frozen=True)
class Encoded:
    """ids, counted: true for the tokens that are targets. unused: keys that nothing reads. lost, ends: see
    `Turns`.
    """

    ids: list[int]
    counted: list[bool]
    unused: Collection[str] = ()
    lost: int = 0
    ends: bool = True


class Encoder:
    """Tokenizes records.

    Args:
        keys: that the caller reads itself.

    Raises:
        BadLine: the record is in none of the forms, or the tokenizer cannot serve it.
    """

    def __init__(self, tokenizer: Any, keys: Collection[str] = ()):
        self.tokenizer, self.keys = tokenizer, set(keys)
        self._templates: dict[bool, ChatTemplate] = {}

    def __call__(self, record: Mapping[str, Any]) -> Encoded:
        record = {key: value for key, value in record.items() if value is not None}
        check_text(record)
        if "conversations" in record and "messages" not in record:
            record["messages"] = from_sharegpt(record.pop("conversations"))
        form = _form(record)
        unused = [key for key in record if key not in form and key not in self.keys]
        if form == ("text",):
            ids = self._closed(text_ids(self.tokenizer, record["text"]))
            return Encoded(ids, [True] * len(ids), unused)
        if form == ("prompt", "completion") and isinstance(record["prompt"], str):
            prompt = prompt_ids(self.tokenizer, record["prompt"])
            completion = self._closed(bare_ids(self.tokenizer, record["completion"]))
            return Encoded(prompt + completion, [False] * len(prompt) + [True] * len(completion), unused)
        return self._chat(record, form, [key for key in unused if key not in _BESIDE_MESSAGES])

    def _chat(self, record: Mapping[str, Any], form: tuple[str, ...], unused: list[str]) -> Encoded:
        parts = [read_messages(record[key], key) for key in form]
        messages = [message for part in parts for message in part]
        tools = _json_list(record, "tools")
        kwargs = record.get("chat_template_kwargs", {})
        if not isinstance(kwargs, dict):
            raise BadLine(f"chat_template_kwargs: found {type(kwargs).__name__}, expected an object")
        template = self._template(tools is not None)
        wrong = sorted(template.reserved & kwargs.keys())
        if wrong:
            raise BadLine(f"chat_template_kwargs: found {', '.join(wrong)}, which are not the template's to be given")
        conversation = Conversation(
            messages, tools, _json_list(record, "documents"), kwargs, len(parts[0]) if len(parts) > 1 else 0
        )
        made = encode_turns(template, conversation)
        unread = [key for key in ("tools", "documents") if key in record and not template.reads(key)]
        unread += [f"chat_template_kwargs.{key}" for key in kwargs if not template.reads(key)]
        fields = dict.fromkeys(key for message in messages for key in message if key not in ("role", "content"))
        unread += [f"{form[0]}.{key}" for key in fields if not template.reads(key)]
        return Encoded(made.ids, made.counted, [*unused, *unread], made.lost, made.ends)

    def _template(self, with_tools: bool) -> ChatTemplate:
        if with_tools not in self._templates:
            self._templates[with_tools] = ChatTemplate(self.tokenizer, with_tools=with_tools)
        return self._templates[with_tools]

    def _closed(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _form(record: dict[str, Any]) -> tuple[str, ...]:
    """The one form of a record, with its values checked."""
    present = [form for form in FORMS if any(key in record for key in form)]
    if "messages" in record and "text" not in record and "completion" not in record:
        present = [("messages",)]
    if len(present) != 1:
        known = sorted(key for form in present for key in form if key in record)
        raise BadLine(f"found {', '.join(known or sorted(record)) or 'nothing'}; {EXPECTED}")
    for key in present[0]:
        if key not in record:
            raise BadLine(f"{key} is missing beside {', '.join(k for k in present[0] if k in record)}")
        value = record[key]
        if key == "messages" or isinstance(value, list) and key != "text":
            continue  # `read_messages` checks them
        if not isinstance(value, str):
            raise BadLine(f"{key}: found {type(value).__name__}, expected a string")
        if not value:
            raise BadLine(f"{key}: empty")
    kinds = {key: type(record[key]).__name__ for key in present[0]}
    if len(set(kinds.values())) > 1:
        found = " and ".join(f"{key} a {kind}" for key, kind in kinds.items())
        raise BadLine(f"found {found}, expected two strings or two lists of messages")
    return present[0]


def _json_list(record: Mapping[str, Any], key: str) -> list[Any] | None:
    """A list of objects, which some data sets have as a string of JSON."""
    value = record.get(key)
    if isinstance(value, str):
        value = parsed(value, key)
    if value is not None and not (isinstance(value, list) and all(isinstance(element, dict) for element in value)):
        raise BadLine(f"{key}: found {type(value).__name__}, expected a list of objects")
    return value
