"""Nonlinear branches: more than one convolution, also when deployed (Table 7)."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from repvgg.model.branches import Branch, BranchFactory, ConvShape, Summand


class Activated(Branch):
    """A branch and a ReLU after it, before the block's sum (Table 7, "+ReLU in branch").

    No convolution equals it. Deployed, it is the branch's own convolution with its BN folded, and the ReLU.

    Args:
        branch: what the ReLU follows; an affine one if the network is to be deployed.
    """

    def __init__(self, branch: Branch) -> None:
        super().__init__()
        self.branch = branch
        self.activation = nn.ReLU()

    @classmethod
    def where_it_fits(cls, shape: ConvShape, branch: BranchFactory) -> Activated | None:
        """The branch that ``branch`` makes, activated; None where it makes none."""
        made = branch(shape)
        return None if made is None else cls(made)

    def forward(self, x: Tensor) -> Tensor:
        """N × I × H × W to N × O × ⌈H/stride⌉ × ⌈W/stride⌉, not negative."""
        return self.activation(self.branch(x))

    def summand(self, shape: ConvShape, dtype: torch.dtype, device: torch.device) -> Summand:
        """The branch's, with the ReLU after it."""
        inner = self.branch.summand(shape, dtype, device)
        return replace(inner, activation=nn.Sequential(inner.activation, copy.deepcopy(self.activation)))
