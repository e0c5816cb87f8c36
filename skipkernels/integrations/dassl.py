"""SkipCLIP as a trainer of Dassl, in the layout of CoOp and the projects that derive from it.

`import skipkernels.integrations.dassl` in a project's `train.py` registers it: `--trainer SkipKernels`. For options,
call `extend_cfg(cfg)` where the project extends its configuration.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from ..clip import SkipCLIP
from ..data import coop, templates

try:
    from dassl.engine import TRAINER_REGISTRY, TrainerX
    from dassl.optim import build_lr_scheduler, build_optimizer
    from dassl.utils import load_checkpoint
except ImportError as error:
    raise ImportError(
        f"skipkernels.integrations.dassl: needs Dassl ({error}). It is on no package index: install "
        "https://github.com/KaiyangZhou/Dassl.pytorch, and import this module in the train.py that uses it."
    ) from error

__all__ = ["DEFAULTS", "SkipKernels", "extend_cfg"]

DEFAULTS: dict[str, Any] = {
    "SKIP_LAYERS": 6,  # blocks skipped in each tower
    "KEEP_RATIO": 0.5,
    "MAX_KEEP": 50,
    "DECAY": 0.3,
    "TAIL": "resample",
    "MAX_TAIL": -1,  # -1: no bound
    "TEMPLATE": "",  # prompt with {} for the class name; empty: that of the paper for DATASET.NAME
    "TEXT_LR": 0.0,  # learning rates of the towers; 0: OPTIM.LR
    "IMAGE_LR": 0.0,
    "PREC": "fp32",  # "fp32", or "amp" for autocast in bf16
    "MEMORY": "auto",
}
"""Options of `cfg.TRAINER.SKIPKERNELS`; what they mean is in `SkipCLIP`."""


def extend_cfg(cfg: Any) -> None:
    """Add the node TRAINER.SKIPKERNELS with its defaults to a Dassl configuration, before files are merged."""
    node = type(cfg)()
    for name, value in DEFAULTS.items():
        setattr(node, name, value)
    cfg.TRAINER.SKIPKERNELS = node


@TRAINER_REGISTRY.register()
class SkipKernels(TrainerX):
    """Skip Tuning in Dassl: all images are labelled, the classes are those of the dataset.

    Checkpoints are Dassl's own. They hold the sampler, so that a resumed training draws the same classes. `load_model`
    also accepts a checkpoint of other classes, as in base-to-new evaluation: then it loads the weights alone.

    `make_clip`, `load_clip` and `prompts` may be overridden for other settings, another model or other prompts.
    """

    model: SkipCLIP

    def check_cfg(self, cfg: Any) -> None:
        """Raise a ValueError if PREC is unknown."""
        if _option(cfg, "PREC") not in ("fp32", "amp"):
            raise ValueError(
                f'SkipKernels: TRAINER.SKIPKERNELS.PREC must be "fp32" or "amp"; got {_option(cfg, "PREC")!r}.'
            )

    def build_model(self) -> None:
        """Register the model of `make_clip` with an optimizer and a scheduler."""
        cfg = self.cfg
        self.model = self.make_clip()
        groups = self.model.parameter_groups(
            text_lr=_option(cfg, "TEXT_LR") or cfg.OPTIM.LR, image_lr=_option(cfg, "IMAGE_LR") or cfg.OPTIM.LR
        )
        self.optim = build_optimizer(self.model, cfg.OPTIM, param_groups=groups)
        self.sched = build_lr_scheduler(self.optim, cfg.OPTIM)
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

        The project's own package `clip` loads it, if there is one and it knows the name. Otherwise open_clip does: with
        OpenAI's weights for names such as "ViT-B/16"; for an open_clip config with the weights MODEL.INIT_WEIGHTS, a
        file or a name.
        """
        name, weights = self.cfg.MODEL.BACKBONE.NAME, self.cfg.MODEL.INIT_WEIGHTS
        with contextlib.suppress(ImportError):
            clip = importlib.import_module("clip")
            if name in clip.available_models():
                return clip.load(name, device="cpu")[0], clip.tokenize
        config = name.replace("/", "-")
        if config in open_clip.list_openai_models():
            config, weights = f"{config}-quickgelu", weights or "openai"
        return open_clip.create_model(config, pretrained=weights or None), open_clip.get_tokenizer(config)

    def prompts(self, names: list[str]) -> list[str]:
        """Return the prompts of the classes, from the template of the options or of the dataset."""
        template = _option(self.cfg, "TEMPLATE") or _template(self.cfg.DATASET.NAME)
        return [templates.format_prompt(template, name.replace("_", " ")) for name in names]

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

        Raises:
            FileNotFoundError: If there is no such file.
        """
        if directory:
            path = Path(directory, "model", "model-best.pth.tar" if epoch is None else f"model.pth.tar-{epoch}")
            weights = load_checkpoint(str(path))["state_dict"]
            self.model.load_state_dict(weights | {"_extra_state": self.model.get_extra_state()})


def _option(cfg: Any, name: str) -> Any:
    return getattr(getattr(cfg.TRAINER, "SKIPKERNELS", None), name, DEFAULTS[name])


def _template(dataset: str) -> str:
    """Return the template of a dataset of CoOp by the name of its class there, such as OxfordPets."""
    names = {name.replace("_", ""): name for name in coop.DATASETS} | {"describabletextures": "dtd"}
    return templates.resolve_templates(names.get(dataset.lower()))[0]
