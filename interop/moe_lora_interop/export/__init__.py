"""Exports for programs that know nothing of mixtures: ordinary LoRA directories, or a standalone Mixtral model."""

from moe_lora_interop.export.experts import export_lora_experts as export_lora_experts
from moe_lora_interop.export.fixed_gates import export_lora as export_lora
from moe_lora_interop.export.gate_sources import gates_from_file as gates_from_file
from moe_lora_interop.export.gate_sources import gates_of as gates_of
from moe_lora_interop.export.gate_sources import uniform_gates as uniform_gates
from moe_lora_interop.export.inside import Inside as Inside
from moe_lora_interop.export.mixtral import export_mixtral as export_mixtral
