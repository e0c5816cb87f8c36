"""SkipCLIP, optimizer and schedule, trained by `graphed` or in a plain loop."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import skipkernels as sk
from skipkernels.clip.step import LossOptions, step
from skipkernels.graphs.parts import ReservedRanks
from tests.models import tiny_batch, tiny_clip, tiny_tokens

CLASSES, BATCH = 30, 4


def skip_clip(dtype: torch.dtype = torch.float32, **options: Any) -> sk.SkipCLIP:
    """SkipCLIP in training mode, with weights in `dtype` and the logit scale in fp32."""
    model = tiny_clip(torch.float32)
    if options.pop("unfused", False):
        model.transformer.resblocks[1].mlp.gelu = nn.SiLU()
    for name, parameter in model.named_parameters():
        if name != "logit_scale":
            parameter.data = parameter.data.to(dtype)
    return sk.SkipCLIP(model, **{"tokens": tiny_tokens(CLASSES), "skip_layers": 1, **options}).train()


def batches(clip: sk.SkipCLIP, count: int, batch: int = 4, *, images: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Batches (features at the cut, labels); without a cut, or with `images`, (images, labels)."""
    found = []
    for seed in range(count):
        x, labels = tiny_batch(batch, CLASSES, clip.images.tower.dtype, seed=seed)
        found.append((x if images or not clip.skip_layers[0] else clip.encode_lower(x), labels))
    return found


def groups_of(clip: sk.SkipCLIP, *, stochastic: bool = False) -> list[dict[str, Any]]:
    """Parameter groups for FusedSGD; with `stochastic`, bf16 parameters are in groups with stochastic rounding."""
    groups = clip.parameter_groups(text_lr=0.02, image_lr=0.01)
    return [
        {**group, "params": params, "stochastic_rounding": bf16}
        for group in groups
        for bf16 in ((True, False) if stochastic else (False,))
        if (params := [p for p in group["params"] if not stochastic or (p.dtype == torch.bfloat16) == bf16])
    ]


def optimizer_of(kind: str, clip: sk.SkipCLIP) -> torch.optim.Optimizer:
    groups = groups_of(clip, stochastic=kind == "stochastic")
    if kind == "torch":
        groups = clip.parameter_groups(text_lr=torch.tensor(0.02), image_lr=torch.tensor(0.01))
        return torch.optim.SGD(groups, momentum=0.9, weight_decay=0.01, fused=True)
    if kind == "one group":
        return sk.FusedSGD(clip.trainable_parameters(), 0.02, momentum=0.9, weight_decay=0.01)
    return sk.FusedSGD(groups, momentum=0.9, weight_decay=0.01, in_backward=kind == "in_backward")


class Run:
    """SkipCLIP, optimizer and schedule, trained by `graphed` or in a plain loop."""

    captures = False  # True where graphs are captured: K is the same in every step on a batch of this size

    def __init__(self, kind: str, *, by_graph: bool):
        self.clip = skip_clip(torch.bfloat16 if kind == "stochastic" else torch.float32)
        self.optimizer = optimizer_of(kind, self.clip)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.8)
        self.ranks = ReservedRanks(self.clip)
        self.step = sk.graphed(self.clip, self.optimizer, batch_size=BATCH) if by_graph else self.plain

    def plain(self, x: Tensor, labels: Tensor) -> sk.SkipOutput:
        out = self.forward(x, labels)
        out.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return out

    def forward(self, x: Tensor, labels: Tensor) -> sk.SkipOutput:
        if not (self.captures or x.is_cuda) or len(x) != BATCH:
            return self.clip(x, labels)
        self.ranks.draw(BATCH)
        image = self.clip.images.encode(x)
        options = LossOptions(self.clip.label_smoothing, self.clip.class_weight)
        return step(image, labels, self.clip.texts, self.ranks, self.clip.scale, options)

    def train(self, some: list[tuple[Tensor, Tensor]]) -> list[Any]:
        """Losses and classes of the steps, and the weights after them."""
        found: list[Any] = []
        for x, labels in some:
            out = self.step(x, labels)
            found += [out.loss.item(), out.class_ids.tolist()]
            self.schedule.step()
        return [*found, *(p.detach().tolist() for p in self.clip.parameters())]

    def state(self) -> Any:
        states = self.clip.state_dict(), self.optimizer.state_dict(), self.schedule.state_dict()
        return copy.deepcopy(states)

    def load(self, state: Any) -> None:
        for part, saved in zip((self.clip, self.optimizer, self.schedule), copy.deepcopy(state), strict=True):
            part.load_state_dict(saved)
