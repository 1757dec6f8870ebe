"""RevNet-164 on CIFAR-100, by the RevNet authors' recipe: 80,000 steps of 100 images.

Command:   python train.py --config configs/cifar100_revnet164.py
Hardware:  not run yet
Time:      not run yet
Accuracy:  not run yet
n:         0
"""

from ml_collections import ConfigDict

from configs.cifar import recipe


def get_config() -> ConfigDict:
    """Return the recipe of configs/cifar.py for this network and data set."""
    return recipe("cifar100", "revnet164")
