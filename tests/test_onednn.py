"""Inference by oneDNN: its convolutions, what is done in the same pass, where it is left alone, and whole networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnfamily import create_model, optimize_for_inference, programs
from cnnfamily.errors import UsageError
from cnnfamily.fold import fold_batch_norm
from cnnfamily.inference import prepare
from cnnfamily.models import initialize, onednn
from cnnfamily.models.geometry import Geometry
from cnnfamily.models.layers import ACTIVATIONS
from tests.test_fold import SMALL, with_statistics

CALL = "__onednn$convolution"


def needs(dtype):
    if reason := onednn.missing(dtype):
        pytest.skip(f"no oneDNN for {dtype} here: {reason}")


# image sizes, kernel, stride, padding, groups, channels, filters
GEOMETRIES = {
    "pointwise": ((5, 7), (1, 1), (1, 1), ((0, 0), (0, 0)), 1, 24, 40),
    "pointwise, strided": ((8, 9), (1, 1), (2, 2), ((0, 0), (0, 0)), 1, 17, 5),
    "depthwise": ((9, 8), (3, 3), (1, 1), ((1, 1), (1, 1)), 24, 24, 24),
    "depthwise, strided, odd pixel at the end": ((8, 8), (3, 3), (2, 2), ((0, 1), (0, 1)), 21, 21, 21),
    "depthwise, two filters a channel": ((7, 7), (5, 5), (1, 1), ((2, 2), (2, 2)), 6, 6, 12),
    "groups": ((6, 6), (3, 3), (1, 1), ((1, 1), (1, 1)), 4, 16, 32),
    "stem": ((32, 32), (7, 7), (2, 2), ((3, 3), (3, 3)), 1, 3, 16),
    "valid": ((12, 12), (5, 5), (1, 1), ((0, 0), (0, 0)), 1, 6, 16),
    "smaller than the kernel": ((1, 2), (5, 5), (2, 2), ((2, 2), (2, 2)), 1, 8, 8),
    "to one pixel": ((5, 5), (5, 5), (1, 1), ((0, 0), (0, 0)), 1, 16, 10),
    "sides apart": ((9, 6), (3, 2), (2, 1), ((1, 0), (0, 1)), 1, 7, 9),
    "one channel, one filter": ((4, 4), (3, 3), (1, 1), ((1, 1), (1, 1)), 1, 1, 1),
}
ENDS = {  # bias, summand, activation
    "bare": (False, False, "identity"),
    "bias, ReLU": (True, False, "relu"),
    "sum, ReLU6": (True, True, "relu6"),
    "SiLU": (True, False, "silu"),
    "hard-swish, which oneDNN is not asked for": (True, True, "hard_swish"),
    "sigmoid": (False, True, "sigmoid"),
    "tanh": (True, False, "tanh"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_convolution_with_each_end(name, dtype, on_cpu):
    needs(dtype)
    size, taps, stride, padding, groups, channels, filters = GEOMETRIES[name]
    geometry, draw = Geometry(size, taps, stride, padding, groups), np.random.default_rng(0)
    images = jnp.asarray(draw.normal(size=(2, *size, channels)), dtype)
    kernel = jnp.asarray(draw.normal(size=(*taps, channels // groups, filters)) / np.sqrt(taps[0] * taps[1] * channels), dtype)
    bias = jnp.asarray(draw.normal(size=filters), jnp.float32)
    summand = jnp.asarray(draw.normal(size=(2, *geometry.output_size, filters)), dtype)
    ends = {end: (bias if b else None, summand if s else None, ACTIVATIONS[a]) for end, (b, s, a) in ENDS.items()}

    def by_onednn(images, kernel):
        return {e: onednn.Pending(images, kernel, b, geometry).output(a, s) for e, (b, s, a) in ends.items()}

    with programs.not_kept():
        found = jax.jit(by_onednn)(images, kernel)
    with jax.enable_x64(True):
        wide = [np.asarray(x, np.float64) for x in (images, kernel)]
        layout = ("NHWC", "HWIO", "NHWC")
        exact = jax.lax.conv_general_dilated(
            *wide, stride, padding, dimension_numbers=layout, feature_group_count=groups, precision="highest"
        )
        for end, (b, s, activation) in ends.items():
            total = exact + sum(np.asarray(x, np.float64) for x in (b, s) if x is not None)
            expected = np.asarray(activation(total))
            assert found[end].dtype == dtype, end
            assert found[end].shape == expected.shape, end
            # Rounded once: within half a unit in the last of 8 digits, and of what the sums are made of in float32.
            digits = 2.0**-8 if dtype == "bfloat16" else 2.0**-23
            once_more = np.abs(total) * digits if end.startswith("hard-swish") else 0.0
            slack = np.abs(expected) * digits + once_more + 4e-6 * np.abs(total).max()
            error = np.abs(np.asarray(found[end], np.float64) - expected)
            assert (error <= slack).all(), (end, (error - slack).max())


def test_rounding_is_xlas_for_every_kind_of_number():
    bits = np.random.default_rng(0).integers(0, 2**32, 2**16, np.uint32)
    bits[:8] = [0x7F800000, 0xFF800000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7F7FFFFF, 0x00008000, 0x00018000]
    x = bits.view(np.float32)
    both = jax.jit(lambda x: [onednn._rounded(x, jnp.dtype("bfloat16")), x.astype("bfloat16")])
    found, expected = (np.asarray(values.astype(np.float32)) for values in both(x))
    np.testing.assert_array_equal(found, expected)  # NaN where that is NaN


NETWORKS = SMALL | {
    "plain20_cifar": {"stage_sizes": (1, 1, 1)},
    "se_resnet18": {"stage_sizes": (1, 1), "width": 0.25},
    "resnext50_32x4d": {"stage_sizes": (1, 1), "width": 0.25},
    "alexnet": {"width": 0.125},
    "vgg11": {"width": 0.125},
    "resnet18": {"stage_sizes": (1, 1), "width": 0.25, "preactivation": True},  # not folded
    "resnet34": {"stage_sizes": (2, 1), "width": 0.25, "stochastic_depth": 0.5, "stochastic_depth_scaling": "test"},
    "mobilenet_v3_large": {"stages": ((3, 16, 16, True, "RE", 2), (3, 16, 16, False, "HS", 1)), "norm_place": "after"},
    "vgg13_bn": {"width": 0.125, "norm_place": "after"},  # not folded, and its convolutions have a bias beside the norm
}
DEFAULT = ("resnet50", "mobilenet_v3_small", "efficientnet_b0")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.full] * (n not in DEFAULT)) for n in NETWORKS])
def test_a_network_keeps_its_function(name, on_cpu):
    needs("float32")
    side = 64 if name in ("googlenet", "alexnet") else 32
    network = create_model(name, num_classes=7, **NETWORKS[name]).clone(resolution=side)
    variables = with_statistics(initialize(network, jax.random.key(0), resolution=side))
    images = np.random.default_rng(1).normal(size=(2, side, side, 3)).astype(np.float32)
    expected = jax.jit(network.apply)(variables, images)
    logits = optimize_for_inference(network, variables)(images)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, rtol=2e-4, atol=2e-5 * np.abs(expected).max())


def folded(name, **fields):
    network = create_model(name, num_classes=7, **fields).clone(resolution=32)
    return fold_batch_norm(network, initialize(network, jax.random.key(0), resolution=32))


def test_every_convolution_is_one_call_with_what_follows(on_cpu):
    needs("float32")
    for name, fields, expected in (
        # Stem; depthwise and projection; expansion, depthwise and a projection that ends in the sum; head.
        ("mobilenet_v2", {"stages": ((1, 8, 1, 1), (6, 8, 1, 1))}, {CALL: 7, "BIAS": 7, "RELU6": 5, "BINARY_ADD": 1}),
        # Stem; in each of two blocks a projection and three, of which the last takes up the sum and its ReLU.
        ("resnet50", SMALL["resnet50"], {CALL: 9, "BIAS": 9, "RELU": 7, "BINARY_ADD": 2}),
        # As MobileNetV2 with one block more; those of squeeze-and-excitation, of one pixel, are products.
        ("efficientnet_b0", SMALL["efficientnet_b0"], {CALL: 10, "BIAS": 10, "SWISH": 7, "SIGMOID": 0, "BINARY_ADD": 1}),
    ):
        network, variables = folded(name, **fields)
        with onednn.used():
            text = jax.jit(network.apply).lower(variables, jnp.zeros((1, 32, 32, 3))).as_text()
        assert {word: text.count(word) for word in expected} == expected, name


def test_nothing_else_calls_it(on_cpu):
    network, variables = folded("mobilenet_v2", **SMALL["mobilenet_v2"])
    images = np.zeros((1, 32, 32, 3), np.float32)
    optimize_for_inference(network, variables)(images)
    assert CALL not in jax.jit(network.apply).lower(variables, images).as_text()


def test_what_was_traced_before_is_traced_anew(on_cpu, monkeypatch):
    """Of a network that is not folded both are `network.apply` of equal arguments."""
    needs("float32")
    network, images = create_model("lenet5"), jnp.zeros((1, 32, 32, 1))
    variables = jax.device_put(initialize(network, jax.random.key(0), resolution=32))
    apply = jax.jit(network.apply)  # alive, and with it its trace
    apply(variables, images)
    calls, compile_ = [], jax.stages.Lowered.compile

    def spy(lowered):
        calls.append(lowered.as_text().count(CALL))
        return compile_(lowered)

    monkeypatch.setattr(jax.stages.Lowered, "compile", spy)
    optimize_for_inference(network, variables)(images)
    assert calls == [3]
    assert CALL not in apply.lower(variables, images).as_text()


def test_its_programs_are_written_to_no_cache(on_cpu, monkeypatch):
    # What jaxlib makes of them there is read from memory that is not theirs: seen as std::bad_alloc, and may be worse.
    needs("float32")
    settings, compile_ = [], jax.stages.Lowered.compile

    def spy(lowered):
        settings.append(jax.config.jax_enable_compilation_cache)
        return compile_(lowered)

    monkeypatch.setattr(jax.stages.Lowered, "compile", spy)
    infer = optimize_for_inference(*folded("mobilenet_v2", **SMALL["mobilenet_v2"]))
    infer(np.zeros((1, 32, 32, 3), np.float32))
    assert settings == [False]
    assert jax.config.jax_enable_compilation_cache


def test_a_shape_is_compiled_once_and_repeats_bit_for_bit(on_cpu):
    network, variables = folded("mobilenet_v2", dtype="bfloat16", **SMALL["mobilenet_v2"])
    infer, images = optimize_for_inference(network, variables), np.random.default_rng(0).normal(size=(2, 32, 32, 3))
    first = np.asarray(infer(images.astype(np.float32)))
    with jax.no_tracing():
        for _ in range(20):
            np.testing.assert_array_equal(infer(images.astype(np.float32)), first)


def test_kernels_are_narrowed_once(on_cpu):
    _, variables = prepare(*folded("mobilenet_v2", dtype="bfloat16", **SMALL["mobilenet_v2"]))
    dtypes = {path[-1].key: leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(variables)}
    assert dtypes == {"kernel": jnp.bfloat16, "bias": jnp.float32}


def test_inside_another_program_it_says_so():
    infer = optimize_for_inference(*folded("mobilenet_v2", **SMALL["mobilenet_v2"]))
    with pytest.raises(UsageError, match="found a traced array, expected images"):
        jax.jit(infer)(jnp.zeros((1, 32, 32, 3)))


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(onednn.platform, "system", lambda: "Linux")
    monkeypatch.setattr(onednn.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(onednn.jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(onednn, "_version", lambda: (0, 11))
    monkeypatch.setattr(onednn, "_features", lambda: frozenset({"avx2"}))
    assert onednn.missing("float32") == ""
    assert onednn.missing("bfloat16") == "the processor has no avx512_bf16 and no amx_bf16"
    assert onednn.missing("float64") == "dtype float64: float32 and bfloat16 alone"
    monkeypatch.setattr(onednn, "_version", lambda: (0, 13))
    assert onednn.missing("float32").startswith("jaxlib 0.13: tried with 0.10, 0.11")
    monkeypatch.setattr(onednn.platform, "machine", lambda: "aarch64")
    assert "aarch64" in onednn.missing("float32")
    monkeypatch.setattr(onednn.jax, "default_backend", lambda: "gpu")
    assert onednn.missing("float32") == "the device is a gpu"


def test_without_it_the_function_is_the_same(monkeypatch):
    network, variables = folded("mobilenet_v2", **SMALL["mobilenet_v2"])
    images = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
    expected = jax.jit(network.apply)(variables, images)
    monkeypatch.setattr(onednn, "missing", lambda dtype: "it is not here")
    np.testing.assert_allclose(optimize_for_inference(network, variables)(images), expected, rtol=1e-6)
