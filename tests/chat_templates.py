"""Chat templates of several styles, written by hand, and a tokenizer for them (no test of its own)."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = none %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}<s>[INST] "
    "{% if loop.first and system %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% for m in messages %}{% if loop.first %}<|begin|>{% endif %}"
    "<|start_header|>{{ m.role }}<|end_header|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header|>assistant<|end_header|>\n\n{% endif %}"
)
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}<bos>"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# strips the reasoning of all turns but those after the last question, and puts an empty one before the last answer
QWEN_3 = (
    "{% if tools %}<|im_start|>system\n# Tools\n"
    "{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set text = m.content if m.content is string else '' %}{% set think = '' %}"
    "{% if '</think>' in text %}{% set think = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or think) %}<think>\n{{ think }}\n</think>\n\n{% endif %}{{ text }}"
    "{% for call in m.tool_calls or [] %}{% if text or not loop.first %}\n{% endif %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ "{" }}'
    "{% for key, value in call.function.arguments.items() %}{{ key | tojson }}: {{ value | tojson }}{% endfor %}}}\n"
    "</tool_call>{% endfor %}<|im_end|>\n"
    "{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# puts what the system says into the last question
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{% set ns = namespace(last=0) %}"
    "{% for m in rest %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}<s>"
    "{% for m in rest %}{% if m.role == 'user' %}[INST] {% if system and loop.index0 == ns.last %}{{ system }}\n\n"
    "{% endif %}{{ m.content }}[/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
# opens a thought in the prompt, strips thoughts, opens no turn after a tool's answer, shows calls beside null alone
DEEPSEEK = (
    "{% for m in messages %}{% if m.role == 'user' %}<|begin|>{{ m.content }}{% elif m.role == 'tool' %}"
    "<tool>{{ m.content }}</tool>{% else %}{% if not loop.previtem or loop.previtem.role != 'tool' %}<|eot|>{% endif %}"
    "{% if m.content is none %}{{ m.tool_calls[0].function.name }}{% else %}{{ m.content.split('</think>')[-1] }}"
    "{% endif %}</s>{% endif %}{% endfor %}{% if add_generation_prompt and messages[-1].role != 'tool' %}"
    "<|eot|><think>\n{% endif %}"
)
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}" + CHATML
ENDING_ONCE = CHATML.replace("{% if add", "{% if not add_generation_prompt %}</s>{% endif %}{% if add")
PARTS = CHATML.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}")
# prints the arguments of a tool call as they are: wants JSON text
PRINTING = CHATML.replace(
    "{{ m.content }}",
    "{% if m.content is not none %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }} {{ call.function.arguments }}{% endfor %}",
)
MARKED = CHATML.replace(
    "{{ m.content }}<|im_end|>\n",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}",
)

SPECIAL = """<s> </s> <bos> <|begin|> <|im_start|> <|im_end|> <|start_header|> <|end_header|> <|eot|> <start_of_turn>
<end_of_turn> [INST] [/INST]""".split()


def chat_tokenizer(template: str | None, eos: str = "</s>") -> PreTrainedTokenizerFast:
    """One id per byte, and one for each special token; nothing is added."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token=eos)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = template
    return tokenizer
