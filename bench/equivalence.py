"""Train with the published step and with SkipCLIP; compare the losses of each step, and the weights at the end.

    python -m bench.equivalence                all cases, 300 steps of each, 12 minutes
    python -m bench.equivalence --steps 50 --precision fp32

The published training is written out from the paper and shares no code with the package: all tokens run through all
blocks, dense logits, autograd (`tests/naive.py`), a mask over ranks that is drawn once, `torch.optim.SGD` with two
learning rates, momentum and weight decay, and a cosine that is stepped once per epoch and starts after the warm-up.
SkipCLIP trains with `tail="fixed"`, `FusedSGD` and the schedule of the tuner. Both have the same weights at the
beginning and see the same batches, each of a single class if it has enough images: a pictogram has two.

Models, with random weights: vit-tiny on pictograms, and a narrower ViT on random images. Columns
of bench/results/DEVICE/equivalence.csv, all over the whole training:

    other_classes    steps in which the two kept different classes
    loss             largest relative difference of the losses of a step; of losses below 1e-3, relative to 1e-3
    weights          relative difference of the trained weights at the end, ‖ours − published‖ / ‖published‖
    change           the same, relative to how far training moved them: / ‖published − initial‖
    logits           relative difference of the logits of all test images over all classes at the end
    predictions      test images to which the two assign different classes
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import open_clip
import torch
from rich.progress import track
from torch import Tensor, nn

import skipkernels as sk
from skipkernels.app.config import TuneConfig
from skipkernels.app.train.model import RANDOM, load_model
from skipkernels.app.train.setup import build_task
from skipkernels.features import BatchSampler
from skipkernels.published import cosine_with_warmup
from skipkernels.testing import relative_error
from tests import naive

from . import measure
from .inputs import class_names, positive
from .published import freeze
from .rows import command, save

_MOMENTUM, _WEIGHT_DECAY, _WARMUP_LR = 0.9, 5e-4, 1e-6
_KEEP_RATIO, _MAX_KEEP, _DECAY, _SEED = 0.5, 50, 0.3, 0
_BATCH, _WARMUP_EPOCHS = 4, 1
_SMALL_VISION = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 4, "head_width": 16}
_SMALL_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 4}
_DTYPES = {"fp64": torch.float64, "fp32": torch.float32}
_SMALL_LOSS = 1e-3  # in fp32 that of a batch may be 0


class Inputs(NamedTuple):
    """Model and data of a case, in fp64."""

    model: nn.Module
    tokens: Tensor  # [C, L]
    images: Tensor  # [N, 3, height, width]
    labels: Tensor  # [N]
    tests: Tensor  # [M, 3, height, width]

    def to(self, dtype: torch.dtype) -> Inputs:
        """A copy in another dtype."""
        model, *data = self
        return Inputs(copy.deepcopy(model).to(dtype), *(x.to(dtype) if x.is_floating_point() else x for x in data))


class Case(NamedTuple):
    """Model, blocks skipped in image and text, and learning rates, by default the published ones."""

    model: str
    skip: tuple[int, int]
    text_lr: float = 2e-5
    image_lr: float = 5e-6


# vit-tiny has 6 image blocks and 4 text blocks, the small ViT 4 and 4.
_CASES = [
    *(Case("vit-tiny", skip, text_lr=4e-3, image_lr=2e-3) for skip in ((1, 1), (3, 2), (5, 3))),
    Case("vit-tiny", (3, 2)),
    *(Case("ViT, 4 blocks", skip, text_lr=1e-2, image_lr=1e-2) for skip in ((1, 1), (2, 2), (2, 3))),
    Case("ViT, 4 blocks", (2, 2)),
]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command(__doc__)
    parser.add_argument("--steps", type=positive, default=300)
    parser.add_argument("--precision", nargs="+", choices=list(_DTYPES), default=list(_DTYPES))
    args = parser.parse_args(arguments)
    args.device = measure.CPU
    inputs = {"vit-tiny": pictogram_inputs(), "ViT, 4 blocks": random_inputs()}
    rows = []
    for case, precision in itertools.product(_CASES, args.precision):
        skip = "/".join(map(str, case.skip))
        row = {"model": case.model, "skip_layers": skip, "text_lr": case.text_lr, "image_lr": case.image_lr}
        found = compare(case, inputs[case.model].to(_DTYPES[precision]), args.steps)
        rows.append(row | {"precision": precision} | found)
        print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    save(args, rows, "equivalence")


def pictogram_inputs() -> Inputs:
    """Half of 160 pictograms, two drawings of each, and the test drawings of the same classes."""
    model, transform, tokenizer = load_model("vit-tiny", RANDOM, measure.CPU)
    config = TuneConfig(max_classes=160).resolved()
    task = build_task(config, transform)
    test = task.tests[0]
    images, labels = _stacked(task.train)
    tests, _ = _stacked(test.images)
    tokens = tokenizer(list(test.prompts[0]))
    return Inputs(model.double(), tokens, images, labels, tests)


def _stacked(dataset: Any) -> tuple[Tensor, Tensor]:
    images, labels = zip(*(dataset[item] for item in range(len(dataset))), strict=True)
    return torch.stack(images).double(), torch.tensor(labels)


def random_inputs(classes: int = 30, each: int = 8, tests: int = 200) -> Inputs:
    """A ViT with random weights, prompts of real words, and random images."""
    torch.manual_seed(_SEED)
    model = open_clip.CLIP(32, _SMALL_VISION, _SMALL_TEXT, quick_gelu=True).double()
    tokens = open_clip.tokenize([f"a photo of a {name}." for name in class_names(classes)])
    labels = torch.arange(classes).repeat_interleave(each)
    size = 3, _SMALL_VISION["image_size"], _SMALL_VISION["image_size"]
    images, held_out = (torch.randn(count, *size, dtype=torch.float64) for count in (len(labels), tests))
    return Inputs(model, tokens, images, labels, held_out)


def compare(case: Case, inputs: Inputs, steps: int) -> dict[str, Any]:
    """Train both ways and return the columns of the comparison."""
    sampler = BatchSampler(inputs.labels, _BATCH, "class_pure", generator=torch.Generator().manual_seed(_SEED))
    epochs = math.ceil(steps / len(sampler))
    batches = [(epoch, torch.tensor(items)) for epoch in range(epochs) for items in sampler][:steps]
    theirs = published_training(case, inputs, batches, epochs)
    ours = skip_clip_training(case, inputs, batches, epochs)
    names = [name for name, weight in theirs.model.named_parameters() if weight.requires_grad]
    initial, last, mine = (_flat(trained, names) for trained in (inputs.model, theirs.model, ours.model))
    losses = zip(ours.losses, theirs.losses, strict=True)
    logits = [_logits(trained.model, inputs) for trained in (ours, theirs)]
    found = {
        "steps": steps,
        "K": len(theirs.kept[0]),
        "other_classes": sum(a != b for a, b in zip(ours.kept, theirs.kept, strict=True)),
        "loss": torch.tensor([abs(a - b) / max(b, _SMALL_LOSS) for a, b in losses]).max().item(),  # NaN if one is
        "weights": relative_error(mine, last),
        "change": ((mine - last).norm() / (last - initial).norm()).item(),
        "logits": relative_error(*logits),
        "predictions": (logits[0].argmax(1) != logits[1].argmax(1)).sum().item(),
        "tests": len(inputs.tests),
        "trained_loss": theirs.losses[-1],
    }
    return {name: float(f"{x:.3g}") if isinstance(x, float) else x for name, x in found.items()}


def _flat(model: nn.Module, names: Sequence[str]) -> Tensor:
    return torch.cat([model.get_parameter(name).detach().double().flatten() for name in names])


@torch.no_grad()
def _logits(model: Any, inputs: Inputs) -> Tensor:
    image, text = (x.double() for x in (model.encode_image(inputs.tests), model.encode_text(inputs.tokens)))
    image, text = (x / x.norm(dim=1, keepdim=True) for x in (image, text))
    return model.logit_scale.double().exp() * image @ text.T


class Trained(NamedTuple):
    """Trained model, and loss and kept classes of every step."""

    model: nn.Module
    losses: list[float]
    kept: list[list[int]]


def published_training(case: Case, inputs: Inputs, batches: Sequence[tuple[int, Tensor]], epochs: int) -> Trained:
    """Train with the step, mask and schedule of the paper."""
    model, quick = copy.deepcopy(inputs.model), _quick_gelu(inputs.model)
    freeze(model, *case.skip)
    with torch.no_grad():
        prototypes = naive.class_embeddings(model, inputs.tokens, 0, quick)
    ranks = _fixed_ranks(len(inputs.tokens))
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    image, text = ([w for name, w in named if name.startswith("visual.") == visual] for visual in (True, False))
    rates = case.text_lr, case.image_lr
    groups = [{"params": weights, "lr": rate} for weights, rate in zip((text, image), rates, strict=True)]
    optimizer = torch.optim.SGD(groups, momentum=_MOMENTUM, weight_decay=_WEIGHT_DECAY)
    losses, kept = [], []
    for epoch, items in track(batches, "published", transient=True):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            cosine = rate * (1 + math.cos(math.pi * (epoch - _WARMUP_EPOCHS) / epochs)) / 2
            group["lr"] = min(rate, _WARMUP_LR) if epoch < _WARMUP_EPOCHS else cosine
        images, labels = inputs.images[items], inputs.labels[items]
        ranking = naive.class_ranking(model, images, labels, prototypes, quick)
        classes = sorted(ranking[rank] for rank in ranks)
        targets = torch.tensor([classes.index(label) for label in labels.tolist()])
        logits = naive.cosine_logits(model, images, inputs.tokens[classes], case.skip, quick)
        loss = torch.nn.functional.cross_entropy(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        kept.append(classes)
    return Trained(model, losses, kept)


def _fixed_ranks(classes: int) -> list[int]:
    """Ranks that the published mask keeps: the first m, and rank m + j with probability q_j, drawn once."""
    keep = min(math.ceil(_KEEP_RATIO * classes), _MAX_KEEP)
    x = torch.linspace(0, 5, classes - keep, dtype=torch.float64)
    weights = torch.exp(-x / _DECAY)
    q = (weights - weights.min()) / (weights.max() - weights.min())
    drawn = torch.rand(len(q), dtype=q.dtype, generator=torch.Generator().manual_seed(_SEED)) < q
    return [*range(keep), *(keep + drawn.nonzero().flatten()).tolist()]


def skip_clip_training(case: Case, inputs: Inputs, batches: Sequence[tuple[int, Tensor]], epochs: int) -> Trained:
    """Train with SkipCLIP from features at the cut, with the tuner's optimizer and schedule."""
    model = copy.deepcopy(inputs.model)
    settings = {"keep_ratio": _KEEP_RATIO, "max_keep": _MAX_KEEP, "decay": _DECAY, "tail": "fixed"}
    generator = torch.Generator().manual_seed(_SEED)
    clip = sk.SkipCLIP(model, inputs.tokens, skip_layers=case.skip, generator=generator, **settings)
    features = torch.cat([clip.encode_lower(images) for images in inputs.images.split(64)])
    groups = clip.parameter_groups(text_lr=case.text_lr, image_lr=case.image_lr)
    optimizer = sk.FusedSGD(groups, lr=case.text_lr, momentum=_MOMENTUM, weight_decay=_WEIGHT_DECAY)
    schedule = cosine_with_warmup(optimizer, epochs=epochs, warmup_epochs=_WARMUP_EPOCHS, warmup_lr=_WARMUP_LR)
    losses, kept, current = [], [], 0
    for epoch, items in track(batches, "skipkernels", transient=True):
        if epoch != current:
            schedule.step()
            current = epoch
        out = clip(features[items], inputs.labels[items])
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
        kept.append(out.class_ids.tolist())
    return Trained(model, losses, kept)


def _quick_gelu(model: Any) -> bool:
    return isinstance(model.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU)


if __name__ == "__main__":
    main()
