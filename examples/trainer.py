"""A plain transformers Trainer script, which never imports moe-lora-jax:

    moe-lora run -- python examples/trainer.py --base MODEL_DIR --data lines.txt --output adapter

`moe-lora run` registers the PEFT method MOE_LORA before this starts; everything else is what it would be for LoRA,
except the two lines that add the routers' auxiliary loss.
"""

import argparse

import torch
from peft import get_peft_config, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments


class RouterTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not model.training:
            return result
        aux = self.accelerator.unwrap_model(model).moe_lora_aux_loss(inputs["attention_mask"])
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

    tokenizer = AutoTokenizer.from_pretrained(options.base)
    with open(options.data, encoding="utf-8") as file:
        rows = [tokenizer(line.strip() + tokenizer.eos_token) for line in file if line.strip()]

    def collate(batch):
        padded = tokenizer.pad([{k: row[k] for k in ("input_ids", "attention_mask")} for row in batch])
        ids, mask = torch.tensor(padded["input_ids"]), torch.tensor(padded["attention_mask"])
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(options.base),
        get_peft_config(
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
    trainer = RouterTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.output,
            max_steps=options.steps,
            per_device_train_batch_size=len(rows),
            learning_rate=options.learning_rate,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            remove_unused_columns=False,
        ),
        train_dataset=rows,
        data_collator=collate,
    )
    trainer.train()
    model.save_pretrained(options.output)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
