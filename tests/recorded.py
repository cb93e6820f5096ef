"""Training steps with every random choice on, which record their choices; for several processes a script.

recorded.py FILE.npz FORM GROUP MICRO_BATCHES...    # the first process writes the choices of all steps, and the parameters
"""

import functools
import sys

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from cnnfamily import config as configs
from cnnfamily import parallel, processes
from cnnfamily.data import feed
from cnnfamily.models import build, initialize
from cnnfamily.step import Objective, create_state, train_step


def all_choices_on(form: str, group: int, micro_batches: int):
    """EfficientNet in small with dropout, stochastic depth, augmentation, mixing, smoothing and averages, in float64."""
    overrides = {
        "batch_size": 32,
        "accumulate_steps": micro_batches,
        "label_smoothing": 0.1,
        "augment.crop_padding": 2,
        "augment.shift": 2,
        "augment.flip": True,
        "augment.mixup": 0.4,
        "augment.cutmix": 1.0,
        "augment.mix_group": 4,
        "model.dtype": "float64",
        "model.norm_group": group,
        "model.stem_filters": 16,
        "model.stages": ((1, 16, 1, 1, 3),),  # one residual block; what else is in one compiles, and draws nothing
        "model.se_ratio": 0.0,
        "model.head_filters": 32,
        "model.stochastic_depth": 0.5,
        "model.stochastic_depth_form": form,
        "model.stochastic_depth_schedule": "l/L",
        "model.stochastic_depth_group": 4,
    }
    return configs.load_config("configs/efficientnet_b0.py:digits", overrides)


@functools.cache
def digits():
    return feed.load_data(all_choices_on("none", 0, 1))


@functools.cache
def small_network(form: str, group: int):
    """The network and its first variables, which depend on neither devices nor micro-batches."""
    network = build(all_choices_on(form, group, 1).model)
    return network, initialize(network, jax.random.key(1))


def twenty_steps(form: str, group: int, mesh: Mesh, micro_batches: int):
    """The state after 20 steps of SGD, and what each step recorded of its choices and its loss."""
    config, optimizer = all_choices_on(form, group, micro_batches), optax.sgd(0.05, momentum=0.9)
    train = feed.TrainFeed(digits(), config, mesh)
    network, variables = small_network(form, group)
    state = create_state(variables, optimizer, ema=True)
    objective = Objective(network.clone(axis_name="data"), train.view(32), 3, train.mix, label_smoothing=0.1)
    step = functools.partial(train_step, objective=objective, optimizer=optimizer, ema_decay=0.9, record=True)
    update = parallel.map_over_devices(step, mesh, batch_axis=1, outputs=2)
    state, recorded = parallel.replicate(state, mesh), []
    for step in range(20):
        state, metrics = update(state, train.batch(step), train.store)
        recorded.append(jax.device_get(metrics))
    shards = jax.tree.map(lambda x: [np.asarray(shard.data) for shard in x.addressable_shards], state.batch_stats)
    return jax.device_get(state), recorded, shards


def flat(state, steps) -> dict[str, np.ndarray]:
    """Choices by step and name, losses and parameters by name, in one dictionary."""
    found = {}
    for i, step in enumerate(steps):
        for path, choice in jax.tree_util.tree_leaves_with_path(step["choices"]):
            found[f"choice {i}{jax.tree_util.keystr(path)}"] = np.asarray(choice)
    for path, value in jax.tree_util.tree_leaves_with_path(state):
        found[f"state{jax.tree_util.keystr(path)}"] = np.asarray(value)
    return found


if __name__ == "__main__":
    file, form, group, *numbers = sys.argv[1:]
    with processes.session(), jax.enable_x64(True):
        found = {}
        for number in numbers:
            state, steps, _ = twenty_steps(form, int(group), parallel.data_mesh(), int(number))
            found |= {f"{number} {name}": value for name, value in flat(state, steps).items()}
        if jax.process_index() == 0:
            np.savez(file, **found)
