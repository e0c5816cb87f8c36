"""Export of an image classifier to ONNX: the image tower with the head of the classes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...formatting import first_line
from ..data import InputError
from ..train.model import quiet
from .loading import TunedRun

FILE = "model.onnx"
_EXTERNAL = 1 << 30  # bytes of weights above which they are in a second file: protobuf ends at 2 GiB


class ImageClassifier(nn.Module):
    """Image tower and head: images [B, 3, H, W] → logits / temperature [B, C], unit-norm image embeddings [B, D]."""

    def __init__(self, run: TunedRun):
        super().__init__()
        self.model, self.head, self.temperature = run.model, run.method.head(), run.described.temperature or 1.0

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the logits and the embeddings."""
        logits, embedding = self.head(self.model.encode_image(pixel_values))
        return logits / self.temperature, embedding


def write(run: TunedRun, folder: Path) -> None:
    """Write model.onnx.

    Its input is pixel_values [batch, 3, H, W], preprocessed as the metadata say. Its outputs are logits [batch, C], of
    which the softmax is the probabilities, and image_embedding [batch, D]. The metadata are "classes" and
    "preprocessing", in JSON.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  needed by torch.onnx
    except ImportError as error:
        raise InputError(f"onnx needs {error.name}: pip install 'skipkernels[onnx]'.", "to", "export") from None
    module, size = ImageClassifier(run).eval(), _image_size(run)
    program = _program(module, size)
    described = {"classes": run.described.classes, "preprocessing": run.described.preprocessing | {"size": size}}
    program.model.metadata_props.update({name: json.dumps(value) for name, value in described.items()})
    external = sum(parameter.nbytes for parameter in module.parameters()) > _EXTERNAL
    program.save(folder / FILE, external_data=external)
    onnx.checker.check_model(folder / FILE)


def _image_size(run: TunedRun) -> list[int]:
    """Height and width of the images of a model."""
    size: Any = run.described.preprocessing.get("size") or getattr(run.model.visual, "image_size", 224)
    return [size, size] if isinstance(size, int) else list(map(int, size))


def _program(module: ImageClassifier, size: list[int]) -> Any:
    """Export to ONNX, for any number of images, without the stack traces that torch.onnx adds."""
    try:
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                module,
                (torch.zeros(2, 3, *size),),
                input_names=["pixel_values"],
                output_names=["logits", "image_embedding"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                verbose=False,
            )
    except RuntimeError as error:
        raise InputError(
            f"torch.onnx can't export the model ({first_line(error)}). Use open-clip.", "run", "export"
        ) from error
    for part in (program.model.graph, *program.model.functions.values()):
        for node in part.all_nodes():
            node.metadata_props.clear()  # stack traces have the paths of source files
    return program
