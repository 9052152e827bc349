"""Sources that misbehave. A module of its own: they are unpickled in another process."""

import os
import signal
import time
from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass
class Faulty:
    """Forty gray squares, and one sample at which something happens."""

    kind: str
    description: str = "faulty"
    classes: tuple[str, ...] = ("a", "b")

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image = Image.fromarray(np.full((16, 16, 3), index, dtype=np.uint8))
        if self.kind == "slow":
            time.sleep(5)
        if index != 23:
            return image, index % 2
        match self.kind:
            case "raises":
                raise KeyError("no such image")
            case "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            case "writer dies":
                os.kill(os.getppid(), signal.SIGKILL)
            case "gray":
                return image.convert("L"), 0
            case "label":
                return image, 2
            case "huge":
                return Image.new("RGB", (2000, 2000)), 0
            case "flat":
                return Image.new("RGB", (3000, 1)), 0
        return image, index % 2
