"""Small networks with statistics that hide no mistake."""

from functools import partial

import torch
from torch import nn

from repvgg.model import ConvBN, Identity, RepVGG

K3 = ConvBN
K1 = partial(ConvBN, kernel_size=1)
ID = Identity.where_it_fits
ABLATIONS = {"plain": [K3], "id": [K3, ID], "1x1": [K3, K1], "full": [K3, K1, ID]}


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Non-trivial running statistics and affine parameters for every BatchNorm; fresh BNs would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            shape = module.running_mean.shape
            dtype = module.running_mean.dtype
            with torch.no_grad():
                module.running_mean.copy_(torch.randn(shape, generator=generator, dtype=dtype) * 0.5)
                module.running_var.copy_(torch.rand(shape, generator=generator, dtype=dtype) * 2 + 0.1)
                module.weight.copy_(torch.randn(shape, generator=generator, dtype=dtype))
                module.bias.copy_(torch.randn(shape, generator=generator, dtype=dtype) * 0.3)
    return model


def tiny(ablation: str = "full", **options) -> RepVGG:
    """A RepVGG of a few thousand parameters with every kind of layer."""
    options = {"num_classes": 7, **options}
    return RepVGG((1, 2, 2, 1), 0.125, 0.0625, ABLATIONS[ablation], **options)
