"""What every branch adds to its block, what quantization will make of the sum, and how large the gradients are."""

from __future__ import annotations

import csv
import io
import logging
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from statistics import fmean
from typing import Any

import pytorch_lightning as pl
import torch
import wandb
from pytorch_lightning.loggers import WandbLogger
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from repvgg.files import replacing
from repvgg.model import Affine, Block, Branch, ConvBN, Identity, NotAffineError, norm_as_affine, relative
from repvgg.model.layers import as_evaluated, other_forward

log = logging.getLogger(__name__)

#: The row of a block's sum, among those of its branches.
FUSED = "fused"
#: A channel is dead where |γ| is at most this times the block's mean |γ|.
DEAD = 1e-3
OF_A_MAP = ("share", "norm", "weight_max", "channel_range", "bias_min", "bias_max")
OF_A_NORM = ("gamma_mean", "gamma_min", "gamma_max", "gamma_dead", "var_min")
COLUMNS = ("epoch", "step", "layer", "stage", "branch", *OF_A_MAP, *OF_A_NORM, "grad_norm")

#: One line of health.csv: COLUMNS to numbers and names, None where a quantity does not exist.
Row = dict[str, Any]


def kinds(block: Block) -> dict[str, nn.Module]:
    """The branches by kind: ``conv3x3``, ``conv1x1``, ``identity``, or the name of the class.

    The second of a kind is ``conv3x3_2``.
    """
    named: dict[str, nn.Module] = {}
    seen: Counter[str] = Counter()
    for branch in block.branches:
        if type(branch) is ConvBN:
            kind = "conv{}x{}".format(*branch.conv.kernel_size)
        else:
            kind = "identity" if type(branch) is Identity else type(branch).__name__
        seen[kind] += 1
        named[kind if seen[kind] == 1 else f"{kind}_{seen[kind]}"] = branch
    return named


@torch.no_grad()
def diagnose(block: Block, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, Tensor]]:
    """The state of every branch of a block, and of their sum under ``fused``, as scalars on the block's device.

    Of a branch's map with kernel K_b (after the block's own norm, if it has one; zero-padded), K their sum:

    - ``share``: ⟨K_b, K⟩ / ‖K‖², the part of the fused kernel that lies along the branch. Because K is the sum of all
      K_b the shares add up to 1, also where branches cancel: a branch that works against the others has a negative
      share. (‖K_b‖ / Σ‖K_b‖ adds up to 1 as well, but calls two branches that cancel the largest of all.) It weighs
      kernels, not activations: the inputs' scale and correlation are not in it.
    - ``norm``: ‖K_b‖, Frobenius.
    - ``weight_max``: max |w|; ``channel_range``: the largest of the output channels' max |w| over their median, the
      bits that one scale for the whole tensor wastes on most channels; ``bias_min``, ``bias_max``.

    Of the BatchNorms in a branch (``fused``: the block's own):

    - ``gamma_mean``, ``gamma_min``, ``gamma_max`` of |γ|. That is the standard deviation of what the BatchNorm puts
      out in training (but for ε), so branches can be compared by it; ``gamma_dead``: the share of channels with |γ|
      at most 1e-3 of the block's mean.
    - ``var_min``: the smallest running variance. Where it is almost 0 in the identity's BatchNorm, the fused kernel
      holds a huge 1/σ: what breaks int8 according to QARepVGG (arXiv 2212.01593).

    Args:
        dtype: the precision that branches are folded in.

    Returns:
        by kind, then by quantity. A branch that is no affine map has no map's quantities, and the sum is of the others.
    """
    branches = kinds(block)
    device = next((p.device for p in block.parameters()), torch.device("cpu"))
    maps: dict[str, Affine] = {}
    with as_evaluated(block):
        for kind, branch in branches.items():
            try:
                if isinstance(branch, Branch):
                    maps[kind] = branch.affine(dtype, device)
            except NotAffineError:
                continue
    found: dict[str, dict[str, Tensor]] = {kind: {} for kind in [*branches, FUSED]}
    if maps:
        fused = reduce(operator.add, maps.values())
        if not other_forward(block.norm, nn.BatchNorm2d, nn.SyncBatchNorm):  # of another one the deploy form is no map
            scale, shift = norm_as_affine(block.norm, fused.kernel)
            maps = {kind: part.scaled(scale, torch.zeros_like(shift)) for kind, part in maps.items()}
            fused = fused.scaled(scale, shift)
        for kind, part in {**maps, FUSED: fused}.items():
            found[kind] |= _of_a_map(part, fused.kernel)
    norms = {
        kind: [m for m in module.modules() if isinstance(m, _BatchNorm)]
        for kind, module in {**branches, FUSED: block.norm}.items()
    }
    gammas = {kind: [m.weight.abs().to(dtype) for m in ms if m.weight is not None] for kind, ms in norms.items()}
    every = [gamma for those in gammas.values() for gamma in those]
    for kind, those in gammas.items():
        if those:
            gamma = torch.cat(those)
            found[kind] |= {
                "gamma_mean": gamma.mean(),
                "gamma_min": gamma.min(),
                "gamma_max": gamma.max(),
                "gamma_dead": (gamma <= DEAD * torch.cat(every).mean()).to(dtype).mean(),
            }
        variances = [m.running_var.to(dtype) for m in norms[kind] if m.running_var is not None]
        if variances:
            found[kind]["var_min"] = torch.cat(variances).min()
    return {kind: values for kind, values in found.items() if values or kind != FUSED}


