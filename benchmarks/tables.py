"""The papers' tables of test errors, each row a config of configs/ with what was published for it.

Sources: `revnet_cifar` is the re-run of the RevNet authors' code that MemCNN's README reports (100
less its accuracies); the others are the papers' own, those of He et al. medians of five runs.
`cifar_epoch` and `digits` have nothing published: the first has too few steps for that, the second
holds the ways to the gradient of one small network against each other.
"""

import importlib.util
from typing import Any, NamedTuple

from record import ROOT


class Row(NamedTuple):
    """A row of a table."""

    config: str  # as train.py's --config takes it
    published: float | str | None  # test error, %; or in words; None: it was not
    flags: tuple[str, ...] = ()  # overrides of the config


REVNET = {  # CIFAR-10, CIFAR-100
    "revnet38": (6.86, 28.83),
    "resnet32": (7.26, 30.90),
    "revnet110": (5.98, 26.00),
    "resnet110": (6.01, 26.70),
    "revnet164": (5.44, 23.61),
    "resnet164": (5.43, 23.21),
}
PAIRS = (("revnet38", "resnet32"), ("revnet110", "resnet110"), ("revnet164", "resnet164"))
FAILS = "fails (over 20)"


def revnet_cifar() -> dict[str, Row]:
    """The pairs of Gomez et al. 2017, smallest first, on CIFAR-10 and then on CIFAR-100."""
    order = [*((0, pair) for pair in PAIRS[:2]), *((1, pair) for pair in PAIRS[:2])]
    order += [(0, PAIRS[2]), (1, PAIRS[2])]
    rows = {}
    for which, pair in order:
        data = ("cifar10", "cifar100")[which]
        for network in pair:
            name = f"{data}_{network}"
            rows[name] = Row(f"configs/{name}.py", REVNET[network][which])
    return rows


def identity_mappings() -> dict[str, Row]:
    """He et al. 2016, tables 1 to 3."""
    gates = {"exclusive_gating_-6": 8.70, "exclusive_gating_-7": 9.81}
    published: dict[str, float | str] = {
        "shortcut_identity": 6.61,
        "shortcut_constant_0.5_0.5": 12.35,
        **gates,
        "shortcut_only_gating_0": 12.86,
        "shortcut_only_gating_-6": 6.91,
        "shortcut_convolution": 12.22,
        "resnet110_original": 6.61,
        "resnet110_bn_after_addition": 8.17,
        "resnet110_relu_before_addition": 7.84,
        "resnet110_relu_only_preactivation": 6.71,
        "resnet110_full_preactivation": 6.37,
        "resnet164_original": 5.93,
        "resnet164_bn_after_addition": 6.50,
        "resnet164_relu_before_addition": 6.14,
        "resnet164_relu_only_preactivation": 5.91,
        "resnet164_full_preactivation": 5.46,
        "resnet1001_original": 7.61,
        "resnet1001_full_preactivation": 4.92,
        "resnet1001_batch64": 4.62,
        "cifar100_resnet164_full_preactivation": 24.33,
        "cifar100_resnet1001_original": 27.82,
        "cifar100_resnet1001_full_preactivation": 22.71,
    }
    fail = ("shortcut_constant_0_1", "shortcut_constant_0.5_1", "shortcut_dropout")
    fail += tuple(f"exclusive_gating_{bias}" for bias in (0, -1, -2, -3, -4, -5))
    published |= dict.fromkeys(fail, FAILS)
    return _of_file("identity_mappings", published)


def stochastic_depth() -> dict[str, Row]:
    """Huang et al. 2016, table 1, and their 1202 layers."""
    published: dict[str, float | str] = {
        "cifar10_resnet110_constant": 6.41,
        "cifar10_resnet110": 5.25,
        "cifar100_resnet110_constant": 27.76,
        "cifar100_resnet110": 24.98,
        "svhn_resnet152_constant": 1.80,
        "svhn_resnet152": 1.75,
        "cifar10_resnet1202_constant": 6.67,
        "cifar10_resnet1202": 4.91,
    }
    return _of_file("stochastic_depth", published)


def cifar_epoch() -> dict[str, Row]:
    """One epoch, 500 steps of 100 images, of the smallest pair of Gomez et al. 2017."""
    flags = ("--config.steps=500", "--config.eval_every=500", "--config.checkpoint_every=100")
    return {
        f"cifar10_{network}": Row(f"configs/cifar10_{network}.py", None, flags)
        for network in PAIRS[0]
    }


def digits() -> dict[str, Row]:
    """One small network by every way to its gradient: 300 steps on scans of digits, no download."""
    short = ("--config.steps=300", "--config.optim.boundaries=(180,255)")
    rows = {}
    for dtype in ("float32", "bfloat16"):
        flags = (*short, f"--config.model.dtype={dtype}")
        for backward in ("store", "remat"):
            rows[f"resnet_{backward}_{dtype}"] = Row(
                "configs/digits_resnet.py:full_preactivation",
                None,
                (*flags, f"--config.model.backward={backward}"),
            )
        for backward in ("reversible", "remat", "store"):
            for stream, bits in (("grid", 14), ("float", None)):
                rows[f"revnet_{backward}_{stream}_{dtype}"] = Row(
                    "configs/digits_resnet.py:revnet",
                    None,
                    (
                        *flags,
                        f"--config.model.backward={backward}",
                        f"--config.model.grid_bits={bits}",
                    ),
                )
    return rows


def _of_file(file: str, published: dict[str, float | str]) -> dict[str, Row]:
    """All rows of a config file that has several."""
    path = ROOT / "configs" / f"{file}.py"
    spec: Any = importlib.util.spec_from_file_location(file, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    missing = published.keys() - module.ROWS.keys()
    assert not missing, missing
    return {name: Row(f"configs/{file}.py:{name}", published.get(name)) for name in module.ROWS}


TABLES = {
    "revnet_cifar": revnet_cifar,
    "identity_mappings": identity_mappings,
    "stochastic_depth": stochastic_depth,
    "cifar_epoch": cifar_epoch,
    "digits": digits,
}
