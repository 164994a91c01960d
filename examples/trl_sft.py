"""Supervised fine-tuning with TRL, in a script that never imports moe-lora-jax:

    moe-lora run -- python examples/trl_sft.py --base MODEL_DIR --data lines.txt --output adapter

(A script that may import it says `class Trainer(AuxLossMixin, SFTTrainer)`, from moe_lora_interop.peft_tuner.trainer:
that is the class below, and is right for DPOTrainer too, whose reference runs through the same layers.)
"""

import argparse

from datasets import Dataset
from peft import get_peft_config
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


class RouterTrainer(SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not model.training:
            return result
        aux = self.accelerator.unwrap_model(model).moe_lora_aux_loss(inputs.get("attention_mask"))
        if num_items_in_batch is not None:  # the language loss is a sum over all tokens of the accumulated steps
            aux = aux / self.current_gradient_accumulation_steps
        return (result[0] + aux, result[1]) if return_outputs else result + aux


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", required=True, help="a causal language model: directory or hub id")
    parser.add_argument("--data", required=True, help="a text file, one example a line")
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    options = parser.parse_args()

    with open(options.data, encoding="utf-8") as file:
        lines = [line.strip() for line in file if line.strip()]
    trainer = RouterTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.base),
        args=SFTConfig(
            output_dir=options.output,
            max_steps=options.steps,
            per_device_train_batch_size=len(lines),
            learning_rate=options.learning_rate,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_dict({"text": lines}),
        processing_class=AutoTokenizer.from_pretrained(options.base),
        peft_config=get_peft_config(
            {
                "peft_type": "MOE_LORA",
                "task_type": "CAUSAL_LM",
                "num_experts": 4,
                "top_k": 2,
                "r": 4,
                "lora_alpha": 16,
                "target_modules": "all-linear",
                "router_aux_loss_coef": 0.01,
            }
        ),
    )
    trainer.train()
    trainer.save_model(options.output)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
