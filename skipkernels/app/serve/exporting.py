"""Export of a tuned model to other libraries."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

from ...digests import digest_file
from ...folders import replace_tensors, replace_text, replaced_files
from ..config import CONFIG, TuneConfig
from ..data import InputError
from ..data.base import check_choice
from ..data.files import expanded
from ..results.files import CARD, HEAD, METRICS, check_writable, existing_run, read_metrics, writing
from ..train.checkpoint import FOLDER as CHECKPOINT
from ..train.description import Description, write_open_clip_config
from ..train.model_card import model_card
from ..train.reading import has_run
from ..untrusted import read_object
from . import to_hugging_face, to_onnx
from .loading import TunedRun, load_plain
from .public import public_config, public_description

Target = Literal["open-clip", "hugging-face", "onnx"]
OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"  # the name that open_clip looks for on the Hub
CLASSES = "classes.json"


class Exported(NamedTuple):
    """Result of `export`."""

    folder: Path  # Folder of the files
    files: list[str]  # Their names
    notes: list[str]  # Differences from the tuned model


def export(
    run: str | Path,
    to: Target,
    out: str | Path,
    *,
    overwrite: bool = False,
    trust: bool = False,
) -> Exported:
    """Write a tuned model for another library.

    - "open-clip": `open_clip.create_model("local-dir:OUT")`, and `sk.Classifier.load(OUT)`.
    - "hugging-face": `transformers.CLIPModel.from_pretrained(OUT)` and `CLIPProcessor`. For CLIPs with vision
      transformers and CLIP's tokenizer; another model is refused by name. The embeddings of both are compared.
    - "onnx": OUT/model.onnx, an image classifier: image tower, class embeddings, temperature; the names of the classes
      and the preprocessing are in its metadata.

    LoRA is merged into the weights. A CLIP has no place for the head of a run (`tune --head`), or for what methods such
    as linear-probe train: ONNX has it, and the other targets have these weights in OUT/head.safetensors, and the lines
    of code that apply them in OUT/README.md, a model card. OUT/classes.json has the names of the classes, their prompt
    templates and the temperature. No file has local paths.

    Args:
        run: Folder of a run, or one that `blend` wrote.
        to: "open-clip", "hugging-face" or "onnx".
        out: Folder to write; new or empty.
        overwrite: Write into a folder with files. An earlier export in it is replaced; other files are kept. The folder
            of a run is refused.
        trust: See `Classifier.load`.

    Raises:
        InputError: If the run can't be read or exported, a package is missing, or an argument can't be used.

    Example:
        >>> import logging, tempfile; logging.disable()
        >>> import open_clip, skipkernels as sk
        >>> out = Path(tempfile.mkdtemp())
        >>> config = sk.TuneConfig(data="pictograms:food", method="skip", max_classes=4, epochs=1, out=out / "run")
        >>> _ = sk.tune(config, device="cpu")
        >>> sorted(sk.export(out / "run", "open-clip", out / "exported").files)[:2]
        ['README.md', 'classes.json']
        >>> model = open_clip.create_model(f"local-dir:{out / 'exported'}")
    """
    check_choice(to, Target, "to", "export")
    source, folder = existing_run(run, "export"), expanded(out)
    _check_folders(source, folder, overwrite=overwrite)
    loaded = load_plain(source, trust=trust)
    with writing(folder, "out", "export"), replaced_files(folder, _earlier_files(folder)) as written:
        notes = _write_files(loaded, source, to, written)
        files = sorted([*(path.name for path in written.iterdir()), CLASSES])
        values = {name: getattr(loaded.described, name) for name in ("classes", "templates", "temperature")}
        replace_text(written / CLASSES, json.dumps(values | {"files": files}, indent=2) + "\n")
    return Exported(folder, files, notes)


def _check_folders(run: Path, out: Path, *, overwrite: bool) -> None:
    """Check the folders before the work is done."""
    check_writable(out, "out", "export")
    if not overwrite and out.is_dir() and any(out.iterdir()):
        raise InputError(f"must be a new or an empty folder; got {out}. Use `overwrite=True`.", "out", "export")
    if has_run(out) or (out / CHECKPOINT).exists() or out.resolve() == run.resolve():
        raise InputError(f"must not be the folder of a run; got {out}. Choose another.", "out", "export")


def _earlier_files(folder: Path) -> list[str]:
    """Names of the files of an earlier export in a folder."""
    try:
        return [str(name) for name in read_object(folder / CLASSES)["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _write_files(run: TunedRun, source: Path, to: Target, folder: Path) -> list[str]:
    """Write the files of an export but `CLASSES`, and return its notes."""
    notes = _write_model(run, to, folder)
    described, fitted = public_description(run, OPEN_CLIP_WEIGHTS), run.method.fitted
    head_code = "" if to == "onnx" else run.method.head_code  # the file for ONNX has the head
    if head_code:
        replace_tensors(folder / HEAD, run.method.head().state_dict() if fitted is None else fitted.tensors())
        described = replace(described, head_xxh3=digest_file(folder / HEAD))
    if to == "open-clip" and (fitted is not None or not head_code):  # `Classifier.load` can read it
        replace(described, weights_xxh3=digest_file(folder / OPEN_CLIP_WEIGHTS)).write(folder)
    _write_card(source, folder, described, to, head_code)
    return notes


def _write_model(run: TunedRun, to: Target, folder: Path) -> list[str]:
    """Write the model in the format of a target, and return notes on differences."""
    if to == "hugging-face":
        return to_hugging_face.write(run, folder)
    if to == "onnx":
        to_onnx.write(run, folder)
        return []
    if not write_open_clip_config(folder, run.model, run.tokenizer):
        raise InputError(f"must have a model of open_clip; got {type(run.model).__name__}.", "run", "export")
    replace_tensors(folder / OPEN_CLIP_WEIGHTS, run.model.state_dict())
    return []


def _write_card(source: Path, folder: Path, described: Description, to: Target, head_code: str) -> None:
    """Write the model card of a complete run."""
    if (source / CONFIG).is_file() and (source / METRICS).is_file():
        config = public_config(TuneConfig.from_yaml(source / CONFIG, trust=True), described)  # nothing is loaded
        card = model_card(config, described, read_metrics(source), use=to, head_code=head_code)
        replace_text(folder / CARD, card)