def _of_a_map(part: Affine, whole: Tensor) -> dict[str, Tensor]:
    kernel = part.kernel
    rows, columns = ((w - k) // 2 for w, k in zip(whole.shape[2:], kernel.shape[2:], strict=True))
    under = whole[:, :, rows : whole.shape[2] - rows, columns : whole.shape[3] - columns]  # cheaper than zeros around
    largest = torch.linalg.vector_norm(kernel, torch.inf, (1, 2, 3))
    return {
        "share": relative((kernel * under).sum(), torch.linalg.vector_norm(whole).square()),
        "norm": torch.linalg.vector_norm(kernel),
        "weight_max": largest.max(),
        "channel_range": relative(largest.max(), largest.quantile(0.5)),
        "bias_min": part.bias.min(),
        "bias_max": part.bias.max(),
    }


def gradient_norms(net: nn.Module) -> dict[tuple[str, str], Tensor]:
    """‖∇‖₂ by layer and kind of branch, and of the whole network under ``("", "total")``, where there are gradients."""
    parts = {("", "total"): net}
    for layer, block in _blocks(net):
        parts |= {(layer, kind): branch for kind, branch in kinds(block).items()}
    gradients = {where: [p.grad for p in part.parameters() if p.grad is not None] for where, part in parts.items()}
    return {where: get_total_norm(those) for where, those in gradients.items() if those}


def layer_rows(net: nn.Module, epoch: int, step: int, gradients: Mapping[tuple[str, str], Tensor]) -> list[Row]:
    """The rows of health.csv for the network as it is now; ``gradients`` as from :func:`gradient_norms`."""
    rows: list[Row] = []
    scalars: list[Tensor] = []
    places: list[tuple[Row, str]] = []
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    for layer, block in _blocks(net):
        dtype = next((p.dtype for p in block.parameters()), torch.float32)
        for kind, values in diagnose(block, torch.promote_types(dtype, torch.float32)).items():
            place = {"epoch": epoch, "step": step, "layer": layer, "stage": stage_of(layer), "branch": kind}
            rows.append({**dict.fromkeys(COLUMNS), **place})
            if (layer, kind) in gradients:
                values["grad_norm"] = gradients[layer, kind]
            places += [(rows[-1], quantity) for quantity in values]
            scalars += [value.to(device) for value in values.values()]
    # One copy from the device for all of them.
    for (row, quantity), value in zip(places, torch.stack(scalars).tolist() if scalars else [], strict=True):
        row[quantity] = value
    return rows


def stage_of(layer: str) -> str:
    """``stage0`` for the stem, ``stage3`` for ``stages.2.4``; in another network, the module that holds the layer."""
    stage = re.search(r"(?:^|\.)stages\.(\d+)\.", layer)
    if stage:
        return f"stage{int(stage[1]) + 1}"
    return "stage0" if layer == "stem" else layer.split(".")[0]


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """What is logged of one epoch: means over the blocks of a stage, and the worst where one layer spoils it.

    ``health/<quantity>/<stage>/<branch>`` (share, norm, gamma: a stage's mean over the blocks that have the branch),
    ``health/<quantity>/<stage>`` (of the fused kernels, the worst: weight_max, channel_range, bias_range) and
    ``health/<quantity>/<branch>`` (gamma_dead: mean; var_min: smallest; grad_norm: over all blocks together).
    """
    values: dict[str, list[float]] = {}
    reductions: dict[str, Callable[[list[float]], float]] = {}

    def add(quantity: str, where: str, value: float | None, reduction: Callable[[list[float]], float]) -> None:
        if value is not None:
            key = f"health/{quantity}/{where}"
            values.setdefault(key, []).append(value)
            reductions[key] = reduction

    for row in rows:
        stage, branch = row["stage"], row["branch"]
        if branch != FUSED:
            add("share", f"{stage}/{branch}", row["share"], fmean)
            add("norm", f"{stage}/{branch}", row["norm"], fmean)
            add("grad_norm", branch, row["grad_norm"], lambda norms: math.hypot(*norms))
        elif row["weight_max"] is not None:
            add("weight_max", stage, row["weight_max"], _worst)
            add("channel_range", stage, row["channel_range"], _worst)
            add("bias_range", stage, row["bias_max"] - row["bias_min"], _worst)
        add("gamma", f"{stage}/{branch}", row["gamma_mean"], fmean)
        add("gamma_dead", branch, row["gamma_dead"], fmean)
        add("var_min", branch, row["var_min"], min)
    return {key: reductions[key](found) for key, found in values.items()}


def _worst(values: list[float]) -> float:
    """The largest; max() would pass over a NaN that is not the first."""
    return math.nan if any(map(math.isnan, values)) else max(values)


class Health(pl.Callback):
    """Logs :func:`summary` at the end of training epochs, and writes every layer's numbers to ``health.csv``.

    Read from the weights as they are trained (an average of them, if there is one, is not looked at) and from rank
    0's BatchNorm buffers, which are what a checkpoint holds. Gradients are those of the epoch's last optimiser step,
    unscaled and before clipping; an epoch that ``max_steps`` cuts short has none. Nothing is run forward, no
    parameter, buffer, gradient or random number is touched.

    With W&B, ``health/share_of_layers/<branch>`` is a histogram over the layers, and ``health/layers`` the whole
    table, at the end.

    Args:
        directory: for ``health.csv``: one line per epoch, layer and branch, and one for the fused kernel. Resumed
            in the same directory, it goes on.
        every_n_epochs: how often; 0 never.

    Raises:
        ValueError: a negative ``every_n_epochs``.
    """

    def __init__(self, directory: str, every_n_epochs: int = 1) -> None:
        if every_n_epochs < 0:
            raise ValueError(
                f"callbacks.health.every_n_epochs={every_n_epochs}: choose 1 for every epoch, or 0 for none"
            )
        self.file = Path(directory) / "health.csv"
        self.every_n_epochs = every_n_epochs
        self.rows: list[Row] = []
        self.gradients: dict[tuple[str, str], Tensor] = {}

    def _is_due(self, trainer: pl.Trainer) -> bool:
        due = self.every_n_epochs > 0 and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        return due and trainer.is_global_zero

    def state_dict(self) -> dict[str, Any]:
        """The gradients' norms of an epoch whose end is still to come."""
        return {"gradients": [[*where, norm] for where, norm in self.gradients.items()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As :meth:`state_dict`."""
        self.gradients = {(layer, kind): norm for layer, kind, norm in state_dict["gradients"]}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep what an interrupted run wrote of the epochs before this one."""
        if trainer.is_global_zero:
            earlier = read_rows(self.file) if trainer.current_epoch else []
            self.rows = [row for row in earlier if row["epoch"] < trainer.current_epoch]

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Measure the gradients of the epoch's last step; Lightning has unscaled them unless a fused optimiser will."""
        if not (trainer.is_last_batch and self._is_due(trainer)):
            return
        norms = gradient_norms(pl_module.net)  # type: ignore[arg-type]
        scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            norms = {where: norm / scaler.get_scale() for where, norm in norms.items()}
        self.gradients = norms

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Diagnose, log and write."""
        if not self._is_due(trainer):
            return
        net: nn.Module = pl_module.net  # type: ignore[assignment]
        rows = layer_rows(net, trainer.current_epoch, trainer.global_step, self.gradients)
        if not self.rows:
            _name_what_has_no_map(rows)
        self.rows += rows
        values = summary(rows)
        total = self.gradients.get(("", "total"))
        if total is not None:
            values["health/grad_norm/total"] = total.item()
        self.gradients = {}
        pl_module.log_dict(values, rank_zero_only=True)
        write_rows(self.file, self.rows)
        for logger in _wandb_loggers(trainer):
            logger.log_metrics(_histograms(rows), step=trainer.global_step)  # type: ignore[arg-type]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give W&B the table of all layers and epochs."""
        if self.rows:
            for logger in _wandb_loggers(trainer):
                logger.log_table("health/layers", list(COLUMNS), [[row[c] for c in COLUMNS] for row in self.rows])


def _blocks(net: nn.Module) -> list[tuple[str, Block]]:
    return [(n.replace("_orig_mod.", ""), m) for n, m in net.named_modules() if isinstance(m, Block)]


def _name_what_has_no_map(rows: Sequence[Row]) -> None:
    layers: dict[str, list[str]] = {}
    for row in rows:
        if row["norm"] is None and row["branch"] != FUSED:
            layers.setdefault(row["branch"], []).append(row["layer"])
    for kind, where in layers.items():
        log.warning("%s in %s is no affine map: health/share and health/norm leave it out", kind, ", ".join(where))


def _wandb_loggers(trainer: pl.Trainer) -> list[WandbLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)] if trainer.is_global_zero else []


def _histograms(rows: Sequence[Row]) -> Mapping[str, wandb.Histogram]:
    shares: dict[str, list[float]] = {}
    for row in rows:
        if row["branch"] != FUSED and row["share"] is not None and math.isfinite(row["share"]):
            shares.setdefault(row["branch"], []).append(row["share"])
    return {f"health/share_of_layers/{kind}": wandb.Histogram(values) for kind, values in shares.items()}


def write_rows(file: Path, rows: Sequence[Row]) -> None:
    """Write all rows, to 7 significant digits; the file is whole or not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{value:.7g}" if isinstance(value, float) else value for name, value in row.items()})
    with replacing(file) as out:
        out.write(text.getvalue().encode())


def read_rows(file: Path) -> list[Row]:
    """What :func:`write_rows` wrote; nothing where there is no file."""
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return [{name: _parsed(name, text) for name, text in row.items()} for row in csv.DictReader(lines)]


def _parsed(name: str, text: str) -> str | int | float | None:
    if name in ("layer", "stage", "branch"):
        return text
    if name in ("epoch", "step"):
        return int(text)
    return float(text) if text else None
