"""The well-known data sets in one table: sizes, classes and the usual normalisation, by their names in TensorFlow Datasets."""

import dataclasses

from cnnfamily.data.preprocessing import imagenet_classes


@dataclasses.dataclass(frozen=True)
class Known:
    """What is published of a set; `mean` and `std` of its training pixels scaled to 0..1, a number a channel."""

    train: int  # images
    test: int
    size: int  # pixels a side; 0: photographs of any size
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def channels(self) -> int:
        return len(self.mean)


_DIGITS = tuple("0123456789")
_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle caterpillar
cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl
hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road
rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank
telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""

KNOWN = {
    "mnist": Known(60_000, 10_000, 28, (0.1307,), (0.3081,), _DIGITS),
    "fashion_mnist": Known(
        *(60_000, 10_000, 28, (0.2860,), (0.3530,)),
        ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    "cifar10": Known(
        *(50_000, 10_000, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
    "cifar100": Known(
        *(50_000, 10_000, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        tuple(_CIFAR100.split()),
    ),
    "svhn_cropped": Known(73_257, 26_032, 32, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), _DIGITS),
    "imagenet2012": Known(
        *(1_281_167, 50_000, 0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        imagenet_classes(),  # where TensorFlow Datasets has the synsets' numbers
    ),
}
