"""Sources that misbehave. A module of its own: they are unpickled in another process."""

import os
import signal
import time
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image

from repvgg.data.sources import ImageSource, Sample


@dataclass
class Faulty(ImageSource):
    """Forty gray squares, and one sample at which something happens."""

    kind: str
    description: str = "faulty"
    classes: tuple[str, ...] = ("a", "b")
    chunk: int = 4

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Sample:
        image = Image.fromarray(np.full((16, 16, 3), index, dtype=np.uint8))
        name = f"square {index}"
        if self.kind == "slow":
            time.sleep(0.05)
        if index == 23:
            match self.kind:
                case "raises":
                    raise KeyError("no such image")
                case "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "label":
                    return Sample(name, 2, image)
                case "huge":
                    return Sample(name, 0, Image.new("RGB", (2000, 2000)))
                case "long":
                    return Sample(name, 0, Image.new("RGB", (70000, 1)))
                case "cut":
                    buffer = BytesIO()
                    Image.effect_noise((64, 64), 50).save(buffer, "JPEG")
                    return Sample(name, 0, buffer.getvalue()[:700])
        return Sample(name, index % 2, image)
