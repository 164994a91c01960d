"""Says once that an adapter's auxiliary loss is in no one's loss: a plain training loop has no place that adds it."""

import warnings

from torch import Tensor

UNCLAIMED = (
    "adapter {name!r} has router_aux_loss_coef {balance} and router_z_loss_coef {z}, but a backward pass ran without "
    "its auxiliary loss: add model.base_model.moe_lora_aux_loss(attention_mask) to the loss before loss.backward(), or "
    "put moe_lora_interop.peft_tuner.trainer.AuxLossMixin before your Trainer among its bases"
)


class Claim:
    """One forward of one router: whether `moe_lora_aux_loss` has taken its losses."""

    taken = False


class Watch:
    """What the routers of one adapter in one model share: whether the warning has been given."""

    def __init__(self, message: str) -> None:
        self.message = message
        self.warned = False

    def over(self, gates: Tensor) -> tuple[Tensor, Claim]:
        """The gates for the model's output, and a claim on the losses of this forward: a backward pass of the output
        that comes before it is taken warns, once."""
        claim = Claim()
        if not self.warned:
            gates = gates.view_as(gates)  # so that losses on the routing itself do not pass here
            gates.register_hook(lambda gradient: self._check(claim))
        return gates, claim

    def _check(self, claim: Claim) -> None:
        if not claim.taken and not self.warned:
            self.warned = True
            warnings.warn(self.message, UserWarning, stacklevel=2)
