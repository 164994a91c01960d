"""Small adapters for tests: the tensors a config implies, written out here once more and not taken from the code."""

import numpy as np

from moe_lora_interop import Adapter, MoeLoraConfig

Q0, V0 = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
Q1, V1 = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
SHAPES = {Q0: (5, 6), V0: (5, 3), Q1: (5, 6), V1: (5, 3)}  # module: (in, out)


def random_bits(rng, shape, dtype):
    """Any bit pattern at all: NaNs with payloads, infinities, subnormals and -0.0 among them."""
    dtype = np.dtype(dtype)
    return np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)


def random_numbers(rng, shape, dtype):
    return rng.standard_normal(shape).astype(dtype)


def make_tensors(config, shapes=SHAPES, dtype="float32", router_dtype="float32", seed=0, draw=random_numbers):
    """{(module, role): array} for every module in `shapes`; ranks below the largest are zero-padded."""
    rng, tensors = np.random.default_rng(seed), {}
    for module, (n_in, n_out) in shapes.items():
        sizes = config.for_module(module)
        experts, rank = sizes.num_experts, max(sizes.ranks)
        a = draw(rng, (1 if config.shared_lora_A else experts, rank, n_in), dtype).copy()
        b = draw(rng, (experts, n_out, rank), dtype).copy()
        for expert, own in enumerate(sizes.ranks):
            if not config.shared_lora_A:
                a[expert, own:] = 0
            b[expert, :, own:] = 0
        tensors[module, "lora_A"], tensors[module, "lora_B"] = a, b
        if experts > 1:
            reads = len(a) * rank if config.router_input == "expert_activations" else n_in
            tensors[module, "router"] = draw(rng, (experts, reads), router_dtype)
            if config.router_bias:
                tensors[module, "router_bias"] = draw(rng, (experts,), router_dtype)
            if config.adaptive_threshold:
                tensors[module, "threshold"] = draw(rng, (n_in,), router_dtype)
                tensors[module, "threshold_bias"] = draw(rng, (), router_dtype)
            if width := config.temperature_hidden_size:
                for j, shape in enumerate([(width, n_in), (1, width)]):
                    tensors[module, f"temperature_{j}"] = draw(rng, shape, router_dtype)
                    tensors[module, f"temperature_bias_{j}"] = draw(rng, shape[:1], router_dtype)
    return tensors


def make_adapter(shapes=SHAPES, dtype="float32", seed=0, draw=random_numbers, **fields):
    """Three experts of rank 2 on two kinds of layer, unless `fields` say otherwise."""
    config = MoeLoraConfig(**{"r": 2, "num_experts": 3, "target_modules": ["q_proj", "v_proj"], **fields})
    return Adapter(config, make_tensors(config, shapes, dtype, seed=seed, draw=draw))


def assert_same_tensors(found, expected):
    """The same names, dtypes, shapes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert found[name].tobytes() == tensor.tobytes(), name
