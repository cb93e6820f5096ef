"""The convolution against `lax.conv_general_dilated`: values, gradients, and what is compiled for each platform."""

import itertools
import math
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from jax import export, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cnnfamily.models import cpu_windows
from cnnfamily.models.convolution import convolution, in_a_branch, matrix_product
from cnnfamily.models.cpu_forms import channel_sums


@pytest.fixture(autouse=True)
def _strict():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def plain(images, kernel, *, stride=(1, 1), padding=((0, 0), (0, 0)), groups=1):
    return lax.conv_general_dilated(
        images, kernel, stride, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


def tf_same(size, taps, stride):
    total = max(0, (-(-size // stride) - 1) * stride + taps - size)
    return total // 2, total - total // 2


PADDINGS = {
    "symmetric": lambda size, taps, stride: ((taps - 1) // 2, (taps - 1) // 2),
    "tf_same": tf_same,
    "valid": lambda size, taps, stride: (0, 0),
    # Windows beyond the map on both sides: outputs that see only padding.
    "full": lambda size, taps, stride: (taps, taps + 1),
}


def operands(size, taps, channels, filters, groups, dtype=np.float64, batch=2):
    draw = np.random.default_rng(0).normal
    images = draw(size=(batch, *size, channels)).astype(np.float32)
    kernel = draw(size=(*taps, channels // groups, filters)).astype(np.float32)
    return jnp.asarray(images, dtype), jnp.asarray(kernel, dtype)


def products(convolve, images, kernel):
    """The output and both gradients, for a cotangent that differs from pixel to pixel."""
    output, gradients = jax.vjp(convolve, images, kernel)
    cotangent = jnp.cos(jnp.arange(output.size, dtype=jnp.float32)).reshape(output.shape).astype(output.dtype)
    return output, *gradients(cotangent)


def in_branch(*operands, **geometry):
    with in_a_branch():
        return convolution(*operands, **geometry)


def assert_equal_to_plain(size, taps, channels, filters, groups, stride, padding, ours=convolution):
    images, kernel = operands(size, taps, channels, filters, groups)
    both = [partial(f, stride=stride, padding=padding, groups=groups) for f in (ours, plain)]
    found, expected = jax.jit(lambda *x: [products(f, *x) for f in both])(images, kernel)
    for name, a, b in zip(("output", "images' gradient", "kernel's gradient"), found, expected, strict=True):
        # The absolute tolerance is for sums that cancel; values and taps are near 1.
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13, err_msg=name)
        assert a.dtype == b.dtype


def axes():
    """Every size, kernel, stride and padding of one dimension that yields at least one output."""
    for size, taps, stride, name in itertools.product((1, 2, 3, 7, 8), (1, 3, 5), (1, 2), PADDINGS):
        padding = PADDINGS[name](size, taps, stride)
        if size + sum(padding) >= taps:
            yield size, taps, stride, padding


# Height and width are independent, so a program tests two cases at once. A fixed quarter of the cases, and with `-m full`
# as many again: almost all of the time is compilation.
CASES = [list(axes())[i] for i in np.random.default_rng(0).permutation(len(list(axes())))]
PAIRS = list(zip(CASES[0::4], CASES[1::4], strict=True))
PAIRS = [pytest.param(*pair, marks=[pytest.mark.full] if i % 2 else []) for i, pair in enumerate(PAIRS)]


@pytest.mark.parametrize(("rows", "columns"), PAIRS)
def test_depthwise_equals_the_plain_convolution_in_value_and_gradients(rows, columns):
    size, taps, stride, padding = zip(rows, columns, strict=True)
    assert_equal_to_plain(size, taps, 3, 3, 3, stride, padding)


@pytest.mark.parametrize(("rows", "columns"), PAIRS[::6])
def test_dense_in_a_branch_equals_the_plain_convolution(rows, columns):
    size, taps, stride, padding = zip(rows, columns, strict=True)
    assert_equal_to_plain(size, taps, 3, 4, 1, stride, padding, in_branch)


@pytest.mark.usefixtures("on_cpu")
def test_a_dense_gradient_in_a_branch_is_no_plain_loop():
    """XLA's CPU compiler has fast code for one order of dimensions, and brings no convolution in a branch into it."""

    def loss(images, kernel, runs):
        def branch(images, kernel):
            return jnp.sin(convolve(images, kernel, padding=((1, 1), (1, 1))))

        return lax.cond(runs, branch, lambda images, kernel: jnp.zeros_like(images), images, kernel).sum()

    found = {}
    for convolve in (in_branch, plain):
        given = *operands((8, 8), (3, 3), 4, 4, 1, jnp.float32), True
        program = jax.jit(jax.grad(loss, (0, 1))).lower(*given).compile().as_text()
        orders = [line.split("dim_labels=")[1].split(",")[0] for line in program.splitlines() if " convolution(" in line]
        found[convolve] = [order == "b01f_01io->b01f" for order in orders]
    assert found[in_branch] == [True] * 3  # the output, computed anew, and both gradients
    assert not all(found[plain])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_stays_so(value):
    """The conditional asks the first number."""
    ours, (images, kernel) = of_kind("dense", dtype=jnp.float32)
    output, gradients = jax.vjp(ours, images, kernel)
    for place in ((0, 0, 0, 0), (1, 2, 3, 4)):
        found = gradients(jnp.ones_like(output).at[place].set(value))[1]
        assert not np.isfinite(found[..., place[3]]).all()


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 8)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 1)])
def test_1x1_equals_the_plain_convolution_in_value_and_gradients(size, stride):
    assert_equal_to_plain(size, (1, 1), 3, 5, 1, stride, ((0, 0), (0, 0)))


@pytest.mark.parametrize(
    ("size", "taps", "channels", "filters", "groups", "stride", "padding"),
    [
        ((1, 1), (3, 3), 3, 4, 1, (1, 1), ((1, 1), (1, 1))),  # cut to the middle tap: a matrix product
        ((2, 1), (5, 5), 3, 4, 1, (2, 1), ((2, 2), (2, 2))),
        ((7, 8), (3, 3), 3, 4, 1, (2, 2), ((0, 1), (0, 1))),
        ((2, 2), (3, 3), 3, 4, 1, (1, 1), ((1, 1), (1, 1))),  # fewer pixels than taps
        ((2, 3), (3, 3), 3, 4, 1, (2, 1), ((1, 1), (0, 1))),
        ((4, 4), (3, 3), 3, 4, 1, (2, 2), ((1, 1), (1, 1))),  # fewer outputs than taps
        ((5, 6), (7, 7), 3, 4, 1, (2, 2), ((3, 3), (3, 3))),
        ((3, 3), (1, 1), 3, 4, 1, (2, 2), ((1, 0), (0, 1))),  # a padded 1x1 stays a convolution
        ((4, 4), (3, 3), 4, 8, 4, (1, 1), ((1, 1), (1, 1))),  # two filters a channel
        ((4, 4), (3, 3), 4, 6, 2, (1, 1), ((1, 1), (1, 1))),
        ((4, 4), (3, 3), 1, 1, 1, (1, 1), ((1, 1), (1, 1))),
    ],
)
def test_every_other_shape_equals_the_plain_convolution(size, taps, channels, filters, groups, stride, padding):
    assert_equal_to_plain(size, taps, channels, filters, groups, stride, padding)


KINDS = {
    "depthwise": {"taps": (3, 3), "filters": 4, "groups": 4, "padding": ((1, 1), (0, 1)), "stride": (2, 2)},
    "1x1": {"taps": (1, 1), "filters": 6, "groups": 1, "padding": ((0, 0), (0, 0)), "stride": (2, 2)},
    "grouped": {"taps": (3, 3), "filters": 6, "groups": 2, "padding": ((1, 1), (0, 1)), "stride": (2, 2)},
    "tiny": {"taps": (5, 5), "filters": 6, "groups": 1, "padding": ((2, 2), (2, 1)), "stride": (2, 2)},
    "strided": {"channels": 16, "taps": (3, 3), "filters": 16, "groups": 1, "padding": ((1, 1), (0, 1)), "stride": (2, 1)},
    "wide": {"channels": 64, "taps": (2, 2), "filters": 128, "groups": 1, "padding": ((1, 0), (0, 1)), "stride": (1, 1)},
    "dense": {"channels": 16, "taps": (3, 3), "filters": 24, "groups": 1, "padding": ((1, 1), (0, 1)), "stride": (1, 1)},
    "by images": {"channels": 32, "taps": (3, 3), "filters": 48, "groups": 1, "padding": ((1, 1), (0, 1)), "stride": (1, 1)},
    "side by side": {"channels": 16, "taps": (2, 3), "filters": 64, "groups": 1, "padding": ((0, 1), (0, 1)), "stride": (1, 1)},
    "and back": {"channels": 64, "taps": (3, 2), "filters": 16, "groups": 1, "padding": ((1, 1), (0, 1)), "stride": (1, 1)},
    "few": {"channels": 3, "taps": (3, 3), "filters": 32, "groups": 1, "padding": ((1, 0), (1, 1)), "stride": (1, 1)},
    "plain": {"channels": 4, "taps": (3, 3), "filters": 6, "groups": 1, "padding": ((1, 0), (1, 1)), "stride": (2, 1)},
    "halved": {"channels": 96, "taps": (2, 2), "filters": 96, "groups": 1, "padding": ((1, 0), (0, 1)), "stride": (1, 1)},
    "patches": {"channels": 2, "taps": (3, 4), "filters": 32, "groups": 1, "padding": ((0, 1), (2, 0)), "stride": (2, 3)},
}
# Convolutions among the three products on a CPU: a tiny one's kernel gradient stays one, of a grouped or wide one all but
# that, of one with a stride the output, of one whose patches are a product the gradient of the images.
LEFT = {"depthwise": 0, "1x1": 0, "tiny": 1, "grouped": 2, "strided": 1, "wide": 2, "dense": 3}
LEFT |= {"by images": 2, "side by side": 3, "and back": 3, "few": 2, "patches": 1, "plain": 3, "halved": 2}


# For what JAX does with them: vmap, devices, exports, further gradients. Of the variants that others stand for with `-m full`.
VARIANTS = ("grouped", "wide", "by images", "side by side", "and back", "plain", "halved", "few")
TRANSFORMED = [pytest.param(kind, marks=[pytest.mark.full] if kind in VARIANTS else []) for kind in KINDS]


def of_kind(kind, convolve=convolution, dtype=np.float64, batch=2, size=(5, 6)):
    geometry = dict(KINDS[kind])
    taps, channels, filters = geometry.pop("taps"), geometry.pop("channels", 4), geometry.pop("filters")
    images, kernel = operands(size, taps, channels, filters, geometry["groups"], dtype, batch)
    return partial(convolve, **geometry), (images, kernel * jnp.asarray((4 / channels) ** 0.5, dtype))  # sums of like size


def all_three(f, images, kernel, cotangent):
    output, gradients = jax.vjp(f, images, kernel)
    return output, *gradients(cotangent)


# In float32 nothing is rounded, and the values are tested in float64.
OTHERS = [pytest.param(*row, marks=pytest.mark.full) for row in ((jnp.float16, 5e-4), (jnp.float32, 1e-6))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 4e-3), *OTHERS])
def test_lower_precision_is_rounded_once(kind, dtype, tolerance):
    """Against float64 of the same operands: one rounding to bfloat16 errs by 2^-8 at most, a sum kept in it by more."""
    size = (5, 6) if kind == "tiny" else (24, 24)
    convolve, given = of_kind(kind, dtype=dtype, batch=8, size=size)
    exact, _ = of_kind(kind, plain)
    cotangent = jnp.ones(jax.eval_shape(convolve, *given).shape, dtype)

    found = jax.jit(partial(all_three, convolve))(*given, cotangent)
    expected = jax.jit(partial(all_three, exact))(*(x.astype(jnp.float64) for x in (*given, cotangent)))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(a.astype(jnp.float64), b, rtol=tolerance, atol=1e-6 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
    ("stride", "padding"), [((1, 1), ((1, 1), (1, 1))), ((2, 2), ((0, 1), (1, 1))), ((2, 1), ((0, 0), (2, 2)))]
)
def test_bfloat16_by_taps_is_rounded_once(stride, padding):
    """From 96 channels on a CPU multiplies tap by tap: no operand is widened, and the sum over taps is kept in float32."""
    given = operands((6, 7), (3, 3), 96, 96, 1, jnp.bfloat16)
    convolve, exact = (partial(f, stride=stride, padding=padding) for f in (convolution, plain))
    given = *given, jnp.cos(convolve(*given))  # the cotangent
    program = jax.jit(partial(all_three, convolve))
    wide = jax.jit(partial(all_three, exact))(*(x.astype(jnp.float64) for x in given))
    for a, b in zip(program(*given), wide, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float64), b, rtol=4e-3, atol=4e-3)
    lowered = program.trace(*given).lower(lowering_platforms=("cpu",)).as_text()
    assert lowered.count("stablehlo.dot_general") == 27
    assert "stablehlo.convolution" not in lowered


