"""What a compiler says of a program ahead of time, without the device: its topology, its cycles, its memory."""

from moe_lora_jax.compiled.cycles import Cycles as Cycles
from moe_lora_jax.compiled.cycles import estimated_cycles as estimated_cycles
from moe_lora_jax.compiled.topologies import Topology as Topology
from moe_lora_jax.compiled.topologies import topology as topology
