"""The RevNet authors' ImageNet recipe, which every imagenet_*.py of this folder trains by.

Source: renmengye/revnet-public, the code of Gomez et al. 2017: schedule, weight decay, colours and
scale. It crops 5% to 100% of the area and resizes in one of four ways; here it is 8% to 100% and
bilinear. It evaluates the middle 7/8 of both sides, squeezed to a square; here the shorter side
becomes 256 and the middle 224 is seen.
"""

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder


def recipe(model_name: str) -> ConfigDict:
    """Return the config that trains one of the authors' networks for 224x224 images.

    Args:
        model_name: one of `revjax.list_models()` made for such images.
    """
    config = ConfigDict()

    config.data = data = ConfigDict()
    data.name = "imagenet2012"
    data.dir = placeholder(str)  # of the prepared data; None: tfds's own
    data.source = placeholder(str)  # or a folder of images, DIR/train/CLASS/*.JPEG and DIR/val/...
    data.normalize = "minus_one_to_one"
    data.image_size = 224
    data.flip = True
    data.color = True
    data.workers = 0  # processes that decode; 0: threads

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
    optim.boundaries = (160_000, 320_000, 480_000)  # absolute: a shorter run does not move them
    optim.decay_factor = 0.1
    optim.momentum = 0.9
    optim.weight_decay = 1e-4

    config.seed = 0
    config.steps = 600_000
    config.batch_size = 256

    config.log_every = 100
    config.eval_every = 5_000
    config.precise_bn_batches = 50  # statistics for an evaluation; 0: the running averages
    config.checkpoint_every = 5_000
    config.keep_checkpoints = 3
    return config