@pytest.mark.parametrize("kind", TRANSFORMED)
def test_the_gradient_of_the_gradient(kind):
    def second(convolve, images, kernel):
        def slope(images, kernel):
            gradients = jax.grad(lambda *x: jnp.sum(jnp.sin(convolve(*x))), (0, 1))(images, kernel)
            return sum(jnp.sum(jnp.cos(g)) for g in gradients)

        return jax.grad(slope, (0, 1))(images, kernel)

    ours, given = of_kind(kind)
    found, expected = jax.jit(lambda *x: [second(f, *x) for f in (ours, of_kind(kind, plain)[0])])(*given)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-12), found, expected)


@pytest.mark.parametrize("kind", TRANSFORMED)
def test_vmap_over_images_and_kernels(kind):
    ours, (images, kernel) = of_kind(kind, batch=6)
    stacked = images.reshape(3, 2, *images.shape[1:]), jnp.stack([kernel, 2 * kernel, -kernel])

    @jax.jit
    def both(*stacked):
        found = jax.vmap(partial(products, ours))(*stacked)
        return found, jax.tree.map(lambda *x: jnp.stack(x), *[products(ours, *x) for x in zip(*stacked, strict=True)])

    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13), *both(*stacked))


@pytest.mark.parametrize("kind", TRANSFORMED)
@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.full)])
def test_shard_map_sums_the_kernel_gradient_over_devices(kind, check_vma):
    """On as many CPU devices as the session has; the types of the varying axes are checked even on one."""
    ours, (images, kernel) = of_kind(kind, batch=8)
    devices = len(jax.devices())
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))

    def gradients(images, kernel):
        of_images, of_kernel = jax.grad(lambda *x: jnp.sum(jnp.sin(ours(*x))), (0, 1))(images, kernel)
        return of_images, of_kernel if check_vma else lax.psum(of_kernel, "data")

    data, replicated = PartitionSpec("data"), PartitionSpec()
    specs = {"in_specs": (data, replicated), "out_specs": (data, replicated), "check_vma": check_vma}
    found = jax.jit(jax.shard_map(gradients, mesh=mesh, **specs))(images, kernel)
    expected = jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(ours(*x))), (0, 1)))(images, kernel)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13), found, expected)


