"""Lightning's `metrics.csv`, written so that neither a kill nor a full disk costs a row that was there."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.loggers.logger import rank_zero_experiment
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from repvgg.files import replacing

log = logging.getLogger(__name__)


class Writer(ExperimentWriter):
    """Appends rows; a new column makes a new file, which takes the old one's place when it is whole.

    Lightning's own rewrites the file in place. Rows that the disk does not take stay in memory (``metrics``) and are
    tried again with the next one: the training has more to do than to end for them.
    """

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self._path = Path(self.metrics_file_path)
        #: Bytes of whole rows. What a full disk left behind them is written over: it is the beginning of the same rows.
        self._size = 0
        self._failing = False

    def _check_log_dir_exists(self) -> None:
        """Lightning's would delete an older file; `metrics_csv` has set it aside."""

    def save(self) -> None:
        """Write the rows that are not in the file yet; without space, a warning, once."""
        if not self.metrics:
            return
        try:
            self._write()
        except OSError as error:
            if not self._failing:
                log.warning("%s: %s. Its rows are kept in memory and tried again", self._path, error.strerror or error)
            self._failing = True
            return
        if self._failing:
            log.warning("%s is written again; no row is missing", self._path)
        self._failing = False
        self.metrics = []

    def _write(self) -> None:
        columns = sorted({*self.metrics_keys, *(name for row in self.metrics for name in row)})
        if self._size and columns == self.metrics_keys:
            with self._path.open("r+b") as file:
                file.seek(self._size)
                file.write(_lines(columns, self.metrics))
                file.flush()
                size = file.tell()
        else:
            older: list[dict[str, str]] = []
            if self._size:
                whole = self._path.read_bytes()[: self._size].decode()
                older = list(csv.DictReader(io.StringIO(whole, newline="")))
            content = _lines(columns, [dict(zip(columns, columns, strict=True)), *older, *self.metrics])
            with replacing(self._path) as file:
                file.write(content)
            size = len(content)
        self.metrics_keys, self._size = columns, size


def _lines(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns).writerows(rows)
    return text.getvalue().encode()


class SafeCSVLogger(CSVLogger):
    """``directory/metrics.csv`` and ``hparams.yaml``: each row is in the file when the call that logs it returns.

    That is as often as the training logs (every 50 steps, and at validations), not at every step. It survives the
    process, not a power cut: the operating system writes it to the disk when it likes.
    """

    def __init__(self, directory: str | Path) -> None:
        path = Path(directory)
        super().__init__(save_dir=path.parent, name=path.name, version="", flush_logs_every_n_steps=1)

    @property
    @rank_zero_experiment
    def experiment(self) -> Writer:
        """The writer, made when it is needed first."""
        if self._experiment is None:
            self._experiment = Writer(self.log_dir)
        return self._experiment  # type: ignore[return-value]

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left. Rows that the disk still does not take are named, since they end with the process."""
        super().finalize(status)
        if self._experiment is not None and self._experiment.metrics:
            rows = len(self._experiment.metrics)
            log.error("%s lacks the last %d rows: there was no space for them", self.experiment.metrics_file_path, rows)
