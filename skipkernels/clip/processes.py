"""Checks that processes agree: an error or a difference of one is raised on all, so that none waits for a message."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..parallel import ClassParallel, cost
from ..selection import RankSampler
from ..store import digest_json, digest_tensors, digests
from ..towers import Reduction, UnsupportedModel, build_towers, evaluating
from ..towers.base import Tower
from .classes import prompts_of
from .image_encoder import ImageEncoder
from .prompt_features import PromptFeatures
from .settings import Settings

if TYPE_CHECKING:
    from .base import SkipCLIPBase

ClassParallelOption = bool | Literal["auto"]
_SAMPLED = 1024  # prompts for the mean length
# What every process must have in common.
AGREED = (
    "tokens",
    "skip_layers, class_parallel and the trained parameters",
    "options of the selection",
    "generator",
    "label_smoothing and class_weight",
    "weights",
)


@contextlib.contextmanager
def reporting(parallel: ClassParallel, clip: SkipCLIPBase) -> Iterator[None]:
    """Check the arguments of a collective call in this context: an error is raised on every process."""
    try:
        yield
    except Exception:
        parallel.report_error(clip.prototypes.device)
        raise


@contextlib.contextmanager
def agreeing(
    parallel: ClassParallel | None, device: torch.device, names: Sequence[str], digests_of: Callable[[], Sequence[str]]
) -> Iterator[None]:
    """Run a block on every process; raise an error on all if one raises an error, or if their digests then differ.

    Args:
        parallel: The processes, or None for only this one.
        device: Device of the messages.
        names: Names of the things that must be equal, for the message of an error.
        digests_of: Function that returns the digest of each.
    """
    if parallel is None:
        yield
        return
    try:
        yield
        found = digests_of()
    except Exception:
        parallel.report_error(device, len(names))
        raise
    parallel.check_equal(list(zip(names, found, strict=True)), device)


def choose_class_parallel(
    parallel: ClassParallel, class_parallel: ClassParallelOption, clip: SkipCLIPBase, tokens: Tensor
) -> Reduction:
    """Set `parallel.replicated` from the argument `class_parallel`, and return the choice with its reason.

    "auto" compares the predicted steps with `IMAGES` images per process. On a CPU it shares out texts, since encoding
    them takes longer than messages.
    """
    device, W = device_of(clip.model), parallel.size
    parallel.replicated = class_parallel is False
    if class_parallel != "auto":
        return Reduction.unless("class_parallel is False" if parallel.replicated else None)
    gpu = gpu_of(device)
    if W > 1 and gpu is not None:
        sizes, sampler = sizes_of_model(clip.model, tokens, clip._settings), clip.sampler
        options = sampler.keep_ratio, sampler.max_keep, sampler.decay, sampler.tail, None, sampler.max_tail
        kept = RankSampler(*options).expected_keep(len(tokens), W * cost.IMAGES)
        if min(sizes.image_blocks, sizes.text_blocks) > 0:
            faster = cost.faster_way(W, cost.IMAGES, len(tokens), kept, sizes, gpu)
            parallel.replicated = faster == cost.REPLICATED
    return Reduction.unless(
        f"encoding all selected classes on each process takes less time than messages about them, by the formulas for "
        f"{W} {gpu} with {cost.IMAGES} images each"
        if parallel.replicated
        else None
    )


def gpu_of(device: torch.device) -> str | None:
    """Name in `cost.GPUS` of the GPU that is most like a device; None for a CPU."""
    if device.type != "cuda":
        return None
    return "A100" if "A100" in torch.cuda.get_device_name(device) else "H100"


def sizes_of_model(model: nn.Module, tokens: Tensor, settings: Settings) -> cost.Model:
    """Return the sizes of a model above the cut, with prompts [C, L] or [C, T, L], equal on every process."""
    some = prompts_of(tokens[:: max(1, len(tokens) // _SAMPLED)])
    image, texts = build_towers(model, some)
    settings.apply(image, texts)
    pixels = torch.zeros(1, 3, *image.image_size, dtype=image.dtype, device=device_of(model))
    with torch.no_grad(), evaluating([model]):
        features = ImageEncoder(image, 1).lower(pixels)
        D, text_width = image.upper(features).shape[1], PromptFeatures(texts[0], 1).lower(texts[0].pooled[:1] * 0)
    tokens_and_width = features.shape[1:] if features.ndim == 3 else (features[0, 0].numel(), features.shape[1])
    prompts = [text.prompts for text in texts]
    return cost.Model(
        image_width=tokens_and_width[1],
        image_tokens=tokens_and_width[0],
        image_blocks=len(image.blocks) - image.skip,
        text_width=text_width.shape[-1],
        text_blocks=len(texts[0].blocks) - texts[0].skip,
        D=D,
        prefix=prompts[0].prefix_length,
        suffix=sum(x.lengths.double().mean().item() for x in prompts),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def device_of(model: nn.Module) -> torch.device:
    """Device of the messages about a model: that of its first parameter."""
    return next(model.parameters()).device


def refuse_batch_norms(tower: Tower) -> None:
    """Raise if a part above the cut has batch norms over the images of one process."""
    for part in (*tower.blocks[tower.skip :], *tower.head):
        for module in part.modules() if isinstance(part, nn.Module) else ():
            if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
                raise UnsupportedModel(
                    "SkipCLIP: with process_group, batch norms above the cut must use the images of all processes; got "
                    f"{type(module).__name__}. Convert the model with "
                    "torch.nn.SyncBatchNorm.convert_sync_batchnorm, on a GPU, or raise skip_layers."
                )


def digests_of_clip(clip: SkipCLIPBase) -> tuple[str, ...]:
    """Digests of what every process must have in common; refuses models that would differ from one process."""
    if clip._parallel is not None and clip._parallel.size > 1:
        refuse_batch_norms(clip._image)
        refuse_batch_norms(clip._text)
    sampler, model = clip.sampler, clip.model
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    tensors = (x.detach() for x in (*model.parameters(), *model.buffers()))
    assert clip._prompts is not None
    weights = [] if clip.class_weight is None else [("class_weight", clip.class_weight)]
    return (
        clip._prompts,
        digest_json([clip.skip_layers, trained, clip._parallel is not None and clip._parallel.replicated]),
        digest_json([sampler.keep_ratio, sampler.max_keep, sampler.decay, sampler.tail, sampler.max_tail]),
        digest_tensors(sorted(sampler.tensors().items())),
        digest_json([clip.label_smoothing, digest_tensors(weights)]),
        digest_json(digests(tensors)),
    )
