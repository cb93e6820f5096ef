"""Every key of a config with its default and its reason. A config file of an experiment holds only what differs.

    from configs import default

    def get_config(arg=""):
        config = default.get_config("resnet50")
        config.batch_size = 1024
        return config

Durations have their unit in their name; where a key exists in epochs and in steps, set one of the two.
"""

from ml_collections import ConfigDict

from cnnfamily.data.known import KNOWN
from cnnfamily.errors import unknown
from cnnfamily.models import model_config

# `data` of the recipes for ImageNet
IMAGENET = {
    "source": "tfds:imagenet2012",
    "fit": "crop",
    "mean": KNOWN["imagenet2012"].mean,
    "std": KNOWN["imagenet2012"].std,
}
ONE_RESOLUTION = {"train_resolutions": (), "train_boundaries_epochs": ()}
# `augment` without any change of the images that it could make
AS_IT_IS = {
    **{"repeats": 1, "crop_padding": 0, "shift": 0, "flip": False, "flip_alternating": False},
    **{"policy": "", "jitter": 0.0, "light": 0.0},
    **{"erasing": 0.0, "cutout_side": 0, "mixup": 0.0, "cutmix": 0.0},
}


def get_config(arg: str = "") -> ConfigDict:
    """The defaults for the network named by `arg`, EfficientNet-B0 without; or that in its `digits` or `smoke` form."""
    form = arg if arg in ("digits", "smoke") else ""
    model = "efficientnet_b0" if form or not arg else arg
    config = ConfigDict()
    config.seed = 0  # of initialisation, order, augmentation, dropout and stochastic depth: a run is a function of it
    config.batch_size = 64  # examples a step, over all devices
    config.accumulate_steps = 1  # micro-batches a step, for batches that do not fit; batch norm sees one micro-batch
    config.keep_programs = True  # compiled ones on disk, for the next start; False: they are neither read nor written
    config.onednn = False  # convolutions of training on a CPU by oneDNN: faster in bfloat16, and compiled at each start
    config.total_epochs = 30.0
    config.total_steps = 0
    config.loss = "cross_entropy"  # or binary_cross_entropy; evaluations always have the first
    config.label_smoothing = 0.0  # share of the target spread over all classes

    config.aux_weight = 0.3  # of the loss of each auxiliary classifier; GoogLeNet with model.aux has two

    config.model = model_config(model)  # `name`, and every field of that network

    config.data = ConfigDict()
    config.data.source = "digits"  # digits, npz:PATH, idx:DIR, tfds:NAME, folder:PATH or fake
    config.data.dir = ""  # where tfds: looks (else TFDS_DATA_DIR, else ~/tensorflow_datasets), and folder: for relative paths
    config.data.resolution = 0  # side of the images in pixels; 0: the network's own (model.resolution)
    config.data.train_resolutions = ()  # sides in training where they differ from those in evaluation, one after another
    config.data.train_boundaries_epochs = ()  # when the second, the third, ... begins
    # "pad" puts images in the middle of black, as LeNet-5's paper does; "crop" is for photographs, decoded when needed: a
    # random part in training (augment.crop_*), the middle in evaluation.
    config.data.fit = "resize"  # whole images made square
    config.data.resize = 0  # crop: the shorter side in evaluation, before the middle is cut; 0: 8/7 of the resolution
    config.data.interpolation = "bilinear"  # crop: or bicubic
    config.data.test_share = 0.2  # of a folder without train and val, by a permutation from split_seed
    config.data.split_seed = 0  # not the run's seed: runs of other seeds compare on the same images
    config.data.workers = -1  # threads that decode photographs; 0: none; -1: as many as cores
    config.data.prefetch = 2  # batches of photographs made ahead
    config.data.bad_images = "stop"  # or "replace": by the next good one, with a warning
    config.data.mean = ()  # of pixels scaled to 0..1, one number a channel; (): measured on the training images
    config.data.std = ()
    config.data.zca_epsilon = 0.0  # small images are whitened (ZCA) in place of mean and std, 1e-2 for example; 0: not
    config.data.device_megabytes = 2048  # a split up to this size is kept on each device, a larger one is sent in batches

    config.augment = ConfigDict()  # changes of training images, made on the device; 0 or False: none
    config.augment.repeats = 1  # times that an image stands in a batch, changed unlike; an epoch sees so many fewer
    config.augment.crop_scale = (0.08, 1.0)  # data.fit="crop": share of the area that a random part has, on the host
    config.augment.crop_ratio = (3 / 4, 4 / 3)  # and its width over its height
    config.augment.crop_shorter = ()  # instead: shorter side drawn between two numbers of pixels, then a square cut out
    config.augment.crop_padding = 0  # pixels of black on each side before a random crop back to size
    config.augment.shift = 0  # pixels of random shift, filled with the image's edge
    config.augment.flip = False  # left and right, with probability 1/2
    config.augment.flip_alternating = False  # or in every other epoch, in the first by a coin for each image
    config.augment.policy = ""  # autoaugment, autoaugment_cifar10, randaugment or trivialaugment; "": none
    config.augment.policy_count = 2  # randaugment: operations one after another
    config.augment.policy_magnitude = 9  # randaugment: 0 to 30
    config.augment.jitter = 0.0  # brightness, contrast and saturation by 1 +- this
    config.augment.light = 0.0  # AlexNet's colour noise; 0.1 in the paper
    config.augment.erasing = 0.0  # probability of a box of zeros
    config.augment.cutout_side = 0  # pixels of a square of zeros
    config.augment.mixup = 0.0  # alpha of mixup, 0.2 for example; with cutmix as well, a coin for each image decides
    config.augment.cutmix = 0.0  # alpha of cutmix, 1.0 for example
    config.augment.mix_group = 16  # partners are found among so many neighbours in the batch

    config.optim = ConfigDict()
    config.optim.name = "sgd"  # sgd, rmsprop, adamw, lamb or muon
    config.optim.learning_rate = 0.1  # at its peak, for reference_batch examples a step
    config.optim.reference_batch = 0  # the learning rate grows with batch_size over this; 0: it is as given
    config.optim.momentum = 0.9  # of sgd, rmsprop and muon; adamw's and lamb's first beta
    config.optim.nesterov = True  # sgd and muon
    config.optim.beta2 = 0.999  # decay of the mean square in all but sgd
    config.optim.epsilon = 1e-8  # all but sgd
    config.optim.adam_factor = 0.1  # muon: the learning rate of what is no matrix, over that of matrices
    config.optim.weight_decay = 0.0  # on kernels only: norms and biases are left alone
    config.optim.clip_norm = 0.0  # largest global norm of the gradient; 0: any
    config.optim.schedule = "cosine"  # constant, cosine, linear, steps or exponential
    config.optim.warmup_epochs = 0.0  # linear from 0 to the peak
    config.optim.warmup_steps = 0
    config.optim.end_factor = 0.0  # cosine and linear: the last learning rate over the peak
    config.optim.boundaries_epochs = ()  # steps: when the learning rate is multiplied by decay_factor
    config.optim.boundaries_steps = ()
    config.optim.decay_factor = 0.1  # steps and exponential
    config.optim.decay_epochs = 0.0  # exponential: once every so many
    config.optim.decay_steps = 0
    config.optim.decay_staircase = True  # exponential: in jumps; False: a little every step

    config.ema = ConfigDict()  # averages of parameters and batch statistics, evaluated beside the raw ones
    config.ema.decay = 0.0  # kept of the average each step; 0: no averages
    config.ema.warmup = True  # at most (1 + step) / (10 + step), so that the start is forgotten

    config.evaluate = ConfigDict()
    config.evaluate.every_epochs = 1.0  # each evaluation is followed by a checkpoint
    config.evaluate.batch_size = 512  # at most; a smaller test split is one batch
    config.evaluate.crops = 1  # views whose probabilities are averaged; 2: mirrored too; 10: corners and middle, mirrored too

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 0  # further checkpoints between evaluations; 0: none
    config.checkpoint.keep = 2  # newest ones that are kept beside the best; more for `evaluate --average`

    config.log = ConfigDict()
    config.log.every_steps = 50  # a training line, the mean over the steps since the last; one at every evaluation too
    config.log.tensorboard = False  # TensorBoard files as well; needs tensorboardX
    config.log.wandb = False  # Weights & Biases as well; needs wandb
    config.lock()  # a typo in a config file is an error, not a new key
    return choose(config, form, digits_epochs=24.0)