@pytest.mark.parametrize("kind", TRANSFORMED)
def test_operands_that_vary_alike_are_taken_as_they_are(kind):
    """Two products with 1 for each convolution were a twentieth of the text of a training step."""
    ours, given = of_kind(kind)
    assert "mul" not in [equation.primitive.name for equation in jax.make_jaxpr(ours)(*given).eqns]


@pytest.mark.parametrize("kind", TRANSFORMED)
def test_images_that_are_placed_on_a_mesh_need_no_jit(kind):
    """As a batch of a feed in a notebook. Of one device, where it failed; on eight it did not."""
    ours, (images, kernel) = of_kind(kind, batch=8)
    mesh = mesh_of(1)
    placed = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
    np.testing.assert_allclose(ours(placed, kernel), ours(images, kernel), rtol=1e-12, atol=1e-13)


def all_products(kind, images, kernel):
    return products(of_kind(kind)[0], images, kernel)


@pytest.mark.parametrize("kind", TRANSFORMED)
@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_each_platform_gets_its_own_program(kind, platform):
    """An export from this machine for another: the plain convolution thrice there, none here."""
    given = of_kind(kind, dtype=jnp.float32)[1]
    module = export.export(jax.jit(partial(all_products, kind)), platforms=[platform])(*given).mlir_module()
    assert module.count("stablehlo.convolution") == (LEFT[kind] if platform == "cpu" else 3)


