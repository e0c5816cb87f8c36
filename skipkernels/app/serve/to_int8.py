"""int8 weights for an exported ONNX classifier, and a comparison of both on images."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..._progress import progress
from ...folders import replaced_file
from ..config import TuneConfig
from ..data import InputError
from ..data.files import find_images
from ..data.images import read_ahead, read_image
from ..train.model import quiet
from ..train.run_folder import CONFIG
from ..train.setup import build_task
from . import to_onnx
from .merging import PlainModel

FILE = "model.int8.onnx"
_BATCH = 32


class Comparison(NamedTuple):
    """An ONNX file with int8 weights beside the one in fp32, on the same images."""

    images: int  # Number of images
    source: str  # What the images are: "test images (all)"
    fp32_accuracy: float | None  # In per cent; None for images without labels
    int8_accuracy: float | None
    agreement: float  # Images with the same best class in both, in per cent
    fp32_bytes: int  # Size of the files
    int8_bytes: int

    def __str__(self) -> str:
        files = [(to_onnx.FILE, self.fp32_bytes, self.fp32_accuracy), (FILE, self.int8_bytes, self.int8_accuracy)]
        parts = [
            f"{name}: {size / 1e6:.1f} MB" + ("" if accuracy is None else f", {accuracy:.2f} % right")
            for name, size, accuracy in files
        ]
        same = f"the same class for {self.agreement:.2f} % of {self.images:,} {self.source}"
        return "; ".join([*parts, same])


def write(plain: PlainModel, folder: Path, source: Path, images: Path | None, trust: bool) -> Comparison:
    """Write model.int8.onnx beside model.onnx, with the comparison in its metadata.

    Weights of matrix products in the image tower are int8 with a scale for each output; their inputs are quantised when
    the model runs. Convolutions, attention between tokens, norms and the head stay in fp32.

    Args:
        plain: The model.
        folder: Folder with model.onnx.
        source: Folder of the run, of which the test images are read, or else the validation images.
        images: Folder of other images, or an image, for a comparison without labels.
        trust: See `Classifier.load`.
    """
    try:
        import onnx
        import onnxruntime
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise InputError(f"export: int8 needs {error.name}: pip install 'skipkernels[onnx]'.", "int8") from None
    read, labels, of = _of_run(plain, source, trust) if images is None else _given(plain, images)
    fp32, int8 = folder / to_onnx.FILE, folder / FILE
    external = fp32.with_name(f"{fp32.name}.data")
    graph = onnx.load(fp32, load_external_data=False).graph
    head = [node.name for node in graph.node if node.name.startswith(to_onnx.HEAD)]
    head += [f"{name}_MatMul" for name in head]  # the name of a Gemm, which is split first
    with quiet():
        quantize_dynamic(
            fp32,
            int8,
            per_channel=True,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_exclude=head,
            use_external_data_format=external.exists(),
        )
    sizes = [sum(p.stat().st_size for p in folder.glob(f"{path.name}*")) for path in (fp32, int8)]
    with progress(f"fp32 and int8 on {of}", len(labels)) as advance:
        sessions = [onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in (fp32, int8)]
        found = _best(sessions, read, len(labels), advance)
    known = np.array(labels)
    fp32_accuracy, int8_accuracy = (
        None if None in labels else round(100 * float((best == known).mean()), 4) for best in found
    )
    agreement = round(100 * float((found[0] == found[1]).mean()), 4)
    comparison = Comparison(len(labels), of, fp32_accuracy, int8_accuracy, agreement, sizes[0], sizes[1])
    model = onnx.load(int8, load_external_data=False)
    onnx.helper.set_model_props(
        model, {p.key: p.value for p in model.metadata_props} | {"int8": json.dumps(comparison._asdict())}
    )
    with replaced_file(int8) as new:
        new.write_bytes(model.SerializeToString())
    return comparison


def _best(sessions: list[Any], read: Callable[[int], Any], count: int, advance: Callable) -> list[np.ndarray]:
    """Best class of each image, by each session."""
    found: list[list[np.ndarray]] = [[] for _ in sessions]
    decoded = read_ahead(read, count, ahead=2 * _BATCH)
    for start in range(0, count, _BATCH):
        batch = [next(decoded) for _ in range(min(_BATCH, count - start))]
        for image in batch:
            if isinstance(image, Exception):
                raise image
        pixels = np.stack([np.asarray(image) for image in batch])
        for best, session in zip(found, sessions, strict=True):
            best.append(session.run(["logits"], {"pixel_values": pixels})[0].argmax(axis=1))
        advance(len(batch))
    return [np.concatenate(best) for best in found]


def _given(plain: PlainModel, images: Path) -> tuple[Callable[[int], Any], list[Any], str]:
    path = images.expanduser()
    paths = [path / name for name, _ in find_images(path, {"": 0})[0]] if path.is_dir() else [path]
    if not paths:
        raise InputError(f"export: images must be a folder with images; {path} has none.", "images")
    return lambda number: read_image(paths[number], plain.transform), [None] * len(paths), "given images"


def _of_run(plain: PlainModel, source: Path, trust: bool) -> tuple[Callable[[int], Any], list[Any], str]:
    """Test images of a run with the trained classes, or its validation images, their labels, and what they are."""
    try:
        config = TuneConfig.from_yaml(source / CONFIG, trust=trust)
        changes: dict[str, Any] = {"cache": None, "refresh": "never", "download": False, "device": "cpu"}
        task = build_task(replace(config, trust=trust, **changes).resolved(), plain.transform)
    except InputError as error:
        raise InputError(
            f"export: int8 compares both files on images, and those of the run can't be read: {error} Or give "
            "`images`, a folder of others.",
            "int8",
        ) from error
    test, kind = task.tests[0], f"test images ({task.tests[0].name})"
    if not len(test.images) and task.validation is not None:
        test, kind = task.validation, "validation images"
    if not len(test.images) or list(test.classes) != plain.described.classes:
        raise InputError(
            "export: int8 compares both files on images, and the run has none of its classes. Give `images`, a folder "
            "of others.",
            "int8",
        )
    images: Any = test.images
    return lambda number: images[number][0], list(images.labels), kind
