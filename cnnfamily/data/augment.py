"""Random changes of training images, as pure functions of (key, image).

Each takes ONE image [height, width, channels] with pixels 0..255 and returns its shape and dtype; `augment` maps them
over a batch. Pixels are changed before they are normalised, so the zeros that pad a crop are black and not the mean
of the training set: the order of torchvision's recipes (He et al., 2015, leave it open).

Measured on two CPU cores, batch 128 of 32x32x3 with crops of 4: 0.2 ms a batch with `dynamic_slice`, against 0.8 ms
for one-hot matrix products, 1.9 ms for shifts by powers of two, and 7 ms for a chain of selections.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cnnfamily.data import policies
from cnnfamily.errors import UsageError, unknown
from cnnfamily.rng import example_keys

# What each sub-key is for. The numbers are part of a run's meaning: switching one augmentation on must not change the
# random choices of another, so a new one takes a new number.
CROP, SHIFT, FLIP, POLICY, JITTER, LIGHTING, ERASE, CUTOUT = 0, 1, 2, 3, 4, 5, 6, 7
# Likewise of `mix`.
PARTNER, KIND, SHARE, PLACE = 0, 1, 2, 3


def random_crop(key, image, padding: int):
    """Pads every side with `padding` zeros, then cuts the image's own size out at a random place.

    He et al., "Deep Residual Learning" (2015), section 4.2. Each of the (2 padding + 1)^2 places is equally likely.
    """
    return _random_window(key, image, padding, mode="constant")


def random_shift(key, image, pixels: int):
    """Moves the image by -pixels..pixels along each axis and fills with its own edge.

    For images whose background is not black, where the border that `random_crop` makes would be a feature.
    """
    return _random_window(key, image, pixels, mode="edge")


def _random_window(key, image, margin: int, mode: str):
    padded = jnp.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode=mode)
    top, left = jax.random.randint(key, (2,), 0, 2 * margin + 1)
    return lax.dynamic_slice(padded, (top, left, jnp.zeros_like(top)), image.shape)


def random_flip(key, image):
    """Mirrors left and right with probability 1/2."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def color_jitter(key, image, strength: float):
    """Brightness, contrast and saturation in random order, each by a factor uniform in 1 - strength .. 1 + strength.

    As torchvision's `ColorJitter(strength, strength, strength)` on a Pillow image; uint8 [height, width, 1 or 3].
    """
    order, amount = jax.random.split(key)
    names = jnp.asarray([policies.OPERATIONS.index(name) for name in ("brightness", "contrast", "color")])
    magnitudes = jax.random.uniform(amount, (3,), jnp.float32, -strength, strength)
    pixels = jnp.asarray(image, jnp.int32)
    for place in jax.random.permutation(order, 3):
        pixels = policies.enhance(pixels, names[place], magnitudes[place])
    return pixels.astype(image.dtype)


# Of the colours of ImageNet's pixels, scaled to 0..1: the square roots of the eigenvalues of their covariance, and its
# eigenvectors in columns, as in https://github.com/facebookarchive/fb.resnet.torch, datasets/imagenet.lua.
_DEVIATIONS = (0.2175, 0.0188, 0.0045)
_COLORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


def lighting(key, image, strength: float):
    """Adds one random colour to the whole image: Krizhevsky et al. 2012, section 4.1, whose `strength` is 0.1.

    Normal along each principal component of ImageNet's colours; float32 pixels 0..255 [height, width, 3], not clipped.
    """
    amount = strength * jax.random.normal(key, (3,), jnp.float32) * jnp.asarray(_DEVIATIONS, jnp.float32)
    return image + 255 * jnp.asarray(_COLORS, jnp.float32) @ amount


def random_erase(key, image, probability: float):
    """With a probability a box of zeros: Zhong et al. 2020, https://arxiv.org/abs/1708.04896.

    Its area is 2 to 33 % of the image's, its height over its width log-uniform from 0.3 to 3.3; the first of ten that fits,
    as in torchvision. Of a normalised image [height, width, channels], where 0 is the mean.
    """
    height, width, _ = image.shape
    coin, area, ratio, place = jax.random.split(key, 4)
    areas = height * width * jax.random.uniform(area, (10,), jnp.float32, 0.02, 0.33)
    ratios = jnp.exp(jax.random.uniform(ratio, (10,), jnp.float32, math.log(0.3), math.log(3.3)))
    tall, wide = (jnp.round(jnp.sqrt(side)).astype(jnp.int32) for side in (areas * ratios, areas / ratios))
    fits = (tall < height) & (wide < width)
    first = jnp.argmax(fits)
    tall, wide = tall[first], wide[first]
    top, left = jax.random.randint(place, (2,), 0, jnp.stack([height - tall + 1, width - wide + 1]))
    erased = _without_box(image, top, top + tall, left, left + wide)
    return jnp.where(fits.any() & jax.random.bernoulli(coin, probability), erased, image)


