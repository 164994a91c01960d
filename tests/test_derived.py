"""Tensors computed from those that a layout stores, beyond the sizes that the peers have."""

import numpy as np

from moe_lora_interop.rules.derived import layers_into_one


def test_more_than_ten_layers_are_multiplied_in_the_order_of_their_numbers():
    rng = np.random.default_rng(0)
    weights, biases = rng.normal(size=(12, 3, 3)) / 2, rng.normal(size=(12, 3))
    tensors = {("", f"router_{n}"): weight.astype(np.float32) for n, weight in enumerate(weights)}
    tensors |= {("", f"router_bias_{n}"): bias.astype(np.float32) for n, bias in enumerate(biases)}
    found, problems = layers_into_one(tensors, {"enable_relu_and_dropout": False, "xlora_depth": 12})
    assert problems == [] and set(found) == {("", "router_0"), ("", "router_bias_0")}
    x = rng.normal(size=3)
    expected = x
    for weight, bias in zip(weights, biases, strict=True):
        expected = weight @ expected + bias
    one = np.asarray(found["", "router_0"]) @ x + np.asarray(found["", "router_bias_0"])
    np.testing.assert_allclose(one, expected, rtol=1e-5)
