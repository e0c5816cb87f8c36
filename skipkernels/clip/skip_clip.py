"""SkipCLIP: a CLIP model with the training step of Skip Tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..boundary import DEFAULT_CHUNK
from ..checks import warn_caller
from ..digests import digest_tensors
from ..options import AttentionName, Tail
from ..selection import ClassSelection, RankSampler
from ..towers import ImageTower, Memory, TextTower, UnsupportedModel, build_towers, evaluating
from ..towers.block import fuse_blocks
from ..towers.changes import Containers
from .base import Settings, SkipOutput, Trainable, uncompiled
from .image import ImageEncoder, refuse_export
from .inference import Inference, check_embeddings
from .losses import Losses, check_class_weight, check_label_smoothing, check_labels
from .text import TextEncoder, check_tokens, check_vocabulary, prompts_digest, prompts_of
from .verify import verify

if TYPE_CHECKING:
    from ..parallel import ClassParallel
    from .graphed import GraphedStep

_ADAPTERS = ("peft", "loralib", "adapters")  # packages of adapter modules, with weights beside the model's own


class SkipCLIP(Losses, Inference):
    """Tune a CLIP by Skip Tuning: train the blocks above `skip_layers` on the classes selected for each batch.

    The model is tuned in place, and the keys of its `state_dict` do not change. The *cut* is after the first
    `skip_layers` blocks of each tower: parameters below it are frozen, parameters above it train. A step, selection
    and loss are in docs/method.md; evaluation, checks for changes of the model, memory and limits in
    docs/training-loop.md.

    Args:
        model: open_clip `CLIP`, `CustomTextCLIP` or `CoCa`, OpenAI `clip.model.CLIP`, Hugging Face `CLIPModel`,
            `MetaClip2Model`, `SiglipModel` or `Siglip2Model`, in fp32, bf16, fp16 or fp64; docs/models.md.
        tokens: int64 [C, L], a prompt per class, or [C, T, L], T templates, over which embeddings are averaged.
        skip_layers: ω, frozen blocks per tower: a number, a fraction, or a pair (image, text) of these.
        keep_ratio: Most similar classes that each step compares its images with: a share of all if below 1, all classes
            if 1, a number of classes if above 1. docs/method.md.
        max_keep: Upper limit of the number of classes kept in every step, unless a batch has more labels.
        decay: Decay of the probability that a less similar class, of the tail, is drawn in a step: larger values draw
            more.
        tail: How each step draws a few of the other classes, the tail. "resample": other ranks of the tail in every
            step. "fixed": drawn once, as published.
        max_tail: Upper limit of the expected number of classes of the tail; changes the method. docs/many-classes.md.
        generator: Generator of the draws; default: one with seed 0.
        lower_device: Device of parameters and buffers below the cut; default: that of the model.
        train_text: False trains the image tower only: constant class embeddings, all classes. docs/training-loop.md.
        train_logit_scale: True also trains the temperature.
        label_smoothing: ε in [0, 1] of the loss, over the kept classes. docs/method.md.
        class_weight: [C] weights of the classes in the loss, as in `torch.nn.CrossEntropyLoss`; default: none.
        trainable: "upper" trains all parameters above the cut; "as_is" those that require gradients. docs/trainers.md.
        chunk: Images or prompts that run through the frozen blocks at a time, to bound memory; no effect on results.
        memory: Memory of a training step. "fast": each block saves what its backward pass needs. "min": it saves its
            input alone and computes the rest again. "auto": fast if it fits in memory. docs/training-loop.md.
        attention: "sdpa", or "xformers" on a GPU. docs/training-loop.md.
        text_cache: Folder of the text features at the cut; default: in memory. docs/cache.md, Very many classes.
        process_group: Processes that train together as one; default: none. docs/many-processes.md.

    Attributes:
        prototypes: [C, D] unit-norm text embeddings from before tuning, at least fp32; with a group of own classes.
        class_weight: [C] in the dtype of the prototypes, or None. Not part of `state_dict`.
        sampler: The `RankSampler`. Its state is part of `state_dict`.

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
        max_tail: int | None = None,
        generator: torch.Generator | None = None,
        lower_device: torch.device | str | None = None,
        train_text: bool = True,
        train_logit_scale: bool = False,
        label_smoothing: float = 0.0,
        class_weight: Tensor | None = None,
        trainable: Trainable = "upper",
        chunk: int = DEFAULT_CHUNK,
        memory: Memory = "auto",
        attention: AttentionName = "sdpa",
        text_cache: str | Path | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
    ):
        super().__init__()
        check_tokens(tokens)
        if not isinstance(chunk, int) or chunk < 1:
            raise ValueError(f"SkipCLIP: chunk must be a whole number, at least 1; got {chunk!r}.")
        if torch.is_inference_mode_enabled():
            raise RuntimeError("SkipCLIP: cannot be created under torch.inference_mode(): its tensors could not train.")
        self._settings = Settings.checked(skip_layers, memory, attention, trainable, train_text, train_logit_scale)
        self.label_smoothing = check_label_smoothing(label_smoothing)
        self.sampler = RankSampler(keep_ratio if train_text else 1.0, max_keep, decay, tail, generator, max_tail)
        self.model = model
        self._parallel: ClassParallel | None = None
        if process_group is not None:
            from ..parallel import ClassParallel

            self._parallel = ClassParallel(process_group, len(tokens), next(model.parameters()).device)
        parallel = self._parallel
        self._prompts = prompts_digest(tokens)
        self._tokens = prompts_of(tokens if parallel is None else tokens[parallel.owned])

        with _restored_after_error(model):
            # 1. Cut the towers, fuse their blocks, and freeze what is below the cut
            image, texts = build_towers(model, self._tokens)
            self._image_encoder, self._text_encoder = ImageEncoder(image, chunk), TextEncoder(texts, chunk)
            self._set_up(image, texts)
            with torch.autocast(texts[0].tokens.device.type, enabled=False):
                # 2. Text features at the cut, and prototypes: embeddings of all classes before tuning
                with evaluating([model]):
                    folder = None if text_cache is None else Path(text_cache)
                    if folder is not None and parallel is not None:
                        folder /= f"process_{parallel.rank}_of_{parallel.size}"
                    if folder is not None:
                        self._text_encoder.use_folder(folder)
                    prototypes = self._text_encoder.prototypes()
                if parallel is None:
                    self.register_buffer("prototypes", prototypes, persistent=False)  # `get_extra_state` holds them
                else:
                    self.prototypes = prototypes  # not a buffer: DistributedDataParallel would broadcast it
                weight = check_class_weight(class_weight, prototypes, self._num_classes)
                self.register_buffer("class_weight", weight, persistent=False)
                # 3. Comparison with the model itself, and between processes
                verify(model, self._image_encoder, self._text_encoder, self._tokens)
            if parallel is not None:
                from .sharded import check_agreement

                check_agreement(self)

        # The text features of all classes are computed by now, so the lower text tower can move to another device.
        self._move_lower(None if lower_device is None else torch.device(lower_device))

    # ---- the step -----------------------------------------------------------------------------------------------

    @uncompiled  # a compiler would break the graph at each fused block
    def forward(
        self,
        x: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        return_logits: bool = False,
    ) -> SkipOutput:
        """Run one step: embed the images, select classes, embed these, and compute the loss.

        In evaluation mode all classes are compared, nothing is drawn, and the logits are [B, C]. With `process_group` a
        training step is collective: classes and loss are those of the images of all processes. `targets`, and the loss
        in evaluation mode, are those of this process.

        Args:
            x: Images [B, 3, height, width], or features at the cut [B, N, W].
            labels: [B] int64, classes of the images. Or soft labels, [B, C] floating-point, rows of probabilities that
                sum to 1, as of mixup and CutMix: see `loss`.
            pixel_values: Another name of x, for trainers that pass their batch by name.
            return_logits: In training, also return the [B, K] logits; the loss does not need them.

        Returns:
            SkipOutput: the cross-entropy over the selected classes, and these classes.
        """
        if (x is None) == (pixel_values is None):
            raise TypeError("SkipCLIP: pass images or features as x, or as pixel_values; got both or none.")
        x = pixel_values if x is None else x
        refuse_export()
        distributed = self._parallel is not None and self.training
        if distributed:
            from .sharded import padded, sharded_step

            x, labels, images = padded(x, labels)
        self._check_step(x, labels)
        assert x is not None and labels is not None
        if distributed:
            return sharded_step(self, x, labels, images, return_logits)
        return self._compare(self._image_encoder.encode(x), labels, return_logits)

    if TYPE_CHECKING:
        __call__ = forward  # that of a Module has no types

    @uncompiled
    def loss(self, image: Tensor, labels: Tensor) -> Tensor:
        """Loss [] of image embeddings: `clip.loss(clip.encode_image(x), labels)` is `clip(x, labels).loss`.

        For trainers that call a model and then a loss function. Both calls belong within the same autocast. A training
        step with `process_group` is refused.

        Soft labels p [B, C] have the cross-entropy of `torch.nn.functional.cross_entropy` over the K selected classes,

            loss = −1/B · Σ_b Σ_k w_k · p'_bk · log softmax(z_b)_k,   p' = (1 − label_smoothing) · p + label_smoothing/K

        Every class with a probability above 0 in the batch is selected, as labels are, so p must be sparse: pass label
        smoothing to SkipCLIP, not to mixup. The logits z [B, K] are in memory. On a GPU such a step has a host sync, to
        count these classes.

        Args:
            image: [B, D] image embeddings of any norm, such as from `encode_image`.
            labels: [B] int64, or soft labels [B, C] floating-point, rows of probabilities that sum to 1.

        Example:
            >>> from skipkernels.app.demo import pictogram_tiny
            >>> model, _, tokenizer = pictogram_tiny.load()
            >>> clip = SkipCLIP(model, tokenizer([f"the digit {n}." for n in range(10)]), skip_layers=0.5, keep_ratio=1)
            >>> images, labels = torch.rand(2, 3, 32, 32), torch.tensor([3, 7])
            >>> mixed = torch.tensor([[0.8, 0.2], [0.2, 0.8]]) @ torch.eye(10)[labels]  # [2, 10]
            >>> image = clip.encode_image(images)
            >>> clip.loss(image, labels).equal(clip(images, labels).loss), clip.loss(image, mixed).shape
            (True, torch.Size([]))
        """
        if self.training:
            self._refuse_parallel("loss in training mode", "Call clip(x, labels).")
        width, remedy = self.prototypes.shape[1], "Compute them with clip.encode_image(x)."
        check_embeddings("SkipCLIP.loss: image", image, "image embeddings, floating-point [B", width, remedy)
        converts = torch.is_autocast_enabled(image.device.type) or not self._settings.train_text
        if not converts and image.dtype != self._text.dtype and (self.training or torch.is_grad_enabled()):
            raise TypeError(
                f"SkipCLIP.loss: image must be {self._text.dtype} like the class embeddings; got {image.dtype}. Call "
                "encode_image and loss within the same autocast, or convert the embeddings."
            )
        self._check_model(image.device)
        self._check_labels(labels, image)
        return self._compare(image, labels, return_logits=False).loss

    def _check_step(self, x: Any, labels: Any) -> None:
        """Check a batch of images with their labels, and the model, on the host."""
        self._check_batch(x)
        self._check_labels(labels, x)

    def _check_labels(self, labels: Any, x: Tensor) -> None:
        check_labels(labels, x, self._num_classes)
        if self.training and labels.ndim == 2:
            self._refuse_parallel("a step with soft labels")
        self._check_draw(len(x))

    def _compare(self, image: Tensor, labels: Tensor, return_logits: bool) -> SkipOutput:
        """Compare image embeddings [B, D] with the selected classes; in evaluation mode with all."""
        if self.training:
            return self._step(image, labels, self.sampler.draw_on, return_logits=return_logits)
        class_ids = torch.arange(self._num_classes, device=image.device)
        return self._cross_entropy(image, self._embeddings_of_all(image), ClassSelection(class_ids, labels), True)

    def _step(
        self,
        image: Tensor,
        labels: Tensor,
        draw_on: Callable[[torch.device, int, int], Tensor],
        *,
        return_logits: bool = False,
        encode_classes: Callable[[Tensor, torch.dtype], Tensor] | None = None,
    ) -> SkipOutput:
        """Run a training step on image embeddings [B, D] and the ranks of `draw_on`(device, C, number of labels).

        With `sampler.take` and labels [B] it has no host sync.
        """
        # 1. Classes of the step, [K], and the positions of the labels among them, [B]: classes are ranked by their
        # highest cosine with an image, labels first, and those at the drawn ranks are kept
        selection = self._select(image, labels, draw_on)
        # 2. Text embeddings of these classes alone, [K, D]
        text = (encode_classes or self._encode_classes)(selection.class_ids, image.dtype)
        # 3. Cross-entropy over these classes
        return self._cross_entropy(image, text, selection, return_logits)

    def _cross_entropy(self, image: Tensor, text: Tensor, selection: ClassSelection, return_logits: bool) -> SkipOutput:
        """Cross-entropy of images [B, D] over classes [K, D]; targets are positions [B] or probabilities [B, K]."""
        (class_ids, targets), scale = selection, self.model.logit_scale.exp()
        weight = None if self.class_weight is None else self.class_weight.index_select(0, class_ids)
        options: dict[str, Any] = {"label_smoothing": self.label_smoothing}
        if targets.ndim == 2:
            logits = functional.class_sampled_logits(image, text, scale)
            loss = F.cross_entropy(logits, targets.to(logits.dtype), weight, **options)
            return SkipOutput(loss, logits, class_ids, targets)
        loss = functional.class_sampled_ce(image, text, targets, scale, class_weight=weight, **options)
        kept_logits = functional.class_sampled_logits(image, text, scale) if return_logits else None
        return SkipOutput(loss, kept_logits, class_ids, targets)

    def select(self, image: Tensor, labels: Tensor) -> ClassSelection:
        """Select the classes of a step from image embeddings [B, D] and labels [B]; draws from the tail."""
        self._refuse_parallel("select")
        return self._select(image, labels, self.sampler.draw_on)

    @contextmanager
    def same_classes(self) -> Iterator[None]:
        """Select the classes of the first training step for all steps of the context, with one draw.

        The loss of a batch is then a function of the weights, as SAM, the closure of LBFGS and the two forward passes
        of R-Drop need it. Labels of later steps must be among these classes: a ValueError on the CPU, and a device-side
        assertion on a GPU. `graphed` steps and `process_group` are refused.

        Example:
            >>> from skipkernels.app.demo import pictogram_tiny
            >>> model, _, tokenizer = pictogram_tiny.load()
            >>> clip = SkipCLIP(model, tokenizer([f"the digit {n}." for n in range(10)]), skip_layers=0.5)
            >>> images, labels = torch.rand(4, 3, 32, 32), torch.tensor([3, 3, 7, 7])
            >>> with clip.same_classes():
            ...     first, second = clip(images, labels), clip(images, labels)
            >>> first.class_ids.equal(second.class_ids), first.loss.equal(second.loss)
            (True, True)
        """
        self._refuse_parallel("same_classes")
        if self._shares_classes:
            raise RuntimeError("SkipCLIP: same_classes() cannot be nested. Leave the outer context first.")
        self._shares_classes = True
        try:
            yield
        finally:
            self._shares_classes, self._shared_classes = False, None

    def graphed(self, optimizer: torch.optim.Optimizer, *, batch_size: int) -> GraphedStep:
        """Return a function that runs a whole training step: on a GPU, a replay of a CUDA graph. See `GraphedStep`."""
        self._refuse_parallel("graphed", "Run the steps without graphed.")
        from .graphed import GraphedStep

        return GraphedStep(self, optimizer, batch_size)

    # ---- set-up, change of the model or of the classes ---------------------------------------------------------

    def _set_up(self, image: ImageTower, texts: Sequence[TextTower]) -> None:
        """Cut the towers, fuse their blocks, and set which parameters train."""
        check_vocabulary(self._tokens, texts[0].vocabulary)
        self._containers = Containers(self.model, (image, *texts))
        self._containers.refuse_overrides()
        fuse_blocks([*image.blocks, *texts[0].blocks])
        self._settings.apply(image, texts)
        _set_trainable(self.model, image, texts[0], self._settings)

    def refresh(self) -> None:
        """Read the model again, after a deliberate change to it or to its weights below the cut.

        Compute stored image features at the cut again before the next step. This call repeats every check of the
        constructor and sets `requires_grad` again; prototypes and sampler do not change. Create the optimizer again if
        it holds replaced parameters, and SkipCLIP again after an error.
        """
        device, lower_device = self.prototypes.device, self._image.lower_device
        image, texts = build_towers(self.model, self._tokens)
        self._set_up(image, texts)
        for text in texts:
            text.apply(lambda x: x.to(device))
        self._image_encoder.tower = image
        self._text_encoder.replace_towers(texts)
        with torch.autocast(device.type, enabled=False):
            verify(self.model, self._image_encoder, self._text_encoder, self._tokens)
        self._move_lower(lower_device)
        self._image_encoder.weights = None

    def set_classes(self, tokens: Tensor, class_weight: Tensor | None = None) -> None:
        """Replace the classes of the task in place; their number may change.

        Parameters, optimizer states and the generator stay. In distributed training every process must make this call,
        and copies, such as that of an `AveragedModel`, need their own. The new `prototypes` are computed with the
        *current* weights: before the first step they are the zero-shot embeddings that the published method selects
        with. After an error (the model was altered, or `text_cache` is in use) the previous classes stay in use.

        Args:
            tokens: As in the constructor.
            class_weight: [C] weights of the new classes in the loss; by default none.

        Example:
            >>> from skipkernels.app.demo import pictogram_tiny
            >>> model, _, tokenizer = pictogram_tiny.load()
            >>> clip = SkipCLIP(model, tokenizer([f"the digit {n}." for n in range(10)]), skip_layers=0.5)
            >>> clip.set_classes(tokenizer([f"the letter {n}." for n in "abcdefghijklmnopqrstuvwxyz"]))
            >>> clip.predict(torch.rand(4, 3, 32, 32)).shape
            torch.Size([4, 26])
        """
        device, parallel = self.prototypes.device, self._parallel
        self._check_unaltered()
        check_tokens(tokens)
        check_vocabulary(tokens, self._text.vocabulary)
        if torch.is_inference_mode_enabled():
            raise RuntimeError("SkipCLIP: set_classes cannot be called under torch.inference_mode().")
        if parallel is not None:
            parallel = parallel.with_classes(len(tokens))
        prompts = prompts_of(tokens if parallel is None else tokens[parallel.owned])
        encoder = self._text_encoder.of_other_prompts(build_towers(self.model, prompts)[1], device)
        with torch.autocast(device.type, enabled=False):
            with evaluating([self.model]):
                prototypes = encoder.prototypes()
            weight = check_class_weight(class_weight, prototypes, len(tokens))
            if encoder.tower.lower_device is None:  # verify runs the model itself, which must be on one device
                verify(self.model, self._image_encoder, encoder, prompts)
        prompts_of_all = prompts_digest(tokens)
        if parallel is not None:
            digests = [prompts_of_all, digest_tensors([] if weight is None else [("class_weight", weight)])]
            names = "tokens of set_classes", "class_weight of set_classes"
            parallel.check_equal(list(zip(names, digests, strict=True)), device)
        self._tokens, self._text_encoder, self.prototypes, self.class_weight = prompts, encoder, prototypes, weight
        self._parallel, self._prompts = parallel, prompts_of_all
        self._containers = Containers(self.model, (self._image, *self._text_encoder.towers))
        self._move_lower(self._image.lower_device)

    def _move_lower(self, lower_device: torch.device | None) -> None:
        """Set the device of the modules below the cut, and move them there. Texts that do not train go to the CPU."""
        texts = lower_device
        if not self._settings.train_text:
            self._text_encoder.drop_cached()
            texts = None if self.prototypes.device.type == "cpu" else torch.device("cpu")
        for tower in (self._image, *self._text_encoder.towers):
            tower.lower_device = lower_device if tower is self._image else texts
            tower.move_lower()

    # ---- parameters ---------------------------------------------------------------------------------------------

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return every parameter that trains."""
        return [p for group in self.parameter_groups(text_lr=0.0, image_lr=0.0) for p in group["params"]]

    def parameter_groups(self, *, text_lr: float, image_lr: float) -> list[dict[str, Any]]:
        """Return the parameter groups "text" and "image"; a `logit_scale` that trains is in "text"."""
        self._refuse_training_below()
        text, image = (
            [p for p in tower.upper_parameters() if trains and (p.requires_grad or self._settings.trainable == "upper")]
            for tower, trains in ((self._text, self._settings.train_text), (self._image, True))
        )
        if self.model.logit_scale.requires_grad:
            text.append(self.model.logit_scale)
        self._check_unaltered()
        return [{"name": "text", "params": text, "lr": text_lr}, {"name": "image", "params": image, "lr": image_lr}]

    def activation_checkpointing_enable(self, *arguments: Any, **options: Any) -> None:
        """Set `memory="min"`. Options of transformers (`every_n_layers`, `offload`) are accepted without effect."""
        self.set_grad_checkpointing(True)

    def activation_checkpointing_disable(self) -> None:
        """Set `memory` back to its value at construction, or to "auto" if that was "min"."""
        self.set_grad_checkpointing(False)

    # Names in transformers before version 6.
    gradient_checkpointing_enable = activation_checkpointing_enable
    gradient_checkpointing_disable = activation_checkpointing_disable

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable gradient checkpointing, under the name that open_clip uses."""
        disabled: Memory = "auto" if self._settings.memory == "min" else self._settings.memory
        for tower in (self._image, *self._text_encoder.towers):
            tower.memory = "min" if enable else disabled


