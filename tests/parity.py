"""Compares our networks with torchvision's and timm's on random weights: `python tests/parity.py [NAME ...]`.

Needs torch and torchvision, and timm for its scheme. Prints the largest difference of the logits beside the largest logit.
"""

import argparse
import contextlib
import functools
import zlib

import jax
import numpy as np
from torchvision_keys import read_keys

import cnnfamily
from cnnfamily import naming

RESIDUAL = ("BasicBlock", "Bottleneck", "MBConv", "InvertedResidual", "DepthwiseSeparableConv")  # torchvision's and timm's
RESIDUAL += ("PreActBasic", "PreActBottleneck")


def import_torchvision():
    """torchvision; beside a torch without its compiled operators by way of `torchvision_cpu`, where that exists."""
    with contextlib.suppress(ImportError):
        import torchvision_cpu  # noqa: F401
    import torchvision

    return torchvision


def has_random_weights(network):
    """Weights that keep activations near 1, and batch statistics that differ from theirs, so that no norm is the identity.

    Every array is drawn from its own name, so it does not depend on the order of modules.
    """
    import torch

    def draw(name, shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))

    def set_statistics(name, norm, inputs):
        """About those of the inputs, which come from norms before this one that are set already."""
        var, mean = torch.var_mean(inputs[0], dim=(0, 2, 3))
        # A channel that is nearly dead would amplify rounding: none has less than a tenth of the mean variance.
        norm.running_var.copy_(var * (0.3 * draw(f"{name}.running_var", var.shape)).exp() + 0.1 * var.mean())
        norm.running_mean.copy_(mean + 0.3 * var.sqrt() * draw(f"{name}.running_mean", mean.shape))

    norms = {name: module for name, module in network.named_modules() if hasattr(module, "running_mean")}
    # Branches that weigh as much as the shortcut amplify rounding, torch's own too: 330 times in ResNet-152, and
    # trained networks are not so. The last norm of a branch is drawn smaller.
    blocks = [name for name, module in network.named_modules() if type(module).__name__ in RESIDUAL]
    last = {[name for name in norms if name.startswith(f"{block}.") and "downsample" not in name][-1] for block in blocks}
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(draw(name, parameter.shape) * (2 * parameter.shape[0] / parameter.numel()) ** 0.5)
            else:
                module, _, leaf = name.rpartition(".")
                scale = 0.3 if module in last else 1.0
                centre = scale if module in norms and leaf == "weight" else 0.0
                parameter.copy_(centre + 0.2 * scale * draw(name, parameter.shape))
        hooks = [norm.register_forward_pre_hook(functools.partial(set_statistics, name)) for name, norm in norms.items()]
        network.eval()(draw("images", (4, 3, 224, 224)))
        for hook in hooks:
            hook.remove()
    return network


def torch_network(name: str, scheme: str = "torchvision", **fields):
    """A network of torchvision or timm with random weights, in eval mode."""
    if scheme == "torchvision":
        if name == "googlenet":  # as with its published weights; and drawing its own initial values takes a minute
            fields = {"transform_input": True, "init_weights": False} | fields
        return has_random_weights(import_torchvision().models.get_model(name, weights=None, **fields))
    import_torchvision()
    import timm

    return has_random_weights(timm.create_model(name.replace("se_resnet", "seresnet"), **fields))


def images_of(resolution: int, batch: int = 2) -> np.ndarray:
    """Random images `[batch, height, width, 3]` float32."""
    return np.random.default_rng(resolution).normal(size=(batch, resolution, resolution, 3)).astype(np.float32)


def difference(name: str, theirs, resolution: int, **overrides) -> float:
    """max |ours - theirs| / max |theirs| of the logits, in eval mode and float32, with `theirs`'s weights in our network."""
    import torch

    network, variables = cnnfamily.load_pretrained(name, theirs.state_dict(), **overrides)
    images = images_of(resolution)
    ours = np.asarray(jax.jit(network.apply)(variables, images))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    assert ours.shape == expected.shape
    return float(np.abs(ours - expected).max() / np.abs(expected).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--scheme", choices=naming.SCHEMES, default="torchvision")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[224, 97])
    arguments = parser.parse_args()
    for name in arguments.names or sorted(read_keys()):
        theirs = torch_network(name, arguments.scheme)
        found = [f"{size}: {difference(name, theirs, size):.1e}" for size in arguments.resolutions]
        print(f"{name:<24}{arguments.scheme:<14}{'  '.join(found)}", flush=True)


if __name__ == "__main__":
    main()
