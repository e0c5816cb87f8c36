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
    module = ImageClassifier(run).eval()
    size: Any = run.described.preprocessing.get("size") or getattr(run.model.visual, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else map(int, size)
    images = torch.zeros(2, 3, height, width)
    try:
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                module,
                (images,),
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
    described = run.described
    values = {
        "classes": described.classes,
        "preprocessing": described.preprocessing | {"size": [height, width]},
    }
    for part in (program.model.graph, *program.model.functions.values()):
        for node in part.all_nodes():
            node.metadata_props.clear()  # stack traces, with the paths of source files
    program.model.metadata_props.update({name: json.dumps(value) for name, value in values.items()})
    path = folder / FILE
    external = sum(p.nbytes for p in module.parameters()) > _EXTERNAL
    program.save(path, external_data=external)
    onnx.checker.check_model(path)
