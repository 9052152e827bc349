"""The authors' training, written down a second time: plain functions on tensors with the official names, in float64.

It shares nothing with repvgg but torch. The facts: the network and the 120- and 200-epoch recipes of the paper
(sections 3 and 4.1), and the parameter groups of the authors' older ``train.py``, which it chose by name: no decay
where the name holds ``bias`` or ``bn``, twice the learning rate where it holds ``bias``. The identity's BatchNorm is
called ``rbr_identity``, so that rule decays its γ.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = dict[str, Tensor]

#: What of a state dict is state of BatchNorm rather than a parameter.
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Recipe:
    """Everything that fixes a trajectory, given initial weights and batches.

    The two switches are the older script's; without them, the paper's section 4.1.
    """

    steps: int
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_steps: int = 0
    label_smoothing: float = 0.0
    decay_identity_gamma: bool = False
    bias_lr_factor: float = 1.0

    def lr_of_step(self, t: int) -> float:
        """Linear from lr/100, then ½ lr (1 + cos(π t/T)) over what is left."""
        if t < self.warmup_steps:
            return self.lr * (0.01 + 0.99 * t / self.warmup_steps)
        share = (t - self.warmup_steps) / (self.steps - self.warmup_steps)
        return 0.5 * self.lr * (1 + math.cos(math.pi * share))

    def decay_of(self, name: str) -> float:
        undecayed = "bias" in name or "bn" in name or ("rbr_identity" in name and not self.decay_identity_gamma)
        return 0.0 if undecayed else self.weight_decay

    def lr_factor_of(self, name: str) -> float:
        return self.bias_lr_factor if "bias" in name else 1.0


@dataclass
class Trajectory:
    """What a training leaves: of every step the loss and each weight's learning rate, and the tensors at its end."""

    losses: list[float] = field(default_factory=list)
    rates: list[dict[str, float]] = field(default_factory=list)
    tensors: Tensors = field(default_factory=dict)
    momenta: Tensors = field(default_factory=dict)


def official_names(names: Iterable[str]) -> dict[str, str]:
    """Each name of our state dict and its official one; a branch with no convolution is the identity."""
    names = list(names)
    official = {}
    for name in names:
        there = re.sub(r"^stages\.(\d+)", lambda m: f"stage{int(m[1]) + 1}", name)
        there = there.replace("stem.", "stage0.").replace("head.", "linear.")
        branch = re.match(r"(.*branches\.)(\d+)\.", name)
        if branch is not None and f"{branch[0]}conv.weight" not in names:
            there = re.sub(r"branches\.\d+\.bn", "rbr_identity", there)
        official[name] = there.replace("branches.0.", "rbr_dense.").replace("branches.1.", "rbr_1x1.")
    return official


def batch_norm(x: Tensor, w: Tensors, name: str) -> Tensor:
    """Train mode: normalised with the batch's biased variance; the running one gets the unbiased (momentum 0.1)."""
    count = x.numel() / x.shape[1]
    mean = x.mean((0, 2, 3))
    centred = x - mean[:, None, None]
    variance = centred.square().mean((0, 2, 3))
    with torch.no_grad():
        w[name + "running_mean"] = 0.9 * w[name + "running_mean"] + 0.1 * mean
        w[name + "running_var"] = 0.9 * w[name + "running_var"] + 0.1 * variance * count / (count - 1)
        w[name + "num_batches_tracked"] = w[name + "num_batches_tracked"] + 1
    scale = w[name + "weight"] / torch.sqrt(variance + 1e-5)
    return centred * scale[:, None, None] + w[name + "bias"][:, None, None]


def block(x: Tensor, w: Tensors, name: str, *, stride: int, groups: int) -> Tensor:
    """ReLU(SE(sum of the branches that the names tell of))."""
    kernel = w[name + "rbr_dense.conv.weight"]
    total = batch_norm(F.conv2d(x, kernel, stride=stride, padding=1, groups=groups), w, name + "rbr_dense.bn.")
    if name + "rbr_1x1.conv.weight" in w:
        kernel = w[name + "rbr_1x1.conv.weight"]
        total = total + batch_norm(F.conv2d(x, kernel, stride=stride, groups=groups), w, name + "rbr_1x1.bn.")
    if name + "rbr_identity.weight" in w:
        total = total + batch_norm(x, w, name + "rbr_identity.")
    if name + "se.down.weight" in w:
        hidden = total.mean((2, 3)) @ w[name + "se.down.weight"][:, :, 0, 0].T + w[name + "se.down.bias"]
        gate = hidden.clamp(min=0) @ w[name + "se.up.weight"][:, :, 0, 0].T + w[name + "se.up.bias"]
        total = total / (1 + torch.exp(-gate[:, :, None, None]))
    return total.clamp(min=0)


def network(x: Tensor, w: Tensors, *, groups: int, strides: Sequence[int]) -> Tensor:
    """Logits in train mode; moves the running statistics in ``w``."""
    layers = sorted({m[1] for m in (re.match(r"(stage0|stage\d+\.\d+)\.", name) for name in w) if m}, key=layer_key)
    for number, layer in enumerate(layers):
        stage, index = layer_key(layer)
        grouped = number % 2 == 0 and 2 <= number <= 26
        x = block(x, w, layer + ".", stride=1 if index else strides[stage], groups=groups if grouped else 1)
    return x.mean((2, 3)) @ w["linear.weight"].T + w["linear.bias"]


def layer_key(layer: str) -> tuple[int, int]:
    """Stage and place in it."""
    stage, _, index = layer.removeprefix("stage").partition(".")
    return int(stage), int(index or 0)


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Against (1 − ε) one-hot + ε / classes."""
    log_p = logits - torch.logsumexp(logits, 1, keepdim=True)
    target = torch.full_like(log_p, smoothing / log_p.shape[1])
    target[torch.arange(len(labels)), labels] += 1 - smoothing
    return -(target * log_p).sum(1).mean()


def train(
    initial: Tensors,
    batches: Iterable[tuple[Tensor, Tensor]],
    recipe: Recipe,
    *,
    groups: int = 1,
    strides: Sequence[int] = (2, 2, 2, 2, 2),
) -> Trajectory:
    """SGD: v ← 0.9 v + g + wd·w; w ← w − lr·v, from v = 0."""
    w = {name: value.clone() for name, value in initial.items()}
    names = [name for name in w if not name.endswith(BUFFERS)]
    seen = Trajectory(momenta={name: torch.zeros_like(w[name]) for name in names})
    for t, (images, labels) in enumerate(batches):
        for name in names:
            w[name] = w[name].detach().requires_grad_()
        loss = cross_entropy(network(images, w, groups=groups, strides=strides), labels, recipe.label_smoothing)
        gradients = torch.autograd.grad(loss, [w[name] for name in names])
        rates = {name: recipe.lr_of_step(t) * recipe.lr_factor_of(name) for name in names}
        with torch.no_grad():
            for name, gradient in zip(names, gradients, strict=True):
                momentum = recipe.momentum * seen.momenta[name] + gradient + recipe.decay_of(name) * w[name]
                w[name] = w[name] - rates[name] * momentum
                seen.momenta[name] = momentum
        seen.losses.append(loss.item())
        seen.rates.append(rates)
    seen.tensors = w
    return seen
