"""A small reversible Vision Transformer on the 1,797 digit scans inside scikit-learn: no download.

Command:   python train.py --config configs/digits_revvit.py
Hardware:  2-core CPU, JAX 0.10.2
Time:      364 s, beside other work that held both cores; 218 s of processor time
Accuracy:  97.78% on the held-out fifth, seed 0
n:         1
"""

from ml_collections import ConfigDict, FieldReference


def get_config() -> ConfigDict:
    """Six blocks on the 16 patches of 2x2 pixels of an 8x8 image."""
    config = ConfigDict()

    config.data = data = ConfigDict()
    data.name = "digits"
    data.normalize = "channels"
    data.padding = 1
    data.flip = False  # a mirrored digit is no digit

    config.model = model = ConfigDict()
    model.name = "revvit"
    model.depth = 6
    model.width = 64  # of each half
    model.heads = 4
    model.patch = 2
    model.backward = "reversible"  # or "remat", "store"
    model.grid_bits = FieldReference(14, field_type=object)  # or None: plain float
    model.dtype = "float32"  # or "bfloat16"

    config.optim = optim = ConfigDict()
    optim.name = "adamw"
    optim.learning_rate = 2e-3
    optim.boundaries = (1_000, 1_300)
    optim.decay_factor = 0.1
    optim.momentum = 0.9
    optim.weight_decay = 0.05
    optim.warmup_steps = 50
    optim.warmup_rate = 2e-4

    config.seed = 0
    config.steps = 1_500
    config.batch_size = 100

    config.log_every = 50
    config.eval_every = 100
    config.precise_bn_batches = 0  # there is no BatchNorm
    config.checkpoint_every = 500
    config.keep_checkpoints = 3
    return config
