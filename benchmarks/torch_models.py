"""The benchmarks' chain of reversible blocks, and RevNets, in PyTorch and by MemCNN.

A way is "plain", "checkpoint" (a block or unit each, and a network's stem) or "memcnn". The halves
of the stream are two tensors, as in revjax, but for MemCNN, whose blocks take and give them joined.
"""

# PyTorch is in the extra "bench" alone.
# pyright: reportMissingImports=false

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode


def norm_relu(channels: int) -> tuple[nn.Module, nn.Module]:
    return nn.BatchNorm2d(channels, eps=1e-3), nn.ReLU()


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Module:
    """Of stride 2 it pads other sides than revjax does, which changes no shape and no time."""
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    nn.init.normal_(conv.weight, std=(2 / (size**2 * outputs)) ** 0.5)
    return conv


def residual(
    inputs: int, outputs: int, stride: int = 1, *, bottleneck=False, preactivate=True
) -> nn.Module:
    """BN-ReLU-conv3x3-BN-ReLU-conv3x3, or the bottleneck's 1x1, 3x3, 1x1: revjax.residual."""
    middle = outputs // 4 if bottleneck else outputs
    channels = [inputs, middle, middle, outputs] if bottleneck else [inputs, middle, outputs]
    sizes = [1, 3, 1] if bottleneck else [3, 3]
    layers: list[nn.Module] = []
    for i, size in enumerate(sizes):
        if i or preactivate:
            layers += norm_relu(channels[i])
        layers.append(conv(channels[i], channels[i + 1], size, 1 if i else stride))
    return nn.Sequential(*layers)


class Block(nn.Module):
    """`y1 = x1 + F(x2)`, `y2 = x2 + G(y1)`, each half `[B, channels, H, W]`."""

    def __init__(self, f: nn.Module, g: nn.Module):
        super().__init__()
        self.f, self.g = f, g

    def forward(self, x1: Any, x2: Any) -> Any:
        y1 = x1 + self.f(x2)
        return y1, x2 + self.g(y1)


class Transition(Block):
    """A unit that changes shape: its shortcuts pool and pad, or project."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, preactivate: bool, **kind: Any):
        f = residual(inputs, outputs, stride, preactivate=preactivate, **kind)
        super().__init__(f, residual(outputs, outputs, **kind))
        self.shortcut1, self.shortcut2 = (
            conv(inputs, outputs, 1, stride)
            if kind["bottleneck"]
            else nn.Sequential(
                nn.AvgPool2d(stride),
                nn.ZeroPad3d((0, 0, 0, 0, (outputs - inputs) // 2, (outputs - inputs + 1) // 2)),
            )
            for _ in range(2)
        )

    def forward(self, x1: Any, x2: Any) -> Any:
        y1 = self.shortcut1(x1) + self.f(x2)
        return y1, self.shortcut2(x2) + self.g(y1)


def memcnn_block(f: nn.Module, g: nn.Module) -> nn.Module:
    """A block by MemCNN, which frees the storage of what it is given."""
    import memcnn

    return memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(f, g), keep_input=False)


def make_block(way: str, f: nn.Module, g: nn.Module) -> nn.Module:
    return memcnn_block(f, g) if way == "memcnn" else Block(f, g)


def call(way: str, module: nn.Module, *x: Any) -> Any:
    return checkpoint(module, *x, use_reentrant=False) if way == "checkpoint" else module(*x)


def call_blocks(way: str, blocks: nn.ModuleList, x: Any) -> Any:
    """Of blocks in turn, the output; x and it are joined, `[B, 2 channels, H, W]`."""

    def halves(x):
        return tuple(half.contiguous() for half in torch.chunk(x, 2, dim=1))

    if way == "memcnn":
        x = x.clone()  # as its storage will be freed
        for block in blocks:
            split = isinstance(block, Transition)
            x = torch.cat(block(*halves(x)), dim=1) if split else block(x)
        return x
    pair = halves(x)
    for block in blocks:
        pair = call(way, block, *pair)
    return torch.cat(pair, dim=1)


class Chain(nn.Module):
    """`depth` blocks, differentiated by one of the ways."""

    def __init__(self, depth: int, channels: int, way: str):
        super().__init__()
        self.way = way
        # First, so that parameters() has one order whatever MemCNN calls f and g.
        self.functions = nn.ModuleList(residual(channels, channels) for _ in range(2 * depth))
        pairs = zip(self.functions[::2], self.functions[1::2], strict=True)
        self.blocks = nn.ModuleList(make_block(way, f, g) for f, g in pairs)

    def forward(self, x: Any) -> Any:
        return call_blocks(self.way, self.blocks, x)


class RevNet(nn.Module):
    """revjax.RevNet of these arguments, `[B, 3, H, W] -> [B, num_classes]`, by one of the ways."""

    def __init__(
        self,
        units: Sequence[int],
        filters: Sequence[int],
        num_classes: int,
        way: str,
        *,
        bottleneck: bool = False,
        large_images: bool = False,
    ):
        super().__init__()
        self.way = way
        size, stride = (7, 2) if large_images else (3, 1)
        self.stem = nn.Sequential(conv(3, filters[0], size, stride), *norm_relu(filters[0]))
        if large_images:
            self.stem.append(nn.MaxPool2d(3, 2, padding=1))
        half, blocks = filters[0] // 2, []
        for i, (depth, listed) in enumerate(zip(units, filters[1:], strict=True)):
            inputs, half = half, (4 * listed if bottleneck else listed) // 2
            stride = 1 if i == 0 else 2
            kind = dict(bottleneck=bottleneck)
            if stride == 1 and inputs == half:
                f = residual(half, half, preactivate=i > 0, **kind)
                blocks.append(make_block(way, f, residual(half, half, **kind)))
            else:
                blocks.append(Transition(inputs, half, stride, preactivate=i > 0, **kind))
            for _ in range(depth - 1):
                functions = (residual(half, half, **kind) for _ in range(2))
                blocks.append(make_block(way, *functions))
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Sequential(*norm_relu(2 * half), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.dense = nn.Linear(2 * half, num_classes)

    def forward(self, images: Any) -> Any:
        x = call_blocks(self.way, self.blocks, call(self.way, self.stem, images))
        return self.dense(self.head(x))


def count_operations(step: Callable[[], Any]) -> int:
    """Of the convolutions and products of a step, by PyTorch's own count."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()
