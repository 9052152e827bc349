"""Torch only: affine algebra, branches, block, network, conversion."""

from repvgg.model.activated import Activated
from repvgg.model.affine import Affine, conv_as_affine, identity_map, norm_as_affine
from repvgg.model.block import Block, FoldedBlock, FusedBlock, SqueezeExcite, memory_format_of
from repvgg.model.branches import Branch, BranchFactory, ConvBN, ConvShape, Identity, Summand
from repvgg.model.convert import Equivalence, equivalence, not_fused, relative, to_deploy
from repvgg.model.count import count_macs, count_parameters, count_winograd_muls
from repvgg.model.dirac import Dirac
from repvgg.model.diverse import PointwiseAverage, PointwiseConv
from repvgg.model.layers import NotAffineError, copied
from repvgg.model.network import RepVGG, StageFactory
from repvgg.model.orepa import Orepa
from repvgg.model.residual import ResidualStage, count_shortcuts
from repvgg.model.save import named, write_weights
from repvgg.model.tensorfile import require_suffix
from repvgg.model.weights import (
    NAMINGS,
    Weights,
    WeightsMismatchError,
    damage,
    distance,
    fits,
    initialize,
    load_weights,
    read_weights,
)

__all__ = [
    "NAMINGS",
    "Activated",
    "Affine",
    "Block",
    "Branch",
    "BranchFactory",
    "ConvBN",
    "ConvShape",
    "Dirac",
    "Equivalence",
    "FoldedBlock",
    "FusedBlock",
    "Identity",
    "NotAffineError",
    "Orepa",
    "PointwiseAverage",
    "PointwiseConv",
    "RepVGG",
    "ResidualStage",
    "SqueezeExcite",
    "StageFactory",
    "Summand",
    "Weights",
    "WeightsMismatchError",
    "conv_as_affine",
    "copied",
    "count_macs",
    "count_parameters",
    "count_shortcuts",
    "count_winograd_muls",
    "damage",
    "distance",
    "equivalence",
    "fits",
    "identity_map",
    "initialize",
    "load_weights",
    "memory_format_of",
    "named",
    "norm_as_affine",
    "not_fused",
    "read_weights",
    "relative",
    "require_suffix",
    "to_deploy",
    "write_weights",
]
