"""SkipCLIP as a trainer of Dassl, in the layout of CoOp and the projects that derive from it.

`import skipkernels.integrations.dassl` in a project's `train.py` registers it: `--trainer SkipKernels`. For options,
call `extend_cfg(cfg)` where the project extends its configuration; `set_published(cfg)` has the published settings.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .. import published
from ..clip import SkipCLIP
from ..features import BatchSampler
from .dassl_settings import DEFAULTS, extend_cfg, option, problems, rate, set_published, template

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
        if found := list(problems(cfg)):
            raise ValueError("SkipKernels: " + " ".join(found))

    def build_data_loader(self) -> None:
        """Load the data as Dassl does, for training in batches of one class unless SAMPLER is empty."""
        super().build_data_loader()
        if option(self.cfg, "SAMPLER"):
            self.train_loader_x = class_pure_loader(self.train_loader_x, self.cfg.SEED)

    def build_model(self) -> None:
        """Register the model of `make_clip` with an optimizer and a scheduler."""
        cfg = self.cfg.OPTIM
        self.model = self.make_clip()
        groups = self.model.parameter_groups(text_lr=rate(self.cfg, "TEXT_LR"), image_lr=rate(self.cfg, "IMAGE_LR"))
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
            skip_layers=option(cfg, "SKIP_LAYERS"),
            keep_ratio=option(cfg, "KEEP_RATIO"),
            max_keep=option(cfg, "MAX_KEEP"),
            decay=option(cfg, "DECAY"),
            tail=option(cfg, "TAIL"),
            max_tail=None if option(cfg, "MAX_TAIL") < 0 else option(cfg, "MAX_TAIL"),
            memory=option(cfg, "MEMORY"),
            generator=torch.Generator().manual_seed(max(cfg.SEED, 0)),
        )

    def load_clip(self) -> tuple[nn.Module, Callable[[list[str]], Tensor]]:
        """Return the CLIP of MODEL.BACKBONE.NAME on the CPU, and its tokenizer.

        open_clip loads it with MODEL.INIT_WEIGHTS, a file or a name; by default with OpenAI's weights for names such as
        "ViT-B/16" and "ViT-L/14@336px".
        """
        name, weights = self.cfg.MODEL.BACKBONE.NAME, self.cfg.MODEL.INIT_WEIGHTS
        config = name.replace("/", "-").replace("@", "-").removesuffix("px")
        if config in open_clip.list_openai_models():
            config, weights = f"{config}-quickgelu", weights or "openai"
        described = (open_clip.get_model_config(config) or {}).get("text_cfg", {})
        safe = {"trust_remote_code": False} if "hf_tokenizer_name" in described else {}
        return open_clip.create_model(config, pretrained=weights or None), open_clip.get_tokenizer(config, **safe)

    def prompts(self, names: list[str]) -> list[str]:
        """Return the prompts of the classes, from the template of the options or of the dataset."""
        return [template(self.cfg).replace("{}", name.replace("_", " ")) for name in names]

    def forward_backward(self, batch: dict[str, Any]) -> dict[str, float]:
        """Run a training step on the "img" and the "label" of a batch; return the loss."""
        image, label = self.parse_batch_train(batch)
        amp = option(self.cfg, "PREC") == "amp"
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
