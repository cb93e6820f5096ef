"""Training by oneDNN: the three products of a convolution, where they are used, a step and a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnfamily import benchmark, checkpoint, create_model, errors, programs, train
from cnnfamily.models import onednn
from cnnfamily.models.convolution import convolution
from cnnfamily.models.geometry import Geometry
from tests.conftest import mesh_of, short_config
from tests.test_onednn import CALL, SMALL, needs
from tests.test_train import assert_equal_states, final_state

PRODUCT = "__onednn$matmul"
# image sizes, kernel, stride, padding, channels, filters, and of each product, output, images and kernel, the calls
CASES = {
    "pointwise": ((5, 7), (1, 1), (1, 1), ((0, 0), (0, 0)), 24, 40, [(0, 1), (0, 1), (0, 1)]),
    "pointwise, strided": ((8, 9), (1, 1), (2, 3), ((0, 0), (0, 0)), 17, 16, [(0, 1), (0, 1), (0, 1)]),
    "1x1, padded": ((7, 7), (1, 1), (1, 1), ((1, 1), (0, 2)), 24, 24, [(1, 0), (0, 0), (0, 1)]),
    "3x3": ((9, 8), (3, 3), (1, 1), ((1, 1), (1, 1)), 24, 40, [(1, 0), (1, 0), (0, 1)]),
    "3x3, valid": ((9, 10), (3, 3), (1, 1), ((0, 0), (0, 0)), 40, 24, [(1, 0), (1, 0), (0, 1)]),
    "3x3, strided": ((13, 14), (3, 3), (2, 2), ((1, 1), (0, 1)), 24, 40, [(1, 0), (0, 0), (0, 9)]),
    "3x3, padded beyond the kernel": ((8, 8), (3, 3), (1, 1), ((3, 0), (0, 3)), 24, 40, [(1, 0), (0, 0), (0, 1)]),
    "5x3, sides apart": ((11, 8), (5, 3), (1, 1), ((2, 1), (0, 2)), 40, 24, [(1, 0), (1, 0), (0, 1)]),
    "1x5": ((7, 9), (1, 5), (1, 1), ((0, 0), (2, 2)), 24, 24, [(1, 0), (1, 0), (0, 1)]),
    "rows that no tap sees": ((24, 7), (2, 2), (3, 1), ((0, 0), (1, 0)), 24, 24, [(1, 0), (0, 0), (0, 4)]),
    "many taps": ((12, 12), (8, 8), (1, 1), ((4, 4), (3, 3)), 24, 24, [(1, 0), (0, 0), (0, 0)]),
    "stem": ((19, 18), (7, 7), (2, 2), ((3, 3), (3, 2)), 3, 32, [(1, 0), (0, 0), (0, 1)]),
    "stem of few filters": ((9, 9), (3, 3), (1, 1), ((1, 1), (1, 1)), 4, 31, [(1, 0), (0, 0), (0, 0)]),
    "stem whose patches are large": ((12, 12), (5, 5), (1, 1), ((2, 2), (2, 2)), 3, 32, [(1, 0), (0, 0), (0, 0)]),
}
ELSEWHERE = {  # image sizes, kernel, stride, padding, groups, channels, filters
    "depthwise": ((8, 8), (3, 3), (1, 1), ((1, 1), (1, 1)), 24, 24, 24),
    "groups": ((8, 8), (3, 3), (1, 1), ((1, 1), (1, 1)), 2, 48, 48),
    "few channels": ((8, 8), (3, 3), (1, 1), ((1, 1), (1, 1)), 1, 23, 32),
    "five channels": ((8, 8), (3, 3), (1, 1), ((1, 1), (1, 1)), 1, 5, 32),
    "few filters": ((8, 8), (3, 3), (1, 1), ((1, 1), (1, 1)), 1, 32, 23),
    "pointwise, few channels": ((8, 8), (1, 1), (1, 1), ((0, 0), (0, 0)), 1, 15, 32),
    "stem of fewer filters": ((9, 9), (3, 3), (1, 1), ((1, 1), (1, 1)), 1, 3, 15),
    "few rows": ((6, 8), (3, 3), (1, 1), ((1, 1), (1, 1)), 1, 32, 32),
    "few columns": ((8, 8), (3, 3), (1, 1), ((1, 1), (0, 0)), 1, 32, 32),
    "one pixel": ((1, 1), (1, 1), (1, 1), ((0, 0), (0, 0)), 1, 32, 32),
}


def three(f, images, kernel, cotangent):
    output, transpose = jax.vjp(f, images, kernel)
    return (output, *transpose(cotangent))


def calls(f, *operands):
    text = jax.jit(f).lower(*operands).as_text()
    return text.count(CALL), text.count(PRODUCT)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_three_products_are_those_of_the_plain_convolution_rounded_once(name, dtype, on_cpu):
    needs(dtype)
    size, taps, stride, padding, channels, filters, expected_calls = CASES[name]
    draw = np.random.default_rng(0)
    images = jnp.asarray(draw.normal(size=(3, *size, channels)), dtype)
    kernel = jnp.asarray(draw.normal(size=(*taps, channels, filters)), dtype)
    layout = ("NHWC", "HWIO", "NHWC")

    def ours(images, kernel):
        return convolution(images, kernel, stride=stride, padding=padding)

    def plain(images, kernel):
        return jax.lax.conv_general_dilated(images, kernel, stride, padding, dimension_numbers=layout, precision="highest")

    cotangent = jnp.asarray(draw.normal(size=jax.eval_shape(plain, images, kernel).shape), dtype)
    with programs.by_onednn("training"):
        found = jax.jit(lambda *operands: three(ours, *operands))(images, kernel, cotangent)
        alone = [
            calls(lambda *operands: ours(*operands), images, kernel),
            calls(lambda images: jax.vjp(lambda x: ours(x, kernel), images)[1](cotangent), images),
            calls(lambda kernel: jax.vjp(lambda x: ours(images, x), kernel)[1](cotangent), kernel),
        ]
    assert alone == expected_calls
    with jax.enable_x64(True):
        wide = [np.asarray(x, np.float64) for x in (images, kernel, cotangent)]
        exact = jax.jit(lambda *operands: three(plain, *operands))(*wide)
    digits = 2.0**-8 if dtype == "bfloat16" else 2.0**-23
    for which, is_, should in zip(("output", "images", "kernel"), found, exact, strict=True):
        assert is_.dtype == dtype
        error = np.abs(np.asarray(is_, np.float64) - np.asarray(should))
        assert (error <= digits * np.abs(should) + 4e-6 * np.abs(should).max()).all(), which


@pytest.mark.parametrize("name", ELSEWHERE)
def test_other_convolutions_keep_their_forms(name, on_cpu):
    needs("float32")
    size, taps, stride, padding, groups, channels, filters = ELSEWHERE[name]
    images, kernel = jnp.ones((2, *size, channels)), jnp.ones((*taps, channels // groups, filters))

    def total(images, kernel):
        return convolution(images, kernel, stride=stride, padding=padding, groups=groups).sum()

    with onednn.used("training"):
        assert calls(jax.grad(total, (0, 1)), images, kernel) == (0, 0)


@pytest.mark.parametrize("taps", [1, 3])
def test_sums_that_are_not_rounded(taps, on_cpu):
    """As every convolution with a bias has them."""
    needs("bfloat16")
    draw = np.random.default_rng(0)
    images, kernel = (jnp.asarray(draw.normal(size=s), "bfloat16") for s in ((2, 9, 9, 24), (taps, taps, 24, 24)))

    def ours(images, kernel):
        return convolution(images, kernel, rounded=False)

    with programs.by_onednn("training"):
        lowered = jax.jit(lambda *operands: ours(*operands)).lower(images, kernel)
        found = lowered.compile()(images, kernel)
    assert (lowered.as_text().count(CALL) or lowered.as_text().count(PRODUCT)) == 1
    wide = [np.asarray(x, np.float32) for x in (images, kernel)]
    exact = jax.lax.conv_general_dilated(
        *wide, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())


def test_a_padding_that_cuts_off_is_refused_here_for_there_it_ends_the_process(on_cpu):
    needs("float32")
    images, kernel = jnp.ones((2, 9, 9, 24)), jnp.ones((3, 3, 24, 24))
    with onednn.used("training"):
        for low, expected in ((-1, False), (0, True)):
            geometry = Geometry((9, 9), (3, 3), (1, 1), ((low, 1), (1, 1)), 1)
            assert onednn.applies(images, kernel, geometry, "training") == expected


def test_what_it_is_used_in_is_one_of_two():
    with pytest.raises(ValueError, match="expected 'inference' or 'training'"), onednn.used("train"):
        pass


def test_the_gradient_of_the_gradient(on_cpu):
    needs("float32")
    draw = np.random.default_rng(0)
    images, kernel = (jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in ((2, 8, 8, 24), (3, 3, 24, 24)))

    def second(images, kernel):
        def size(images, kernel):
            y = convolution(images, kernel, padding=((1, 1), (1, 1)))
            return (y * jnp.sin(y)).sum()

        def of_gradient(images, kernel):
            return sum((g**2).sum() for g in jax.grad(size, (0, 1))(images, kernel))

        return jax.grad(of_gradient, (0, 1))(images, kernel)

    expected = jax.jit(lambda *operands: second(*operands))(images, kernel)
    with programs.by_onednn("training"):
        text = jax.jit(lambda *operands: second(*operands)).lower(images, kernel)
        assert CALL in text.as_text()
        found = text.compile()(images, kernel)
    for is_, should in zip(found, expected, strict=True):
        np.testing.assert_allclose(is_, should, rtol=1e-3, atol=1e-4 * np.abs(should).max())


def test_a_convolution_that_is_mapped(on_cpu):
    needs("float32")
    draw = np.random.default_rng(0)
    images, kernels = (jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in ((3, 2, 9, 9, 24), (3, 3, 3, 24, 24)))
    expected = [convolution(x, k) for x, k in zip(images, kernels, strict=True)]
    with programs.by_onednn("training"):
        found = jax.jit(jax.vmap(lambda x, k: convolution(x, k)))(images, kernels)
    np.testing.assert_allclose(found, jnp.stack(expected), rtol=1e-4, atol=1e-4)


def step_of(mode, devices=1):
    network = create_model("resnet50", num_classes=7, **SMALL["resnet50"])
    return benchmark.training(network, 4, resolution=32, mesh=mesh_of(devices), mode=mode)


@pytest.mark.full
def test_a_step_on_two_devices_is_that_without_on_one_up_to_rounding(on_cpu):
    needs("float32")
    program, two, again = step_of("train"), step_of("onednn", 2), step_of("onednn", 2)
    program.compile()
    two.compile()
    again.compiled = two.compiled
    text = two.compiled.as_text()
    assert CALL in text
    assert PRODUCT in text
    expected_state, expected = jax.device_get(program.step())
    state, metrics = jax.device_get(two.step())
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], expected["grad_norm"], rtol=1e-3)
    # The momentum after one step is the gradient.
    for found, should in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(expected_state.opt_state), strict=True):
        np.testing.assert_allclose(found, should, rtol=1e-3, atol=1e-3 * np.abs(should).max())
    assert_equal_states(jax.device_get(again.step()[0]), state)


def test_a_dtype_that_it_has_not_ends_the_run_before_it_begins(tmp_path, monkeypatch):
    config = short_config(onednn=True)
    monkeypatch.setattr(onednn, "missing", lambda dtype: f"no {dtype} here")
    with pytest.raises(errors.UsageError, match=r"config\.onednn=True: no float32 here; expected False"):
        train.run_training(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(errors.UsageError, match="training by oneDNN: no float32 here"):
        benchmark.training(create_model("lenet5"), 4, mode="onednn")


@pytest.mark.full
def test_a_run_is_cached_but_for_its_steps_and_ends_with_the_same_bits_after_a_crash(tmp_path, monkeypatch, dies_at_3, on_cpu):
    needs("float32")
    compiled, compile_ = [], jax.stages.Lowered.compile

    def spy(lowered):
        compiled.append((CALL in lowered.as_text(), jax.config.jax_enable_compilation_cache))
        return compile_(lowered)

    monkeypatch.setattr(jax.stages.Lowered, "compile", spy)
    steps = {"total_epochs": 0.0, "total_steps": 5, "optim__warmup_epochs": 0.0, "checkpoint__every_steps": 2}
    config = short_config(onednn=True, model__width=4.0, **steps)
    train.run_training(config, tmp_path / "straight", quiet=True)
    assert sorted(compiled) == [(False, True), (True, False)]  # the evaluation, the step
    dies_at_3(config, tmp_path / "stopped")
    assert checkpoint.newest_step(tmp_path / "stopped" / "checkpoints") == 2
    train.run_training(config, tmp_path / "stopped", quiet=True)
    assert_equal_states(final_state(tmp_path / "stopped"), final_state(tmp_path / "straight"))
    with pytest.raises(errors.UsageError, match=r"onednn \(True there, False here\); take another --workdir"):
        train.run_training(short_config(model__width=4.0, **steps), tmp_path / "stopped", quiet=True)
