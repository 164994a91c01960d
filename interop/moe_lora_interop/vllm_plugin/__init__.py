"""A vLLM plugin: mixtures of scope linear beside plain LoRAs and the base, chosen for every request.

vLLM calls `register` in each of its processes (entry point group vllm.general_plugins). What can be served, and with
which --max-lora-rank, `moe_lora_interop.checkpoint.servable` says, which needs neither torch nor vLLM.
"""

import logging

from moe_lora_interop.checkpoint.servable import TRIED


def register() -> None:
    """Teaches vLLM to load directories of peft_type MOE_LORA.

    Where vLLM is not as in the versions tried, it is left as it is, and its log says why; it then refuses a mixture
    itself, by the name of its first tensor. An exception here would keep it from starting for anything else, too.
    """
    log = logging.getLogger("vllm.plugins.moe_lora")
    try:
        from moe_lora_interop.vllm_plugin import touches

        problems = touches.register()
    except (ImportError, AttributeError) as error:
        problems = [str(error)]
    if problems:
        reasons = "\n  - ".join(problems)
        log.error("mixtures of LoRA cannot be served: tried with vLLM %s\n  - %s", ", ".join(TRIED), reasons)
