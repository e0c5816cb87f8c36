"""Images with their embeddings by a tuned model, such as the training images of its run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from ...folders import restored
from ...retrieval import top_k_logits
from ..config import TuneConfig
from ..data import InputError
from ..data.images import Images, read_all, reason_of
from ..report.mistakes import encoded
from ..train.own_dataset import KIND
from ..train.run_folder import CONFIG
from ..train.setup import BATCH, build_task
from .classifier import Classifier


@dataclass(frozen=True)
class EmbeddedImages:
    """The n images of a dataset that can be read.

    Attributes:
        names: Name of each image, such as its path in the folder of the data.
        labels: Class of each image, int64 [n], as positions in `classes`.
        classes: Names of the classes.
        embeddings: Unit-norm embeddings [n, D] by the model of the run, on the CPU.
        thumbnails: Small copy of each image, as a PNG or JPEG file.
        unreadable: Reason by name for images that can't be read.
    """

    names: list[str]
    labels: Tensor
    classes: list[str]
    embeddings: Tensor
    thumbnails: list[bytes]
    unreadable: dict[str, str]

    def __len__(self) -> int:
        return len(self.names)

    def nearest(self, embeddings: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Cosines [B, count] to the nearest images, descending, and their numbers, for embeddings [B, D]."""
        return top_k_logits(embeddings.cpu(), self.embeddings, min(count, len(self)))


def find_training_images(run: Path, *, trust: bool = False) -> tuple[Images, list[str]]:
    """Find the training images of a run in its data, without reading them; return them and the names of the classes.

    Raises:
        InputError: If the run names no data that can be found, or is not trusted and names a dataset of the hub.
    """
    folder = restored(run.expanduser())
    config = TuneConfig.from_yaml(folder / CONFIG, trust=trust, given=("model", "pretrained"))
    if config.data.partition(":")[0] == KIND:
        raise InputError(f"{folder}: its training images were passed to `tune` in Python.")
    task = build_task(replace(config, trust=trust, unreadable="error"))  # "skip" reads all images
    return task.train, list(task.tests[0].classes)


def embed_images(
    classifier: Classifier, images: Images, classes: list[str], advance: Callable[[float], None]
) -> EmbeddedImages:
    """Read images and compute their embeddings; one that can't be read is left out.

    `advance` is called with the number of images of each batch.
    """
    read = read_all(images, lambda image: (classifier.transform(image), encoded(image)))
    names: list[str] = []
    labels: list[int] = []
    thumbnails: list[bytes] = []
    embeddings: list[Tensor] = []
    unreadable: dict[str, str] = {}
    for start in range(0, len(images), BATCH):
        found = list(enumerate(islice(read, BATCH), start))
        good = [(index, each) for index, each in found if not isinstance(each, Exception)]
        wrong = [(images.names[index], each) for index, each in found if isinstance(each, Exception)]
        for name, error in wrong:
            reason = reason_of(error, name)
            unreadable[name] = reason.partition(f"{name}: ")[2] or reason  # before it is the folder of the data
        names += [images.names[index] for index, _ in good]
        labels += [images.labels[index] for index, _ in good]
        thumbnails += [thumbnail for _, (_, thumbnail) in good]
        if good:
            embeddings.append(classifier.embed(torch.stack([tensor for _, (tensor, _) in good])).cpu())
        advance(len(found))
    if not names:
        raise InputError("none of the images can be read.")
    return EmbeddedImages(names, torch.tensor(labels), classes, torch.cat(embeddings), thumbnails, unreadable)
