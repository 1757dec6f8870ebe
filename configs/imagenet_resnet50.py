"""ResNet-50 on ImageNet, by the RevNet authors' recipe: 600,000 steps of 256 images.

Command:   python train.py --config configs/imagenet_resnet50.py
Hardware:  not run yet
Time:      not run yet
Accuracy:  not run yet
n:         0
"""

from ml_collections import ConfigDict

from configs.imagenet import recipe


def get_config() -> ConfigDict:
    """Return the recipe of configs/imagenet.py for this network."""
    return recipe("resnet50")
