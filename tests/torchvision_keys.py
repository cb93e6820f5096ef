"""Writes torchvision_keys.txt: the state dicts of torchvision's networks, by name and shape. `python tests/torchvision_keys.py`

Needs torch and torchvision. A line for each module: its name, then "norm=C" for the five arrays of a normalisation over C
channels, or the shape of each of its arrays.
"""

from pathlib import Path

FILE = Path(__file__).with_suffix(".txt")
FAMILIES = "resnet", "resnext", "wide_resnet", "efficientnet_b", "alexnet", "vgg", "googlenet", "mobilenet"
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def read_keys() -> dict[str, dict[str, tuple[int, ...]]]:
    """Name of the network -> key -> shape."""
    networks, name = {}, ""
    for line in FILE.read_text().splitlines():
        if line.startswith(" "):
            module, *arrays = line.split()
            for array, _, text in (item.partition("=") for item in arrays):
                shape = tuple(map(int, text.split("x")))
                leaves = dict.fromkeys(NORM[:4], shape) | {NORM[4]: ()} if array == "norm" else {array: shape}
                networks[name] |= {f"{module}.{leaf}": value for leaf, value in leaves.items()}
        elif not line.startswith("#"):
            name = line
            networks[name] = {}
    return networks


def main() -> None:
    import torch
    from parity import import_torchvision

    torchvision = import_torchvision()
    lines = [
        f"# torch {torch.__version__}, torchvision {torchvision.__version__}; written by torchvision_keys.py, which reads it"
    ]
    for name in torchvision.models.list_models(torchvision.models):
        if not name.startswith(FAMILIES):
            continue
        lines.append(name)
        with torch.device("meta"):  # shapes without numbers
            arrays = torchvision.models.get_model(name).state_dict()
        modules = {}
        for key, value in arrays.items():
            module, _, leaf = key.rpartition(".")
            modules.setdefault(module, {})[leaf] = "x".join(map(str, value.shape))
        for module, leaves in modules.items():
            text = f"norm={leaves['weight']}" if tuple(leaves) == NORM else " ".join(f"{k}={v}" for k, v in leaves.items())
            lines.append(f" {module} {text}")
    FILE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
