"""Residual stages: shortcuts that stay when the network is deployed (Table 7, "Residual Reorg")."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from repvgg.model.block import Block
from repvgg.model.branches import ConvBN, ConvShape


class ResidualStage(nn.Module):
    """Layers in pairs, each pair with a shortcut: ``relu(second(first(x)) + shortcut(x))`` (ResNet-18 and -34).

    The first shortcut is a 1×1 convolution and its BN where the pair changes the shape (He et al. 2016, option B); all
    others are the identity. A stage of one layer is that layer. Deployed, every layer is a convolution, and so is the
    projection; the shortcuts stay, since the ReLU between two layers keeps them apart.

    Layers keep their numbers, as in a plain stage: a checkpoint has ``0.…``, ``1.…`` and, with a projection,
    ``shortcut.…``.

    Args:
        layers: of the stage, all but the first of one shape. The second of each pair loses its activation to the sum.

    Raises:
        ValueError: an odd number of layers above 1.
    """

    def __init__(self, layers: Sequence[Block]) -> None:
        super().__init__()
        if len(layers) != 1 and len(layers) % 2:
            raise ValueError(
                f"{len(layers)} layers cannot be paired: a residual stage has one layer or an even number of them "
                "(net.depths=[2,4,14,1] has)"
            )
        self.depth = len(layers)
        for i, layer in enumerate(layers):
            self.add_module(str(i), layer)
            if i % 2:
                layer.activation = nn.Identity()
        self.shortcut: nn.Module = nn.Identity()
        self.activation: nn.Module = nn.Identity()
        if self.depth > 1:
            first, second = layers[0].shape, layers[1].shape
            across = ConvShape(first.in_channels, second.out_channels, first.stride * second.stride)
            if not across.keeps_shape:
                self.shortcut = Block(across, [partial(ConvBN, kernel_size=1)])
                self.shortcut.activation = nn.Identity()
            self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """N × in_channels × H × W to N × out_channels × ⌈H/stride⌉ × ⌈W/stride⌉."""
        layers = [self.get_submodule(str(i)) for i in range(self.depth)]
        if self.depth == 1:
            y: Tensor = layers[0](x)
            return y
        for i, (first, second) in enumerate(zip(layers[::2], layers[1::2], strict=True)):
            x = self.activation(second(first(x)) + (x if i else self.shortcut(x)))
        return x


def count_shortcuts(model: nn.Module) -> int:
    """Shortcuts of either form: no conversion removes them."""
    return sum(stage.depth // 2 for stage in model.modules() if isinstance(stage, ResidualStage))
