"""RevNet-38 on CIFAR-10, by the RevNet authors' recipe: 80,000 steps of 100 images.

Command:   python train.py --config configs/cifar10_revnet38.py
Hardware:  not run to its end yet; the first 500 steps on a 2-core CPU, JAX 0.10.2
Time:      1,389 s for those, beside other work; 1,177 s in bfloat16
Accuracy:  62.57% after 500 steps; 63.08% in bfloat16
n:         0 whole runs
"""

from ml_collections import ConfigDict

from configs.cifar import recipe


def get_config() -> ConfigDict:
    """Return the recipe of configs/cifar.py for this network and data set."""
    return recipe("cifar10", "revnet38")
