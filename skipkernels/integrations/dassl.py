"""SkipCLIP as a trainer of Dassl, in the layout of CoOp and the projects that derive from it.

`import skipkernels.integrations.dassl` in a project's `train.py` registers it: `--trainer SkipKernels`. For options,
call `extend_cfg(cfg)` where the project extends its configuration; `set_published(cfg)` has the published settings.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .. import published
from ..checks import warn_caller
from ..clip import SkipCLIP
from ..features import BatchSampler
from ..options import Protocol

try:
    from dassl.engine import TRAINER_REGISTRY, TrainerX
    from dassl.optim import build_lr_scheduler, build_optimizer
    from dassl.utils import load_checkpoint
except ImportError as error:
    raise ImportError(
        f"skipkernels.integrations.dassl: needs Dassl ({error}). It is on no package index: install "
        "https://github.com/KaiyangZhou/Dassl.pytorch, and import this module in the train.py that uses it."
    ) from error

__all__ = ["DEFAULTS", "SkipKernels", "class_pure_loader", "extend_cfg", "set_published"]

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


PUBLISHED_NAMES = {"START_LAYER": "SKIP_LAYERS", "TOP_RATIO": "KEEP_RATIO", "MAX_TOP": "MAX_KEEP", "LAMBDA": "DECAY"}
"""Names of options of `cfg.TRAINER.SKIP` in the published code, and of the same ones in `DEFAULTS`."""


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
    rates = published.RATES[protocol]
    fewer = 4 if cfg.DATASET.NAME in ("ImageNet", "SUN397", "Food101") else 1
    settings = {
        "OPTIM.NAME": "sgd",
        "OPTIM.LR": rates.text_lr,
        "OPTIM.MOMENTUM": published.MOMENTUM,
        "OPTIM.WEIGHT_DECAY": published.WEIGHT_DECAY,
        "OPTIM.MAX_EPOCH": rates.epochs // fewer,
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
    own = {"TEXT_LR": rates.text_lr, "IMAGE_LR": rates.image_lr, "TAIL": "fixed"}
    for name, value in (DEFAULTS | own).items():
        if name not in ("TEMPLATE", "MEMORY"):
            settings[f"TRAINER.SKIPKERNELS.{name}"] = value
    if not hasattr(cfg.TRAINER, "SKIPKERNELS"):
        extend_cfg(cfg)
    cfg.merge_from_list([part for setting in settings.items() for part in setting])


def class_pure_loader(loader: DataLoader, seed: int) -> DataLoader:
    """Return a loader of the same images of Dassl, in batches of one class; see `features.BatchSampler`."""
    dataset: Any = loader.dataset
    labels, generator = [item.label for item in dataset.data_source], torch.Generator().manual_seed(max(seed, 0))
    order = BatchSampler(torch.tensor(labels), loader.batch_size or 1, "class_pure", generator)
    return DataLoader(dataset, batch_sampler=order, num_workers=loader.num_workers, pin_memory=loader.pin_memory)


@TRAINER_REGISTRY.register()
class SkipKernels(TrainerX):
    """Skip Tuning in Dassl: all images are labelled, the classes are those of the dataset.

    Checkpoints are Dassl's own. They hold the state of the class sampler, but not the order of the images. `load_model`
    also accepts a checkpoint of other classes, as in base-to-new evaluation: then it loads the weights alone.

    `make_clip`, `load_clip` and `prompts` may be overridden for other settings, another model or other prompts.
    """

    model: SkipCLIP
    train_loader_x: DataLoader

    def check_cfg(self, cfg: Any) -> None:
        """Raise a ValueError that lists the settings that this trainer would ignore or does not know."""
        if problems := list(_problems(cfg)):
            raise ValueError("SkipKernels: " + " ".join(problems))

    def build_data_loader(self) -> None:
        """Load the data as Dassl does, for training in batches of one class unless SAMPLER is empty."""
        super().build_data_loader()
        if _option(self.cfg, "SAMPLER"):
            self.train_loader_x = class_pure_loader(self.train_loader_x, self.cfg.SEED)

    def build_model(self) -> None:
        """Register the model of `make_clip` with an optimizer and a scheduler."""
        cfg = self.cfg.OPTIM
        self.model = self.make_clip()
        groups = self.model.parameter_groups(text_lr=_rate(self.cfg, "TEXT_LR"), image_lr=_rate(self.cfg, "IMAGE_LR"))
        self.optim = build_optimizer(self.model, cfg, param_groups=groups)
        if cfg.WARMUP_EPOCH > 0:  # Dassl's own passes `verbose` to a schedule of PyTorch without this argument
            self.sched = published.cosine_with_warmup(
                self.optim, epochs=cfg.MAX_EPOCH, warmup_epochs=cfg.WARMUP_EPOCH, warmup_lr=cfg.WARMUP_CONS_LR
            )
        else:
            self.sched = build_lr_scheduler(self.optim, cfg)
        self.register_model("model", self.model, self.optim, self.sched)

    def make_clip(self) -> SkipCLIP:
        """Return SkipCLIP around the model of `load_clip`, for the classes of the dataset."""
        cfg = self.cfg
        model, tokenize = self.load_clip()
        return SkipCLIP(
            model.float().to(self.device),
            tokenize(self.prompts(self.dm.dataset.classnames)),
            skip_layers=_option(cfg, "SKIP_LAYERS"),
            keep_ratio=_option(cfg, "KEEP_RATIO"),
            max_keep=_option(cfg, "MAX_KEEP"),
            decay=_option(cfg, "DECAY"),
            tail=_option(cfg, "TAIL"),
            max_tail=None if _option(cfg, "MAX_TAIL") < 0 else _option(cfg, "MAX_TAIL"),
            memory=_option(cfg, "MEMORY"),
            generator=torch.Generator().manual_seed(max(cfg.SEED, 0)),
        )

    def load_clip(self) -> tuple[nn.Module, Callable[[list[str]], Tensor]]:
        """Return the CLIP of MODEL.BACKBONE.NAME on the CPU, and its tokenizer.

        The project's own package `clip` loads it, if there is one and it knows the name, unless MODEL.INIT_WEIGHTS is
        set. Otherwise open_clip does, with these weights, a file or a name; by default with OpenAI's for names such as
        "ViT-B/16".
        """
        name, weights = self.cfg.MODEL.BACKBONE.NAME, self.cfg.MODEL.INIT_WEIGHTS
        clip = _own_clip()
        if not weights and hasattr(clip, "available_models") and name in clip.available_models():
            return clip.load(name, device="cpu")[0], clip.tokenize
        config = name.replace("/", "-")
        if config in open_clip.list_openai_models():
            config, weights = f"{config}-quickgelu", weights or "openai"
        described = (open_clip.get_model_config(config) or {}).get("text_cfg", {})
        safe = {"trust_remote_code": False} if "hf_tokenizer_name" in described else {}
        return open_clip.create_model(config, pretrained=weights or None), open_clip.get_tokenizer(config, **safe)

    def prompts(self, names: list[str]) -> list[str]:
        """Return the prompts of the classes, from the template of the options or of the dataset."""
        template = _option(self.cfg, "TEMPLATE") or _template(self.cfg.DATASET.NAME)
        return [template.replace("{}", name.replace("_", " ")) for name in names]

    def forward_backward(self, batch: dict[str, Any]) -> dict[str, float]:
        """Run a training step on the "img" and the "label" of a batch; return the loss."""
        image, label = self.parse_batch_train(batch)
        amp = _option(self.cfg, "PREC") == "amp"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=amp):
            loss = self.model(image, label).loss
        self.model_backward_and_update(loss)
        if self.batch_idx + 1 == self.num_batches:
            self.update_lr()
        return {"loss": loss.item()}

    def parse_batch_train(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return images and labels on the device of the model."""
        return batch["img"].to(self.device), batch["label"].to(self.device)

    def model_inference(self, input: Tensor) -> Tensor:
        """Logits [B, C] over all classes."""
        return self.model.predict(input)

    def load_model(self, directory: str, epoch: int | None = None) -> None:
        """Load the weights of `model-best.pth.tar` or of an epoch, of these or of other classes.

        An empty directory leaves the model untuned, as in CoOp.
        """
        if directory:
            path = Path(directory, "model", "model-best.pth.tar" if epoch is None else f"model.pth.tar-{epoch}")
            weights = load_checkpoint(str(path))["state_dict"]
            self.model.load_state_dict(weights | {"_extra_state": self.model.get_extra_state()})


