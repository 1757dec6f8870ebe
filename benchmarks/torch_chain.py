"""The benchmarks' chain of reversible blocks in PyTorch, and MemCNN's."""

# PyTorch is in the extra "bench" alone.
# pyright: reportMissingImports=false

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode


def residual(channels: int) -> nn.Module:
    """BN-ReLU-conv3x3-BN-ReLU-conv3x3."""

    def layer():
        conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        nn.init.normal_(conv.weight, std=(2 / (9 * channels)) ** 0.5)
        return nn.BatchNorm2d(channels, eps=1e-3), nn.ReLU(), conv

    return nn.Sequential(*layer(), *layer())


class Block(nn.Module):
    """`y1 = x1 + F(x2)`, `y2 = x2 + G(y1)`, the halves joined: `[B, 2 channels, H, W]`."""

    def __init__(self, f: nn.Module, g: nn.Module):
        super().__init__()
        self.f, self.g = f, g

    def forward(self, x: Any) -> Any:
        x1, x2 = torch.chunk(x, 2, dim=1)
        y1 = x1 + self.f(x2)
        y2 = x2 + self.g(y1)
        return torch.cat([y1, y2], dim=1)


def memcnn_block(f: nn.Module, g: nn.Module) -> nn.Module:
    """The same by MemCNN."""
    import memcnn

    return memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(f, g), keep_input=False)


class Chain(nn.Module):
    """`depth` blocks, differentiated by way "plain", "checkpoint" (a block each) or "memcnn"."""

    def __init__(self, depth: int, channels: int, way: str):
        super().__init__()
        self.checkpointed = way == "checkpoint"
        # First, so that parameters() has one order whatever MemCNN calls f and g.
        self.functions = nn.ModuleList(residual(channels) for _ in range(2 * depth))
        block = memcnn_block if way == "memcnn" else Block
        pairs = zip(self.functions[::2], self.functions[1::2], strict=True)
        self.blocks = nn.ModuleList(block(f, g) for f, g in pairs)

    def forward(self, x: Any) -> Any:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


def count_operations(chain: Chain, x: Any) -> int:
    """Of the convolutions of a gradient, by PyTorch's own count."""
    with FlopCounterMode(display=False) as counter:
        (chain(x.detach().clone().requires_grad_()) ** 2).sum().backward()
    return counter.get_total_flops()
