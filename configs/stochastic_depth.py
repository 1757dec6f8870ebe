"""The experiments of Huang et al. 2016 (arXiv:1603.09382), a row a config.

Command:   python train.py --config configs/stochastic_depth.py:ROW
Hardware:  not run yet
Time:      not run yet
Accuracy:  not run yet
n:         0

The rows, with the test error that the paper reports at the best validation epoch, in percent:

    cifar10_resnet110_constant   6.41   |  cifar10_resnet110    5.25
    cifar100_resnet110_constant 27.76   |  cifar100_resnet110  24.98
    cifar10_resnet1202_constant  6.67   |  cifar10_resnet1202   4.91
    svhn_resnet152_constant      1.80   |  svhn_resnet152       1.75
    cifar10_revnet110, cifar100_revnet110: not in the paper: its gates in a reversible network

Survival falls linearly to 0.5 (`--config.model.stochastic_depth.p_last=0.2` sets another). The
recipe is the authors' code (yueatsprograms/Stochastic_Depth); an epoch here leaves out the last,
smaller batch, and the rate falls after 250 and 375 epochs. summary.json has the error at the best
validation step beside the last.
"""

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder

NETWORKS = {"resnet110": (18, 18, 18), "resnet152": (25, 25, 25), "resnet1202": (200, 200, 200)}
ROWS = {
    f"{data}_{network}{depth}": (data, network, depth == "")
    for data, network in (
        ("cifar10", "resnet110"),
        ("cifar100", "resnet110"),
        ("cifar10", "resnet1202"),
        ("svhn", "resnet152"),
        ("cifar10", "revnet110"),
        ("cifar100", "revnet110"),
    )
    for depth in ("_constant", "")
    if network != "revnet110" or depth == ""
}


def get_config(row: str = "") -> ConfigDict:
    """Return the config of a row."""
    if row not in ROWS:
        raise ValueError(
            f"there is no row {row!r}: name one as in --config configs/stochastic_depth.py:ROW, "
            f"of {', '.join(ROWS)}"
        )
    return recipe(*ROWS[row])


def recipe(data: str, network: str, stochastic: bool) -> ConfigDict:
    """Huang et al.'s recipe for one of their networks, or for a RevNet."""
    svhn = data == "svhn"
    config = ConfigDict()

    config.data = ConfigDict()
    config.data.name = "svhn_cropped+extra" if svhn else data
    config.data.dir = placeholder(str)  # of the prepared data; None: tfds's own
    config.data.source = placeholder(str)  # the official files on disk; None: download them
    config.data.validation = 6_000 if svhn else 5_000
    config.data.normalize = "mean_image_std"
    config.data.padding = 0 if svhn else 4
    config.data.flip = not svhn

    config.model = model = ConfigDict()
    if network in NETWORKS:
        model.name = "resnet"
        model.units = NETWORKS[network]
        model.filters = (16, 16, 32, 64)
        model.bottleneck = False
        model.placement = "original"
        model.conventions = "stochastic_depth"
        model.backward = "store"  # or "remat"
    else:
        model.name = network
        model.backward = "reversible"  # or "remat", "store"
        model.grid_bits = FieldReference(14, field_type=object)  # or None: plain float
    model.dtype = "float32"  # or "bfloat16"
    if stochastic:
        model.stochastic_depth = ConfigDict()
        model.stochastic_depth.p_last = 0.5
        model.stochastic_depth.mode = "linear"  # or "uniform"
        model.stochastic_depth.granularity = "batch"  # or "sample"

    config.seed = 0
    config.batch_size = 128
    epoch = ((604_388 - 6_000) if svhn else 45_000) // config.batch_size
    config.steps = (50 if svhn else 500) * epoch

    config.optim = optim = ConfigDict()
    optim.learning_rate = 0.1
    optim.boundaries = (30 * epoch, 35 * epoch) if svhn else (250 * epoch, 375 * epoch)
    optim.decay_factor = 0.1
    optim.momentum = 0.9
    optim.nesterov = True
    optim.weight_decay = 1e-4
    optim.decay = "all"
    if network == "resnet1202":
        optim.warmup_steps = 10 * epoch
        optim.warmup_rate = 0.01

    config.log_every = 100
    config.eval_every = 200 if svhn else epoch
    config.precise_bn_batches = 0  # evaluate by the running averages
    config.checkpoint_every = 1_000
    config.keep_checkpoints = 3
    return config
