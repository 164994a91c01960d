"""A script, run by tests/test_trainers.py: five training steps in two processes, then save.

    torchrun --nproc-per-node 2 tests/distributed_peft.py ddp|fsdp2|zero3 OUT
    python tests/distributed_peft.py single OUT

`single` does in one process what two do under DDP: each step averages the gradients of the two halves of the batch.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from test_peft_support import config, tiny_llama
from torch.distributed.fsdp import FSDPModule

from moe_lora_interop.peft_tuner.trainer import collected_aux_losses

STEPS = 5
FIELDS = {
    "target_modules": ["q_proj", "down_proj"],
    "top_k": 2,
    "router_bias": True,
    "router_aux_loss_coef": 0.05,
    "task_type": "CAUSAL_LM",
    "init_lora_weights": False,
}

# the model to call, the update after a loss, and the whole state dict (None where it is not the main process)
Backend = tuple[torch.nn.Module, Callable[[list[torch.Tensor]], None], Callable[[], dict[str, torch.Tensor] | None]]


def batch(step: int, half: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + half)
    ids = torch.randint(3, 97, (2, 8), generator=generator)
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def with_accelerate(mode: str, model: peft.PeftModel, optimizer: torch.optim.Optimizer) -> Backend:
    accelerator = Accelerator(cpu=True)
    if mode == "fsdp2":
        # accelerate 1.15 reads an FSDP plugin only where there are accelerators, and ignores it without a word on CPU
        # (AcceleratorState.__init__); its FSDP2 code itself runs on gloo
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            cpu_ram_efficient_loading=False,
            state_dict_type="FULL_STATE_DICT",
        )
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    prepared, optimizer = accelerator.prepare(model, optimizer)
    if mode == "fsdp2":
        units = [n for n, m in prepared.named_modules() if isinstance(m, FSDPModule)]
        assert sum(n.endswith(("layers.0", "layers.1")) for n in units) == 2, units

    def update(losses: list[torch.Tensor]) -> None:
        optimizer.zero_grad()
        for loss in losses:
            accelerator.backward(loss)
        optimizer.step()

    def state() -> dict[str, torch.Tensor] | None:
        found = accelerator.get_state_dict(prepared)
        return found if accelerator.is_main_process else None

    return prepared, update, state


def with_deepspeed(model: peft.PeftModel, optimizer: torch.optim.Optimizer) -> Backend:
    """ZeRO-3 with every parameter partitioned. Directly: on CPU, accelerate 1.15 believes in one process here."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    assert all(p.numel() == 0 for p in model.parameters())

    def update(losses: list[torch.Tensor]) -> None:
        engine.backward(losses[0])
        engine.step()

    def state() -> dict[str, torch.Tensor] | None:
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return {n: t.clone() for n, t in model.state_dict().items()} if engine.global_rank == 0 else None

    return engine, update, state


def train(mode: str, out: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(3)
    model = peft.get_peft_model(tiny_llama(), config(**FIELDS)).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "moe_lora_" not in n}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    running, update, state = (
        with_deepspeed(model, optimizer) if mode == "zero3" else with_accelerate(mode, model, optimizer)
    )
    halves = [0, 1] if mode == "single" else [torch.distributed.get_rank()]
    means = []
    for step in range(STEPS):
        losses = []
        for half in halves:
            with collected_aux_losses(running) as aux:
                loss = running(**batch(step, half)).loss
            assert len(aux) == 1 and aux[0] > 0
            losses.append((loss + aux[0]) / len(halves))
        total = torch.stack([loss.detach() for loss in losses]).sum()
        if mode != "single":
            torch.distributed.all_reduce(total)
            total /= 2
        update(losses)
        means.append(total.item())
    whole = state()
    if whole is not None:
        model.save_pretrained(out, state_dict=whole)
        changed = [n for n, p in before.items() if not torch.equal(whole[n], p)]
        (out / "report.json").write_text(json.dumps({"losses": means, "changed": changed}))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        # To return frees the wrapped model and with it the group itself, whose destructor waits, with the GIL, for a
        # thread that may be waiting for the GIL (torch 2.13.0; seen once, as a process that never ended).
        os._exit(0)


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]))
