"""Which tokens a router saw: in an encoder-decoder, those of the encoder or those of the decoder."""

import re
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

_CROSS_ATTENTION = re.compile(r"encdec|encoder_attn|cross_?att", re.IGNORECASE)
_KEY_OR_VALUE = re.compile(r"(k|v|kv|key|value|c_attn)(_proj)?")
"""GPT-2's c_attn holds the keys and values of a cross-attention; its queries are q_attn."""


class TokenMasks:
    """The masks of a batch, each [batch, seq] and nonzero for real tokens, or None: every token counts.

    In an encoder-decoder `attention_mask` is for the routers in the encoder and at the keys and values of
    cross-attention, `decoder_attention_mask` for the others. In any other model `attention_mask` is for all.
    """

    def __init__(self, model: nn.Module, attention_mask: Tensor | None, decoder_attention_mask: Tensor | None) -> None:
        whole = encoder_decoder(model)
        encoder = None if whole is None else whole.get_encoder()
        self.in_encoder = None if encoder is None else set(encoder.modules())
        self.attention_mask = attention_mask
        self.decoder_attention_mask = decoder_attention_mask

    def of(self, name: str, layer: nn.Module, rows: int) -> Tensor | None:
        """The mask for a router at this place, which saw that many tokens (0: sequences).

        A name that is not known as cross-attention is no reason to refuse a mask that fits when its own does not.
        """
        if self.in_encoder is None:
            return self.attention_mask
        own, other = self.attention_mask, self.decoder_attention_mask
        if layer not in self.in_encoder and not reads_encoder(name):
            own, other = other, own
        if rows and own is not None and own.numel() != rows and other is not None and other.numel() == rows:
            return other
        return own


def encoder_decoder(model: nn.Module) -> Any:
    """The encoder-decoder inside `model`, a PeftModel or whatever wraps one; None if there is none."""
    inner = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    return inner if inner is not None and inner.config.is_encoder_decoder else None


def reads_encoder(name: str) -> bool:
    """Whether a layer of a decoder reads the encoder's output: the keys and values of cross-attention."""
    *path, last = name.split(".")
    return any(map(_CROSS_ATTENTION.search, path)) and _KEY_OR_VALUE.fullmatch(last) is not None


def decoder_mask(arguments: dict[str, Any]) -> Tensor | None:
    """The decoder's mask in a call of an encoder-decoder: decoder_attention_mask; or the labels that count, as position
    i of the decoder predicts label i; None: every token counts."""
    mask, labels = arguments.get("decoder_attention_mask"), arguments.get("labels")
    if mask is None and isinstance(labels, Tensor) and labels.ndim == 2:
        return labels != -100
    return mask
