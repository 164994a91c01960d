"""A vLLM plugin: mixtures of scope linear beside plain LoRAs and the base, chosen for every request.

vLLM calls `register` in each of its processes (entry point group vllm.general_plugins). What can be served, and with
which --max-lora-rank, `moe_lora_interop.checkpoint.servable` says, which needs neither torch nor vLLM.
"""


def register() -> None:
    """Teaches vLLM to load directories of peft_type MOE_LORA.

    Raises:
        ConfigError: this vLLM is not one that the plugin was tried with; vLLM then does not start.
    """
    from moe_lora_interop.vllm_plugin.touches import register as touch

    touch()