def cutout(key, image, side: int):
    """A square of zeros of `side` pixels, centred anywhere and cut by the edges: DeVries and Taylor 2017,
    https://arxiv.org/abs/1708.04552. Of a normalised image [height, width, channels], where 0 is the mean.
    """
    top, left = jax.random.randint(key, (2,), 0, jnp.asarray(image.shape[:2])) - side // 2
    return _without_box(image, top, top + side, left, left + side)


def _without_box(image, top, bottom, left, right):
    rows, columns = jnp.arange(image.shape[0])[:, None, None], jnp.arange(image.shape[1])[None, :, None]
    return jnp.where((rows >= top) & (rows < bottom) & (columns >= left) & (columns < right), jnp.zeros_like(image), image)


POLICIES = {
    "": None,
    "autoaugment": policies.auto_augment,
    "autoaugment_cifar10": functools.partial(policies.auto_augment, policy="cifar10"),
    "randaugment": policies.rand_augment,
    "trivialaugment": policies.trivial_augment,
}


def augment(
    keys,
    images,
    *,
    crop_padding: int = 0,
    shift: int = 0,
    flip: bool = False,
    policy: str = "",
    policy_count: int = 2,
    policy_magnitude: int = 9,
    jitter: float = 0.0,
    light: float = 0.0,
):
    """keys [batch], uint8 images [batch, height, width, channels] to float32 images, pixels still 0..255.

    The order is crop, shift, flip, policy (of `POLICIES`; count and magnitude are RandAugment's), colour jitter, lighting. What
    happens to an image depends on its key alone, not on the others in the batch.
    """
    if policy not in POLICIES:
        raise unknown("augment.policy", policy, filter(None, POLICIES))
    if not (policy_count >= 1 and 0 <= policy_magnitude <= 30):
        raise UsageError(
            f"augment.policy_count={policy_count} and policy_magnitude={policy_magnitude}; expected 1 or more, and 0 to 30"
        )
    if jitter > 1:
        raise UsageError(f"augment.jitter={jitter}; expected 0 (off) to 1")
    if light and images.shape[-1] != 3:
        raise UsageError(f"augment.light={light} and images of {images.shape[-1]} channel(s); expected 3, RGB")
    change = POLICIES[policy]
    if policy == "randaugment":
        change = functools.partial(change, count=policy_count, magnitude=policy_magnitude)
    side = min(images.shape[1:3])
    if not (0 <= crop_padding <= side and 0 <= shift <= side):
        raise UsageError(
            f"augment.crop_padding={crop_padding} and augment.shift={shift}; expected 0 (off) to {side}, the side of the images"
        )

    def augment_one(key, image):
        if crop_padding:
            image = random_crop(jax.random.fold_in(key, CROP), image, crop_padding)
        if shift:
            image = random_shift(jax.random.fold_in(key, SHIFT), image, shift)
        if flip:
            image = random_flip(jax.random.fold_in(key, FLIP), image)
        if change:
            image = change(jax.random.fold_in(key, POLICY), image)
        if jitter:
            image = color_jitter(jax.random.fold_in(key, JITTER), image, jitter)
        image = image.astype(jnp.float32)
        if light:
            image = lighting(jax.random.fold_in(key, LIGHTING), image, light)
        return image

    return jax.vmap(augment_one)(keys, images)


def erase(keys, images, *, erasing: float = 0.0, cutout_side: int = 0):
    """keys [batch], normalised images [batch, height, width, channels]: random erasing by probability, then cutout."""
    if erasing > 1:
        raise UsageError(f"augment.erasing={erasing}; expected a probability, 0 (off) to 1")
    if cutout_side > 2 * max(images.shape[1:3]):  # it would always leave nothing
        raise UsageError(f"augment.cutout_side={cutout_side}; expected at most twice the side of the images, {images.shape[2]}")

    def erase_one(key, image):
        if erasing:
            image = random_erase(jax.random.fold_in(key, ERASE), image, erasing)
        if cutout_side:
            image = cutout(jax.random.fold_in(key, CUTOUT), image, cutout_side)
        return image

    return jax.vmap(erase_one)(keys, images) if erasing or cutout_side else images


def normalize(image, mean, std):
    """Pixels 0..255 of any dtype, [..., channels], to float32 (image / 255 - mean) / std; `mean`, `std` [channels]."""
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return (image.astype(jnp.float32) / 255 - mean) / std


def whiten(images, store):
    """Images [..., height, width, channels] of pixels scaled to 0..1, whitened if `store` has what `sources.whitening` made."""
    if "whitening_matrix" not in store:
        return images
    flat = images.reshape(*images.shape[:-3], -1) - store["whitening_mean"]
    # At the default precision GPUs and TPUs would round the operands of a product that takes differences of like numbers.
    return jnp.matmul(flat, store["whitening_matrix"], precision="highest").reshape(images.shape)


