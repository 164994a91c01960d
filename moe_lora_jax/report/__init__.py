"""Pictures of an adapter: what its routers do, how its experts differ, how its training went.

Needs matplotlib: `pip install 'moe-lora-jax[report]'`. Every function that draws returns a matplotlib figure, but
`plot_tokens`: its picture is HTML.
"""

from moe_lora_jax.measure.router_statistics import RouterStatistics, router_statistics
from moe_lora_jax.report.curves import plot_balance, plot_entropy, plot_losses
from moe_lora_jax.report.heat_maps import plot_router, plot_similarity, plot_topics
from moe_lora_jax.report.similarity import delta_similarity
from moe_lora_jax.report.tokens import TokenPicture, plot_tokens

__all__ = [
    "RouterStatistics",
    "TokenPicture",
    "delta_similarity",
    "plot_balance",
    "plot_entropy",
    "plot_losses",
    "plot_router",
    "plot_similarity",
    "plot_tokens",
    "plot_topics",
    "router_statistics",
]
