"""SkipCLIP: a CLIP model with the training step of Skip Tuning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..boundary import DEFAULT_CHUNK
from ..checks import warn_caller
from ..digests import digest_tensors
from ..options import AttentionName, Memory, Tail, Trainable
from ..selection import RankSampler
from ..towers.base import Reduction
from ..towers.modes import evaluating
from . import checks
from .cut_towers import TowerOptions
from .encoders import Encoders
from .images import ImageEncoder, sharing_weights
from .state import Origin, pack_state, unpack_state
from .step import LossOptions, SkipOutput, compare_with_all, step
from .texts import ClassTexts, in_same_dtype

if TYPE_CHECKING:
    from typing_extensions import Self  # of Python 3.11

    from .classifier import AffineHead


class SkipCLIP(nn.Module):
    """Tune a CLIP by Skip Tuning: train the blocks above `skip_layers` on the classes selected for each batch.

    The model is tuned in place, and the keys of its `state_dict` do not change. The *cut* is after the first
    `skip_layers` blocks of each tower: parameters below it are frozen, parameters above it train. A step, selection
    and loss are in docs/method.md; evaluation, checks for changes of the model, memory and limits in
    docs/training-loop.md. `parallel.ShardedSkipCLIP` is the same on several processes.

    Args:
        model: open_clip `CLIP`, `CustomTextCLIP` or `CoCa`, OpenAI `clip.model.CLIP`, Hugging Face `CLIPModel`,
            `MetaClip2Model`, `SiglipModel` or `Siglip2Model`, in fp32, bf16, fp16 or fp64; docs/models.md.
        tokens: int64 [C, L], a prompt per class, or [C, T, L], T templates, over which embeddings are averaged.
        skip_layers: ω, frozen blocks per tower: a number, a fraction, or a pair (image, text) of these.
        keep_ratio: Most similar classes that each step compares its images with: a share of all if below 1, all classes
            if 1, a number of classes if above 1. docs/method.md.
        max_keep: Upper limit of that number, unless a batch has more labels; the tail is not counted.
        decay: λ of the probability that a less similar class, of the tail, is drawn: larger values draw more.
        tail: How each step draws a few of the other classes, the tail. "resample": other ranks of the tail in every
            step. "fixed": drawn once, as published.
        max_tail: Upper limit of the expected number of classes of the tail; changes the method. docs/many-classes.md.
        generator: Generator of the draws; default: one with seed 0.
        label_smoothing: ε in [0, 1] of the loss, over the kept classes. docs/method.md.
        class_weight: [C] weights of the classes in the loss, as in `torch.nn.CrossEntropyLoss`; default: none.
        train_text: False trains the image tower only: constant class embeddings, all classes. docs/training-loop.md.
        train_logit_scale: True also trains the temperature.
        trainable: "upper" trains all parameters above the cut; "as_is" those that require gradients. docs/trainers.md.
        attention: "sdpa", or "xformers" on a GPU. docs/training-loop.md.
        memory: Saved by a block for its backward pass. "fast": all that it needs. "min": its input alone, and the rest
            is computed again. "auto": fast if it fits in memory. docs/training-loop.md.
        chunk: Images or prompts that run through the frozen blocks at a time, to bound memory; no effect on results.
        lower_device: Device of parameters and buffers below the cut; default: that of the model.
        text_cache: Folder of the text features at the cut; default: in memory. docs/cache.md, Very many classes.

    Attributes:
        class_weight: [C] in the dtype of the prototypes, or None. Not part of `state_dict`.
        sampler: The `RankSampler`. Its state is part of `state_dict`.
        encoders, images, texts: Parts for the code of this package.

    Raises:
        UnsupportedModel: If the model cannot be cut and called exactly; the message has the reason.
        RuntimeError: If embeddings or gradients differ from those that the model computes itself.
        CacheError: If `text_cache` holds features of other prompts, other weights or another model.

    Source: Wu et al., "Skip Tuning", CVPR 2025, arXiv 2412.11509.

    Example:
        >>> from skipkernels.app.demo import pictogram_tiny
        >>> model, _, tokenizer = pictogram_tiny.load()
        >>> clip = SkipCLIP(model, tokenizer([f"the digit {n}." for n in range(10)]), skip_layers=0.5)
        >>> out = clip(torch.rand(4, 3, 32, 32), torch.tensor([3, 3, 3, 3]))
        >>> out.loss.shape, out.class_ids[out.targets].tolist()
        (torch.Size([]), [3, 3, 3, 3])
    """

    model: Any  # nn.Module; its attributes depend on its library
    class_weight: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        tokens: Tensor,
        *,
        skip_layers: int | float | tuple[int | float, int | float],
        # Selection
        keep_ratio: float = 0.5,
        max_keep: int = 50,
        decay: float = 0.3,
        tail: Tail = "resample",
        max_tail: int | None = None,
        generator: torch.Generator | None = None,
        # Loss
        label_smoothing: float = 0.0,
        class_weight: Tensor | None = None,
        # Towers
        train_text: bool = True,
        train_logit_scale: bool = False,
        trainable: Trainable = "upper",
        attention: AttentionName = "sdpa",
        # Memory
        memory: Memory = "auto",
        chunk: int = DEFAULT_CHUNK,
        lower_device: torch.device | str | None = None,
        text_cache: str | Path | None = None,
    ):
        super().__init__()
        tokens = checks.as_tokens(tokens)
        checks.check_chunk(chunk)
        checks.refuse_inference_mode("SkipCLIP: cannot be created")
        options = TowerOptions(skip_layers, memory, attention, trainable, train_text, train_logit_scale, chunk)
        self.label_smoothing = checks.as_label_smoothing(label_smoothing)
        share = keep_ratio if train_text else 1.0  # constant class embeddings cost nothing
        self.sampler = RankSampler(
            share, max_keep=max_keep, decay=decay, tail=tail, max_tail=max_tail, generator=generator
        )
        self.encoders = Encoders(model, tokens, options, text_cache=text_cache, lower_device=lower_device)
        self.model = model
        self.config = getattr(model, "config", None)  # for the model card of transformers' trainer
        weight = checks.as_class_weight(class_weight, self.prototypes, len(tokens))
        self.register_buffer("class_weight", weight, persistent=False)

    # ---- parts, for the code of this package ------------------------------------------------------------------------

    @property
    def images(self) -> ImageEncoder:  # noqa: D102
        return self.encoders.images

    @property
    def texts(self) -> ClassTexts:  # noqa: D102
        return self.encoders.texts

    @property
    def scale(self) -> Tensor:
        """Factor of the cosines [], exp(logit_scale)."""
        return self.model.logit_scale.exp()

    # ---- the step ----------------------------------------------------------------------------------------------------

    @torch.compiler.disable  # a compiler would break the graph at each fused block
    def forward(self, pixel_values: Tensor, labels: Tensor, *, return_logits: bool = False) -> SkipOutput:
        """Run one step: embed the images, select classes, embed these, and compute the loss.

        In evaluation mode all classes are compared, nothing is drawn, and the logits are [B, C].

        Args:
            pixel_values: Images [B, 3, height, width], or features at the cut [B, N, W].
            labels: [B] int64, classes of the images. Or soft labels, [B, C] floating-point, rows of probabilities that
                sum to 1, as of mixup and CutMix: see `loss`.
            return_logits: In training, also return the [B, K] logits; the loss does not need them.
        """
        self.check_and_follow(pixel_values)
        checks.check_labels(labels, pixel_values, self.num_classes)
        return self._compare_with_classes(self.images.encode(pixel_values), labels, return_logits)

    if TYPE_CHECKING:
        __call__ = forward  # that of a Module has no types

    def check_and_follow(self, pixel_values: Any) -> None:
        """Check images or features of a step or an evaluation, and follow them to their device; see `_follow_to`."""
        checks.refuse_export()
        self.images.check(pixel_values)
        self._follow_to(pixel_values.device)

    def _follow_to(self, device: torch.device) -> None:
        """Move the class weights and the tensors of the texts too, after the model alone was moved to a device."""
        if self.prototypes.device != device and self.model.logit_scale.device == device:
            self.class_weight = None if self.class_weight is None else self.class_weight.to(device)
            self.texts.drop()
            self.texts.convert(lambda x: x.to(device))

    @torch.compiler.disable
    def loss(self, image: Tensor, labels: Tensor) -> Tensor:
        """Loss [] of image embeddings: `clip.loss(clip.encode_image(images), y)` is `clip(images, y).loss`.

        For trainers that call a model and then a loss function, within the same autocast. `image` is [B, D], of any
        norm; `labels` are those of `forward`. Of soft labels every class with a probability above 0 in the batch is
        selected, as labels are: pass label smoothing to SkipCLIP. On a GPU such a step has a host sync, to count these
        classes. See docs/training-loop.md.
        """
        # Texts that are embedded now are in the dtype of their tower; kept ones are converted to that of the image.
        embeds_texts = self.encoders.options.train_text and (self.training or torch.is_grad_enabled())
        checks.check_image_embeddings(image, self.prototypes.shape[1], self.texts.tower.dtype if embeds_texts else None)
        self._follow_to(image.device)
        checks.check_labels(labels, image, self.num_classes)
        return self._compare_with_classes(image, labels, return_logits=False).loss

    def _compare_with_classes(self, image: Tensor, labels: Tensor, return_logits: bool) -> SkipOutput:
        """Compare embeddings [B, D] with selected classes, in evaluation mode with all; ShardedSkipCLIP overrides."""
        options = LossOptions(self.label_smoothing, self.class_weight, return_logits)
        if not self.training:
            return compare_with_all(image, labels, self.evaluation_embeddings(), self.scale, options)
        return step(image, labels, self.texts, self.sampler, self.scale, options)

    def evaluation_embeddings(self) -> Tensor:
        """Embeddings [C, D] of all classes: with gradient and any norm, else unit norm; ShardedSkipCLIP overrides."""
        return self.texts.encode(self.texts.class_ids) if torch.is_grad_enabled() else self.texts.kept_embeddings()

    # ---- evaluation --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(
        self, pixel_values: Tensor, *, tokens: Tensor | None = None, class_embeddings: Tensor | None = None
    ) -> Tensor:
        """Logits [B, C] over all classes, or over other classes, always in evaluation mode.

        Args:
            pixel_values: Images [B, 3, height, width], or features at the cut [B, N, W].
            tokens: Prompts of other classes; the same as `class_embeddings=clip.class_embeddings(tokens)`.
            class_embeddings: Embeddings [C', D] of other classes, from the method of this name, for several batches;
                unit norm, any floating dtype. Logits are computed in the dtype of `prototypes`.
        """
        if tokens is not None:
            if class_embeddings is not None:
                raise TypeError("SkipCLIP.predict: pass tokens or class_embeddings; got both.")
            class_embeddings = self.class_embeddings(tokens)
        if class_embeddings is not None:
            checks.check_class_embeddings(class_embeddings, self.prototypes.shape[1])
            class_embeddings = class_embeddings.to(self.prototypes.dtype)
        image, classes = self._scaled_image_and_classes(pixel_values, class_embeddings)
        with torch.autocast(image.device.type, enabled=False):  # bf16 logits at a scale of 100 are half a unit apart
            return image @ classes.T

    @torch.no_grad()
    def top_k(self, pixel_values: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest logits [B, k] of each image over all classes, descending, and their class ids int64 [B, k].

        The same as `predict(images).topk(k)`, in chunks of classes: with very many classes [B, C] is never in memory.
        Of equal logits that of the lower class comes first.
        """
        from ..retrieval import top_k_logits

        image, classes = self._scaled_image_and_classes(pixel_values)
        with torch.autocast(image.device.type, enabled=False):
            return top_k_logits(image, classes, k)

    def class_embeddings(self, tokens: Tensor | None = None) -> Tensor:
        """Unit-norm text embeddings [C, D] of all classes with the current weights, without gradient or dropout.

        Computed again only after a change of the weights, of any kind. With `tokens` [C', L] or [C', T, L], as in the
        constructor, return those of other classes [C', D], computed in each call; the task stays.
        """
        if tokens is None:
            return self.texts.kept_embeddings().clone()  # the original is kept
        tokens = checks.as_tokens(tokens)
        checks.check_vocabulary("SkipCLIP", "tokens", tokens, self.texts.tower.vocabulary)
        texts = self.texts.others(tokens)
        return texts.compute_embeddings(texts.class_ids)

    def classifier(self, head: AffineHead | None = None) -> nn.Module:
        """Return a plain module from images [B, 3, height, width] to logits [B, C], with the current class embeddings.

        It shares the weights of the image tower, runs in evaluation mode and contains no SkipCLIP, so `torch.export`
        and ONNX accept it. Create it again after further training. `head` replaces the class embeddings: docs/heads.md.
        """
        from .classifier import ImageClassifier

        with torch.no_grad():
            encoder = sharing_weights(self.images.tower.encoder(), self.model)
            if head is not None:
                return ImageClassifier(encoder, head.weight, head.bias).eval()
            text = self.class_embeddings()
            return ImageClassifier(encoder, self.scale.to(text.dtype) * text).eval()

    def _scaled_image_and_classes(self, pixel_values: Tensor, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Unit-norm image embeddings [B, D] times the scale, and unit-norm embeddings of classes, by default all."""
        self.check_and_follow(pixel_values)
        classes = self.texts.kept_embeddings() if classes is None else classes
        with evaluating([self.model]):
            image = self.images.encode(pixel_values)
        with torch.autocast(image.device.type, enabled=False):
            image = nn.functional.normalize(image.to(classes.dtype), dim=-1)
            return self.scale.to(classes.dtype) * image, classes

    # ---- towers ------------------------------------------------------------------------------------------------------

    def encode_lower(self, images: Tensor) -> Tensor:
        """Images [B, 3, height, width] to features at the cut [B, N, W], constants that may be cached.

        Below the cut all modules run in evaluation mode, without dropout. Features do not record their cut: those of
        another `skip_layers` are often accepted, with wrong results. `FeatureCache.build` compares cut and weights.
        """
        checks.check_pixel_values(images)
        self.images.watch()
        return self.images.lower(images)

    def encode_upper(self, features: Tensor) -> Tensor:
        """Features at the cut [B, N, W] to image embeddings [B, D], not normalised."""
        checks.check_features(features, self.images.feature_shape)
        return self.images.upper(features)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Images [B, 3, height, width], or features at the cut [B, N, W], to image embeddings [B, D], any norm."""
        self.images.check(pixel_values)  # without `check_and_follow`, as no texts are needed
        return self.images.encode(pixel_values)

    def encode_classes(self, class_ids: Tensor) -> Tensor:
        """Class ids [K], int64 in [0, C), to text embeddings [K, D], not normalised. Ids may repeat."""
        checks.check_class_ids(class_ids, len(self.texts))
        return self.texts.encode(class_ids, exact_rows=True).to(self.texts.tower.dtype)

    def refresh(self) -> None:
        """Read the model again, after a deliberate change to it or to its weights below the cut.

        Compute stored image features at the cut again before the next step. This call repeats every check of the
        constructor and sets `requires_grad` again; prototypes and sampler do not change. Create the optimizer again if
        it holds replaced parameters, and SkipCLIP again after an error.
        """
        self.encoders.refresh()

    def set_classes(self, tokens: Tensor, class_weight: Tensor | None = None) -> None:
        """Replace the classes of the task in place; their number may change.

        Parameters, optimizer states and the generator stay; class weights are those passed here. Copies, such as that
        of an `AveragedModel`, need their own call. The new `prototypes` are computed with the *current* weights: before
        the first step they are the zero-shot embeddings that the published method selects with. After an error the
        previous classes stay in use.
        """
        tokens = checks.as_tokens(tokens)
        checks.refuse_inference_mode("SkipCLIP: set_classes cannot be called")
        weight = checks.as_class_weight(class_weight, self.prototypes, len(tokens))
        self.encoders.set_tokens(tokens)
        self.class_weight = weight

    # ---- parameters --------------------------------------------------------------------------------------------------

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return every parameter that trains."""
        return [parameter for side in self.encoders.trained() for parameter in side]

    def parameter_groups(self, *, text_lr: float, image_lr: float) -> list[dict[str, Any]]:
        """Return the parameter groups "text" and "image"; a `logit_scale` that trains is in "text"."""
        text, image = self.encoders.trained()
        return [{"name": "text", "params": text, "lr": text_lr}, {"name": "image", "params": image, "lr": image_lr}]

    @property
    def prototypes(self) -> Tensor:
        """Unit-norm text embeddings [C, D] from before tuning, at least fp32."""
        return self.texts.prototypes

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return len(self.texts)

    @property
    def skip_layers(self) -> tuple[int, int]:
        """Number of blocks skipped in the image tower and in the text tower."""
        return self.images.tower.skip, self.texts.tower.skip

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that the model takes."""
        return self.images.tower.image_size

    @property
    def reductions(self) -> dict[str, Reduction]:
        """Exact reductions of time and memory by name: `enabled`, or the `reason` why not."""
        return self.encoders.reductions

    def extra_repr(self) -> str:  # noqa: D102
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        where = f"dtype={self.images.tower.dtype}, device={self.prototypes.device}"
        return f"classes={self.num_classes}, skip_layers={self.skip_layers}, trainable={trainable:,}, {where}"

    # ---- modes and moves ---------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; a switch compares the model with what it was, see `check_model`."""
        if mode != self.training:
            self.check_model()
        return super().train(mode)

    def check_model(self) -> None:
        """Compare the model with what SkipCLIP read: contents below the cut, hooks, replaced methods, masks, settings.

        Called at each switch between training and evaluation mode; a step compares only identities and versions of the
        weights below the cut. After a change below the cut, text features are computed again, and calls with image
        features computed before raise an error.
        """
        self.encoders.check_model()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Convert or move everything; prototypes and class weights stay at least fp32."""
        weight = self.class_weight  # a buffer, which super() converts as any other
        with self.encoders.converted(fn):
            super()._apply(fn, recurse)
        self.class_weight = None if weight is None else in_same_dtype(fn, weight)
        return self

    def _replicate_for_data_parallel(self) -> Self:
        checks.refuse_data_parallel()

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """Return the state of the sampler and the prototypes as a uint8 tensor: a safetensors file."""
        return pack_state(self._origin(), self.prototypes, self.sampler.state_dict())

    def set_extra_state(self, state: Any) -> None:
        """Continue from the result of `get_extra_state`; a ValueError for one of other prompts or processes."""
        prototypes, sampler = unpack_state(state, self._origin())
        self.sampler.load_state_dict(sampler)
        if prototypes is not None:
            self.prototypes.copy_(prototypes)

    def _origin(self) -> Origin:
        """Origin of an extra state; overridden by ShardedSkipCLIP."""
        return Origin(digest_tensors([("tokens", self.encoders.tokens)]), self.prototypes.shape[1], processes=1)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        """Warn instead of an error if a state dict has no extra state, such as the model's own."""
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        if (key := f"{prefix}_extra_state") in missing:
            missing.remove(key)
            warn_caller(
                "SkipCLIP: the state dict has no sampler and no prototypes, such as the model's own; both stay as they "
                "are."
            )

    # ---- memory, under the names of open_clip and transformers -------------------------------------------------------

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Set `memory="min"`, or back to its value at construction ("auto" if that was "min"); open_clip's name."""
        self.encoders.save_memory(enable)

    def gradient_checkpointing_enable(self, *arguments: Any, **options: Any) -> None:
        """Set `memory="min"`: the name of transformers; its options are accepted without effect."""
        self.set_grad_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Set `memory` back, under the name of transformers."""
        self.set_grad_checkpointing(False)

    # From version 6 on
    activation_checkpointing_enable = gradient_checkpointing_enable
    activation_checkpointing_disable = gradient_checkpointing_disable
