"""Operations against Pillow's own, and which of them the policies draw."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from PIL import Image, ImageEnhance, ImageOps

from cnnfamily.data import policies
from cnnfamily.errors import UsageError


def pictures():
    """Colours in patches and ramps with noise, dark and bright, a flat one, and one of two levels."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 200, 37)[None, :, None] + np.linspace(0, 55, 29)[:, None, None]
    noisy = np.clip(ramp + rng.normal(0, 20, (29, 37, 3)), 0, 255)
    patches = rng.integers(0, 256, (5, 7, 3)).repeat(6, 0).repeat(6, 1)[:29, :37]
    found = [noisy, patches, noisy * 0.3 + 40, np.full((29, 37, 3), 77.0), 10 + 3 * (noisy > 120)]
    return [image.astype(np.uint8) for image in found]


def pillows(name, magnitude, picture):
    if name in policies.GEOMETRIC:
        fill = (policies.FILL,) * len(picture.getbands()) if picture.mode == "RGB" else policies.FILL
        if name == "rotate":
            return picture.rotate(magnitude, fillcolor=fill)
        whole = int(magnitude)
        data = {
            "shear_x": (1, magnitude, 0, 0, 1, 0),
            "shear_y": (1, 0, 0, magnitude, 1, 0),
            "translate_x": (1, 0, whole, 0, 1, 0),
            "translate_y": (1, 0, 0, 0, 1, whole),
        }
        return picture.transform(picture.size, Image.Transform.AFFINE, data[name], fillcolor=fill)
    if name in policies.BLENDS:
        return getattr(ImageEnhance, name.capitalize())(picture).enhance(1 + magnitude)
    return {
        "identity": lambda: picture,
        "posterize": lambda: ImageOps.posterize(picture, int(magnitude)),
        "solarize": lambda: ImageOps.solarize(picture, magnitude),
        "autocontrast": lambda: ImageOps.autocontrast(picture),
        "equalize": lambda: ImageOps.equalize(picture),
        "invert": lambda: ImageOps.invert(picture),
    }[name]()


MAGNITUDES = {
    **dict.fromkeys(("shear_x", "shear_y"), (-0.99, -0.3, 0.0, 0.15)),
    **dict.fromkeys(("translate_x", "translate_y"), (-16.7, 0.0, 5.0, 40.0)),
    "rotate": (-135.0, -30.0, 0.0, 12.5, 90.0),
    **dict.fromkeys(policies.BLENDS, (-1.0, -0.99, -0.4, 0.0, 0.37, 0.99)),
    "posterize": (2.0, 4.0, 7.0, 8.0),
    "solarize": (0.0, 100.0, 127.5, 255.0),
}
operate = jax.jit(jax.vmap(policies.operate))


@pytest.mark.parametrize("name", policies.OPERATIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_operations_are_pillows(name, channels):
    given = [image[..., :channels] for image in pictures()]
    cases = [(image, magnitude) for image in given for magnitude in MAGNITUDES.get(name, (0.0,))]
    images, magnitudes = np.stack([image for image, _ in cases]), np.array([value for _, value in cases], np.float32)
    found = np.asarray(operate(images, np.full(len(cases), policies.OPERATIONS.index(name)), magnitudes))
    assert found.dtype == np.uint8
    for image, magnitude, ours in zip(images, magnitudes, found, strict=True):
        picture = Image.fromarray(image if channels == 3 else image[:, :, 0])
        theirs = np.asarray(pillows(name, float(magnitude), picture)).reshape(image.shape)
        difference = np.abs(ours.astype(int) - theirs)
        if name in policies.GEOMETRIC:
            assert (difference > 0).any(axis=2).mean() < 0.01, magnitude
        else:
            rounded = name == "autocontrast" or (name in policies.BLENDS and magnitude not in (-1, 0))
            assert difference.max() <= rounded, magnitude


def test_each_image_has_its_own_operation():
    """Under `vmap` all at once, against one by one."""
    image = pictures()[2]
    operations = np.arange(len(policies.OPERATIONS))
    chosen = dict.fromkeys(policies.OPERATIONS, 0.4) | {
        "translate_x": 5,
        "translate_y": 5,
        "rotate": 9,
        "posterize": 4,
        "solarize": 99,
    }
    magnitudes = np.array([chosen[name] for name in policies.OPERATIONS], np.float32)
    found = operate(np.stack([image] * len(operations)), operations, magnitudes)
    for operation, magnitude, ours in zip(operations, magnitudes, found, strict=True):
        np.testing.assert_array_equal(ours, operate(image[None], operation[None], magnitude[None])[0])
    assert len({ours.tobytes() for ours in np.asarray(found)}) == len(operations)


# Which operations are drawn: `operate` is replaced by one that tells


@pytest.fixture
def draws(monkeypatch):
    """A function of (policy, n): operations [n, steps] and magnitudes [n, steps] of n keys on an image of 64 x 64."""

    def draws(policy, n):
        steps = []
        monkeypatch.setattr(
            policies, "operate", lambda image, operation, magnitude: (steps.append((operation, magnitude)), image)[1]
        )

        def one(key):
            steps.clear()
            policy(key, jnp.zeros((64, 64, 3), jnp.uint8))
            return tuple(jnp.stack(values) for values in zip(*steps, strict=True))

        return tuple(map(np.asarray, jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), n))))

    return draws


