"""Feed-forward blocks, for experts that are whole blocks: which of a block's linear layers is the last."""

LAST_NAMES = ("down_proj", "fc2", "w2", "wo", "c_proj", "dense_4h_to_h")


def last_layer(layers: dict[str, tuple[int, int]]) -> str | None:
    """The layer of a block whose output is the block's: by its name, or the only one that narrows; None if unclear.

    Args:
        layers: {name: (in_features, out_features)}.
    """
    named = [name for name in layers if name in LAST_NAMES]
    narrowing = [name for name, (size_in, size_out) in layers.items() if size_out < size_in]
    found = named if len(named) == 1 else narrowing
    return found[0] if len(found) == 1 else None