def choose(config: ConfigDict, arg: str, *, digits_epochs: float) -> ConfigDict:
    """The config as it is for no argument, or turned into its `:digits` or `:smoke` form."""
    if arg == "digits":
        digits(config, epochs=digits_epochs)
    elif arg == "smoke":
        smoke(config)
    elif arg:
        raise unknown("config argument", arg, ("digits", "smoke"))
    return config


def digits(config: ConfigDict, *, epochs: float) -> None:
    """Turns a config into training on the embedded digits at a size that two CPU cores manage in minutes."""
    config.update(
        {
            "batch_size": 64,
            "accumulate_steps": 1,
            "total_epochs": epochs,
            "total_steps": 0,
            "label_smoothing": 0.1,
            "model": {"num_classes": 10},
            "data": {"source": "digits", "resolution": 32, "fit": "resize", "mean": (), "std": ()} | ONE_RESOLUTION,
            "augment": AS_IT_IS | {"shift": 3},
            "optim": {
                "name": "adamw",
                "learning_rate": 2e-3,
                "reference_batch": 0,
                "momentum": 0.9,
                "beta2": 0.999,
                "epsilon": 1e-8,
                "weight_decay": 0.05,
                "clip_norm": 1.0,
                "schedule": "cosine",
                "warmup_epochs": 2.0,
                "warmup_steps": 0,
                "end_factor": 0.0,
            },
            "ema": {"decay": 0.0, "warmup": True},
            "evaluate": {"every_epochs": max(1.0, float(round(epochs / 8))), "batch_size": 512, "crops": 1},
            "checkpoint": {"every_steps": 0},
            "log": {"every_steps": 1437 // 64},  # once an epoch
        }
    )
    model = config.model
    if "norm_group" in model:
        model.norm_group = 0  # one group: 64 examples
        model.norm_momentum = 0.9  # the papers' 0.99 lags behind in a run this short
    if "initialization" in model:  # AlexNet
        config.data.resolution = 68  # its strides leave nothing of 66 pixels in the form of the paper
        model.hidden = 512  # 4096 are nearly all of its parameters
        # Its own biases of 1 outweigh what the images change in its last maps by 7,000 times (with torch's start: 14);
        # in the 528 steps of its :digits it did not begin to learn, with torch's start it had 98 % after 176.
        model.initialization = "torch"
    if "pooled" in model:  # VGG: one value a channel, as is usual for small images
        model.pooled = 1
        if model.batch_norm:
            model.hidden = 512
        # Without norms its 4096 units stay: the deviation of 0.01 with which linear layers start is made for as many. Three
        # layers of 512 pass on 1/250 of what they get, and VGG-19 did not begin to learn in 176 steps.
    if "whitening" in model:
        model.in_channels = 1  # three equal colours have directions without variance, whose rounding the norms would blow up
    if not model.get("batch_norm", "hidden" not in model):
        config.optim.learning_rate = 5e-4  # without batch norm the other one is too much


def smoke(config: ConfigDict) -> None:
    """Shrinks network, images, batch and duration to seconds; the recipe stays what it is."""
    repeats = 1 << (config.augment.repeats.bit_length() - 1)  # a power of two, as the batch and the devices
    config.update(
        {
            "batch_size": 16,
            "total_epochs": 1.0,
            "total_steps": 0,
            "model": {"num_classes": 10},
            "data": {"source": "fake:n=64,size=32,channels=3,classes=10", "resolution": 32, "fit": "resize"},
            "augment": {"mix_group": 2, "repeats": repeats},  # for up to 8 devices
            "optim": {"warmup_epochs": min(0.5, config.optim.warmup_epochs), "warmup_steps": min(2, config.optim.warmup_steps)},
            "evaluate": {"every_epochs": 0.5, "crops": min(config.evaluate.crops, 2)},
        }
    )
    sides = (40, 32)[: len(config.data.train_resolutions)]
    config.data.update({"train_resolutions": sides, "train_boundaries_epochs": (0.5,)[: len(sides) - 1]})
    model = config.model
    if "norm_group" in model:
        model.norm_group = 0
    if "stages" in model:  # EfficientNet: both kernels, both strides
        model.update({"width": 0.25, "depth": 0.5, "stages": model.stages[:3]})
    elif "stage_sizes" in model:
        model.update({"width": 0.25, "stage_sizes": (1, 1)})
    elif "modules" in model:  # GoogLeNet: with its first auxiliary classifier
        model.update({"width": 0.25, "modules": tuple(row for row in model.modules if row[0] == "4a")})
    elif "whitening" in model:
        model.width = 0.25
    if "hidden" in model:  # AlexNet and VGG
        model.update({"width": 0.25, "hidden": 256})
    if "hidden" in model and "filters" in model:  # AlexNet: its strides leave nothing of 66 pixels in the form of the paper
        config.data.update({"source": "fake:n=64,size=68,channels=3,classes=10", "resolution": 68})
