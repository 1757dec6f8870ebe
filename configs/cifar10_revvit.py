"""A reversible Vision Transformer on CIFAR-10: 12 blocks on 64 patches of 4x4 pixels.

Command:   python train.py --config configs/cifar10_revvit.py
Hardware:  not run to its end yet; the first 20 steps on a 2-core CPU, JAX 0.10.2
Time:      not run to its end yet
Accuracy:  not run to its end yet; training loss 2.45 after 10 steps, 2.18 after 20
n:         0 whole runs

There is no published recipe for this size: it is AdamW with the decay and the drop path of Mangalam
et al. 2022's smallest network for ImageNet, at a constant rate that drops twice.
"""

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """200 epochs of 390 steps of 128 images."""
    config = ConfigDict()

    config.data = data = ConfigDict()
    data.name = "cifar10"
    data.dir = placeholder(str)  # of the prepared data; None: tfds's own
    data.source = placeholder(str)  # the official files on disk; None: download them
    data.normalize = "channels"
    data.padding = 4
    data.flip = True

    config.model = model = ConfigDict()
    model.name = "revvit"
    model.depth = 12
    model.width = 192  # of each half
    model.heads = 6
    model.patch = 4
    model.backward = "reversible"  # or "remat", "store"
    model.grid_bits = FieldReference(14, field_type=object)  # or None: plain float
    model.dtype = "float32"  # or "bfloat16"
    model.stochastic_depth = ConfigDict()
    model.stochastic_depth.p_last = 0.9
    model.stochastic_depth.mode = "linear"
    model.stochastic_depth.granularity = "sample"  # drop path

    config.seed = 0
    config.batch_size = 128
    epoch = 50_000 // config.batch_size
    config.steps = 200 * epoch

    config.optim = optim = ConfigDict()
    optim.name = "adamw"
    optim.learning_rate = 1e-3
    optim.boundaries = (120 * epoch, 170 * epoch)
    optim.decay_factor = 0.1
    optim.momentum = 0.9
    optim.weight_decay = 0.05
    optim.warmup_steps = 5 * epoch
    optim.warmup_rate = 1e-4

    config.log_every = 100
    config.eval_every = epoch
    config.precise_bn_batches = 0  # there is no BatchNorm
    config.checkpoint_every = 1_000
    config.keep_checkpoints = 3
    return config