def _own_clip() -> Any:
    """Return the package `clip`, None if it is not there or, with a warning, if what it imports is not."""
    try:
        return importlib.import_module("clip")
    except ImportError as error:
        if error.name != "clip":
            warn_caller(f"SkipKernels: the package clip cannot be imported ({error}), so open_clip loads the model.")
        return None


def _option(cfg: Any, name: str) -> Any:
    return getattr(getattr(cfg.TRAINER, "SKIPKERNELS", None), name, DEFAULTS[name])


def _rate(cfg: Any, name: str) -> float:
    return cfg.OPTIM.LR if _option(cfg, name) < 0 else _option(cfg, name)


def _problems(cfg: Any) -> Iterator[str]:
    """Settings that would be ignored, each as a sentence with a remedy."""
    optim, skip = cfg.OPTIM, getattr(cfg.TRAINER, "SKIP", None)
    same = [("PREC", cfg.TRAINER, "PREC"), *((f"SKIP.{name}", skip, ours) for name, ours in PUBLISHED_NAMES.items())]
    for theirs, node, name in same:
        ours = _option(cfg, name)
        value = getattr(node, theirs.rpartition(".")[2], ours)
        if value != ours:
            yield f"TRAINER.{theirs} is {value!r} and TRAINER.SKIPKERNELS.{name} {ours!r}: give both the same value."
    if getattr(skip, "DROP_RATIO", 0):
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
        if optim.WARMUP_CONS_LR > min(_rate(cfg, "TEXT_LR"), _rate(cfg, "IMAGE_LR")):
            yield f"OPTIM.WARMUP_CONS_LR must be at most the rate of each tower; got {optim.WARMUP_CONS_LR}."
    if ":" in cfg.MODEL.BACKBONE.NAME:
        yield (
            "MODEL.BACKBONE.NAME must be a model that open_clip itself describes: hf-hub: and local-dir: name files of "
            "others, which may name code. Override load_clip for them."
        )
    if _option(cfg, "SAMPLER") not in ("class_pure", ""):
        yield f'TRAINER.SKIPKERNELS.SAMPLER must be "class_pure" or ""; got {_option(cfg, "SAMPLER")!r}.'
    elif _option(cfg, "SAMPLER") and cfg.DATALOADER.TRAIN_X.SAMPLER != "RandomSampler":
        yield f'For DATALOADER.TRAIN_X.SAMPLER {cfg.DATALOADER.TRAIN_X.SAMPLER} set TRAINER.SKIPKERNELS.SAMPLER "".'
    if _option(cfg, "PREC") not in ("fp32", "amp"):
        yield f'TRAINER.SKIPKERNELS.PREC must be "fp32" or "amp"; got {_option(cfg, "PREC")!r}.'


def _template(dataset: str) -> str:
    """Return the template of a dataset of CoOp by the name of its class there, such as OxfordPets."""
    names = {name.replace("_", ""): name for name in published.PAPER} | {"describabletextures": "dtd"}
    return published.PAPER.get(names.get(dataset.lower(), ""), published.PHOTO)