@pytest.mark.parametrize("kind", TRANSFORMED)
def test_one_export_for_two_platforms_runs_here(kind):
    given = of_kind(kind, dtype=jnp.float32)[1]
    exported = export.export(jax.jit(partial(all_products, kind)), platforms=["cpu", "cuda"])(*given)
    assert "stablehlo.convolution" in exported.mlir_module()
    expected = jax.jit(partial(all_products, kind))(*given)
    for found, here in zip(jax.jit(exported.call)(*given), expected, strict=True):
        np.testing.assert_allclose(found, here, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_in_the_compiled_gradient_on_cpu(kind):
    given = of_kind(kind, dtype=jnp.float32)[1]
    program = jax.jit(partial(all_products, kind)).lower(*given).compile().as_text()
    assert program.count(" convolution(") == LEFT[kind]
    # A dense kernel's gradient stands in one, into which nothing else is fused.
    assert program.count(" conditional(") == (kind in ("dense", "by images", "side by side", "and back"))


@pytest.mark.parametrize(
    ("size", "filters", "batch", "together"),
    [((5, 6), 64, 3, True), ((5, 111), 64, 2, True), ((5, 112), 64, 2, False), ((5, 6), 64, 1, False), ((5, 6), 96, 3, False)],
)
def test_images_lie_side_by_side_where_a_thread_would_have_no_work(size, filters, batch, together):
    """XLA's library shares filters times columns out among threads, not images."""
    given = operands(size, (3, 3), 16, filters, 1, np.float32, batch)
    lowered = jax.jit(partial(convolution, padding=((1, 1), (1, 1)))).lower(*given).as_text()
    (line,) = (line for line in lowered.splitlines() if "stablehlo.convolution" in line)
    assert f"(tensor<{1 if together else batch}x" in line.split(" : ")[-1]


@pytest.mark.parametrize("size", [(29, 28), (30, 40), (1, 3), (60, 13)])
def test_a_product_for_each_image_or_part_of_one(size):
    """Of at most 784 pixels: of 1, 15, 1 and 60 rows."""
    assert_equal_to_plain(size, (3, 3), 32, 32, 1, (1, 1), ((1, 1), (1, 1)))


LARGE = pytest.mark.parametrize(
    ("filters", "stride", "dtype", "tolerance"),
    # By taps, by images, strided, and in bfloat16 of turned factors, where 1 / 256 is half a last place.
    [(128, 1, np.float32, 1e-5), (64, 1, np.float32, 1e-5), (64, 2, np.float32, 1e-5), (128, 1, jnp.bfloat16, 1 / 128)],
)


def of_large(filters, stride, dtype):
    """Stride and padding of a convolution whose windows take 1.2 to 4.8 MB, and its operands."""
    kwargs = {"stride": (stride, stride), "padding": ((1, 1), (1, 1))}
    return kwargs, *operands((56, 56), (3, 3), 96, filters, 1, dtype, 4)


@LARGE
def test_a_large_kernel_gradient_equals_the_plain_one(filters, stride, dtype, tolerance):
    kwargs, images, kernel = of_large(filters, stride, dtype)
    found, expected = (products(partial(f, **kwargs), images, kernel)[2].astype(jnp.float32) for f in (convolution, plain))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * abs(expected).max())


