"""What is printed about each network in its paper, or where the paper has no figure in torchvision's list of weights.

| column   | what it is                                                                                           |
|----------|------------------------------------------------------------------------------------------------------|
| `params` | parameters as printed, M for millions                                                                |
| `macs`   | multiply-adds as printed, M or B for millions or billions; most papers call them FLOPs               |
| `top1`   | percent of the test or validation images: ImageNet, CIFAR-10, for LeNet-5 MNIST; 100 less a paper's  |
|          | error; one crop of one network unless the source says otherwise                                      |

`python -m cnnfamily.summary` prints them beside our own counts; `tests/test_published.py` holds both together and has the
reason of each that differs.
"""

FIELDS = ("params", "macs", "top1", "source")
NOTHING = ("-", "-", "-", "-")

_TORCHVISION = "torchvision, IMAGENET1K_V1"
_STRIDE = "Hu et al. 2018, {} (stride on 1x1)"  # their bottleneck is that of resnet50_v1

# network -> params, macs, top-1, source
PUBLISHED = {
    "lenet5": NOTHING,
    "lenet5_1998": ("60,000", "-", "99.05", "LeCun et al. 1998, II-B, III"),
    "alexnet": ("61.1M", "0.71B", "56.522", _TORCHVISION),
    "alexnet_2012": ("60M", "-", "59.3", "Krizhevsky et al. 2012, Table 2"),
    "vgg11": ("133M", "-", "70.4", "Simonyan, Zisserman 2014, Tables 2, 3"),
    "vgg11_bn": ("132.9M", "7.61B", "70.37", _TORCHVISION),
    "vgg13": ("133M", "-", "71.3", "Simonyan, Zisserman 2014, Tables 2, 3"),
    "vgg13_bn": ("133.1M", "11.31B", "71.586", _TORCHVISION),
    "vgg16": ("138M", "15.3B", "74.4", "Simonyan 2014, Tables 2, 3; He 2015"),
    "vgg16_bn": ("138.4M", "15.47B", "73.36", _TORCHVISION),
    "vgg19": ("144M", "19.6B", "74.5", "Simonyan 2014, Tables 2, 3; He 2015"),
    "vgg19_bn": ("143.7M", "19.63B", "74.218", _TORCHVISION),
    "plain18": ("-", "1.8B", "72.06", "He et al. 2015, Tables 1, 2 (10 crops)"),
    "plain34": ("-", "3.6B", "71.46", "He et al. 2015, Tables 1, 2 (10 crops)"),
    "resnet18": ("-", "1.8B", "-", "He et al. 2015, Table 1"),  # their 72.12 is of shortcut=A
    "resnet34": ("-", "3.6B", "75.48", "He et al. 2015, Tables 1, 3 (10 crops)"),
    "resnet50": ("25.6M", "4.09B", "76.13", _TORCHVISION),
    "resnet101": ("44.5M", "7.80B", "77.374", _TORCHVISION),
    "resnet152": ("60.2M", "11.51B", "78.312", _TORCHVISION),
    "resnet50_v1": ("-", "3.8B", "77.15", "He et al. 2015, Tables 1, 3 (10 crops)"),
    "resnet101_v1": ("-", "7.6B", "78.25", "He et al. 2015, Tables 1, 3 (10 crops)"),
    "resnet152_v1": ("-", "11.3B", "78.57", "He et al. 2015, Tables 1, 3 (10 crops)"),
    "resnext50_32x4d": ("25.0M", "4.23B", "77.618", _TORCHVISION),
    "resnext101_32x8d": ("88.8M", "16.41B", "79.312", _TORCHVISION),
    "resnext101_64x4d": ("83.5M", "15.46B", "83.246", _TORCHVISION),
    "wide_resnet50_2": ("68.9M", "-", "78.1", "Zagoruyko, Komodakis 2016, Table 8"),
    "wide_resnet101_2": ("126.9M", "22.75B", "78.848", _TORCHVISION),
    "se_resnet18": NOTHING,
    "se_resnet34": NOTHING,
    "se_resnet50": ("28.1M", "3.87B", "77.72", _STRIDE.format("Table 13")),
    "se_resnet101": ("-", "-", "78.25", _STRIDE.format("README")),
    "se_resnet152": ("-", "-", "78.66", _STRIDE.format("README")),
    "plain20_cifar": NOTHING,
    "plain56_cifar": NOTHING,
    "resnet20_cifar": ("0.27M", "-", "91.25", "He et al. 2015, Table 6"),
    "resnet32_cifar": ("0.46M", "-", "92.49", "He et al. 2015, Table 6"),
    "resnet44_cifar": ("0.66M", "-", "92.83", "He et al. 2015, Table 6"),
    "resnet56_cifar": ("0.85M", "-", "93.03", "He et al. 2015, Table 6"),
    "resnet110_cifar": ("1.7M", "-", "93.57", "He et al. 2015, Table 6 (best of 5)"),
    "resnet1202_cifar": ("19.4M", "-", "92.07", "He et al. 2015, Table 6"),
    "googlenet": ("6.6M", "1.50B", "69.778", _TORCHVISION),
    "googlenet_paper": ("6.8M", "1550M", "69.8", "Howard et al. 2017, Table 8"),
    "mobilenet_v1": ("4.2M", "569M", "70.6", "Howard et al. 2017, Table 6"),
    "mobilenet_v2": ("3.4M", "300M", "72.0", "Sandler et al. 2018, Table 4"),
    "mobilenet_v3_large": ("5.4M", "217M", "75.2", "Howard et al. 2019, Table 9"),
    "mobilenet_v3_small": ("2.9M", "66M", "67.5", "Howard et al. 2019, Table 9"),
    "efficientnet_b0": ("5.3M", "0.39B", "76.3", "Tan and Le 2019, Table 2"),
    "efficientnet_b1": ("7.8M", "0.70B", "78.8", "Tan and Le 2019, Table 2"),
    "efficientnet_b2": ("9.2M", "1.0B", "79.8", "Tan and Le 2019, Table 2"),
    "efficientnet_b3": ("12M", "1.8B", "81.1", "Tan and Le 2019, Table 2"),
    "efficientnet_b4": ("19M", "4.2B", "82.6", "Tan and Le 2019, Table 2"),
    "efficientnet_b5": ("30M", "9.9B", "83.3", "Tan and Le 2019, Table 2"),
    "efficientnet_b6": ("43M", "19B", "84.0", "Tan and Le 2019, Table 2"),
    "efficientnet_b7": ("66M", "37B", "84.4", "Tan and Le 2019, Table 2"),
    "airbench94": ("-", "-", "94.01", "airbench94_muon.py (6 views)"),
}
