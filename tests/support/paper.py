"""The published and counted figures that the model must reproduce exactly."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """One row of Tables 3 to 5 of the paper (parameters counted; multiply-adds in units of 1e9 at 224 px)."""

    depths: tuple[int, int, int, int]
    a: float
    b: float
    groups: int
    train_params: int
    deploy_params: int
    deploy_gmacs: float
    train_gmacs: float
    winograd_g: float
    se: bool = False


A, B = (2, 4, 14, 1), (4, 6, 16, 1)
VARIANTS = {
    "a0": Variant(A, 0.75, 2.5, 1, 9_108_968, 8_309_384, 1.361, 1.513, 0.747),
    "a1": Variant(A, 1, 2.5, 1, 14_092_264, 12_789_864, 2.364, 2.626, 1.272),
    "a2": Variant(A, 1.5, 2.75, 1, 28_210_600, 25_499_944, 5.117, 5.685, 2.660),
    "b0": Variant(B, 1, 2.5, 1, 15_817_960, 14_339_048, 3.058, 3.397, 1.580),
    "b1": Variant(B, 2, 4, 1, 57_415_016, 51_829_480, 11.815, 13.128, 5.907),
    "b1g2": Variant(B, 2, 4, 2, 45_782_376, 41_360_104, 8.810, 9.788, 4.571),
    "b1g4": Variant(B, 2, 4, 4, 39_966_056, 36_125_416, 7.307, 8.119, 3.903),
    "b2": Variant(B, 2.5, 5, 1, 89_022_376, 80_315_112, 18.377, 20.418, 9.144),
    "b2g2": Variant(B, 2.5, 5, 2, 70_846_376, 63_956_712, 13.680, 15.200, 7.057),
    "b2g4": Variant(B, 2.5, 5, 4, 61_758_376, 55_777_512, 11.332, 12.591, 6.013),
    "b3": Variant(B, 3, 5, 1, 123_085_288, 110_960_872, 26.209, 29.121, 12.914),
    "b3g2": Variant(B, 3, 5, 2, 96_911_848, 87_404_776, 19.446, 21.606, 9.909),
    "b3g4": Variant(B, 3, 5, 4, 83_825_128, 75_626_728, 16.064, 17.849, 8.406),
    "d2se": Variant((8, 14, 24, 1), 2.5, 5, 1, 133_334_836, 120_387_572, 32.830, 36.477, 15.57, se=True),
}

#: Table 6 with B0: parameters of the train form.
ABLATION_TRAIN_PARAMS = {"plain": 14_345_512, "id": 14_354_856, "1x1": 15_808_616, "full": 15_817_960}


def layers(variant: Variant) -> list[tuple[int, int, bool]]:
    """Of every block: input and output channels, and whether its output has the shape of its input."""
    widths = [int(64 * variant.a), int(128 * variant.a), int(256 * variant.a), int(512 * variant.b)]
    found = [(3, min(64, widths[0]), False)]
    for width, depth in zip(widths, variant.depths, strict=True):
        found += [(found[-1][1], width, False), *[(width, width, True)] * (depth - 1)]
    return found


#: Other designs: parameters of one block's train form, from input channels i, output channels o, and whether there
#: is an identity (s). A BatchNorm has 2 o.
DESIGN_TRAIN_PARAMS: dict[str, Callable[[int, int, bool], int]] = {
    "id_no_bn": lambda i, o, s: 9 * i * o + i * o + 4 * o,
    "post_bn": lambda i, o, s: 9 * i * o + i * o + 2 * o,
    "trivial": lambda i, o, s: 9 * i * o + 2 * o,
    "relu_branch": lambda i, o, s: 9 * i * o + i * o + 4 * o + 2 * o * s,
    "dirac": lambda i, o, s: 9 * i * o + o + o * s + 2 * o,
    "acb": lambda i, o, s: (9 + 3 + 3) * i * o + 6 * o,
    # 3×3; 1×1; 1×1 of input channels, then 3×3; 1×1, then average
    "dbb": lambda i, o, s: (9 * i * o + i * o) + (i * i + 9 * i * o) + i * o + (4 * o + (2 * i + 2 * o) + 4 * o),
    "qarepvgg": lambda i, o, s: 9 * i * o + i * o + 4 * o,
    "mobileone": lambda i, o, s: (4 * 9 + 1) * i * o + 10 * o + 2 * o * s,
    # six scales and a BN; 3×3 twice; 1×1 three times, and once of input channels; separable with 8 per input channel
    "orepa": lambda i, o, s: (6 + 2) * o + 2 * 9 * i * o + 3 * i * o + i * i + 8 * 9 * i + 8 * i * o,
    "residual_reorg": lambda i, o, s: 9 * i * o + 2 * o,
}

#: Of one block's deploy form, where that is not a convolution with bias, 9 i o + o: one per branch, and a factor and a
#: bias per channel for the identity.
DESIGN_DEPLOY_PARAMS: dict[str, Callable[[int, int, bool], int]] = {
    "relu_branch": lambda i, o, s: 9 * i * o + i * o + 2 * o + 2 * o * s
}

#: Of B0's three projections (Residual Reorg): the 1×1 kernels, and their output channels.
PROJECTION_KERNELS, PROJECTION_CHANNELS = 64 * 64 + 64 * 128 + 128 * 256, 64 + 128 + 256
