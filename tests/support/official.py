"""RepVGG written a second time, from the paper's definition and with the authors' names: an oracle for foreign files.

Nothing of repvgg is used here. The other implementations' names are derived from these by text replacement, which is
not how the package does it.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, groups: int, se: bool, deploy: bool) -> None:
        super().__init__()
        if deploy:
            self.rbr_reparam = nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups)
        else:
            self.rbr_identity = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None
            self.rbr_dense = conv_bn(inputs, outputs, 3, stride, groups)
            self.rbr_1x1 = conv_bn(inputs, outputs, 1, stride, groups)
        if se:
            self.se = nn.ModuleDict({"down": nn.Conv2d(outputs, outputs // 16, 1)})
            self.se["up"] = nn.Conv2d(outputs // 16, outputs, 1)
        self.deploy, self.has_se = deploy, se

    def forward(self, x: Tensor) -> Tensor:
        if self.deploy:
            y = self.rbr_reparam(x)
        else:
            y = self.rbr_dense(x) + self.rbr_1x1(x)
            if self.rbr_identity is not None:
                y = y + self.rbr_identity(x)
        if self.has_se:
            pooled = torch.nn.functional.adaptive_avg_pool2d(y, 1)
            y = y * self.se["up"](self.se["down"](pooled).clamp(min=0)).sigmoid()
        return y.clamp(min=0)


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int, groups: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(outputs)))


class RepVGG(nn.Module):
    def __init__(
        self,
        depths: Sequence[int],
        a: float,
        b: float,
        *,
        groups: int = 1,
        se: bool = False,
        num_classes: int = 1000,
        deploy: bool = False,
    ) -> None:
        super().__init__()
        widths = [min(64, int(64 * a)), int(64 * a), int(128 * a), int(256 * a), int(512 * b)]
        number, inputs = 0, 3
        for stage, (depth, outputs) in enumerate(zip([1, *depths], widths, strict=True)):
            blocks = []
            for i in range(depth):
                grouped = groups if number in range(2, 27, 2) else 1
                blocks.append(Block(inputs, outputs, 2 if i == 0 else 1, grouped, se, deploy))
                number, inputs = number + 1, outputs
            setattr(self, f"stage{stage}", blocks[0] if stage == 0 else nn.Sequential(*blocks))
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for stage in range(5):
            x = getattr(self, f"stage{stage}")(x)
        return self.linear(x.flatten(2).mean(2))


def renamed(state: Mapping[str, Tensor], naming: str) -> dict[str, Tensor]:
    """The authors' state dict as timm or mmpretrain would write it."""
    return {_renamed(key, naming): tensor for key, tensor in state.items()}


def _renamed(key: str, naming: str) -> str:
    if naming == "official":
        return key
    words = {
        "timm": {
            "rbr_dense": "conv_kxk",
            "rbr_1x1": "conv_1x1",
            "rbr_identity": "identity",
            "rbr_reparam": "reparam_conv",
            "se.down": "attn.fc1",
            "se.up": "attn.fc2",
            "linear": "head.fc",
        },
        "mmpretrain": {
            "rbr_dense.bn": "branch_3x3.norm",
            "rbr_1x1.bn": "branch_1x1.norm",
            "rbr_dense": "branch_3x3",
            "rbr_1x1": "branch_1x1",
            "rbr_identity": "branch_norm",
            "rbr_reparam": "branch_reparam",
            "se.down": "se_layer.conv1.conv",
            "se.up": "se_layer.conv2.conv",
            "linear": "head.fc",
        },
    }[naming]
    for theirs, other in words.items():
        key = key.replace(theirs, other)
    if naming == "timm":
        return re.sub(r"^stage(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.", key.replace("stage0.", "stem."))
    key = key.replace("stage0.", "stem.")
    return key if key.startswith("head") else "backbone." + re.sub(r"^stage(\d)", r"stage_\1", key)
