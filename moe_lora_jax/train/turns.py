"""Which tokens of a conversation are the assistant's.

Where the template marks them ({% generation %}), those. Otherwise a turn is what stands between two renderings: that
of the messages before it with the generation prompt, and that of the messages up to it, both of which the whole must
start with. Some templates render a turn differently once more messages follow. Then the turn is looked up between the
marks that the template puts around it, and counts if nothing that the message says is missing there: Qwen3 leaves out
an empty <think> in earlier turns (they count), and reasoning (they do not: nobody should learn to answer without it).
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from moe_lora_jax.train.errors import BadLine
from moe_lora_jax.train.messages import Message
from moe_lora_jax.train.template import ChatTemplate, Conversation
from moe_lora_jax.train.tokenizer import bare_ids


class Turns(NamedTuple):
    """ids: of the whole conversation. counted: true for the assistant's. lost: turns of its that carry no loss.
    ends: whether the last of them ends with a token of its own, which then teaches where to stop.
    """

    ids: list[int]
    counted: list[bool]
    lost: int = 0
    ends: bool = True


def encode_turns(template: ChatTemplate, conversation: Conversation) -> Turns:
    """The tokens of a conversation.

    Raises:
        BadLine: the template cannot serve it, or the assistant's last turn cannot be told apart.
    """
    conversation, text = template.fitting(conversation)
    if template.has_generation:
        ids, marked = bare_ids(template.tokenizer, text), template.generation_mask(conversation)
        if conversation.answers_from:
            answers = _overlapping(
                template.tokenizer, text, [(_answers_start(template, conversation, text), len(text))]
            )
            marked = [m and a for m, a in zip(marked, answers, strict=True)]
        return Turns(ids, marked, ends=_ends(template.tokenizer, ids, marked))
    last = conversation.messages[-1]["role"]
    if last != "assistant":
        raise BadLine(f"the last message is from {last!r}, expected 'assistant'")
    spans: list[tuple[int, int]] = []
    lost = 0
    for i, message in enumerate(conversation.messages):
        if message["role"] != "assistant" or i < conversation.answers_from:
            continue
        # what stands before a first message is seen only where the template takes a conversation without any
        ways = (_between_marks, _between_renderings) if i == 0 else (_between_renderings, _between_marks)
        span = ways[0](template, conversation, i, text) or ways[1](template, conversation, i, text)
        if span is not None:
            spans.append(span)
        elif i < len(conversation.messages) - 1:
            lost += 1
        else:
            raise BadLine(
                "the chat template renders the earlier turns differently once the answer follows, so the answer cannot "
                "be told apart: mark it with {% generation %} in the template, or use prompt and completion"
            )
    ids, counted = bare_ids(template.tokenizer, text), _overlapping(template.tokenizer, text, spans)
    return Turns(ids, counted, lost, _ends(template.tokenizer, ids, counted))


def prompt_of(template: ChatTemplate, conversation: Conversation) -> list[int]:
    """The tokens of a conversation that the assistant is to continue."""
    return bare_ids(template.tokenizer, template.fitting(conversation, prompt=True)[1])


def _ends(tokenizer: Any, ids: Sequence[int], counted: Sequence[bool]) -> bool:
    """Whether the last token that counts is an added one, white space aside."""
    added = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    for token in (i for i, counts in zip(reversed(ids), reversed(counted), strict=True) if counts):
        if token in added or tokenizer.decode([token]).strip():
            return token in added
    return False


def _between_renderings(
    template: ChatTemplate, conversation: Conversation, i: int, text: str
) -> tuple[int, int] | None:
    messages = conversation.messages
    try:
        start = template.render(replace(conversation, messages=messages[:i]), prompt=True) if i else ""
        is_last = i == len(messages) - 1
        end = text if is_last else template.render(replace(conversation, messages=messages[: i + 1]))
        if i and template.marks is not None and not end.startswith(start):  # a prompt that begins a thought
            start = template.render(replace(conversation, messages=messages[:i])) + template.marks.opening
    except BadLine:  # a beginning need not be a conversation that the template takes
        return None
    fits = text.startswith(end) and end.startswith(start) and len(end) > len(start)
    return (len(start), len(end)) if fits else None


def _between_marks(template: ChatTemplate, conversation: Conversation, i: int, text: str) -> tuple[int, int] | None:
    marks, messages = template.marks, conversation.messages
    turns = [j for j, message in enumerate(messages) if message["role"] == "assistant"]
    if marks is None or text.count(marks.opening) != len(turns):
        return None
    parts = text.split(marks.opening)
    order = turns.index(i)
    start = sum(map(len, parts[: order + 1])) + (order + 1) * len(marks.opening)
    end = text.find(marks.closing, start)
    if end < 0 or end > start + len(parts[order + 1]):
        return None
    try:
        alone = template.render(replace(conversation, messages=messages[: i + 1]))
    except BadLine:
        return None
    said = {key: value for key, value in messages[i].items() if key != "role"}
    shown = set(re.findall(r"\w+", alone.rpartition(marks.opening)[2]))
    if not _words(said) & shown <= set(re.findall(r"\w+", text[start:end])):
        return None
    return start, len(text) if i == len(messages) - 1 else end + len(marks.closing)


def _answers_start(template: ChatTemplate, conversation: Conversation, text: str) -> int:
    prompt = replace(conversation, messages=conversation.messages[: conversation.answers_from])
    start = template.render(prompt, prompt=True)
    if not text.startswith(start):
        start = template.render(prompt)
    if not text.startswith(start):
        raise BadLine("the chat template renders the prompt differently once the completion follows: use messages")
    return len(start)


def _words(message: Message | Any) -> set[str]:
    """Every word that a message says, in whatever field."""
    if isinstance(message, str):
        return set(re.findall(r"\w+", message))
    inner = [*message, *message.values()] if isinstance(message, dict) else message if isinstance(message, list) else []
    return set().union(*map(_words, inner))


def _overlapping(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]) -> list[bool]:
    """For each token whether a character of it is in a span; a token that is no character, whether it stands in one."""
    if not tokenizer.is_fast:
        return _by_length(tokenizer, text, spans)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [
        any(start < stop and (end > begin or start >= begin) for begin, stop in spans)
        for start, end in encoded["offset_mapping"]
    ]


def _by_length(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]) -> list[bool]:
    """The same for a tokenizer that does not say where its tokens stand: by the tokens up to each border."""
    ids = bare_ids(tokenizer, text)
    counted = [False] * len(ids)
    for span in spans:
        parts = [bare_ids(tokenizer, text[:border]) for border in span]
        if any(ids[: len(part)] != part for part in parts):
            raise BadLine("this tokenizer does not say where its tokens stand, and a turn begins or ends within one")
        begin, stop = map(len, parts)
        counted[begin:stop] = [True] * (stop - begin)
    return counted
