"""What a compiler says of a program ahead of time, without the device: its topology, its cycles, its memory."""

from moe_lora_jax.compiled.ahead import Ahead as Ahead
from moe_lora_jax.compiled.ahead import compile_ahead as compile_ahead
from moe_lora_jax.compiled.cycles import Cycles as Cycles
from moe_lora_jax.compiled.cycles import estimated_cycles as estimated_cycles
from moe_lora_jax.compiled.memory import Buffer as Buffer
from moe_lora_jax.compiled.memory import Memory as Memory
from moe_lora_jax.compiled.topologies import Topology as Topology
from moe_lora_jax.compiled.topologies import topology as topology
from moe_lora_jax.compiled.topologies import usable_bytes as usable_bytes
