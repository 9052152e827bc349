"""Sources of images for tests; in a module, because the writer's process imports what it is given."""

from PIL import Image

from repvgg.data.sources import ImageSource


class First:
    """The first ``count`` images of a source."""

    def __init__(self, source: ImageSource, count: int) -> None:
        self.source, self.count, self.classes = source, count, source.classes
        self.description = f"the first {count} of {source.description}"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.source[index]