def mix(key, position, images, targets, *, mixup: float, cutmix: float, group: int):
    """Blends each image and its targets with those of a partner: mixup, cutmix, or one of them by a coin if both are on.

    mixup (Zhang et al. 2018, https://arxiv.org/abs/1710.09412): share * image + (1 - share) * partner. cutmix (Yun et al. 2019,
    https://arxiv.org/abs/1905.04899): a box of the partner's pixels, 1 - share of the area, centred anywhere; cut by an edge,
    the share is that of the pixels. The share is drawn from Beta(alpha, alpha) for each example, not once a batch, and the
    partner lies in the same `group` of consecutive examples of the global batch (one shift a group, so nobody is his own
    partner and everybody is one once): neither depends on devices or micro-batches.

    Args:
      key: of the step; position: [batch], places in the global batch, a multiple of `group` in number and at the start.
      images: [batch, height, width, channels] float; targets: [batch, classes].
      mixup, cutmix: the alphas; 0 is off.

    Returns:
      images, targets, and what was chosen: `partner` (its position), `share`, `box` [batch, 4] (top, bottom, left, right).

    Raises:
      UsageError: the group does not divide the batch.
    """
    size, height, width, _ = images.shape
    if group < 2 or size % group:
        raise UsageError(
            f"augment.mix_group={group} does not divide the {size} examples that a device has in a micro-batch: "
            f"expected a divisor of {size}, 2 or more"
        )
    groups = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, PARTNER), position[::group] // group)
    shift = jax.vmap(lambda k: jax.random.randint(k, (), 1, group, position.dtype))(groups)
    row = jnp.arange(size, dtype=position.dtype)
    partner = row // group * group + (row + jnp.repeat(shift, group)) % group
    cuts, share, box = jax.vmap(lambda k: _blend(k, mixup, cutmix, height, width))(example_keys(key, position))
    rows, columns = jnp.arange(height)[None, :, None], jnp.arange(width)[None, None]
    top, bottom, left, right = (edge[:, None, None] for edge in box.T)
    pasted = ((rows >= top) & (rows < bottom) & (columns >= left) & (columns < right))[..., None]
    own = jnp.where(cuts[:, None, None, None], 1 - pasted.astype(images.dtype), share.astype(images.dtype)[:, None, None, None])
    weight = share.astype(targets.dtype)[:, None]
    images = own * images + (1 - own) * images[partner]
    targets = weight * targets + (1 - weight) * targets[partner]
    return images, targets, {"partner": position[partner], "share": share, "box": box}


def beta_quantile(uniform, alpha: float):
    """The number below which Beta(alpha, alpha) lies with probability `uniform`; uniform numbers become beta ones.

    `uniform` [...] float32 in [0, 1]; returns its shape and dtype. The distribution is mixup's and cutmix's (see `mix`).
    Interpolates a table of the lower half, with nodes close together at 0: to 3e-6 for alphas from 0.05 to 3. `jax.random.beta`
    draws until it accepts: the loop takes a second to compile, and as rounding decides what is accepted, two platforms may
    choose unlike.
    """
    from scipy import special  # 0.13 s to import, and only mixup and cutmix are in need of it

    quantiles = (1 - np.cos(np.linspace(0, np.pi / 2, 513))) / 2
    table = special.betainc(alpha, alpha, quantiles).astype(np.float32), quantiles.astype(np.float32)
    lower = jnp.interp(jnp.minimum(uniform, 1 - uniform), *table)
    return jnp.where(uniform < 0.5, lower, 1 - lower)


def _blend(key, mixup: float, cutmix: float, height: int, width: int):
    """For one example: whether it is cut, its share, and its box (empty in mixup)."""
    cuts = jax.random.bernoulli(jax.random.fold_in(key, KIND)) if mixup and cutmix else jnp.asarray(bool(cutmix))
    uniform = jax.random.uniform(jax.random.fold_in(key, SHARE), dtype=jnp.float32)
    share = jnp.where(cuts, beta_quantile(uniform, cutmix or 1.0), beta_quantile(uniform, mixup or 1.0))
    sides = jnp.asarray([height, width])
    centre = jax.random.randint(jax.random.fold_in(key, PLACE), (2,), 0, sides)
    half = (jnp.sqrt(1 - share) * sides.astype(jnp.float32) / 2).astype(sides.dtype)
    low, high = jnp.clip(centre - half, 0, sides), jnp.clip(centre + half, 0, sides)
    box = jnp.where(cuts, jnp.stack([low, high], 1).reshape(-1), 0)
    area = jnp.prod(high - low).astype(jnp.float32) / (height * width)
    return cuts, jnp.where(cuts, 1 - area, share), box
