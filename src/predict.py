"""What an exported network sees in images: `python src/predict.py photo.jpg --model best.onnx`; `--help` has more."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repvgg.cli import WRONG_INPUT, clear_errors, interruptible

if TYPE_CHECKING:
    from repvgg.deploy.runtimes import Program

BATCH = 32


def predictions(
    program: "Program", files: Sequence[Path], top: int, unreadable: list[str]
) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """Of every image the ``top`` classes, most probable first; errors of unreadable ones go to ``unreadable``."""
    import numpy as np

    from repvgg.data.pictures import UnreadableImageError, open_image
    from repvgg.deploy.preprocess import Preprocessing, class_names

    preprocessing, names = Preprocessing.of_file(program.metadata), class_names(program.metadata)
    for start in range(0, len(files), BATCH):
        readable, crops = [], []
        for file in files[start : start + BATCH]:
            try:
                crops.append(preprocessing.cut(open_image(file)))
                readable.append(file)
            except UnreadableImageError as error:
                unreadable.append(str(error))
        if not crops:
            continue
        logits = program.run(preprocessing.batch(crops)).astype(np.float64)
        odds = np.exp(logits - logits.max(1, keepdims=True))
        for file, row in zip(readable, odds / odds.sum(1, keepdims=True), strict=True):
            best = np.argsort(-row, kind="stable")[:top]
            yield (
                file,
                [
                    {"index": int(i), "class": str(i) if names is None else names[i], "probability": float(row[i])}
                    for i in best
                ],
            )


def table(rows: list[tuple[Path, list[dict[str, Any]]]]) -> str:
    """One line for each image: file, then class and percent."""
    cells = [
        [str(file), *(f"{best['class']} {100 * best['probability']:.2f} %" for best in found)] for file, found in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def main() -> None:
    """Read the file, look at the images, print what they show."""
    parser = argparse.ArgumentParser(
        description="What an exported network sees in images. The file itself says how they are resized, cut and "
        "normalised, and what its classes are called.",
        epilog="Export a checkpoint first: python src/export.py ckpt=RUN/checkpoints/best.ckpt. Exits with 2 if an "
        "image cannot be read; the others are printed all the same.",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("--model", type=Path, required=True, metavar="FILE", help=".onnx or .pt2 of src/export.py")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes of each image (default: 5)")
    parser.add_argument("--runtime", help="onnxruntime or openvino of an .onnx, torch of a .pt2 (default: the first)")
    parser.add_argument("--precision", help="what the runtime computes in: f32, or bf16 in openvino (default: f32)")
    parser.add_argument("--threads", type=int, metavar="N", help="default: all cores")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    for name in ("top", "threads"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")

    unreadable: list[str] = []
    with clear_errors():
        from repvgg.data.folders import kinds
        from repvgg.data.pictures import find_images
        from repvgg.deploy.runtimes import load_program

        files, unlisted, not_read = find_images(arguments.images)
        unreadable += unlisted
        if not_read:
            print(f"not read: {kinds(not_read)}", file=sys.stderr)
        program = load_program(
            arguments.model, arguments.runtime, threads=arguments.threads, precision=arguments.precision
        )
        rows = list(predictions(program, files, arguments.top, unreadable))
    if arguments.json:
        said = {
            "model": str(arguments.model),
            "runtime": f"{program.runtime} {program.version}",
            "precision": program.precision,
            "images": [{"file": str(file), "predictions": found} for file, found in rows],
        }
        print(json.dumps(said, indent=1, ensure_ascii=False))
    elif rows:
        print(table(rows))
    if unreadable:
        print("\n".join(f"error: {line}" for line in unreadable), file=sys.stderr)
        sys.exit(WRONG_INPUT)


if __name__ == "__main__":
    with interruptible("nothing is left behind"):
        main()
