"""SkipCLIP: a CLIP model with the training step of Skip Tuning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..boundary import DEFAULT_CHUNK
from ..digests import digest_tensors
from ..dtypes import in_same_dtype, without_autocast
from ..options import AttentionName, Memory, Tail, Trainable
from ..selection import RankSampler
from ..towers.fused_classes import fuse_blocks
from ..towers.modes import evaluating
from . import checks
from .state import Origin, forgive_missing_state, pack_state, unpack_state
from .step import LossOptions, SkipOutput, compare_with_all, step
from .texts import PromptEncoder
from .trainable import TrainOptions, check_trained, trained_parameters

if TYPE_CHECKING:
    from typing_extensions import Self  # of Python 3.11

    from ..towers.reductions import Reduction
    from .classifier import AffineHead


class SkipCLIP(nn.Module):
    """Tune a CLIP by Skip Tuning: train the blocks above `skip_layers` on the classes selected for each batch.

    The model is tuned in place, and the keys of its `state_dict` do not change. The *cut* is after the first
    `skip_layers` blocks of each tower: parameters below it are frozen, parameters above it train. docs/training-loop.md
    has examples; `parallel.ShardedSkipCLIP` is the same on several processes.

    Args:
        model: open_clip `CLIP`, `CustomTextCLIP` or `CoCa`, OpenAI `clip.model.CLIP`, Hugging Face `CLIPModel`,
            `MetaClip2Model`, `SiglipModel` or `Siglip2Model`, in fp32, bf16, fp16 or fp64; docs/models.md.
        tokens: int64 [C, L], a prompt per class, or [C, T, L], T templates, over which embeddings are averaged.
        skip_layers: ω, frozen blocks per tower: a number, a fraction, or a pair (image, text) of these.
        keep_ratio: Most similar classes that each step compares its images with: a share of all if below 1, all classes
            if 1, a number of classes if above 1.
        max_keep: Upper limit of that number, unless a batch has more labels; the tail is not counted.
        decay: λ of the probability that a less similar class, of the tail, is drawn: larger values draw more.
        tail: How each step draws a few of the other classes, the tail. "resample": other ranks of the tail in every
            step. "fixed": drawn once, as published.
        max_tail: Upper limit of the expected number of classes of the tail; changes the method. docs/many-classes.md.
        generator: Generator of the draws; default: one with seed 0.
        label_smoothing: ε in [0, 1] of the loss, over the kept classes.
        class_weight: [C] weights of the classes in the loss, as in `torch.nn.CrossEntropyLoss`; default: none.
        train_text: False trains the image tower only, and compares with the constant embeddings of all classes.
        train_logit_scale: True also trains the temperature.
        trainable: "upper" trains every parameter above the cut, also those that were frozen. "as_is" trains those above
            the cut that require gradients: norms, biases, or adapters of PEFT.
        attention: Attention above and below the cut. "sdpa": PyTorch's, with kernels of this package for prompts that
            share a prefix. "xformers": `memory_efficient_attention`, on a GPU with xformers installed.
        memory: Values that a block above the cut saves for its backward pass, per token and channel. "fast": about ten.
            "min": one, its input, and the rest is computed again. "auto": "fast" if that takes less than half of the
            free memory, else "min". The results are the same.
        chunk: Largest number of images or prompts that run through the frozen blocks at once. Smaller numbers take less
            memory; the results are the same.
        lower_device: Device of parameters and buffers below the cut; default: that of the model.
        text_cache: Folder of the text features at the cut, for very many classes; default: in memory.

    Attributes:
        class_weight: [C] in the dtype of the prototypes, or None. Not part of `state_dict`.
        sampler: The `RankSampler`. Its state is part of `state_dict`.
        images, texts, train_options: Parts for the code of this package.

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
        checks.check_options(memory=memory, attention=attention, trainable=trainable, chunk=chunk)
        checks.refuse_inference_mode("SkipCLIP: cannot be created")
        self.label_smoothing = checks.as_label_smoothing(label_smoothing)
        self.sampler = RankSampler(keep_ratio, max_keep, decay, tail, generator, max_tail)
        if not train_text:  # constant class embeddings need no text tower
            self.sampler.keep_ratio = 1.0
        self.model = model
        self.main_input_name, self.config = "pixel_values", getattr(model, "config", None)  # for transformers' trainer
        self.train_options = TrainOptions(trainable, train_text, train_logit_scale)
        from . import builder  # needed at a construction only

        cut = builder.read_cut(memory, attention, chunk, lower_device)
        with builder.restored_after_error(model):
            parts = builder.build(model, tokens, skip_layers, cut, self.train_options, folder=text_cache)
        self.images, self.texts, self._containers = parts
        self.class_weight = checks.as_class_weight(class_weight, self.prototypes, self.num_classes)

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
        self.check_inputs(pixel_values)
        checks.check_labels(labels, pixel_values, self.num_classes)
        return self._compare(self.images.encode(pixel_values), labels, return_logits)

    if TYPE_CHECKING:
        __call__ = forward  # that of a Module has no types

    def _compare(self, image: Tensor, labels: Tensor, return_logits: bool, text: Tensor | None = None) -> SkipOutput:
        """Compare embeddings [B, D] with selected classes; in evaluation mode with all, `text` if given."""
        options = LossOptions(self.label_smoothing, self.class_weight)
        if self.training:
            return step(image, labels, self.texts, self.sampler, self.scale, options, return_logits)
        text = self.evaluation_embeddings() if text is None else text
        return compare_with_all(image, labels, text, self.scale, options)

    def evaluation_embeddings(self) -> Tensor:
        """Embeddings [C, D] of all classes: with gradient and any norm, else unit norm; ShardedSkipCLIP overrides."""
        return self.texts.encode(self.texts.class_ids) if torch.is_grad_enabled() else self.texts.kept_embeddings()

    def check_inputs(self, pixel_values: Any) -> None:
        """Check images or features of a step or an evaluation."""
        checks.refuse_export()
        self.check_device()
        self.images.check(pixel_values)

    def check_device(self) -> None:
        """Raise a RuntimeError if the model was moved alone."""
        checks.refuse_moved_model(self.prototypes.device, self.model.logit_scale.device)

    @torch.compiler.disable
    def loss(self, image: Tensor, labels: Tensor) -> Tensor:
        """Loss [] of image embeddings: `clip.loss(clip.encode_image(images), y)` is `clip(images, y).loss`.

        For trainers that call a model and then a loss function, within the same autocast. `image` is [B, D], of any
        norm; `labels` are those of `forward`. Of soft labels every class with a probability above 0 in the batch is
        selected, as labels are: pass label smoothing to SkipCLIP. On a GPU a host sync counts these classes.
        """
        self._check_embeddings(image, labels)
        return self._compare(image, labels, return_logits=False).loss

    def _check_embeddings(self, image: Tensor, labels: Tensor) -> None:
        """Check image embeddings, and their labels."""
        self.check_device()
        checks.check_image_embeddings(image, self.prototypes.shape[1])
        checks.check_labels(labels, image, self.num_classes)

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
            class_embeddings = checks.as_class_embeddings(class_embeddings, self.prototypes)
        image, classes = self._scaled_image_and_classes(pixel_values, class_embeddings)
        with without_autocast(image.device):  # bf16 logits at a scale of 100 are half a unit apart
            return image @ classes.T

    @torch.no_grad()
    def top_k(self, pixel_values: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest logits [B, k] of each image over all classes, descending, and their class ids int64 [B, k].

        The same as `predict(images).topk(k)`, in chunks of classes: with very many classes [B, C] is never in memory.
        Of equal logits that of the lower class comes first.
        """
        from ..retrieval import top_k_logits

        image, classes = self._scaled_image_and_classes(pixel_values)
        with without_autocast(image.device):
            return top_k_logits(image, classes, k)

    def class_embeddings(self, tokens: Tensor | None = None) -> Tensor:
        """Unit-norm text embeddings [C, D] of all classes with the current weights, without gradient or dropout.

        Computed again only after a change of the weights, of any kind. With `tokens` [C', L] or [C', T, L], as in the
        constructor, return those of other classes [C', D], computed in each call; the task stays.
        """
        self.check_device()
        if tokens is None:
            return self.texts.kept_embeddings().clone()  # the original is kept
        tokens = checks.as_tokens(tokens)
        checks.check_vocabulary("SkipCLIP", "tokens", tokens, self.texts.tower.vocabulary)
        return PromptEncoder(self.texts.tower, tokens).compute_embeddings()

    @torch.no_grad()
    def classifier(self, head: AffineHead | None = None) -> nn.Module:
        """Return a plain module from images [B, 3, height, width] to logits [B, C], with the current class embeddings.

        It shares the weights of the image tower, runs in evaluation mode and contains no SkipCLIP, so `torch.export`
        and ONNX accept it. Create it again after further training. `head` replaces the class embeddings: docs/heads.md.
        """
        from .classifier import classifier_of

        return classifier_of(self, head)

    def _scaled_image_and_classes(self, pixel_values: Tensor, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Unit-norm image embeddings [B, D] times the scale, and unit-norm embeddings of classes, by default all."""
        self.check_inputs(pixel_values)
        classes = self.texts.kept_embeddings() if classes is None else classes
        with evaluating([self.model]):
            image = self.images.encode(pixel_values)
        with without_autocast(image.device):
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
        self.check_device()
        checks.check_features_at_cut(features, self.images.feature_shape)
        return self.images.upper(features)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Images [B, 3, height, width], or features at the cut [B, N, W], to image embeddings [B, D], any norm."""
        self.check_inputs(pixel_values)
        return self.images.encode(pixel_values)

    def encode_classes(self, class_ids: Tensor) -> Tensor:
        """Class ids [K], int64 in [0, C), to text embeddings [K, D], not normalised. Equal ids are encoded once."""
        self.check_device()
        checks.check_class_ids(class_ids, len(self.texts))
        return self.texts.encode_repeated(class_ids.to(self.prototypes.device, torch.int64))

    def refresh(self) -> None:
        """Read the model again, after a deliberate change to it or to its weights below the cut.

        Compute stored image features at the cut again before the next step. This call repeats every check of the
        constructor and sets `requires_grad` again; prototypes and sampler do not change. Create the optimizer again if
        it holds replaced parameters, and SkipCLIP again after an error.
        """
        from .builder import build_again

        self.images, self.texts, self._containers = build_again(self.model, self.images, self.texts, self.train_options)

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
        from .builder import build_texts

        self.texts = build_texts(self.model, self.texts, tokens, self.train_options)
        self.class_weight = weight

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return every parameter that trains."""
        return [p for group in self.parameter_groups(text_lr=0.0, image_lr=0.0) for p in group["params"]]

    def parameter_groups(self, *, text_lr: float, image_lr: float) -> list[dict[str, Any]]:
        """Return the parameter groups "text" and "image"; a `logit_scale` that trains is in "text"."""
        text, image = trained_parameters(self.model, self.images.tower, self.texts.tower, self.train_options)
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
        from ..towers.reductions import reductions_of  # of no step

        return reductions_of(self.images.tower, self.texts.tower, self.texts.templates)

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
        self._containers.check_unchanged()
        fuse_blocks([*self.images.tower.blocks, *self.texts.tower.blocks])  # which replaced others
        self.images.below.compare()  # then calls with features computed before raise
        self.texts.check_contents()
        if any(p.requires_grad for p in self.parameters()):  # a frozen copy, such as a teacher, only evaluates
            check_trained(self.images.tower, self.texts.tower, self.train_options)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Convert or move everything; prototypes and class weights stay at least fp32."""
        watches = [x.below for x in (self.images, self.texts.features) if x is not None]
        valid = [below for below in watches if below.started and not below.is_stale()]
        super()._apply(fn, recurse)
        for encoder in (self.images, self.texts):
            encoder.tower.move_lower()
        self.texts.convert(fn)
        for below in valid:  # the features stay valid; the converted weights have other digests
            below.start()
        if self.class_weight is not None:
            self.class_weight = in_same_dtype(fn, self.class_weight)
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
        return Origin(digest_tensors([("tokens", self.texts.tokens)]), self.prototypes.shape[1], processes=1)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        """Warn instead of an error if a state dict has no extra state."""
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        forgive_missing_state(f"{prefix}_extra_state", missing)

    # ---- memory, under the names of open_clip and transformers -------------------------------------------------------

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Set `memory="min"`, or "auto" with `enable=False`: the name of open_clip."""
        for tower in (self.images.tower, self.texts.tower):
            tower.cut = replace(tower.cut, memory="min" if enable else "auto")

    def gradient_checkpointing_enable(self, *arguments: Any, **options: Any) -> None:
        """Set `memory="min"`: the name of transformers; its options are accepted without effect."""
        self.set_grad_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Set `memory="auto"`: the name of transformers."""
        self.set_grad_checkpointing(False)

    activation_checkpointing_enable = gradient_checkpointing_enable  # its name from version 6 on
    activation_checkpointing_disable = gradient_checkpointing_disable
