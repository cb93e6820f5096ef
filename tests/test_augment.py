"""Augmentations are pure functions of (key, image): what they can return, how often, and what they must not touch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy import special

from cnnfamily.data.augment import (
    augment,
    beta_quantile,
    color_jitter,
    cutout,
    erase,
    lighting,
    mix,
    normalize,
    random_crop,
    random_erase,
    random_flip,
    random_shift,
)
from cnnfamily.errors import UsageError

compiled_augment = jax.jit(augment, static_argnames=("crop_padding", "shift", "flip"))


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def random_images(batch, height=5, width=6, channels=3):
    # From 1, so that a zero in a result can only be padding.
    return np.random.default_rng(0).integers(1, 256, (batch, height, width, channels), dtype=np.uint8)


def all_windows(image, margin, mode):
    height, width, _ = image.shape
    padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode=mode)
    places = np.ndindex(2 * margin + 1, 2 * margin + 1)
    return [padded[top : top + height, left : left + width] for top, left in places]


@pytest.mark.parametrize(("function", "mode"), [(random_crop, "constant"), (random_shift, "edge")])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_windows_are_all_places_equally_often(function, mode, dtype):
    image = random_images(1)[0].astype(dtype)
    keys = jax.random.split(jax.random.key(0), 2500)
    results = np.asarray(jax.jit(jax.vmap(lambda key: function(key, image, 2)))(keys))
    assert results.dtype == dtype
    windows = np.stack(all_windows(image, 2, mode))
    equal = (results[:, None] == windows[None]).all(axis=(2, 3, 4))
    assert (equal.sum(axis=1) == 1).all()
    # 25 places, 100 times each in the mean; five standard deviations either way.
    counts = equal.sum(axis=0)
    assert counts.min() > 50
    assert counts.max() < 150


def test_flip_mirrors_half_of_the_images_horizontally():
    image = random_images(1)[0]
    keys = jax.random.split(jax.random.key(1), 1000)
    results = np.asarray(jax.vmap(lambda key: random_flip(key, image))(keys))
    mirrored = (results == image[:, ::-1]).all(axis=(1, 2, 3))
    assert (mirrored | (results == image).all(axis=(1, 2, 3))).all()
    assert 420 < mirrored.sum() < 580


def test_normalize_by_hand():
    image = np.array([[[0, 51, 255]]], np.uint8)
    result = normalize(jnp.asarray(image), (0.5, 0.2, 0.0), (0.5, 0.1, 2.0))
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, [[[-1.0, 0.0, 0.5]]], atol=1e-6)


def test_augment_without_options_only_converts():
    images = random_images(4)
    result = compiled_augment(jax.random.split(jax.random.key(0), 4), images)
    assert result.dtype == jnp.float32
    np.testing.assert_array_equal(result, images)


def test_each_image_depends_on_its_own_key_alone():
    images, keys = random_images(16), jax.random.split(jax.random.key(3), 16)
    options = {"crop_padding": 2, "shift": 1, "flip": True}
    whole = np.asarray(compiled_augment(keys, images, **options))
    order = np.random.default_rng(0).permutation(16)
    np.testing.assert_array_equal(compiled_augment(keys[order], images[order], **options), whole[order])
    np.testing.assert_array_equal(compiled_augment(keys[5:7], images[5:7], **options), whole[5:7])
    assert not np.array_equal(whole, compiled_augment(keys[::-1], images, **options))


def test_switching_one_augmentation_on_leaves_the_choices_of_another():
    images, keys = random_images(64), jax.random.split(jax.random.key(4), 64)
    cropped = np.asarray(compiled_augment(keys, images, crop_padding=2))
    flipped = np.asarray(compiled_augment(keys, images, flip=True))
    both = np.asarray(compiled_augment(keys, images, crop_padding=2, flip=True))
    flips = (flipped == images[:, :, ::-1]).all(axis=(1, 2, 3))
    assert 0 < flips.sum() < 64
    # The crop comes first, and is mirrored with the image.
    np.testing.assert_array_equal(both, np.where(flips[:, None, None, None], cropped[:, :, ::-1], cropped))
    shifted = np.asarray(compiled_augment(keys, images, shift=2))
    both = np.asarray(compiled_augment(keys, images, shift=2, flip=True))
    np.testing.assert_array_equal(both, np.where(flips[:, None, None, None], shifted[:, :, ::-1], shifted))


def test_crop_and_shift_choose_apart():
    # With one sub-key for both, every crop would be the shift of the same size.
    images, keys = random_images(64), jax.random.split(jax.random.key(5), 64)
    cropped = np.asarray(compiled_augment(keys, images, crop_padding=2))
    shifted = np.asarray(compiled_augment(keys, images, shift=2))
    inside = cropped != 0
    assert not (cropped == shifted)[inside].all()


def test_padding_is_black_before_normalisation():
    images, keys = random_images(32), jax.random.split(jax.random.key(6), 32)
    pixels = compiled_augment(keys, images, crop_padding=3)
    assert (np.asarray(pixels) == 0).any()
    normalised = np.asarray(normalize(pixels, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)))
    assert (normalised[np.asarray(pixels) == 0] == -2).all()


@pytest.mark.parametrize("crop_padding", [-1, 6, 2**63])
def test_sizes_outside_the_image_are_refused(crop_padding):
    keys = jax.random.split(jax.random.key(0), 2)
    with pytest.raises(UsageError, match=rf"crop_padding={crop_padding} and augment\.shift=0; expected 0 \(off\) to 5"):
        augment(keys, random_images(2), crop_padding=crop_padding)


# Mixing


def mixed(size=32, start=0, group=4, seed=0, **alphas):
    """The arguments and the result of `mix` for `size` examples from position `start` on, out of 64."""
    images = np.random.default_rng(1).normal(size=(64, 5, 6, 3)).astype(np.float32)[start : start + size]
    targets = np.random.default_rng(2).dirichlet(np.ones(4), 64).astype(np.float32)[start : start + size]
    position = jnp.arange(start, start + size)
    alphas = {"mixup": 0.0, "cutmix": 0.0} | alphas
    compiled = jax.jit(functools.partial(mix, group=group, **alphas))
    return images, targets, *jax.tree.map(np.asarray, compiled(jax.random.key(seed), position, images, targets))


@pytest.mark.parametrize("alphas", [{"mixup": 0.4}, {"cutmix": 1.0}])
def test_partners_are_a_shift_inside_each_group(alphas):
    partner = mixed(64, **alphas)[4]["partner"].reshape(-1, 4)
    shift = (partner - np.arange(64).reshape(-1, 4)) % 4
    assert (shift == shift[:, :1]).all()
    assert set(shift[:, 0]) == {1, 2, 3}
    assert (partner // 4 == np.arange(16)[:, None]).all()


def test_mixup_by_hand():
    images, targets, blended, weighted, chosen = mixed(mixup=0.4)
    share, partner = chosen["share"], chosen["partner"]
    by_image, by_target = share[:, None, None, None], share[:, None]
    np.testing.assert_allclose(blended, by_image * images + (1 - by_image) * images[partner], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(weighted, by_target * targets + (1 - by_target) * targets[partner], rtol=1e-5)
    assert (chosen["box"] == 0).all()
    assert len(np.unique(share)) == 32


def test_cutmix_by_hand():
    images, targets, blended, weighted, chosen = mixed(cutmix=1.0)
    areas = []
    for i, (top, bottom, left, right) in enumerate(chosen["box"]):
        expected = images[i].copy()
        expected[top:bottom, left:right] = images[chosen["partner"][i], top:bottom, left:right]
        np.testing.assert_array_equal(blended[i], expected)
        own = 1 - (bottom - top) * (right - left) / 30
        np.testing.assert_allclose(weighted[i], own * targets[i] + (1 - own) * targets[chosen["partner"][i]], rtol=1e-5)
        areas.append((bottom - top) * (right - left))
    assert len(set(areas)) > 4
    assert max(areas) <= 30


def test_boxes_of_cutmix_have_the_sides_of_the_paper():
    """The root of the area each way: with alpha 1 the root of a uniform number.

    Of boxes with a side of s, (1 - s)^2 lie wholly in the image, so that those have the density 12 s (1 - s)^2: a mean of 0.4;
    and sides are cut to even numbers of pixels, which takes one on average.
    """
    images, targets = np.zeros((4096, 60, 40, 1), np.float32), np.eye(2, dtype=np.float32)[np.zeros(4096, int)]
    position = np.arange(4096, dtype=np.int32)
    chosen = jax.jit(functools.partial(mix, group=4, mixup=0.0, cutmix=1.0))(jax.random.key(0), position, images, targets)[2]
    top, bottom, left, right = np.asarray(chosen["box"]).T
    whole = (top > 0) & (bottom < 60) & (left > 0) & (right < 40)
    assert (bottom - top)[whole].mean() / 60 == pytest.approx(0.4 - 1 / 60, abs=0.02)
    assert (right - left)[whole].mean() / 40 == pytest.approx(0.4 - 1 / 40, abs=0.02)


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.4, 1.0, 3.0])
def test_uniform_numbers_become_beta_ones(alpha):
    """Between the nodes of the table too, and in the tails."""
    tail = np.geomspace(1e-6, 1e-2, 1000)
    uniform = np.concatenate([np.linspace(0, 1, 10007), tail, 1 - tail]).astype(np.float32)
    found = np.asarray(beta_quantile(uniform, alpha))
    np.testing.assert_allclose(found, special.betaincinv(alpha, alpha, uniform.astype(np.float64)), rtol=0, atol=3e-6)


@pytest.mark.parametrize("alpha", [0.2, *(pytest.param(alpha, marks=pytest.mark.full) for alpha in (1.0, 3.0))])
def test_shares_follow_their_distribution(alpha):
    share = np.concatenate([mixed(64, mixup=alpha, seed=seed)[4]["share"] for seed in range(8)])
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(share.mean() - 0.5) < 5 * (variance / len(share)) ** 0.5
    assert share.var() == pytest.approx(variance, rel=0.25)


def test_both_are_a_coin_for_each_image():
    box = np.concatenate([mixed(64, mixup=0.4, cutmix=1.0, seed=seed)[4]["box"] for seed in range(8)])
    cut = (box != 0).any(axis=1).mean()  # a few boxes are empty
    assert 0.3 < cut < 0.6


@pytest.mark.parametrize("alphas", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_mixing_belongs_to_positions(alphas):
    whole, part = mixed(64, **alphas), mixed(8, start=40, **alphas)
    for a, b in zip(jax.tree.leaves(whole[2:]), jax.tree.leaves(part[2:]), strict=True):
        np.testing.assert_array_equal(a[40:48], b)


@pytest.mark.parametrize("group", [1, 5])
def test_mixing_groups_must_divide_the_examples(group):
    with pytest.raises(UsageError, match=f"augment.mix_group={group} does not divide the 32 examples"):
        mixed(mixup=0.4, group=group)


# Colours and boxes


def test_color_jitter_is_pillows_enhancements_in_a_random_order():
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (12, 9, 3), np.uint8)
    firsts = set()
    for key in jax.random.split(jax.random.key(0), 12):
        found = np.asarray(color_jitter(key, image, 0.4))
        order, amount = jax.random.split(key)
        names = [("Brightness", "Contrast", "Color")[i] for i in jax.random.permutation(order, 3)]
        picture = Image.fromarray(image)
        firsts.add(names[0])
        factors = 1 + np.asarray(jax.random.uniform(amount, (3,), jnp.float32, -0.4, 0.4))
        for name in names:
            factor = factors[("Brightness", "Contrast", "Color").index(name)]
            assert 0.6 <= factor <= 1.4
            picture = getattr(ImageEnhance, name)(picture).enhance(float(factor))
        assert np.abs(found.astype(int) - np.asarray(picture)).max() <= 3  # one of rounding in each
    assert len(firsts) == 3


def test_lighting_adds_one_color_along_the_principal_components():
    image = jnp.asarray(np.random.default_rng(0).uniform(0, 255, (4, 5, 3)), jnp.float32)
    keys = jax.random.split(jax.random.key(1), 4000)
    added = np.asarray(jax.vmap(lambda key: lighting(key, image, 0.1) - image)(keys))
    np.testing.assert_allclose(added, np.broadcast_to(added[:, :1, :1], added.shape), atol=1e-4)
    colors = added[:, 0, 0] / 255
    assert np.abs(colors.mean(0)).max() < 0.002
    values, vectors = np.linalg.eigh(np.cov(colors.T))
    np.testing.assert_allclose(values[::-1] ** 0.5, 0.1 * np.array([0.2175, 0.0188, 0.0045]), rtol=0.05)
    # The eigenvectors by the columns of imagenet.lua's table, the largest first.
    expected = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    np.testing.assert_allclose(abs(vectors[:, ::-1].T @ expected), np.eye(3), atol=0.03)


def test_erasing_leaves_a_box_of_zeros_of_the_shapes_asked_for():
    image = jnp.ones((40, 60, 1))
    erased = jax.jit(jax.vmap(lambda key: random_erase(key, image, 0.25)))
    boxes = np.asarray(erased(jax.random.split(jax.random.key(0), 8000)))[..., 0] == 0
    hit = boxes.any(axis=(1, 2))
    assert abs(hit.mean() - 0.25) < 0.015
    tall, wide = boxes[hit].any(2).sum(1), boxes[hit].any(1).sum(1)
    np.testing.assert_array_equal(boxes[hit].sum(axis=(1, 2)), tall * wide)  # whole boxes
    share, ratio = tall * wide / 2400, tall / wide
    assert share.min() > 0.015
    assert share.max() < 0.345
    assert abs(share.mean() - 0.175) < 0.02
    assert 0.25 < ratio.min() < 0.4
    assert 2.5 < ratio.max() < 3.8
    assert boxes[hit][:, 0].any()
    assert boxes[hit][:, -1].any()


def test_cutout_is_a_square_cut_by_the_edges():
    image = jnp.ones((10, 12, 3))
    boxes = np.asarray(jax.vmap(lambda key: cutout(key, image, 4))(jax.random.split(jax.random.key(0), 3000))) == 0
    assert (boxes == boxes[..., :1]).all()
    found = {(int(a), int(b)) for a, b in zip(boxes[..., 0].any(2).sum(1), boxes[..., 0].any(1).sum(1), strict=True)}
    assert found == {(a, b) for a in (2, 3, 4) for b in (2, 3, 4)}
    inside = boxes[:, 5, 6, 0].mean()
    assert inside == pytest.approx(16 / 120, abs=0.02)


def test_one_augmentation_does_not_change_the_choices_of_another():
    keys = jax.random.split(jax.random.key(0), 6)
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8))
    flipped = np.asarray(augment(keys, images, flip=True))
    both = np.asarray(augment(keys, images, flip=True, light=1e-9))
    np.testing.assert_allclose(both, flipped, atol=1e-3)
    erased = np.asarray(erase(keys, jnp.ones((6, 16, 16, 3)), cutout_side=4))
    together = np.asarray(erase(keys, jnp.ones((6, 16, 16, 3)), cutout_side=4, erasing=0.5))
    assert (together[erased == 0] == 0).all()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"policy": "autoaugmnt"}, "unknown augment.policy 'autoaugmnt'; did you mean 'autoaugment'?"),
        ({"policy_magnitude": 31}, "policy_magnitude=31; expected 1 or more, and 0 to 30"),
        ({"policy_count": 0}, "augment.policy_count=0"),
        ({"jitter": 1.5}, "augment.jitter=1.5; expected 0 (off) to 1"),
        ({"light": 0.1}, "augment.light=0.1 and images of 1 channel(s); expected 3, RGB"),
    ],
)
def test_augmentations_that_cannot_be(fields, expected):
    with pytest.raises(UsageError) as error:
        augment(jax.random.split(jax.random.key(0), 2), jnp.zeros((2, 8, 8, 1), jnp.uint8), **fields)
    assert expected in str(error.value)


def test_boxes_that_cannot_be():
    keys, images = jax.random.split(jax.random.key(0), 2), jnp.zeros((2, 8, 8, 1))
    with pytest.raises(UsageError, match=r"augment\.cutout_side=17; expected at most twice the side of the images, 8"):
        erase(keys, images, cutout_side=17)
    with pytest.raises(UsageError, match=r"augment\.erasing=1\.5; expected a probability"):
        erase(keys, images, erasing=1.5)
