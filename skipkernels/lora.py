"""LoRA on the blocks above the cut of SkipCLIP: low-rank updates of the caller's weights, merged or saved on demand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from .clip import SkipCLIP, check_clip
from .folders import replace_tensors, replaced_files
from .towers.base import Tower, UnsupportedModel
from .towers.low_rank import LowRankUpdate, low_rank_updates

TARGETS = ("q", "k", "v", "out", "fc", "proj")
"""Linear layers of a block: query, key, value and output of attention, first and second layer of the MLP."""
_BEFORE = "_before_lora"  # attribute of a SkipCLIP: `trainable`, and the names of what trained, before `add_lora`
_ADAPTER, _ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's names


def add_lora(
    clip: SkipCLIP,
    rank: int,
    targets: str | Sequence[str] = ("q", "v"),
    *,
    alpha: float | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Add a low-rank update to linear layers of every block above the cut, and train only these updates.

        W' = W + alpha / rank · B A,   A [rank, in] uniform in ±1/√in,   B [out, rank] zero

    The weights become parametrizations (`torch.nn.utils.parametrize`) of the caller's modules, so the model itself
    computes the same, and fused blocks stay fused. Everything but A and B is frozen, except for the temperature with
    `train_logit_scale=True`. Create the optimizer and `DistributedDataParallel` after this call: one made before does
    not train, or average, A and B. Precision, cost and state dicts: docs/lora.md.

    Args:
        clip: SkipCLIP. Its blocks above the cut must be fused.
        rank: Rank of each update, at least 1.
        targets: Layers to update, of "q", "k", "v", "out" (attention), "fc" and "proj" (MLP); or "all-linear".
        alpha: Numerator of the scale. Default: `rank`, a scale of 1.
        generator: Generator of A. Default: seed 0.

    Raises:
        UnsupportedModel: If a block above the cut is not fused.

    Source: Hu et al., "LoRA", ICLR 2022, arXiv 2106.09685.

    Example:
        >>> import skipkernels
        >>> from skipkernels.app.demo import pictogram_tiny
        >>> model, _, tokenizer = pictogram_tiny.load()
        >>> clip = skipkernels.SkipCLIP(model, tokenizer([f"the digit {n}." for n in range(10)]), skip_layers=0.5)
        >>> add_lora(clip, rank=2)
        >>> optimizer = torch.optim.AdamW(clip.parameter_groups(text_lr=1e-3, image_lr=1e-3))
        >>> clip(torch.rand(4, 3, 32, 32), torch.tensor([3, 3, 3, 3])).loss.backward()
        >>> optimizer.step()
        >>> merge_lora(clip)  # clip.model has its plain weights and keys again
    """
    check_clip("add_lora", clip)
    chosen, alpha = _checked_arguments(rank, targets, alpha)
    clip.check_model()
    stale = clip.images.below.is_stale()
    if next(_updates(clip.model), None) is not None:
        raise ValueError("add_lora: the model has low-rank updates already. Merge them first: merge_lora(clip).")
    towers = _fusable_towers(clip)

    generator = generator or torch.Generator().manual_seed(0)
    _freeze(clip)
    try:
        for tower in towers:
            for block in tower.upper_blocks:
                _update_block(block, chosen, rank, alpha, generator)
        _read_again(clip, stale)
    except BaseException:
        _remove(clip.model, merge=False)
        _train_as_before(clip)
        raise


def merge_lora(clip: SkipCLIP) -> None:
    """Add the low-rank updates to the weights, W ← W + alpha / rank · B A, and remove A and B.

    The model has its plain modules and state-dict keys again, and `requires_grad` and the `trainable` setting are as
    before `add_lora` on this SkipCLIP (or a copy of it); on another one, weights stay frozen. Predictions don't change.
    To train further, create the optimizer and `DistributedDataParallel` again.
    """
    _check_updated("merge_lora", clip)
    stale = clip.images.below.is_stale()
    _remove(clip.model, merge=True)
    _train_as_before(clip)
    _read_again(clip, stale)


def save_lora(clip: SkipCLIP, folder: str | Path) -> None:
    """Save the low-rank updates of a Hugging Face model in PEFT's format.

    Writes `adapter_config.json` and `adapter_model.safetensors`, which `peft.PeftModel.from_pretrained(model, folder)`
    loads into the model without updates.

    Args:
        clip: SkipCLIP on a `CLIPModel` or `SiglipModel` with low-rank updates.
        folder: Folder to write, created if it does not exist. An adapter in it is replaced; other files are kept.

    Example:
        >>> import logging, tempfile; logging.disable()  # transformers reports unused settings
        >>> import skipkernels, transformers
        >>> small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
        >>> config = transformers.CLIPConfig(
        ...     text_config=small | {"vocab_size": 60, "eos_token_id": 59},
        ...     vision_config=small | {"image_size": 16, "patch_size": 8},
        ... )
        >>> tokens = torch.tensor([[57, 5, 59], [57, 6, 59]])
        >>> clip = skipkernels.SkipCLIP(transformers.CLIPModel(config), tokens, skip_layers=1)
        >>> add_lora(clip, rank=2)
        >>> folder = Path(tempfile.mkdtemp())
        >>> save_lora(clip, folder)
        >>> sorted(path.name for path in folder.iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    _check_updated("save_lora", clip)
    model = clip.model
    if type(model).__module__.partition(".")[0] != "transformers":
        raise ValueError(
            f"save_lora: PEFT's format is for Hugging Face models, with one nn.Linear per layer; got "
            f"{type(model).__module__}.{type(model).__qualname__}. Save clip.state_dict(), or the whole model after "
            "merge_lora(clip)."
        )
    paths = {id(module): path for path, module in model.named_modules()}
    updates = {paths[id(module)]: update for module, _, update in _updates(model)}
    tensors = {
        f"base_model.model.{path}.{name}.weight": getattr(update, name)[0]
        for path, update in updates.items()
        for name in ("lora_A", "lora_B")
    }
    first = next(iter(updates.values()))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "auto_mapping": {"base_model_class": type(model).__name__, "parent_library": type(model).__module__},
        "base_model_name_or_path": model.name_or_path or None,
        "task_type": None,
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": list(updates),
    }
    with replaced_files(Path(folder), (_ADAPTER, _ADAPTER_CONFIG)) as written:
        replace_tensors(written / _ADAPTER, tensors, {"format": "pt"})
        (written / _ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# ---- checks ----------------------------------------------------------------------------------------------------------


def _checked_arguments(rank: Any, targets: str | Sequence[str], alpha: float | None) -> tuple[frozenset[str], float]:
    """Return the targets and alpha of `add_lora`, or raise a ValueError."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"add_lora: rank must be an integer of at least 1; got {rank!r}.")
    numerator = float(rank if alpha is None else alpha)
    if not 0 < numerator < math.inf:
        raise ValueError(f"add_lora: alpha must be above 0 and finite; got {numerator}.")
    chosen = frozenset(TARGETS if targets == "all-linear" else [targets] if isinstance(targets, str) else targets)
    if not chosen or not chosen <= set(TARGETS):
        raise ValueError(f'add_lora: targets must be of {", ".join(TARGETS)}, or "all-linear"; got {targets!r}.')
    return chosen, numerator


