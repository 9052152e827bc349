"""The RepVGG family: a plain stack of blocks in five stages, pooling and a linear head (paper, section 3.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from repvgg.model.block import Block
from repvgg.model.branches import BranchFactory, ConvShape

#: Grouped layers are the 2nd, 4th, … 26th after the stem (paper, section 3.4), whatever stage they fall in.
LAST_GROUPED_LAYER = 26

#: Makes a stage of its layers, from N × channels × H × W to the last layer's shape.
StageFactory = Callable[[Sequence[Block]], nn.Module]


class RepVGG(nn.Module):
    """A RepVGG classifier in train form; :func:`repvgg.model.to_deploy` gives the deploy form.

    Args:
        depths: blocks of stages 1–4; stage 0 is one block.
        width_a: multiplier of stages 0–3 (64, 64, 128, 256 channels), section 3.4's *a*.
        width_b: multiplier of stage 4 (512 channels), *b*.
        branches: makes the branches of each block; the ablation.
        groups: of the 3×3 and 1×1 convolutions of every second block (B1g2, B1g4 …).
        squeeze_excite: SE of hidden width C // 16 before every ReLU (D2se).
        block_norm: a BatchNorm after the branches' sum.
        stage: makes each of stages 1–4 of its layers; None: one layer after another.
        num_classes: outputs of the linear head.
        in_channels: of the images.
        strides: of the first block of stages 0–4; (2, 2, 2, 2, 2) on 224 px gives 7 × 7, a smaller first stride
            keeps small images large.

    Shapes:
        N × in_channels × H × W to logits N × num_classes.

    Raises:
        ValueError: lists of the wrong length, values below 1, or a depth that ``stage`` refuses.
    """

    def __init__(
        self,
        depths: Sequence[int],
        width_a: float,
        width_b: float,
        branches: Sequence[BranchFactory],
        *,
        groups: int = 1,
        squeeze_excite: bool = False,
        block_norm: bool = False,
        stage: StageFactory | None = None,
        num_classes: int = 1000,
        in_channels: int = 3,
        strides: Sequence[int] = (2, 2, 2, 2, 2),
    ) -> None:
        super().__init__()
        if len(depths) != 4 or min(depths) < 1:
            raise ValueError(f"depths={list(depths)}: four numbers, the blocks of stages 1 to 4, each at least 1")
        if len(strides) != 5:
            raise ValueError(f"strides={list(strides)}: five numbers, of the first block of stages 0 to 4")
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes} is not at least 1")
        widths = [int(64 * width_a), int(128 * width_a), int(256 * width_a), int(512 * width_b)]
        layer = 0
        channels = in_channels

        def block(out_channels: int, stride: int) -> Block:
            nonlocal layer, channels
            grouped = layer % 2 == 0 and 2 <= layer <= LAST_GROUPED_LAYER
            se_hidden = out_channels // 16 if squeeze_excite else 0
            try:
                shape = ConvShape(channels, out_channels, stride, groups if grouped else 1)
                made = Block(shape, branches, norm=block_norm, se_hidden=se_hidden)
            except ValueError as error:
                raise ValueError(f"layer {layer} (stage 0 is layer 0): {error}") from error
            layer, channels = layer + 1, out_channels
            return made

        self.stem = block(min(64, widths[0]), strides[0])
        self.stages = nn.ModuleList()
        for number, (width, depth, stride) in enumerate(zip(widths, depths, strides[1:], strict=True), start=1):
            layers = [block(width, stride if i == 0 else 1) for i in range(depth)]
            try:
                self.stages.append(nn.Sequential(*layers) if stage is None else stage(layers))
            except ValueError as error:
                raise ValueError(f"depths={list(depths)}: stage {number}: {error}") from error
        self.head = nn.Linear(channels, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """The last stage's map, N × int(512 b) × H/32 × W/32 at the default strides."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Logits, N × num_classes."""
        return self.head(self.features(x).mean((2, 3)))