def test_rand_augment_draws_each_operation_alike(draws):
    operations, magnitudes = draws(functools.partial(policies.rand_augment, count=3, magnitude=9), 4000)
    assert operations.shape == (4000, 3)
    counts = np.bincount(operations.ravel(), minlength=15)
    assert counts[-1] == 0, "not to invert"
    np.testing.assert_allclose(counts[:-1] / counts.sum(), 1 / 14, atol=0.006)
    found = {name: {round(float(x), 4) for x in magnitudes[operations == i]} for i, name in enumerate(policies.OPERATIONS)}
    # Magnitude 9 of 30.
    assert found["shear_x"] == {-0.09, 0.09}
    assert found["translate_y"] == {round(sign * 64 * 150 / 331 * 0.3, 4) for sign in (-1, 1)}
    assert found["rotate"] == {-9.0, 9.0}
    assert found["color"] == {-0.27, 0.27}
    assert found["posterize"] == {7.0}  # 8 - round(1.2)
    assert found["solarize"] == {178.5}
    assert found["equalize"] == {0.0}
    np.testing.assert_allclose((magnitudes[operations == 1] > 0).mean(), 0.5, atol=0.06)


def test_trivial_augment_draws_any_magnitude(draws):
    operations, magnitudes = draws(policies.trivial_augment, 8000)
    assert operations.shape == (8000, 1)
    np.testing.assert_allclose(np.bincount(operations.ravel(), minlength=15)[:-1] / 8000, 1 / 14, atol=0.012)
    for name, largest, bins in (
        ("rotate", 135.0, 61),
        ("shear_y", 0.99, 61),
        ("translate_x", 32.0, 61),
        ("contrast", 0.99, 61),
    ):
        values = magnitudes[operations == policies.OPERATIONS.index(name)]
        assert np.abs(values).max() == pytest.approx(largest)
        assert len(set(values.round(5).tolist())) > 0.95 * bins
    assert set(magnitudes[operations == policies.OPERATIONS.index("posterize")].tolist()) == {2, 3, 4, 5, 6, 7, 8}


@pytest.mark.parametrize("policy", ["imagenet", "cifar10"])
def test_auto_augment_draws_its_pairs_with_their_probabilities(draws, policy):
    operations, _ = draws(functools.partial(policies.auto_augment, policy=policy), 20_000)
    expected = np.zeros((15, 15))
    for pair in policies.AUTO_AUGMENT[policy]:
        (first, p, _), (second, q, _) = map(policies._parse, pair.split(", "))
        for one, share in ((first, p), (0, 1 - p)):
            for two, other in ((second, q), (0, 1 - q)):
                expected[one, two] += share * other / 25
    found = np.zeros((15, 15))
    np.add.at(found, (operations[:, 0], operations[:, 1]), 1 / len(operations))
    np.testing.assert_allclose(found, expected, atol=0.008)


def test_a_policy_that_does_not_exist():
    with pytest.raises(UsageError, match="unknown AutoAugment policy 'cifar'; did you mean 'cifar10'"):
        policies.auto_augment(jax.random.key(0), jnp.zeros((8, 8, 3), jnp.uint8), policy="cifar")


@pytest.mark.parity
def test_policies_are_torchvisions():
    """The pairs, and the magnitudes of all three."""
    pytest.importorskip("torch")
    autoaugment = parity.import_torchvision().transforms.autoaugment
    names = {
        name: name.lower().replace("x", "_x").replace("y", "_y") for name in ("ShearX", "ShearY", "TranslateX", "TranslateY")
    }
    for policy, kind in (("imagenet", "IMAGENET"), ("cifar10", "CIFAR10")):
        theirs = autoaugment.AutoAugment(getattr(autoaugment.AutoAugmentPolicy, kind))
        listed = [
            ", ".join(f"{names.get(name, name.lower())} {f'{p:g}'.lstrip('0') or '0'} {level or 0}" for name, p, level in pair)
            for pair in theirs.policies
        ]
        assert list(policies.AUTO_AUGMENT[policy]) == listed
    for theirs, arguments, bins, fields in (
        (autoaugment.AutoAugment(), (10, (64, 64)), 10, policies._USUAL),
        (autoaugment.RandAugment(), (31, (64, 64)), 31, policies._USUAL),
        (autoaugment.TrivialAugmentWide(), (31,), 31, policies._WIDE),
    ):
        ours = policies._magnitudes(bins, size=64, **fields)
        for name, (values, signed) in theirs._augmentation_space(*arguments).items():
            place = policies.OPERATIONS.index(names.get(name, name.lower()))
            np.testing.assert_allclose(ours[place], np.broadcast_to(values.numpy(), bins), rtol=1e-6, err_msg=name)
            assert policies._SIGNED[place] == signed
