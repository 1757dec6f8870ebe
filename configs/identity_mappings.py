"""The CIFAR tables of He et al. 2016 (arXiv:1603.05027), a row a config.

Command:   python train.py --config configs/identity_mappings.py:ROW
Hardware:  not run yet
Time:      not run yet
Accuracy:  not run yet
n:         0

The rows, with the test error that the paper reports, in percent (n: median of five runs):

    shortcut_identity                   6.61   table 1, ResNet-110, original placement
    shortcut_constant_0_1               fails (over 20), as all that are said to fail
    shortcut_constant_0.5_1             fails
    shortcut_constant_0.5_0.5          12.35
    exclusive_gating_0 .. _-5           fails
    exclusive_gating_-6                 8.70
    exclusive_gating_-7                 9.81
    shortcut_only_gating_0             12.86
    shortcut_only_gating_-6             6.91
    shortcut_convolution               12.22
    shortcut_dropout                    fails
    resnet110_original                  6.61   table 2, where BatchNorm and ReLU stand
    resnet110_bn_after_addition         8.17
    resnet110_relu_before_addition      7.84
    resnet110_relu_only_preactivation   6.71
    resnet110_full_preactivation        6.37
    resnet164_original                  5.93
    resnet164_bn_after_addition         6.50
    resnet164_relu_before_addition      6.14
    resnet164_relu_only_preactivation   5.91
    resnet164_full_preactivation        5.46
    resnet1001_original                 7.61   table 3
    resnet1001_full_preactivation       4.92
    resnet1001_batch64                  4.62   the same, by the authors' released code
    cifar100_resnet164_original         -      in the paper; its figure was not at hand
    cifar100_resnet164_full_preactivation -    the same
    cifar100_resnet1001_original       27.82
    cifar100_resnet1001_full_preactivation 22.71

The recipe is the paper's appendix, and where it is silent the released code
(KaimingHe/resnet-1k-layers on fb.resnet.torch): Nesterov's momentum, decay of all parameters.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

PLACEMENTS = (
    "original",
    "bn_after_addition",
    "relu_before_addition",
    "relu_only_preactivation",
    "full_preactivation",
)
SHORTCUTS: dict[str, dict[str, Any]] = {
    "shortcut_identity": dict(kind="identity"),
    "shortcut_constant_0_1": dict(kind="constant_scaling", scale=0.0, branch_scale=1.0),
    "shortcut_constant_0.5_1": dict(kind="constant_scaling", scale=0.5, branch_scale=1.0),
    "shortcut_constant_0.5_0.5": dict(kind="constant_scaling", scale=0.5, branch_scale=0.5),
    **{
        f"exclusive_gating_{b}": dict(kind="exclusive_gating", gate_bias=float(b))
        for b in (0, -1, -2, -3, -4, -5, -6, -7)
    },
    **{
        f"shortcut_only_gating_{b}": dict(kind="shortcut_only_gating", gate_bias=float(b))
        for b in (0, -6)
    },
    "shortcut_convolution": dict(kind="convolution"),
    "shortcut_dropout": dict(kind="dropout", rate=0.5),
}
DEEP = {"110": "preact_resnet110", "164": "preact_resnet164", "1001": "resnet1001"}
ROWS: dict[str, dict[str, Any]] = {
    **{
        name: dict(depth="110", placement="original", shortcut=how)
        for name, how in SHORTCUTS.items()
    },
    **{
        f"resnet{depth}_{placement}": dict(depth=depth, placement=placement)
        for depth in ("110", "164")
        for placement in PLACEMENTS
    },
    **{
        f"{prefix}resnet{depth}_{placement}": dict(depth=depth, placement=placement, data=data)
        for prefix, data, depth in (
            ("", "cifar10", "1001"),
            ("cifar100_", "cifar100", "164"),
            ("cifar100_", "cifar100", "1001"),
        )
        for placement in ("original", "full_preactivation")
    },
    "resnet1001_batch64": dict(depth="1001", batch_size=64, released=True),
}


def get_config(row: str = "") -> ConfigDict:
    """Return the config of a row of the tables."""
    if row not in ROWS:
        raise ValueError(
            f"there is no row {row!r}: name one as in --config configs/identity_mappings.py:ROW, "
            f"of {', '.join(ROWS)}"
        )
    return recipe(**ROWS[row])


def recipe(
    depth: str,
    placement: str = "full_preactivation",
    shortcut: dict[str, Any] | None = None,
    data: str = "cifar10",
    batch_size: int = 128,
    released: bool = False,
) -> ConfigDict:
    """He et al.'s recipe for one of their networks: the paper's, or that of their released code."""
    epoch = 50_000 // batch_size
    config = ConfigDict()

    config.data = ConfigDict()
    config.data.name = data
    config.data.dir = placeholder(str)  # of the prepared data; None: tfds's own
    config.data.source = placeholder(str)  # the official files on disk; None: download them
    config.data.normalize = "channels"
    config.data.padding = 4
    config.data.flip = True

    config.model = model = ConfigDict()
    model.name = DEEP[depth]
    model.placement = placement
    model.shortcut = ConfigDict(shortcut or dict(kind="identity"))
    model.backward = "store"  # or "remat"
    model.dtype = "float32"  # or "bfloat16"

    config.optim = optim = ConfigDict()
    optim.learning_rate = 0.1
    optim.boundaries = (32_000, 48_000)
    optim.decay_factor = 0.1
    optim.momentum = 0.9
    optim.nesterov = True
    optim.weight_decay = 1e-4
    optim.decay = "all"

    config.seed = 0
    config.steps = 64_000
    config.batch_size = batch_size
    if released:  # 200 epochs, a tenth of the rate from epochs 81 and 122 on, and no warm-up
        config.steps = 200 * epoch
        optim.boundaries = (80 * epoch, 121 * epoch)
    else:
        optim.warmup_steps = 400
        optim.warmup_rate = 0.01

    config.log_every = 100
    config.eval_every = 1_000
    config.precise_bn_batches = 0  # evaluate by the running averages
    config.checkpoint_every = 1_000
    config.keep_checkpoints = 3
    return config
