"""Classification of images by a tuned model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...options import Precision
from ..data import InputError
from ..data.base import check_choice
from ..data.images import read_ahead
from ..devices import autocast
from ..results.files import existing_run
from ..train.calibration import class_probabilities
from .inputs import ImageInput, check_counts, check_threshold, named_images
from .loading import TEST, TunedRun, load_run
from .predictions import Predictions

Unreadable = Literal["raise", "skip"]


class Classifier:
    """A tuned model that classifies images, loaded from a run folder by `Classifier.load`.

        p_c = softmax over c of (exp(logit_scale) · ⟨x̂, t̂_c⟩ / temperature)

    t̂_c is the unit-norm mean of the prompts of class c; a method may compute other logits. The temperature was fitted
    on held-out images when the model was tuned; without such images, and for other classes or prompts, it is 1. With a
    threshold, "none of these" is one more class, with a constant logit from the same images.

    Attributes:
        classes: Names of the classes.
        temperature: Divisor of the logits.
        calibrated: True if the temperature was fitted on held-out images, with the same classes and prompts.
        none_logit: Logit of "none of these" after the temperature, which is used with a threshold; None without
            held-out images, and for other classes or prompts.
        transform: Transform of an RGB image to a tensor [3, H, W].

    Example:
        >>> import logging, tempfile; logging.disable()
        >>> from pathlib import Path
        >>> import torch, skipkernels as sk
        >>> run = Path(tempfile.mkdtemp(), "run")
        >>> _ = sk.tune(sk.TuneConfig(data="pictograms:food", shots=1, max_classes=4, epochs=1, device="cpu", out=run))
        >>> classifier = sk.Classifier.load(run, device="cpu")
        >>> found = classifier.predict(torch.zeros(3, 3, 32, 32), top=2)
        >>> found.ids.shape, len(classifier.classes), found[0][0], len(found[0][1])
        (torch.Size([3, 2]), 2, '0', 2)
        >>> classifier.predict(torch.zeros(3, 3, 32, 32), threshold=1).known.tolist()
        [False, False, False]
    """

    def __init__(self, run: TunedRun):
        self._run = run
        self.classes = run.classes
        self.transform = run.transform
        self.calibrated = run.described.temperature is not None
        self.temperature = run.described.temperature or 1.0
        self.none_logit = run.described.none_logit

    @classmethod
    def load(
        cls,
        run: str | Path,
        *,
        classes: Sequence[str] | None = None,
        templates: str | Sequence[str] | None = None,
        device: str | torch.device | None = None,
        precision: Precision = "auto",
        trust: bool = False,
    ) -> Classifier:
        """Load the classifier of a run, or of a folder that `export` or `blend` wrote.

        The training data are not needed. The base model is needed only for the folder of zero-shot, or of a method
        that adds weights to it, such as lora.

        Args:
            run: Run folder.
            classes: Names in place of those of the trained classes. A trained class keeps its row of a head, others are
                recognised by their text alone; probabilities are not calibrated. Default: the trained classes.
            templates: Prompt templates, each with one {}. Default: those of the run; with other templates,
                probabilities are not calibrated.
            device: Device. Default: "cuda" or "mps" if there is one, else "cpu".
            precision: "fp32", "bf16", "fp16" or "auto": bf16 on a GPU that has it, else fp32.
            trust: Load what the files in the folder name: models of the hub, models and weights in other folders.
                Code in the folder never runs.

        Raises:
            InputError: If the folder does not hold a tuned model, or is damaged, or is not trusted and names such a
                source, or an argument can't be used.
        """
        folder = existing_run(run, "Classifier.load")
        found = load_run(folder, classes=classes, templates=templates, device=device, precision=precision, trust=trust)
        classifier = cls(found)
        if classes is not None:  # an error now, before any image is read
            classifier._logits_of(classifier.class_embeddings()[:1])
        return classifier

    def __repr__(self) -> str:
        described = self._run.described
        name = f"{described.model} by {described.classifier or described.method}"
        calibrated = "calibrated" if self.calibrated else "not calibrated"
        return f"Classifier({len(self.classes)} classes, {name}, {calibrated}, {self.device})"

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self._run.model.logit_scale.device

    def predict(
        self,
        images: ImageInput | Iterable[ImageInput],
        *,
        top: int = 5,
        threshold: float | None = None,
        batch_size: int = 64,
        unreadable: Unreadable = "raise",
    ) -> Predictions:
        """Classify images.

        Args:
            images: An image or a list of images: paths, images of Pillow, uint8 arrays [H, W] or [H, W, 3] in the order
                RGB (`image[..., ::-1]` of OpenCV's) or [H, W, 4], and uint8 tensors [3, H, W]. Or the path of a folder,
                for all images in it. Or a floating-point tensor [N, 3, H, W], preprocessed by `transform`.
            top: Number of classes for each image; all classes if there are fewer.
            threshold: Smallest probability, from 0 to 1, of the best class of an image that has a class: `known` of the
                result is False for the others. report.html has thresholds and their accuracy on validation images.
            batch_size: Images per forward pass.
            unreadable: "skip" leaves out files that can't be read and lists them in the result; "raise" raises.

        Returns:
            Predictions: Classes and probabilities of N images.

        Raises:
            InputError: If an image can't be read, or an argument can't be used.
            FloatingPointError: If a logit is not finite.
        """
        batches = self.predict_batches(
            images, top=top, threshold=threshold, batch_size=batch_size, unreadable=unreadable
        )
        return Predictions.joined(list(batches))

    def predict_batches(
        self,
        images: ImageInput | Iterable[ImageInput],
        *,
        top: int = 5,
        threshold: float | None = None,
        batch_size: int = 64,
        unreadable: Unreadable = "raise",
    ) -> Iterator[Predictions]:
        """Classify images batch by batch, with the arguments and errors of `predict`; no images are an empty batch."""
        check_counts(top=top, batch_size=batch_size)
        check_threshold(threshold)
        check_choice(unreadable, Unreadable, "unreadable", "Classifier.predict")
        names, load = named_images(images, self.transform)

        def batches() -> Iterator[Predictions]:
            loaded = read_ahead(load, len(names), ahead=2 * batch_size)
            for start in range(0, max(len(names), 1), batch_size):
                batch = zip(names[start : start + batch_size], loaded, strict=False)
                yield self._classify(*_readable(batch, unreadable), top, threshold)

        return batches()

    def _classify(
        self, names: list[str], images: list[Tensor], reasons: dict[str, str], top: int, threshold: float | None
    ) -> Predictions:
        """Classify preprocessed images [3, H, W]; `reasons` are those of files that could not be read."""
        embeddings = self._embed(torch.stack(images)) if images else self.class_embeddings()[:0]  # [B, D]
        none_logit = None if threshold is None else self.none_logit
        scores = class_probabilities(self._logits_of(embeddings), self.temperature, none_logit)  # [B, C]
        probabilities, ids = (found.cpu() for found in scores.topk(min(top, len(self.classes)), dim=1))
        _check_finite(names, probabilities)
        embeddings = F.normalize(embeddings.float(), dim=1).cpu()
        return Predictions(names, ids, probabilities, embeddings, self.classes, reasons, threshold, self.calibrated)

    def logits(self, images: Tensor) -> Tensor:
        """Logits [B, C] before the temperature, of preprocessed images [B, 3, H, W]."""
        return self._logits_of(self._embed(images))

    def embed(self, images: Tensor) -> Tensor:
        """Unit-norm image embeddings [B, D] in fp32 of preprocessed images [B, 3, H, W]."""
        return F.normalize(self._embed(images).float(), dim=-1)

    @torch.no_grad()
    def class_embeddings(self) -> Tensor:
        """Unit-norm embeddings of the classes, [C, D]."""
        with autocast(self._run.precision, self.device):
            return self._run.method.class_embeddings(TEST)

    @torch.no_grad()
    def _embed(self, images: Tensor) -> Tensor:
        """Image embeddings [B, D] of any norm."""
        with autocast(self._run.precision, self.device):
            return self._run.method.embed(self._run.method.encode_frozen(images.to(self.device)))

    def _logits_of(self, embeddings: Tensor) -> Tensor:
        """Logits [B, C] before the temperature, by the result of `_embed`."""
        method = self._run.method
        with autocast(self._run.precision, self.device):
            logits = method.logits_of(TEST, embeddings)
        if logits is None:
            raise InputError(
                "must be trained classes: a linear probe does not use texts.", "classes", "Classifier.load"
            )
        return logits


def _readable(
    batch: Iterable[tuple[str, Tensor | Exception]], unreadable: Unreadable
) -> tuple[list[str], list[Tensor], dict[str, str]]:
    """Return names and images of those of a batch that could be read, and the reason by name for the others."""
    names: list[str] = []
    images: list[Tensor] = []
    reasons: dict[str, str] = {}
    for name, image in batch:
        if not isinstance(image, Exception):
            names.append(name)
            images.append(image)
        elif unreadable == "raise" or not isinstance(image, InputError) or image.argument is not None:
            raise image
        else:
            reasons[name] = str(image).removeprefix(f"{name}: ")
    return names, images, reasons


def _check_finite(names: Sequence[str], probabilities: Tensor) -> None:
    """Raise a FloatingPointError that names the first image with a probability of NaN: a logit is NaN or +∞."""
    finite = probabilities.isfinite().all(dim=1)
    if not finite.all():
        name = names[finite.tolist().index(False)]
        raise FloatingPointError(
            f"Classifier.predict: logits of image {name} are not finite. Use `precision=fp32`; if they are not "
            "finite in fp32 either, the image or the weights have values that are not finite."
        )