def _check_updated(function: str, clip: Any) -> None:
    check_clip(function, clip)
    if next(_updates(clip.model), None) is None:
        raise ValueError(f"{function}: the model has no low-rank updates. Add them: add_lora(clip, rank).")


def _fusable_towers(clip: SkipCLIP) -> list[Tower]:
    """Return both towers, or raise if no block is above the cut, or one that is not fused."""
    towers: dict[str, Tower] = {"text": clip.texts.tower, "image": clip.images.tower}
    if all(tower.skip == len(tower.blocks) for tower in towers.values()):
        raise ValueError("add_lora: no block is above the cut. Make a SkipCLIP with fewer skip_layers.")
    for name, tower in towers.items():
        if reason := tower.why_no_rows(tower.upper_blocks):
            raise UnsupportedModel(
                f"add_lora: blocks above the cut of the {name} tower must be fused ({reason}). Skip all blocks of this "
                'tower by skip_layers, or insert adapters of PEFT and pass trainable="as_is".'
            )
    return list(towers.values())


# ---- changes to the model --------------------------------------------------------------------------------------------


def _freeze(clip: SkipCLIP) -> None:
    """Freeze every parameter, so that only the updates train that are added before the next `refresh`."""
    names = {name for name, parameter in clip.model.named_parameters() if parameter.requires_grad}
    vars(clip)[_BEFORE] = clip.train_options.trainable, names
    clip.model.requires_grad_(False)
    clip.train_options = clip.train_options._replace(trainable="as_is")


def _train_as_before(clip: SkipCLIP) -> None:
    """Train what trained before `_freeze`; nothing if another SkipCLIP on the model added the updates."""
    trainable, names = vars(clip).pop(_BEFORE, ("as_is", set()))
    clip.train_options = clip.train_options._replace(trainable=trainable)
    for name, parameter in clip.model.named_parameters():
        parameter.requires_grad_(name in names)


def _read_again(clip: SkipCLIP, stale: bool) -> None:
    """Read the model again; image features at the cut stay valid, or `stale`: the model computes the same as before."""
    before = clip.images.below
    clip.refresh()
    if stale:
        clip.images.below = before
    elif before.started:
        clip.images.below.start()


def _update_block(block: Any, targets: frozenset[str], rank: int, alpha: float, generator: torch.Generator) -> None:
    """Add updates to the weights of a fused block that hold some of these targets."""
    held: dict[str, list[str]] = {}  # targets that a weight holds, by its path: "attn.in_proj_weight": ["q", "k", "v"]
    for target, paths in zip(TARGETS, block.linear_weights, strict=True):
        for path in paths if isinstance(paths, tuple) else [paths]:  # SwiGLU has two weights for "fc"
            held.setdefault(path, []).append(target)
    for path, parts in held.items():
        updated = [number for number, target in enumerate(parts) if target in targets]
        if updated:
            owner, _, name = path.rpartition(".")
            module = block.get_submodule(owner)
            update = LowRankUpdate(getattr(module, name), len(parts), updated, rank, alpha, generator)
            parametrize.register_parametrization(module, name, update)


def _updates(model: nn.Module) -> Iterator[tuple[nn.Module, str, LowRankUpdate]]:
    """Modules of a model with an updated weight, the name of the weight, and the update."""
    for module in model.modules():
        for name, update in low_rank_updates(module).items():
            yield module, name, update


def _remove(model: nn.Module, *, merge: bool) -> None:
    """Remove every update of a model, after adding it to the weight if `merge`.

    `parametrize.remove_parametrizations` would also remove the weight from deep copies of the module, which share its
    class, and register it behind the bias.
    """
    for module in {module: None for module, *_ in _updates(model)}:
        weights = {name: getattr(module.parametrizations, name).original for name in low_rank_updates(module)}
        if merge:
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(getattr(module, name))
        own_class = parametrize.type_before_parametrizations(module)
        del module.parametrizations
        module.__class__ = own_class
        others = dict(module.named_parameters(recurse=False))
        for name in others:
            delattr(module, name)
        for name, parameter in (weights | others).items():
            module.register_parameter(name, parameter)
