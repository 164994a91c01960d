"""A script for a process of its own, which alone imports torch: loads an adapter with PEFT and compares logits.

    python peft_check.py BASE_DIR ADAPTER_DIR EXPECTED.npz

EXPECTED.npz holds input_ids and attention_mask [batch, seq] and logits [batch, seq, vocab]. Prints one JSON object:
the largest absolute difference on real tokens, and the largest absolute logit.
"""

import json
import sys

import numpy as np


def compare(base: str, adapter: str, expected_file: str) -> dict[str, float]:
    """Runs the PEFT model in fp32 on the stored input."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import moe_lora_interop.peft_tuner  # noqa: F401  registers MOE_LORA with PEFT

    with np.load(expected_file) as expected:
        ids, mask, logits = (expected[name] for name in ("input_ids", "attention_mask", "logits"))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    model = PeftModel.from_pretrained(plain, adapter).eval()
    with torch.no_grad():
        found = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()
    difference = np.abs(found - logits)[mask > 0]
    return {"largest_difference": float(difference.max()), "largest_logit": float(np.abs(logits[mask > 0]).max())}


if __name__ == "__main__":
    print(json.dumps(compare(*sys.argv[1:])))