@contextmanager
def _restored_after_error(model: nn.Module) -> Iterator[None]:
    """Restore the classes of the blocks of a model, and `requires_grad` of its parameters, after an error."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []  # else `build_towers` raises
    kinds = [(module, type(module)) for module in modules]
    required_grad = [(p, p.requires_grad) for module in modules for p in module.parameters(recurse=False)]
    try:
        yield
    except BaseException:
        for parameter, requires_grad in required_grad:
            parameter.requires_grad_(requires_grad)
        for module, kind in kinds:
            module.__class__ = kind  # of a block that was fused
        raise


def _set_trainable(model: nn.Module, image: ImageTower, text: TextTower, settings: Settings) -> None:
    """Set `requires_grad` of every parameter of the model."""
    lower = {id(parameter) for tower in (image, text) for parameter in tower.lower_parameters()}
    trained = (image, text) if settings.train_text else (image,)
    upper = {id(parameter): parameter for tower in trained for parameter in tower.upper_parameters()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for key in upper:
        if key in lower:
            raise UnsupportedModel(
                f"SkipCLIP: parameter {names[key]} is used on both sides of the cut, so training it would change "
                "cached features. Untie it, or use skip_layers=0."
            )
    if settings.trainable == "upper":
        adapter = next((name for name, module in model.named_modules() if _is_adapter(module)), None)
        if adapter is not None:
            raise UnsupportedModel(
                f'SkipCLIP: {adapter} is an adapter, and trainable="upper" would train the weights beside it as '
                'well. Pass trainable="as_is".'
            )
        frozen = [p for p in upper.values() if not p.requires_grad]
        if frozen:
            warn_caller(
                f'SkipCLIP: trainable="upper" sets requires_grad of {len(frozen)} parameters above the cut that '
                f'were frozen ({_numbers(frozen)}). Pass trainable="as_is" to leave them frozen.'
            )
    else:
        below = [p for p in model.parameters() if id(p) in lower and p.requires_grad]
        if below and any(not p.requires_grad for p in model.parameters()):
            warn_caller(
                f"SkipCLIP: {len(below)} trainable parameters below the cut are frozen ({_numbers(below)}), "
                f"{names[id(below[0])]} among them: features at the cut are constants. Put adapters above the cut, or "
                "lower skip_layers."
            )
    # Other parameters are frozen too: a bias of all logits, which a softmax cancels, and the decoder of CoCa.
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in upper and (settings.trainable == "upper" or parameter.requires_grad))
    model.logit_scale.requires_grad_(settings.train_logit_scale)
    if not any(p.requires_grad for p in upper.values()) and not settings.train_logit_scale and upper:
        warn_caller("SkipCLIP: nothing trains: every parameter above the cut is frozen.")


def _numbers(parameters: list[nn.Parameter]) -> str:
    return f"{sum(parameter.numel() for parameter in parameters):,} numbers"


def _is_adapter(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] in _ADAPTERS or any("lora_" in name for name in module._parameters)


def check_clip(function: str, clip: Any) -> None:
    """Raise a TypeError unless clip is a SkipCLIP."""
    if not isinstance(clip, SkipCLIP):
        raise TypeError(
            f"{function}: clip must be a SkipCLIP; got {type(clip).__name__}. Wrap the model: "
            "SkipCLIP(model, tokens, skip_layers=…)."
        )