@pytest.mark.usefixtures("on_cpu")
@LARGE
def test_few_windows_of_a_kernel_gradient_are_there_at_once(filters, stride, dtype, tolerance):
    """Of nine, which XLA would cut out first of all: without waiting, 7 to 9 windows beside what is padded and turned."""
    kwargs, images, kernel = of_large(filters, stride, dtype)
    output = convolution(images, kernel, **kwargs)

    def gradient(images, cotangent):
        return jax.vjp(lambda kernel: convolution(images, kernel, **kwargs), kernel)[1](cotangent)

    temporary = jax.jit(gradient).lower(images, output).compile().memory_analysis().temp_size_in_bytes
    window = output.size // filters * images.shape[3] * images.itemsize
    assert temporary - images.nbytes - output.nbytes < 4 * window


WIDE = pytest.param("wide", 80, marks=pytest.mark.full)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(("kind", "channels"), [("strided", 20), ("by images", 40), WIDE])
def test_windows_that_wait_under_transformations(kind, channels, monkeypatch):
    """Of channels of its own, for what has been traced before is not traced again."""
    slices = []
    monkeypatch.setattr(cpu_windows, "LEAST_IN_TURN", 0)
    monkeypatch.setattr(
        cpu_windows, "slice_after", lambda *given, wait=cpu_windows.slice_after: slices.append(1) or wait(*given)
    )
    monkeypatch.setitem(KINDS, kind, {**KINDS[kind], "channels": channels})
    test_the_gradient_of_the_gradient(kind)
    test_vmap_over_images_and_kernels(kind)
    test_shard_map_sums_the_kernel_gradient_over_devices(kind, check_vma=True)
    assert len(slices) >= 3 * math.prod(KINDS[kind]["taps"])


