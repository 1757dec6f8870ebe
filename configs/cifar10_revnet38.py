"""RevNet-38 on CIFAR-10, by the RevNet authors' recipe: 80,000 steps of 100 images.

Command:   python train.py --config configs/cifar10_revnet38.py
Hardware:  not run to its end yet; the first 500 steps, an epoch, on one core of a CPU, JAX 0.10.2
Time:      1,018 s for those, beside other work
Accuracy:  63.28% after 500 steps
n:         0 whole runs
"""

from ml_collections import ConfigDict

from configs.cifar import recipe


def get_config() -> ConfigDict:
    """Return the recipe of configs/cifar.py for this network and data set."""
    return recipe("cifar10", "revnet38")
