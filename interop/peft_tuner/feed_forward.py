"""Which modules of a model are feed-forward blocks whose experts can be whole blocks (scope ffn)."""

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from interop.blocks import last_layer
from interop.config import MoeLoraConfig
from interop.peft_tuner.layer import features, unsupported
from interop.peft_tuner.router import MoeLoraLayer


def linear_children(block: nn.Module) -> dict[str, nn.Module]:
    """{name: base layer} of the block's own linear layers, in order, whether wrapped or not."""
    bases = {n: m.get_base_layer() if isinstance(m, BaseTunerLayer) else m for n, m in block.named_children()}
    return {name: base for name, base in bases.items() if unsupported(base) is None}


def last_of(block: nn.Module) -> tuple[str, nn.Module]:
    """(name, base layer) of the last layer of a block without `block_problem`."""
    layers = linear_children(block)
    name = last_layer({n: features(m) for n, m in layers.items()})
    assert name is not None, "checked before"
    return name, layers[name]


def block_problem(path: str, block: nn.Module, config: MoeLoraConfig) -> str | None:
    """Why this block cannot have experts that are whole blocks, or None if it can."""
    if not path:
        return "target_modules: found layers of the model itself, expected layers inside feed-forward blocks"
    for name, child in block.named_children():
        inner = () if isinstance(child, MoeLoraLayer) or name in linear_children(block) else child.modules()
        if any(unsupported(module) is None for module in inner):
            return f"{path}: {name} has linear layers of its own, expected a feed-forward block"
    layers = linear_children(block)
    shapes = {name: features(layer) for name, layer in layers.items()}
    last = last_layer(shapes)
    if last is None or len(layers) < 2:
        return f"{path}: found the layers {shapes}, expected several, exactly one of which has the block's output"
    sums_to_one = config.norm_topk_prob and config.threshold is None and config.routed_scaling_factor == 1
    if getattr(layers[last], "bias", None) is not None and (not sums_to_one or config.expert_dropout > 0):
        return (
            f"{path}.{last}: has a bias, so the gates must sum to 1; expected norm_topk_prob without threshold, "
            "scaling factor or expert_dropout"
        )
    return None