@pytest.mark.usefixtures("on_cpu")  # elsewhere they are rounded before
@pytest.mark.parametrize("kind", TRANSFORMED)
def test_sums_that_are_not_rounded(kind):
    """Against float64 of the same bfloat16 operands, whose gradients are rounded as ever."""
    f, given = of_kind(kind, partial(convolution, rounded=False), jnp.bfloat16)
    exact, _ = of_kind(kind, plain)
    cotangent = jnp.cos(jnp.arange(64.0)).astype(jnp.bfloat16)[:, None] * jnp.ones((), jnp.bfloat16)

    def all_of(f, dtype, images, kernel):
        output, gradients = jax.vjp(f, images, kernel)
        given = jnp.resize(cotangent, output.shape).astype(dtype)
        return output, *gradients(given)

    found = jax.jit(partial(all_of, f, jnp.float32))(*given)
    expected = jax.jit(partial(all_of, exact, jnp.float64))(*(x.astype(jnp.float64) for x in given))
    assert [x.dtype for x in found] == [jnp.float32, jnp.bfloat16, jnp.bfloat16]
    for a, b, tolerance in zip(found, expected, (1e-6, 4e-3, 4e-3), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float64), b, rtol=tolerance, atol=tolerance * float(jnp.abs(b).max()))


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("shape", [(3, 40), (2, 5, 40)])
@pytest.mark.parametrize("units", [2, 300])
def test_a_product_of_matrices(shape, units):
    """In bfloat16 with float32 sums, on a CPU and elsewhere without a convolution; in float32 JAX's own."""
    draw = np.random.default_rng(0).normal
    x, kernel = jnp.asarray(draw(size=shape), jnp.bfloat16), jnp.asarray(draw(size=(40, units)), jnp.bfloat16)
    cotangent = jnp.asarray(draw(size=(*shape[:-1], units)), jnp.bfloat16)

    def three(f, x, kernel, cotangent):
        output, gradients = jax.vjp(f, x, kernel)
        return output, *gradients(cotangent.astype(output.dtype))

    found = jax.jit(partial(three, matrix_product))(x, kernel, cotangent)
    expected = three(jnp.matmul, *(x.astype(jnp.float64) for x in (x, kernel, cotangent)))
    assert [x.dtype for x in found] == [jnp.float32, jnp.bfloat16, jnp.bfloat16]
    for a, b, tolerance in zip(found, expected, (1e-6, 4e-3, 4e-3), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float64), b, rtol=tolerance, atol=tolerance * float(jnp.abs(b).max()))
    for platform in ("cpu", "cuda"):
        lowered = jax.jit(partial(three, matrix_product)).trace(x, kernel, cotangent).lower(lowering_platforms=(platform,))
        assert lowered.as_text().count("stablehlo.dot_general") == 3
        assert "stablehlo.convolution" not in lowered.as_text()
    wide = x.astype(jnp.float32), kernel.astype(jnp.float32)
    np.testing.assert_array_equal(matrix_product(*wide), wide[0] @ wide[1])


def test_the_gradient_of_a_large_kernel_is_not_turned():
    """Else the optimizer reads it across its rows: a step of AlexNet in bfloat16 took 360 ms for 228."""
    x, kernel = jnp.zeros((4, 600), jnp.bfloat16), jnp.zeros((600, 50), jnp.bfloat16)
    gradient = jax.jit(jax.grad(lambda kernel: matrix_product(x, kernel).sum()))
    lowered = gradient.trace(kernel).lower(lowering_platforms=("cpu",)).as_text()
    (product,) = (line for line in lowered.splitlines() if "stablehlo.dot_general" in line)
    assert product.endswith("-> tensor<600x50xf32>")


