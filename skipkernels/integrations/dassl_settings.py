"""Settings of `integrations.dassl` in a Dassl configuration: options, published settings, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

from .. import published
from ..options import Protocol

DEFAULTS: dict[str, Any] = {
    "SKIP_LAYERS": 6,  # blocks skipped in each tower
    "KEEP_RATIO": 0.5,
    "MAX_KEEP": 50,
    "DECAY": 0.3,
    "TAIL": "resample",
    "MAX_TAIL": -1,  # -1: no bound
    "TEMPLATE": "",  # prompt with {} for the class name; empty: that of the paper for DATASET.NAME
    "TEXT_LR": -1.0,  # learning rates of the towers; -1: OPTIM.LR
    "IMAGE_LR": -1.0,
    "SAMPLER": "class_pure",  # batches of one class, as published, or "": those of DATALOADER.TRAIN_X.SAMPLER
    "PREC": "fp32",  # "fp32", or "amp" for autocast in bf16
    "MEMORY": "auto",
}
"""Options of `cfg.TRAINER.SKIPKERNELS`; what they mean is in `SkipCLIP`."""

# Options of other trainers, among them the published one (SKIP), and those of `DEFAULTS` that they must equal
_SAME = {
    "PREC": "PREC",
    "SKIP.START_LAYER": "SKIP_LAYERS",
    "SKIP.TOP_RATIO": "KEEP_RATIO",
    "SKIP.MAX_TOP": "MAX_KEEP",
    "SKIP.LAMBDA": "DECAY",
}


def extend_cfg(cfg: Any) -> None:
    """Add the node TRAINER.SKIPKERNELS with its defaults to a Dassl configuration, before files are merged."""
    node = type(cfg)()
    for name, value in DEFAULTS.items():
        setattr(node, name, value)
    cfg.TRAINER.SKIPKERNELS = node


def set_published(cfg: Any, protocol: Protocol = "base-to-new") -> None:
    """Set the published settings of Skip Tuning for DATASET.NAME, but fp32 for fp16.

    Call it after the file of the dataset is merged, and before the options of the command line, which take precedence.
    TEMPLATE and MEMORY of TRAINER.SKIPKERNELS keep what the file set.

    Args:
        cfg: Dassl configuration.
        protocol: "base-to-new", "cross-dataset", "domain-generalization" or "few-shot".
    """
    rates = published.rates(protocol, cfg.DATASET.NAME.lower())
    settings = {
        "OPTIM.NAME": "sgd",
        "OPTIM.LR": rates.text_lr,
        "OPTIM.MOMENTUM": published.MOMENTUM,
        "OPTIM.WEIGHT_DECAY": published.WEIGHT_DECAY,
        "OPTIM.MAX_EPOCH": rates.epochs,
        "OPTIM.LR_SCHEDULER": "cosine",
        "OPTIM.WARMUP_EPOCH": rates.warmup_epochs,
        "OPTIM.WARMUP_TYPE": "constant",
        "OPTIM.WARMUP_CONS_LR": rates.warmup_lr,
        "OPTIM.WARMUP_RECOUNT": True,
        "OPTIM.STAGED_LR": False,
        "DATALOADER.TRAIN_X.SAMPLER": "RandomSampler",
        "DATALOADER.TRAIN_X.BATCH_SIZE": published.BATCH_SIZE,
        "INPUT.SIZE": (224, 224),
        "INPUT.INTERPOLATION": "bicubic",
        "INPUT.PIXEL_MEAN": list(OPENAI_DATASET_MEAN),
        "INPUT.PIXEL_STD": list(OPENAI_DATASET_STD),
        "INPUT.TRANSFORMS": ("random_resized_crop", "random_flip", "normalize"),
        "MODEL.BACKBONE.NAME": "ViT-B/16",
    }
    if hasattr(cfg.TRAINER, "PREC"):
        settings["TRAINER.PREC"] = "fp32"
    own = DEFAULTS | {"TEXT_LR": rates.text_lr, "IMAGE_LR": rates.image_lr, "TAIL": "fixed"}
    for name, value in own.items():
        if name not in ("TEMPLATE", "MEMORY"):
            settings[f"TRAINER.SKIPKERNELS.{name}"] = value
    if not hasattr(cfg.TRAINER, "SKIPKERNELS"):
        extend_cfg(cfg)
    cfg.merge_from_list([part for setting in settings.items() for part in setting])


def option(cfg: Any, name: str) -> Any:
    """Value of an option; its default without the node TRAINER.SKIPKERNELS."""
    return getattr(getattr(cfg.TRAINER, "SKIPKERNELS", None), name, DEFAULTS[name])


def rate(cfg: Any, name: str) -> float:
    """Learning rate TEXT_LR or IMAGE_LR of a tower."""
    return cfg.OPTIM.LR if option(cfg, name) < 0 else option(cfg, name)


def template(cfg: Any) -> str:
    """Template of the options or of DATASET.NAME, the name of a class of CoOp such as OxfordPets."""
    names = {name.replace("_", ""): name for name in published.PAPER} | {"describabletextures": "dtd"}
    of_dataset = published.PAPER.get(names.get(cfg.DATASET.NAME.lower(), ""), published.PHOTO)
    return option(cfg, "TEMPLATE") or of_dataset


def problems(cfg: Any) -> Iterator[str]:
    """Settings that would be ignored or are unknown, each as a sentence with a remedy."""
    optim, sampler = cfg.OPTIM, cfg.DATALOADER.TRAIN_X.SAMPLER
    for path, name in _SAME.items():
        theirs, ours = _read(cfg.TRAINER, path), option(cfg, name)
        if theirs not in (None, ours):
            yield f"TRAINER.{path} is {theirs!r} and TRAINER.SKIPKERNELS.{name} {ours!r}: give both the same value."
    if _read(cfg.TRAINER, "SKIP.DROP_RATIO"):
        yield "TRAINER.SKIP.DROP_RATIO must be 0: no tokens are dropped."
    if optim.STAGED_LR:
        yield "OPTIM.STAGED_LR must be False: TRAINER.SKIPKERNELS.TEXT_LR and IMAGE_LR are the rates of the towers."
    if optim.WARMUP_EPOCH > 0:
        kind = optim.LR_SCHEDULER, optim.WARMUP_TYPE, optim.WARMUP_RECOUNT
        if kind != ("cosine", "constant", True):
            yield (
                'With OPTIM.WARMUP_EPOCH, LR_SCHEDULER must be "cosine", WARMUP_TYPE "constant" and WARMUP_RECOUNT '
                f"True; got {kind!r}."
            )
        if optim.WARMUP_CONS_LR > min(rate(cfg, "TEXT_LR"), rate(cfg, "IMAGE_LR")):
            yield f"OPTIM.WARMUP_CONS_LR must be at most the rate of each tower; got {optim.WARMUP_CONS_LR}."
    if ":" in cfg.MODEL.BACKBONE.NAME:
        yield (
            "MODEL.BACKBONE.NAME must be a model that open_clip itself describes: hf-hub: and local-dir: name files of "
            "others, which may name code. Override load_clip for them."
        )
    if option(cfg, "SAMPLER") not in ("class_pure", ""):
        yield f'TRAINER.SKIPKERNELS.SAMPLER must be "class_pure" or ""; got {option(cfg, "SAMPLER")!r}.'
    elif option(cfg, "SAMPLER") and sampler != "RandomSampler":
        yield f'For DATALOADER.TRAIN_X.SAMPLER {sampler} set TRAINER.SKIPKERNELS.SAMPLER "".'
    if option(cfg, "PREC") not in ("fp32", "amp"):
        yield f'TRAINER.SKIPKERNELS.PREC must be "fp32" or "amp"; got {option(cfg, "PREC")!r}.'


def _read(node: Any, path: str) -> Any:
    """Value at a path of names below a node, or None."""
    for name in path.split("."):
        node = getattr(node, name, None)
    return node
