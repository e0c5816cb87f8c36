"""SkipCLIP: Skip Tuning on a CLIP that the caller already has."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from . import functional
from .boundary import DEFAULT_CHUNK, LSkipBoundary
from .selection import ClassSelection, RankSampler, Tail, select_ranks
from .towers import Memory, UnsupportedModel, build_towers, evaluating, training_without_chance, xformers
from .towers.attend import SDPA, Attention, Backend
from .towers.base import ImageTower
from .towers.text_store import TextStore, kept_prototypes, telling

# Largest distance between a unit-norm embedding of the caller's model and SkipCLIP's of the same input. The two run
# the same arithmetic in another order, so they differ by rounding: about 1e-6 in fp32 over twelve blocks, and in half
# precision by a few units of the last place of the hidden states. Some models take a softmax in fp32 though all else is
# in fp64. A wrong activation or mask is off by 1e-2 and more.
_SELF_CHECK_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class SkipOutput(NamedTuple):
    """What a step gives: the loss, the [B, K] logits if asked for, kept classes [K], and each label's place there."""

    loss: Tensor
    logits: Tensor | None
    class_ids: Tensor
    targets: Tensor


class SkipCLIP(nn.Module):
    """Tune a CLIP by Skip Tuning: train the blocks above `skip_layers`, on the classes that matter for each batch.

    The caller's model is tuned in place: its parameters are shared and its `state_dict` keeps its keys. What is below
    the cut is frozen (`requires_grad` False), what is above is set to train. At `skip_layers=0` nothing is frozen but
    `logit_scale`: that is full fine-tuning with class skipping.

    `torch.compile(clip)` computes the same. In `DistributedDataParallel(clip, broadcast_buffers=False)` each process
    chooses classes for its part of a batch. With `keep_ratio=1` and equal parts the gradients are those of the whole.

    Args:
        model: An open_clip `CLIP`, `CustomTextCLIP` or `CoCa`, an OpenAI `clip.model.CLIP`, or a Hugging Face
            `CLIPModel` or `SiglipModel`.
        tokens: [C, L] int64, the tokenised prompt of each class.
        skip_layers: Blocks skipped in each tower (ω): a number, a fraction of the tower's blocks, or a pair of either
            (image, text).
        keep_ratio: Share of classes that always stay in a step (up to 1), or their number.
        max_keep: Most classes that always stay, unless a batch has more labels.
        decay: λ, how slowly the chance to stay falls over the other classes.
        tail: "resample" draws the tail of every step anew, "fixed" once per run, as published.
        generator: Source of the draws; seeded with 0 if not given.
        lower_device: Where what is below the cut lives, parameters and buffers, if not with the rest.
        train_logit_scale: Also train the temperature.
        chunk: Most samples that run below the cut at once.
        memory: What a block above the cut keeps for backward: "fast" all but what is cheap to compute again (about ten
            widths a token), "min" its input alone, and runs again in backward; "auto" is "fast" as long as that takes
            less than half of the free memory. Blocks that run as modules keep what autograd keeps, unless it is "min".
            Results are the same.
        attention: Who computes it: "sdpa" is PyTorch, with our own operators for texts behind a shared prefix and for
            pooled tokens. "xformers" takes the place of the first two on a GPU; where it cannot, that is an error.
        text_cache: Folder to keep the texts' features at the cut in, and not in memory, for very many classes; filled
            the first time, while other processes wait, and opened the next. On a GPU each step then waits for the
            classes that it has drawn.

    Attributes:
        prototypes: [C, D] fp32 (fp64 for an fp64 model), unit-norm text embeddings from before tuning.
        sampler: The `RankSampler`; its `state_dict` belongs into a checkpoint.

    Raises:
        UnsupportedModel: If no adapter handles the model.
        ValueError: If an argument is out of range.
        RuntimeError: If SkipCLIP's embeddings differ from the model's own.
        StoreError: If `text_cache` holds the features of other prompts, weights or another model.

    Source: Wu et al., "Skip Tuning", CVPR 2025, arXiv 2412.11509.

    Example:
        >>> import logging; logging.disable()  # open_clip warns of random weights
        >>> import open_clip
        >>> from skipkernels.data import glyph_tiny
        >>> glyph_tiny.register()
        >>> model = open_clip.create_model("glyph-tiny")
        >>> tokens = open_clip.get_tokenizer("glyph-tiny")([f"the digit {n}." for n in range(10)])
        >>> clip = SkipCLIP(model, tokens, skip_layers=0.5)
        >>> out = clip(torch.rand(4, 3, 32, 32), torch.tensor([3, 3, 3, 3]))
        >>> out.loss.shape, out.class_ids.shape, out.class_ids[out.targets].tolist()
        (torch.Size([]), torch.Size([6]), [3, 3, 3, 3])
    """

    model: Any  # the caller's, with the attributes of its family
    prototypes: Tensor
    _text_features: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        tokens: Tensor,
        *,
        skip_layers: int | float | tuple[int | float, int | float],
        keep_ratio: float = 0.5,
        max_keep: int = 50,
        decay: float = 0.3,
        tail: Tail = "resample",
        generator: torch.Generator | None = None,
        lower_device: torch.device | str | None = None,
        train_logit_scale: bool = False,
        chunk: int = DEFAULT_CHUNK,
        memory: Memory = "auto",
        attention: Attention = "sdpa",
        text_cache: str | Path | None = None,
    ):
        super().__init__()
        if not isinstance(tokens, Tensor):
            raise TypeError(
                f"SkipCLIP: tokens must be an int64 tensor [C, L]; got {type(tokens).__name__}. Tokenise one prompt "
                "for each class; of what a tokenizer of transformers returns take input_ids."
            )
        if tokens.ndim != 2 or tokens.numel() == 0 or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"SkipCLIP: tokens must be int64 [C, L] with C ≥ 1 and L ≥ 1; got {tokens.dtype} {list(tokens.shape)}. "
                "Tokenise one prompt for each class with the model's own tokenizer."
            )
        if chunk < 1:
            raise ValueError(f"SkipCLIP: chunk must be at least 1; got {chunk}.")
        self.model = model
        self.sampler = RankSampler(keep_ratio, max_keep, decay, tail, generator)
        self.chunk = chunk
        self._image, self._text = build_towers(model, tokens)
        device = self._text.tokens.device
        pair = skip_layers if isinstance(skip_layers, tuple) else (skip_layers, skip_layers)
        if len(pair) != 2:
            raise ValueError(f"SkipCLIP: skip_layers must be one number or a pair (image, text); got {skip_layers!r}.")
        if memory not in get_args(Memory):
            raise ValueError(f'SkipCLIP: memory must be "auto", "fast" or "min"; got {memory!r}.')
        self._image.memory = self._text.memory = memory
        self._image.attention = self._text.attention = self._backend(attention)
        self._image.skip = blocks_to_skip(pair[0], len(self._image.blocks), "image")
        self._text.skip = blocks_to_skip(pair[1], len(self._text.blocks), "text")
        self._freeze(train_logit_scale)
        self._class_embeddings: tuple[Tensor, Any, list[Tensor]] | None = None  # and of which weights
        self._lower_device: torch.device | None = None  # until all classes have passed the lower text blocks

        self.register_buffer("_text_features", None, persistent=False)
        self._text_store: TextStore | None = None
        self._features_of: list[tuple[int, int]] = []  # the lower weights that gave either
        with torch.autocast(device.type, enabled=False):
            with evaluating([model]):
                if text_cache is not None:
                    self._keep_texts(Path(text_cache))
                prototypes = self._prototypes(text_cache)
                self.register_buffer("prototypes", prototypes, persistent=False)
                self._check_against_model(tokens.to(device))
            with training_without_chance(model):
                self._check_against_model(tokens.to(device))

        if lower_device is not None:
            self._lower_device = torch.device(lower_device)
            for tower in (self._image, self._text):
                tower.move_lower(self._lower_device)
            self._features_of = self._lower_text_weights()

    # ---- construction ------------------------------------------------------------------------------------------

    def _freeze(self, train_logit_scale: bool) -> None:
        # All that is not above a cut: what is below, a bias of all logits, which a softmax doesn't see, CoCa's decoder.
        self.model.requires_grad_(False)
        towers = (self._image, self._text)
        lower = {id(parameter) for tower in towers for parameter in tower.lower_parameters()}
        for parameter in (parameter for tower in towers for parameter in tower.upper_parameters()):
            if id(parameter) in lower:
                name = next(name for name, other in self.model.named_parameters() if other is parameter)
                raise UnsupportedModel(
                    f"SkipCLIP: parameter {name} is used on both sides of the cut, so it would change what is cached. "
                    "Untie it, or use skip_layers=0."
                )
            parameter.requires_grad_(True)
        self.model.logit_scale.requires_grad_(train_logit_scale)

    def _backend(self, attention: Attention) -> Backend:
        if attention not in get_args(Attention):
            raise ValueError(f'SkipCLIP: attention must be "sdpa" or "xformers"; got {attention!r}.')
        if attention == "sdpa":
            return SDPA
        device = self.model.logit_scale.device
        for tower in (self._image, self._text):
            if tower.as_nodes:
                weight = tower.parts(tower.blocks[0]).weights.fc
                reason = xformers.unusable(device, weight.dtype, weight.shape[1] // tower.heads)
                if reason is not None:
                    raise ValueError(
                        f'SkipCLIP: attention="xformers" cannot serve here: {reason} Leave it at "sdpa", or use a GPU '
                        "and an xformers that was built for this PyTorch."
                    )
        return xformers.backend()

    def _check_against_model(self, tokens: Tensor) -> None:
        """Raise if an embedding differs from that which the caller's model, in its present mode, gives itself."""
        ids = telling(self._text)
        generator = torch.Generator().manual_seed(0)
        image = torch.randn(1, 3, *self._image.image_size, generator=generator).to(tokens.device, self._image.dtype)
        with torch.no_grad():
            features = self.encode_lower(image)
            self._features = features.shape[1:], features.dtype
            pairs = {
                "texts": (self._text.own(tokens[ids]), self.encode_classes(ids)),
                "an image": (self._image.own(image), self.encode_upper(features)),
            }
        dtype = max((p.dtype for p in self.trainable_parameters()), key=lambda dtype: torch.finfo(dtype).eps)
        for name, (expected, got) in pairs.items():
            if not expected.isfinite().all():
                raise RuntimeError(
                    f"SkipCLIP: the model itself gives {name} an embedding that is not finite. Its weights are "
                    "damaged, or too large for its dtype; load others."
                )
            expected, got = (nn.functional.normalize(x.to(self.prototypes.dtype), dim=-1) for x in (expected, got))
            distance, allowed = (expected - got).norm(dim=-1).max().item(), _SELF_CHECK_TOLERANCE[dtype]
            if not distance <= allowed:
                mode = "training" if self.model.training else "evaluation"
                raise RuntimeError(
                    f"SkipCLIP: the model itself embeds {name} differently in {mode} mode: unit-norm distance "
                    f"{distance:.2e}, allowed {allowed:.0e} for {dtype}. Something in this model (a hook, a changed "
                    "forward, another mask or activation) is not what its type promises, and tuning it would be "
                    "silently wrong."
                )

    @property
    def skip_layers(self) -> tuple[int, int]:
        """Blocks skipped in the image and in the text tower."""
        return self._image.skip, self._text.skip

    @property
    def reductions(self) -> dict[str, str | None]:
        """Each exact reduction: None where it is on, else the reason why it is off."""
        no_cut = "nothing is skipped (skip_layers=0), so the embedding trains"
        reasons: dict[str, str | None] = {}
        for prefix, tower in (("image", self._image), ("text", self._text)):
            reasons |= {f"{prefix}.{name}": reason for name, reason in tower.reductions.items()}
            if tower.skip == len(tower.blocks):
                reasons[f"{prefix}.pooled_last_block"] = "every block is skipped: the last runs once, for every token"
        return reasons | {
            "image.no_input_gradient": None if self._image.skip else no_cut,
            "text.no_input_gradient": None if self._text.skip else no_cut,
            "text.features_kept": None if self._text.skip else no_cut,
        }

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that the model takes."""
        return self._image.image_size

    # ---- towers ------------------------------------------------------------------------------------------------

    def lower_identity(self, tower: Literal["image", "text"]) -> dict[str, str | int]:
        """What the features of a tower at the cut depend on, by name; it changes when what is below the cut does."""
        return (self._image if tower == "image" else self._text).lower_identity()

    def lower_copy(self) -> Callable[[Tensor], Tensor]:
        """`encode_lower` for another thread: on copies of the modules that share the weights and stay in evaluation."""
        shared = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
        tower = copy.deepcopy(self._image, shared)
        for part in tower.lower_parts:
            if isinstance(part, nn.Module):
                part.eval()
        return partial(self._encode_lower, tower)

    def encode_lower(self, images: Tensor, *, drop_patches: bool = False) -> Tensor:
        """Images [B, 3, height, width] to features at the cut, [B, N, W], the constants that a cache may keep.

        Of a convolutional tower they are maps, as its blocks pass them on. Below the cut nothing is in training mode:
        no dropout, batch norms as they are. Patches are dropped only if asked for, from a model in training mode whose
        image tower does that; such features are a sample, and not for a cache.
        """
        return self._encode_lower(self._image, images, drop_patches)

    def _encode_lower(self, tower: ImageTower, images: Tensor, drop_patches: bool = False) -> Tensor:
        lower, device = partial(tower.lower, draw=drop_patches), images.device
        images = images.to(tower.dtype)
        if tower.skip == 0:
            return lower(images)
        return LSkipBoundary.apply(lower, images.to(self._lower_device or device), self.chunk).to(device)

    def encode_upper(self, features: Tensor) -> Tensor:
        """Features at the cut [B, N, W] to image embeddings [B, D], not normalised."""
        return self._image.upper(features)

    def encode_image(self, x: Tensor) -> Tensor:
        """Images [B, 3, height, width], or features at the cut [B, N, W], to image embeddings [B, D], not normalised.

        From images of a model in training mode patches are dropped, if its image tower does that.

        Raises:
            ValueError: If x is neither, or is features although nothing is skipped.
        """
        shape, dtype = self._features
        sample = self._image.patch_dropout is not None and x.ndim == 3 and x.shape[2] == shape[1]
        are_features = x.shape[1:] == shape or sample
        if x.ndim == 4 and x.shape[1] == 3 and not are_features:
            return self.encode_upper(self.encode_lower(x, drop_patches=True))
        if self._image.skip == 0:
            raise ValueError(
                "SkipCLIP: with skip_layers=0 the embedding trains, so features can't be kept; pass images "
                f"[B, 3, height, width]; got {list(x.shape)}."
            )
        if not are_features:
            raise ValueError(
                "SkipCLIP: x must be images [B, 3, height, width] or features at the cut "
                f"[B, {', '.join(map(str, shape))}]; got {list(x.shape)}."
            )
        return self.encode_upper(x.to(dtype))

    def _keep_texts(self, folder: Path) -> None:
        """Keep the texts' features at the cut in a folder."""
        if self._text.skip == 0:
            raise ValueError("SkipCLIP: text_cache is for what is below a cut; with skip_layers=0 there is nothing.")
        self._text_store = TextStore(folder / "features", self._text, self._lower_texts, self.chunk)
        self._features_of = self._lower_text_weights()

    def _prototypes(self, folder: str | Path | None) -> Tensor:
        """Embeddings [C, D] of all classes from before tuning."""
        if folder is None:
            return self._encode_all_classes()
        return kept_prototypes(Path(folder, "prototypes"), self._text, self._unit_embeddings)

    def _lower_text_weights(self) -> list[tuple[int, int]]:
        """Changes when weights are loaded or moved; a look at each step costs microseconds."""
        return [(p.data_ptr(), p._version) for p in self._text.lower_parameters()]

    def _lower_texts(self, class_ids: Tensor | None = None) -> Tensor:
        """Hidden states [n, L, W] at the cut of the prompts of some classes, or of all, without autocast."""
        tokens = self._text.tokens if class_ids is None else self._text.tokens[class_ids]
        with torch.autocast(tokens.device.type, enabled=False):
            lower_tokens = tokens.to(self._lower_device or tokens.device)
            return LSkipBoundary.apply(self._text.lower, lower_tokens, self.chunk).to(tokens.device)

    def _encode_kept(self) -> Callable[[Tensor], Tensor]:
        """Class ids [K] to embeddings [K, D], from text features at the cut that are kept.

        They are rows [R, W] of all classes, for as long as the weights below the cut are the same, or a folder.
        """
        text, weights = self._text, self._lower_text_weights()
        if self._text_store is not None:
            if weights != self._features_of:
                self._text_store.check(text.lower_identity())
                self._features_of = weights
            kept = self._text_store
            return lambda class_ids: text.upper(kept.gather(text.places(class_ids)), class_ids, of_all=False)
        if self._text_features is None or weights != self._features_of:
            self._text_features, self._features_of = text.rows(self._lower_texts()), weights
        rows = self._text_features
        return lambda class_ids: text.upper(rows, class_ids)

    def encode_classes(self, class_ids: Tensor) -> Tensor:
        """Class ids [K] to text embeddings [K, D], not normalised."""
        if self._text.skip > 0:
            return self._encode_kept()(class_ids)
        hidden = self._text.lower(self._text.tokens[class_ids])
        return self._text.upper(self._text.rows(hidden, class_ids), class_ids, of_all=False)

    def _encode_all_classes(self) -> Tensor:
        """Unit-norm embeddings [C, D] of all classes, without gradient."""
        return self._unit_embeddings(torch.arange(len(self._text.tokens), device=self._text.tokens.device))

    def _unit_embeddings(self, class_ids: Tensor) -> Tensor:
        """Class ids [n] to unit-norm embeddings [n, D], without gradient, in chunks."""
        with torch.no_grad():
            encode = self.encode_classes if self._text.skip == 0 else self._encode_kept()
            embeddings = torch.cat([encode(chunk) for chunk in class_ids.split(self.chunk)])
            wide = torch.promote_types(embeddings.dtype, torch.float32)
            return nn.functional.normalize(embeddings.to(wide), dim=-1)

    # ---- training ----------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, labels: Tensor, *, return_logits: bool = False) -> SkipOutput:
        """One step: embed the images, choose the classes, embed those, and compare.

        Args:
            x: Images [B, 3, height, width], or features at the cut [B, N, W].
            labels: [B] int64, classes of the images.
            return_logits: Also give the [B, K] logits; they are not needed for the loss.

        Returns:
            SkipOutput: the mean cross-entropy over the kept classes, and which they were.

        Raises:
            ValueError: If shapes don't fit or a label is out of range.
        """
        image = self.encode_image(x)
        class_ids, targets = self.select(image, labels)
        text = self.encode_classes(class_ids)
        scale = self.model.logit_scale.exp()
        loss = functional.class_sampled_cross_entropy(image, text, targets, scale)
        logits = functional.class_sampled_logits(image, text, scale) if return_logits else None
        return SkipOutput(loss, logits, class_ids, targets)

    @torch.no_grad()
    def select(self, image: Tensor, labels: Tensor) -> ClassSelection:
        """The classes that take part in a step of image embeddings [B, D] with labels [B]; draws the tail."""
        scores = functional.class_scores(image.to(self.prototypes.dtype), self.prototypes, labels)
        return select_ranks(scores, labels, self.sampler.draw(len(self.prototypes), len(labels)))

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Every parameter that tuning changes."""
        return [p for group in self.parameter_groups(text_lr=0.0, image_lr=0.0) for p in group["params"]]

    def parameter_groups(self, *, text_lr: float, image_lr: float) -> list[dict[str, Any]]:
        """Groups for a `torch.optim` optimizer: the text tower and the image tower, each at its own learning rate.

        The temperature, if it trains, is in the text tower's group.

        Raises:
            RuntimeError: If parameters are no longer the model's.
        """
        text, image = list(self._text.upper_parameters()), list(self._image.upper_parameters())
        if self.model.logit_scale.requires_grad:
            text.append(self.model.logit_scale)
        if not {id(p) for p in (*text, *image)} <= {id(p) for p in self.model.parameters()}:
            raise RuntimeError(
                "SkipCLIP: the model's parameters were replaced by others (load_state_dict with assign=True does "
                "that), so they would not train. Make SkipCLIP anew, or load without assign."
            )
        return [{"name": "text", "params": text, "lr": text_lr}, {"name": "image", "params": image, "lr": image_lr}]

    # ---- inference ---------------------------------------------------------------------------------------------

    def class_embeddings(self) -> Tensor:
        """Unit-norm text embeddings [C, D] of all classes with the weights as they are, without gradient.

        They are those of evaluation mode, are kept, and computed again only when the text tower's weights have changed,
        by whatever means.
        """
        upper, lower = list(self._text.upper_parameters()), list(self._text.lower_parameters())
        device = upper[0].device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        # The version counter misses a change through .data, the hash one that only moves numbers about or flips signs.
        seen = [(p.data_ptr(), p._version) for p in upper], autocast, self._lower_text_weights()
        hashes = [torch.stack([torch.hash_tensor(p.detach()) for p in part]) for part in (upper, lower) if part]
        if self._class_embeddings is not None:
            embeddings, kept_seen, kept_hashes = self._class_embeddings
            same = [kept.equal(hashed) for kept, hashed in zip(kept_hashes, hashes, strict=True)]
            if kept_seen == seen and all(same):
                return embeddings
            if not same[-1]:
                self._text_features, self._features_of = None, []
        with evaluating([self.model]):
            self._class_embeddings = self._encode_all_classes(), seen, hashes
        return self._class_embeddings[0]

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Logits [B, C] of images [B, 3, height, width] or features at the cut [B, N, W] over all classes.

        They are those of evaluation mode, whatever mode the model is in.
        """
        classes = self.class_embeddings()
        with evaluating([self.model]):
            image = self.encode_image(x)
        with torch.autocast(image.device.type, enabled=False):  # bf16 logits at a scale of 100 are half a unit apart
            image = nn.functional.normalize(image.to(classes.dtype), dim=-1)
            return self.model.logit_scale.exp().to(classes.dtype) * image @ classes.T


def blocks_to_skip(skip: int | float, depth: int, tower: str) -> int:
    """How many of the `depth` blocks of a tower are skipped.

    >>> blocks_to_skip(0.5, 12, "image"), blocks_to_skip(5, 12, "text")
    (6, 5)
    """
    number = not isinstance(skip, bool) and isinstance(skip, (int, float))
    blocks = round(skip * depth) if isinstance(skip, float) and 0.0 <= skip <= 1.0 else skip
    if not (number and 0 <= blocks <= depth and blocks == int(blocks)):
        raise ValueError(
            f"SkipCLIP: skip_layers must be a whole number from 0 to {depth} for the {tower} tower, or a fraction of "
            f"its blocks such as 0.5, or a tuple (image, text) of either; got {skip!r}."
        )
    return int(blocks)