@pytest.mark.parametrize("shape", [(2, 3, 5), (7, 1, 5), (13, 5), (8, 2, 2, 5), (1, 5)])
def test_channel_sums_of_any_number_of_pixels(shape):
    """Which is cut into 6, 7, 1, 8 and 1 blocks."""
    terms = list(np.random.default_rng(0).normal(size=(3, *shape)))
    found = jax.jit(channel_sums)([jnp.asarray(term) for term in terms])
    np.testing.assert_allclose(found, [term.reshape(-1, 5).sum(axis=0) for term in terms], rtol=1e-12, atol=1e-14)


def test_taps_that_see_only_padding_are_cut_off():
    """A 5x5 kernel on one pixel is one product, and a dense 3x3 one is a matrix product, on every platform."""

    def lowered(taps, groups):
        given = operands((1, 1), (taps, taps), 4, 4, groups, np.float32)
        padding = ((taps // 2, taps // 2),) * 2
        return jax.jit(partial(convolution, padding=padding, groups=groups)).lower(*given).as_text()

    depthwise, dense = lowered(5, 4), lowered(3, 1)
    assert depthwise.count("stablehlo.multiply") == 1
    assert "stablehlo.dot_general" in dense
    assert "stablehlo.convolution" not in dense


@pytest.mark.usefixtures("on_cpu")
def test_maps_with_fewer_pixels_than_taps_are_tiny():
    """There XLA's CPU compiler is a hundred times slower; elsewhere its convolution stays."""

    def convolutions(size, taps, stride):
        given = operands(size, taps, 4, 4, 1, np.float32)
        f = partial(convolution, padding=tuple((t // 2, t // 2) for t in taps), stride=stride)
        return jax.jit(f).lower(*given).compile().as_text().count(" convolution(")

    assert [convolutions(size, (3, 3), (1, 1)) for size in [(2, 2), (2, 4), (3, 3), (2, 8)]] == [0, 0, 1, 1]
    assert [convolutions(size, (3, 3), (2, 2)) for size in [(4, 4), (5, 5), (3, 8)]] == [0, 1, 0]
    assert [convolutions((16, 16), taps, taps) for taps in [(8, 8), (7, 7)]] == [1, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_operands_that_disagree_are_refused(kind):
    """With the words of the plain convolution."""
    f, (images, kernel) = of_kind(kind)
    with pytest.raises(TypeError, match="same dtypes"):
        f(images, kernel.astype(jnp.float32))
    with pytest.raises(ValueError, match="conv_general_dilated"):
        f(images[..., :-1], kernel)


@pytest.mark.parametrize(
    ("channels", "filters", "groups"),
    [(4, 4, 2), *(pytest.param(*row, marks=pytest.mark.full) for row in ((3, 32, 1), (64, 64, 1)))],
)
def test_nothing_gives_nothing(channels, filters, groups):
    """A kernel beyond the map has no outputs, and a batch of none has none; gradients are zeros."""
    for batch, size, taps in ((1, (2, 2), (5, 5)), (1, (1, 1), (3, 3)), (0, (6, 6), (3, 3)), (0, (2, 2), (2, 2))):
        images, kernel = operands(size, taps, channels, filters, groups, batch=batch)
        found, expected = (products(partial(f, groups=groups), images, kernel) for f in (convolution, plain))
        for a, b in zip(found, expected, strict=True):
            assert a.shape == b.shape
            assert not a.any()
        narrow = (x.astype(jnp.bfloat16) for x in (images, kernel))
        for a, b in zip(products(partial(convolution, groups=groups, rounded=False), *narrow), expected, strict=True):
            assert a.shape == b.shape
            assert not a.any()


def test_the_blocks_of_a_large_network_are_traced_quickly():
    """55 unlike depthwise shapes, as many as EfficientNet-B7 has blocks: 20,000 calls of Python each, 0.6 s on two idle cores.

    Counted, for a slow machine took three times as long.
    """

    def network(images, kernels):
        return [convolution(images[..., : k.shape[3]], k, padding=((2, 2), (2, 2)), groups=k.shape[3]) for k in kernels]

    kernels = [jax.ShapeDtypeStruct((5, 5, 1, 32 + i), jnp.float32) for i in range(55)]
    calls, before = 0, sys.getprofile()

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        jax.eval_shape(network, jax.ShapeDtypeStruct((8, 19, 19, 96), jnp.float32), kernels)
    finally:
        sys.setprofile(before)
    assert calls < 40_000 * len(kernels)
