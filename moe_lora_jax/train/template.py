"""Rendering a conversation with the tokenizer's chat template, and the marks that the template puts around a turn.

Whatever a template raises becomes a `BadLine` with the template's own words. Where templates differ in the spelling
they want, the first that works is taken: content as a string or as a list of parts, null or "" where there is none, the
arguments of a tool call as a mapping or as JSON text. A spelling of which the template shows nothing, or that shows up
as Python (None, {'city': 'Rome'}), does not work.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple

from moe_lora_jax.train.errors import BadLine, DataError
from moe_lora_jax.train.messages import Message, called, has_arguments, python_words, spelled

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_USER, _ASSISTANT, _NEXT = "xyzzyask", "xyzzyanswer", "xyzzynext"  # words that no template has


@dataclass(frozen=True)
class Conversation:
    """What a template is given.

    answers_from: the first message whose turn may count. The other fields are transformers' arguments.
    """

    messages: Sequence[Message]
    tools: Any = None
    documents: Any = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    answers_from: int = 0


class Marks(NamedTuple):
    """What stands right before and right after what the assistant says, in the middle of a conversation."""

    opening: str
    closing: str


class ChatTemplate:
    """The template of a tokenizer for conversations without tools, or with them: some tokenizers have two.

    Raises:
        BadLine: the tokenizer has none.
    """

    def __init__(self, tokenizer: Any, *, with_tools: bool = False):
        self.tokenizer = tokenizer
        try:
            self.source = tokenizer.get_chat_template(tools=[] if with_tools else None)
        except ValueError as error:
            if tokenizer.chat_template is not None:
                raise BadLine(str(error)) from None
            hint = "use text, or prompt and completion, or give a template (--chat-template FILE)"
            raise BadLine(f"messages need a chat template, and the tokenizer has none: {hint}") from None
        self.has_generation = _GENERATION.search(self.source) is not None
        self.reserved = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages"}

    def reads(self, name: str) -> bool:
        """Whether the template has this word at all."""
        return re.search(rf"\b{re.escape(name)}\b", self.source) is not None

    def render(self, conversation: Conversation, *, prompt: bool = False) -> str:
        """The text of a conversation, with the generation prompt if `prompt`."""
        return self._apply(conversation, tokenize=False, add_generation_prompt=prompt)

    def generation_mask(self, conversation: Conversation) -> list[bool]:
        """Which tokens the template marks as the assistant's."""
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        return [bool(mark) for mark in self._apply(conversation, **options)["assistant_masks"]]

    def fitting(self, conversation: Conversation, *, prompt: bool = False) -> tuple[Conversation, str]:
        """The conversation in the spelling that this template wants, and its text; with `prompt`, for an answer.

        Raises:
            BadLine: what the template says to the usual spelling, or that it leaves out the last content or a call.
        """
        messages = list(conversation.messages)
        nulls = (None, "") if any(m["content"] is None for m in messages) else (None,)
        texts = (False, True) if has_arguments(messages) else (False,)
        python = python_words(messages)
        nones = str(spelled(messages, null="", as_text=True, parts=False)).count("None")
        rendered: list[tuple[Conversation, str]] = []
        problems: list[BadLine] = []
        for parts, as_text, null in product((False, True), texts, nulls):
            if parts and rendered:
                break
            made = replace(conversation, messages=spelled(messages, null=null, as_text=as_text, parts=parts))
            try:
                text = self.render(made, prompt=prompt)
            except BadLine as bad:
                problems.append(bad)
                continue
            if left_out := _left_out(messages, text, calls=self.reads("tool_calls")):
                problems.append(BadLine(f"the chat template leaves out {left_out}"))
                continue
            rendered.append((made, text))
            shows_none = len(nulls) > 1 and null is None and text.count("None") > nones
            if not shows_none and not any(word in text for word in python):
                return made, text
        if not rendered:
            raise problems[len(nulls) - 1]  # of strings and mappings, with "" for null: the rest are rarer
        return rendered[0]

    @cached_property
    def marks(self) -> Marks | None:
        """What surrounds a turn, if tokens of their own are part of it on both sides; None if not."""
        middle, end = self._probe(_USER, _ASSISTANT, _NEXT), self._probe(_USER, _ASSISTANT)
        question = self._probe(_USER)
        if middle is None or end is None or question is None or middle.count(_ASSISTANT) != 1:
            return None
        before, after = middle.split(_ASSISTANT)
        prompt = self._probe(_USER, prompt=True)
        if prompt is not None and prompt != question and before.startswith(prompt):
            before = prompt  # what follows the generation prompt is the assistant's
        opening = before.removeprefix(question) if before.startswith(question) else before.partition(_USER)[2]
        if not opening.strip():
            opening = question.partition(_USER)[2]
        found = self._added.match(after)
        if found is None or self._added.search(opening) is None:
            return None
        return Marks(opening, found[0] if end.partition(_ASSISTANT)[2].startswith(found[0]) else found[0].rstrip())

    @cached_property
    def end_token(self) -> int | None:
        """The id of the token that closes an assistant's turn; None if that is no token of its own."""
        found = self._added.match((self._probe(_USER, _ASSISTANT) or "").partition(_ASSISTANT)[2])
        return None if found is None else self.tokenizer.convert_tokens_to_ids(found["token"])

    @cached_property
    def _added(self) -> re.Pattern[str]:
        """An added token, special or not, with white space around it."""
        tokens = {t.content for t in self.tokenizer.added_tokens_decoder.values() if t.content.strip()}
        tokens |= set(self.tokenizer.all_special_tokens)
        words = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)"
        return re.compile(rf"\s*(?P<token>{words})\s*")

    def _probe(self, *contents: str, prompt: bool = False) -> str | None:
        roles = ("user", "assistant", "user")
        messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
        try:
            return self.fitting(Conversation(messages), prompt=prompt)[1]
        except (BadLine, DataError):
            return None

    def _apply(self, conversation: Conversation, **options: Any) -> Any:
        from jinja2 import TemplateError, TemplateSyntaxError

        try:
            return self.tokenizer.apply_chat_template(
                list(conversation.messages),
                tools=conversation.tools,
                documents=conversation.documents,
                chat_template=self.source,
                **options,
                **conversation.kwargs,
            )
        except (ImportError, MemoryError):
            raise
        except TemplateSyntaxError as error:
            raise DataError("cannot use the chat template", [f"line {error.lineno}: {error.message}"]) from error
        except TemplateError as error:
            raise BadLine(f"the chat template refuses these messages: {error}") from None
        except Exception as error:  # a template is a program of somebody else's
            raise BadLine(f"the chat template fails on these messages: {type(error).__name__}: {error}") from None


def _left_out(messages: Sequence[Message], text: str, *, calls: bool) -> str:
    """What is not in the text: all words of the last content that has words, or a call, if the template has `calls`."""
    said = [words for m in messages if (words := re.findall(r"\w+", (m["content"] or "").casefold()))]
    if said and set(said[-1]).isdisjoint(re.findall(r"\w+", text.casefold())):
        return "what the last message says"
    names = called(messages) if calls else []
    return next((f"the call of {name!r}" for name in names if name not in text), "")
