"""The two measurements in section 3 of the paper, on the packaged model: feature sensitivity and gradient dependence.

    python -m bench.paper_figures --out build/paper

Feature sensitivity of block l is the relative change of its output by full fine-tuning, mean over samples and tokens:

    FS_l = mean ‖h'_l − h_l‖ / ‖h_l‖

Gradient dependence is the share of the text gradient of each class, ranked by similarity with the true class first:

    g_c = ‖∂loss/∂t_c‖ = s·|p_c − y_c|·√(1 − ⟨x̂, t̂_c⟩²) / ‖t_c‖

Source: Wu et al., "Skip Tuning", CVPR 2025, arXiv 2412.11509; the relative distance and the closed form are choices
made here.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.utils.data import DataLoader

from skipkernels.app.data import load_task
from skipkernels.app.demo import pictogram_tiny
from skipkernels.app.report.plots import COLOURS, GREY, figure_svg
from skipkernels.towers import build_towers, evaluating

EPOCHS, BATCH, LR = 3, 32, 1e-4  # of the full fine-tuning, by AdamW


@torch.no_grad()
def feature_sensitivity(
    before: nn.Module, after: nn.Module, images: Iterable[Tensor], tokens: Tensor
) -> tuple[list[float], list[float]]:
    """FS of the image blocks and of the text blocks, from first to last.

    Args:
        before: Model of open_clip.
        after: The same model after fine-tuning.
        images: Batches [B, 3, height, width].
        tokens: Prompts [C, L] int64. Padding after the end of a prompt does not count.
    """
    (image, text), (image_after, text_after) = map(build_towers, (before, after))
    seen = torch.arange(tokens.shape[1]) <= text.read_prompts(tokens).pooled[:, None]  # [C, L]
    with evaluating([before, after]):
        pairs = [(_states(image, batch), _states(image_after, batch)) for batch in images]
        visual = [_relative_change(*map(torch.cat, zip(*block, strict=True))) for block in _by_block(pairs)]
        states = zip(_states(text, tokens), _states(text_after, tokens), strict=True)
        textual = [_relative_change(hidden[seen], changed[seen]) for hidden, changed in states]
    return visual, textual


def _states(tower: object, inputs: Tensor) -> list[Tensor]:
    """Output [B, tokens, W] of each block, in the model's own forward."""
    states: list[Tensor] = []

    def keep(block: nn.Module, arguments: object, output: Tensor | tuple[Tensor, ...]) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    with contextlib.ExitStack() as hooks:
        for block in tower.blocks:
            hooks.callback(block.register_forward_hook(keep).remove)
        tower.reference_forward(inputs)
    return states


def _by_block(pairs: list[tuple[list[Tensor], list[Tensor]]]) -> list[list[tuple[Tensor, Tensor]]]:
    batches = [list(zip(before, after, strict=True)) for before, after in pairs]
    return [list(block) for block in zip(*batches, strict=True)]


def _relative_change(before: Tensor, after: Tensor) -> float:
    return ((after - before).norm(dim=-1) / before.norm(dim=-1)).mean(dtype=torch.float64).item()


def gradient_dependence(image: Tensor, text: Tensor, labels: Tensor, scale: float) -> Tensor:
    """Share of the gradient by rank, [C] fp64 with sum 1; rank 0 is the true class.

    Args:
        image: [B, D] image embeddings of any norm.
        text: [C, D] outputs of the text encoder before normalization.
        labels: [B] int64.
        scale: s, the factor of the cosines.
    """
    cosine = F.normalize(image.double(), dim=1) @ F.normalize(text.double(), dim=1).T  # [B, C]
    others = (scale * cosine).softmax(dim=1).scatter(1, labels[:, None], 0.0)
    # The true class: the sum over the other classes, since 1 − p_y cancels to 0 where p_y is close to 1.
    residual = others.scatter(1, labels[:, None], others.sum(dim=1, keepdim=True))
    norms = scale * residual * (1 - cosine.square()).clamp_min(0.0).sqrt() / text.double().norm(dim=1)
    order = cosine.scatter(1, labels[:, None], torch.inf).argsort(dim=1, descending=True, stable=True)
    ranked = norms.gather(1, order)
    return (ranked / ranked.sum(dim=1, keepdim=True)).mean(0)


def fine_tune(model: nn.Module, images: Tensor, labels: Tensor, tokens: Tensor) -> None:
    """Fine-tune every layer on images [N, 3, height, width] with labels [N]."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    generator = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images), generator=generator).split(BATCH):
            image, text, scale = model(images[batch], tokens)[:3]
            F.cross_entropy(scale * image @ text.T, labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure both on the packaged model and data, print them, and write two SVG pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/paper"))
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    model, transform, tokenizer = pictogram_tiny.load()
    task = load_task("pictograms", protocol="base-to-new", shots=2, max_classes=None, seed=0, transform=transform)
    images, labels = next(iter(DataLoader(task.train, batch_size=len(task.train))))
    tokens = tokenizer(task.tests[0].prompts[0])
    with torch.no_grad():
        embedded = model.encode_image(images), model.encode_text(tokens)
    share = gradient_dependence(*embedded, labels, model.logit_scale.exp().item())
    before = copy.deepcopy(model)
    fine_tune(model, images, labels, tokens)
    visual, textual = feature_sensitivity(before, model, images.split(BATCH), tokens)

    def sensitivity(axes: Axes) -> None:
        for name, values, colour in (("image", visual, COLOURS[0]), ("text", textual, COLOURS[1])):
            axes.plot(range(1, len(values) + 1), values, marker="o", markersize=4, color=colour, label=name)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("relative change")
        axes.figure.legend(loc="outside upper center", ncols=2, frameon=False, labelcolor=GREY, fontsize=8)

    def dependence(axes: Axes) -> None:
        beyond = (1 - share.cumsum(0)).clamp_min(1e-5)[:-1]
        axes.plot(range(1, len(beyond) + 1), beyond, color=COLOURS[0])
        axes.set_yscale("log")
        axes.set_ylabel("share beyond the rank")

    args.out.mkdir(parents=True, exist_ok=True)
    for name, label, draw, over in (
        ("feature_sensitivity", "relative change of each block's output in full fine-tuning", sensitivity, "block"),
        ("gradient_dependence", "share of the gradient of the classes beyond a rank", dependence, "first ranks"),
    ):
        (args.out / f"{name}.svg").write_text(figure_svg(name, label, draw, over=over))
    print("feature sensitivity, image:", " ".join(f"{value:.3f}" for value in visual))
    print("feature sensitivity, text: ", " ".join(f"{value:.3f}" for value in textual))
    print("share of the gradient of the true class and the next 9:", " ".join(f"{value:.3f}" for value in share[:10]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
