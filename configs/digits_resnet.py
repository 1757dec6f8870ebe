"""Every form of residual unit on the 1,797 digit scans inside scikit-learn: no download.

Command:   python train.py --config configs/digits_resnet.py:VARIANT
Hardware:  2-core CPU, JAX 0.10.2
Time:      about a minute each, compilation included, beside other work
Accuracy:  94.72% (dropout) to 98.33% on the held-out fifth, seed 0
n:         1

Without :VARIANT it is full_preactivation. docs/papers.md has the accuracy of each, which
benchmarks/variants.py measures.
"""

from typing import Any

from ml_collections import ConfigDict, FieldReference

ROWS: dict[str, dict[str, Any]] = {
    # He et al. 2016, figure 4
    "original": dict(placement="original"),
    "bn_after_addition": dict(placement="bn_after_addition"),
    "relu_before_addition": dict(placement="relu_before_addition"),
    "relu_only_preactivation": dict(placement="relu_only_preactivation"),
    "full_preactivation": dict(placement="full_preactivation"),
    # He et al. 2016, figure 2
    "constant_scaling": dict(
        placement="original", shortcut=dict(kind="constant_scaling", scale=0.5, branch_scale=0.5)
    ),
    "exclusive_gating": dict(
        placement="original", shortcut=dict(kind="exclusive_gating", gate_bias=0.0)
    ),
    "shortcut_only_gating": dict(
        placement="original", shortcut=dict(kind="shortcut_only_gating", gate_bias=-6.0)
    ),
    "convolution": dict(placement="original", shortcut=dict(kind="convolution")),
    "dropout": dict(placement="original", shortcut=dict(kind="dropout", rate=0.5)),
    # Huang et al. 2016, and what came of it
    "stochastic_depth": dict(placement="original", stochastic_depth=dict(p_last=0.5)),
    "uniform_stochastic_depth": dict(
        placement="original", stochastic_depth=dict(p_last=0.8, mode="uniform")
    ),
    "drop_path": dict(
        placement="full_preactivation", stochastic_depth=dict(p_last=0.5, granularity="sample")
    ),
    "revnet": dict(name="revnet"),
    "revnet_stochastic_depth": dict(name="revnet", stochastic_depth=dict(p_last=0.5)),
    "revnet_drop_path": dict(
        name="revnet", stochastic_depth=dict(p_last=0.5, granularity="sample")
    ),
}


def get_config(variant: str = "full_preactivation") -> ConfigDict:
    """Return the config of a small network of that variant, trained for 100 steps or 200."""
    if variant not in ROWS:
        raise ValueError(f"there is no variant {variant!r}: name one of {', '.join(ROWS)}")
    chosen = ROWS[variant]
    config = ConfigDict()

    config.data = data = ConfigDict()
    data.name = "digits"
    data.padding = 1
    data.flip = False  # a mirrored digit is no digit

    config.model = model = ConfigDict(chosen)
    if "name" in chosen:
        model.units = (2, 2, 2)
        model.backward = "reversible"  # or "remat", "store"
        model.grid_bits = FieldReference(14, field_type=object)  # or None: plain float
    else:
        model.name = "resnet"
        model.units = (2, 2, 2)
        model.backward = "store"  # or "remat"
        model.conventions = "identity_mappings"
    model.filters = (16, 16, 32, 64)  # the stem's, then each stage's
    model.bottleneck = False
    model.dtype = "float32"  # or "bfloat16"

    config.optim = optim = ConfigDict()
    optim.learning_rate = 0.1
    # Gates let less through, at first or always.
    gated = variant == "exclusive_gating" or "stochastic_depth" in chosen
    config.steps = steps = 200 if gated else 100
    optim.boundaries = (60 * steps // 100, 85 * steps // 100)
    optim.decay_factor = 0.1
    optim.momentum = 0.9
    optim.weight_decay = 1e-3
    optim.warmup_steps = 10
    optim.warmup_rate = 0.01

    config.seed = 0
    config.batch_size = 100

    config.log_every = 10
    config.eval_every = 50
    config.precise_bn_batches = 10  # statistics for an evaluation; 0: the running averages
    config.checkpoint_every = 100
    config.keep_checkpoints = 1
    return config
