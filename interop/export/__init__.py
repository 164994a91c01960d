"""Exports for programs that know nothing of mixtures: ordinary LoRA directories, or a standalone Mixtral model."""

from interop.export.experts import export_lora_experts as export_lora_experts
from interop.export.fixed_gates import export_lora as export_lora
from interop.export.gate_sources import gates_from_file as gates_from_file
from interop.export.gate_sources import gates_of as gates_of
from interop.export.gate_sources import uniform_gates as uniform_gates
from interop.export.mixtral import export_mixtral as export_mixtral
