"""What a MOE_LORA adapter cannot do, and what to do instead."""

MERGE_REFUSAL = (
    "a MOE_LORA adapter cannot be merged: its router weighs the experts anew for every token, so no single weight "
    "matrix equals it. Keep the PeftModel as it is (unload() gives the base model back), or write an ordinary LoRA "
    "with fixed gates, which can be merged: moe-lora export SRC DST --as lora"
)

WEIGHTED_REFUSAL = (
    "MOE_LORA adapters cannot be combined with add_weighted_adapter: no router weighs like a weighted sum of routers. "
    "Activate both (model.base_model.set_adapter([a, b]) adds their deltas), or make one mixture of ordinary LoRA "
    "adapters: moe-lora combine LORA_DIR LORA_DIR ... DST"
)

INJECTION_REFUSAL = (
    "an adapter of scope {scope} has routers beside the layers, which transformers' load_adapter and "
    "from_pretrained(adapter_dir) would leave random without an error: use peft.get_peft_model or "
    "peft.PeftModel.from_pretrained(base, adapter_dir) instead of injecting it"
)

CACHE_REFUSAL = (
    "adapter {name!r} has a router of the whole model, which reads a first pass through the base model; a cache holds "
    "only the keys and values of the second: pass use_cache=False, to generate() too"
)

FIRST_PASS_REFUSAL = (
    "adapter {name!r} takes part in the first pass of its own router (scaling_pass_value {value}); with other active "
    "adapters it would be another pass: activate this one alone (set_adapter)"
)

BLOCK_REFUSAL = (
    "adapters {names} are active together on one feed-forward block, but {name} mixes whole blocks (scope ffn) and not "
    "linear layers, so their deltas cannot be added: activate one of them (set_adapter)"
)

MIXED_BATCH_REFUSAL = (
    "adapter_names: adapter {name!r} has scope {scope} and router_input {router_input}; a batch can mix only adapters "
    "whose routers stand at each linear layer and read what passes there. Run one batch for each adapter (set_adapter)"
)

NO_VALUE = (
    "{parameter}: the parameter of adapter {name!r} is on the meta device, without a value: load the adapter "
    "(PeftModel.from_pretrained, load_adapter, set_peft_model_state_dict) before the forward"
)

TASKS_MISSING = (
    "adapter {name!r} routes by task: run the model inside `with peft_model.base_model.task_routing(task_ids):` "
    "(PEFT drops a task_ids argument)"
)
