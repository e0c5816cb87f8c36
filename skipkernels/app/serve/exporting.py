"""Export of a tuned model to other libraries."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import open_clip

from ...digests import digest_file
from ...folders import replace_text, replaced_folder, restored
from ..config import TuneConfig
from ..data import InputError
from ..data.files import read_text
from ..data.registry import KINDS, OWN
from ..methods import METHODS
from ..methods.tuned import TunedModel
from ..train import weights
from ..train.checkpoint import HEAD
from ..train.description import CLASSIFIER, Description, write_open_clip_config
from ..train.environment import versions
from ..train.model import OPEN_CLIP, RANDOM
from ..train.model_card import CARD, model_card
from ..train.run_folder import CONFIG, METRICS, read_metrics
from . import to_hugging_face, to_onnx
from .merging import PlainModel, plain_model
from .output import check_exported

Target = Literal["open-clip", "hugging-face", "onnx"]
OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"  # the name that open_clip looks for on the Hub
CLASSES = "classes.json"
# Names of the files of every target, and of transformers' tokenizers: what an earlier export may have left.
_OURS = (
    *(
        CARD,
        CLASSES,
        CLASSIFIER,
        HEAD,
        OPEN_CLIP,
        OPEN_CLIP_WEIGHTS,
        to_onnx.FILE,
        f"{to_onnx.FILE}.data",
    ),
    *("config.json", "model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors"),
    *("preprocessor_config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json", "vocab.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja"),
    "sentencepiece.bpe.model",
)


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
    of code that apply them in OUT/README.md. The folder also has a model card and the names of the
    classes, without local paths.

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
        ['README.md', 'classifier.json']
        >>> model = open_clip.create_model(f"local-dir:{out / 'exported'}")
    """
    if to not in get_args(Target):
        raise InputError(f"export: to must be one of {', '.join(get_args(Target))}; got {to!r}.", "to")
    source, folder = restored(Path(run).expanduser()), Path(out).expanduser()
    check_exported(source, folder, overwrite=overwrite)
    with contextlib.ExitStack() as stack:
        try:
            written = stack.enter_context(replaced_folder(folder, _OURS))
        except OSError as error:
            raise InputError(f"export: out: {folder} can't be written ({error.strerror}).", "out") from error
        plain = plain_model(source, trust=trust)
        write: Callable[[PlainModel, Path], list[str]] = _WRITERS[to]
        described = _shared(plain)
        notes = write(plain, written)
        if plain.head_code and to != "onnx":
            tensors = plain.head.state_dict() if plain.fitted is None else plain.fitted.tensors()
            weights.save_weights(written / HEAD, tensors)
            described = replace(described, head_xxh3=digest_file(written / HEAD))
            _write_classes(written, described)
        elif to == "hugging-face":
            _write_classes(written, described)
        if to == "open-clip" and (plain.fitted is not None or not plain.head_code):
            replace(described, weights_xxh3=digest_file(written / OPEN_CLIP_WEIGHTS)).write(written)
        _write_card(source, written, described, to, plain.head_code if (written / HEAD).exists() else "")
        files = sorted(path.name for path in written.iterdir())
    return Exported(folder, files, notes)


def _write_open_clip(plain: PlainModel, folder: Path) -> list[str]:
    if not write_open_clip_config(folder, plain.model, plain.tokenizer):
        raise InputError(f"export: run must have a model of open_clip; got {type(plain.model).__name__}.", "run")
    weights.save_weights(folder / OPEN_CLIP_WEIGHTS, plain.model.state_dict())
    return []


_WRITERS = {"open-clip": _write_open_clip, "hugging-face": to_hugging_face.write, "onnx": to_onnx.write}


def _write_classes(folder: Path, described: Description) -> None:
    """Write the classes, for use with a library that has no place for them."""
    values = {name: getattr(described, name) for name in ("classes", "templates", "temperature")}
    replace_text(folder / CLASSES, json.dumps(values, indent=2) + "\n")


def _shared(plain: PlainModel) -> Description:
    """Description of an exported model. Each text that may be a path is left out or replaced."""
    described = plain.described
    tuned = issubclass(METHODS[described.method], TunedModel)
    tags = (RANDOM, *open_clip.list_pretrained_tags_by_model(described.model))
    return replace(
        described,
        model=_public(described.model),
        method=described.method if tuned else "zero-shot",
        settings=described.settings if tuned else {},
        data=_public(described.data),
        pretrained=described.pretrained if described.pretrained in (None, *tags) else "file",
        versions={name: described.versions[name] for name in versions() if name in described.versions},
        weights=OPEN_CLIP_WEIGHTS,
        holds=weights.MODEL,
    )


def _public(name: str) -> str:
    """Return the name of a model or a dataset; of own files, only the kind.

    >>> _public("imagefolder:/home/me/photos"), _public("hf-hub:org/name")
    ('imagefolder', 'hf-hub:org/name')
    """
    kind, _, rest = name.partition(":")
    if kind in ("hf", "hf-hub"):
        public = re.fullmatch(r"[\w.-]+(/[\w.-]+)?(\?.*)?", rest) and not Path(rest).exists()
    else:
        public = not re.search(r"[/\\]", rest) and (kind == "dataset" or (kind in KINDS and kind not in OWN))
    return name if public or not rest else kind


def _shared_settings(config: TuneConfig, described: Description) -> TuneConfig:
    """Settings with public names, and without paths."""
    names: dict[str, Any] = {name: getattr(described, name) for name in ("model", "pretrained", "data")}
    if described.data != config.data:  # the path is not shared, and a command needs one
        names["data"] += ":PATH"
    return replace(config, **names, root=None, cache=None, out=None, resume=False, dataset_identity=None)


def _write_card(source: Path, folder: Path, described: Description, to: Target, head_code: str) -> None:
    """Write the model card of an exported run; copy that of an exported folder, which has no settings, if it fits."""
    if not ((source / CONFIG).is_file() and (source / METRICS).is_file()):
        if to == "open-clip" and (source / CARD).is_file():
            replace_text(folder / CARD, read_text(source / CARD))
        return
    config = _shared_settings(TuneConfig.from_yaml(source / CONFIG, trust=True), described)
    card = model_card(config, described, read_metrics(source), use=to, head_code=head_code)
    replace_text(folder / CARD, card)
