"""The RevNet authors' CIFAR recipe, which every cifar*.py of this folder trains by.

Source: renmengye/revnet-public, the code of Gomez et al. 2017; see also MemCNN, which re-ran it.
Training is theirs; evaluation is by precise BN, see revjax/training/evaluation.py.
"""

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder


def recipe(dataset: str, model_name: str) -> ConfigDict:
    """Return the config that trains one of the authors' networks on one of the CIFAR sets.

    Args:
        dataset: "cifar10" or "cifar100".
        model_name: one of `revjax.list_models()` made for 32x32 images.
    """
    config = ConfigDict()

    config.data = data = ConfigDict()
    data.name = dataset
    data.dir = placeholder(str)  # of the prepared data; None: tfds's own
    data.source = placeholder(str)  # the official files on disk; None: download them
    data.padding = 2
    data.flip = True

    config.model = model = ConfigDict()
    model.name = model_name
    model.dtype = "float32"  # or "bfloat16"
    if model_name.startswith("revnet"):
        model.backward = "reversible"  # or "remat", "store"
        model.grid_bits = FieldReference(14, field_type=object)  # or None: plain float
    else:
        model.backward = "store"  # or "remat"

    config.optim = optim = ConfigDict()
    optim.learning_rate = 0.1
    optim.boundaries = (40_000, 60_000)  # absolute: a shorter run does not move them
    optim.decay_factor = 0.1
    optim.momentum = 0.9
    optim.weight_decay = 2e-4

    config.seed = 0
    config.steps = 80_000
    config.batch_size = 100

    config.log_every = 100
    config.eval_every = 1_000
    config.precise_bn_batches = 50  # statistics for an evaluation; 0: the running averages
    config.checkpoint_every = 1_000
    config.keep_checkpoints = 3
    return config
