"""SkipCLIP: a CLIP with the step of Skip Tuning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import functional
from ..boundary import DEFAULT_CHUNK
from ..checks import warn_caller
from ..classifier import ImageClassifier
from ..options import AttentionName, Tail
from ..parallel import ClassParallel
from ..selection import ClassSelection, RankSampler, check_rank_options, select_ranks
from ..store import digest_tensors
from ..towers import ImageTower, Memory, Reduction, TextTower, build_towers, evaluating, refuse_sharded
from ..towers.reductions import of_every_template
from ..towers.structure import containers, refuse_overrides
from .batch import (
    check_class_ids,
    check_features,
    check_images,
    check_label_range,
    check_labels,
    one_batch,
    refuse_export,
)
from .classes import check_class_parallel, check_class_weight, check_label_smoothing, prompts_of
from .graphed import GraphedStep
from .image_encoder import ImageEncoder, sharing_weights
from .multi_label import sigmoid_loss
from .output import SkipOutput
from .pairs import pair_loss
from .processes import AGREED, ClassParallelOption, agreeing, choose_way, device_of, digests_of_clip
from .settings import Settings, Trainable, check_tokens, check_vocabulary
from .sharded_evaluation import sharded_predict, sharded_top_k
from .sharded_step import sharded_step
from .snapshot import Snapshot, refuse_alterations
from .state import Shard, pack_state, prompts_digest, refuse_low_rank_updates, unpack_state
from .text_encoder import TextEncoder
from .top_k import top_k_logits
from .trainable import TrainedParameters, set_trainable
from .verify import verify


class SkipCLIP(nn.Module):
    """Tune a CLIP by Skip Tuning: train the blocks above `skip_layers` on the classes selected for each batch.

    The model is tuned in place: parameters are shared, and its `state_dict` keeps its keys. Parameters below the cut
    are frozen (`requires_grad` False), those above are set to train. With `skip_layers=0` only `logit_scale` is frozen:
    full fine-tuning with class selection.

    In evaluation mode (`clip.eval()`) `clip(x, labels)` compares all classes, returns [B, C] logits and the loss over
    them, and changes no state. `clip.state_dict()` holds the model, and in `_extra_state` the sampler and the
    prototypes, so that a resumed training draws the same classes. `keep_ratio`, `max_keep`, `decay` and `tail` are not
    in it: give the constructor the same ones.

    After construction the model must not be altered (a hook, another layer, mask or number of heads): the next call
    raises an error, until `refresh` reads the model again. Weights below the cut are compared by content at each switch
    between training and evaluation mode, and by version in each step.

    `torch.compile(clip)` does not compile the step. Activation checkpointing around SkipCLIP raises an error, since its
    second forward would draw other classes: use `memory="min"`.

    With `DistributedDataParallel(clip, forward_sync_buffers=False)`, or `broadcast_buffers=False` in PyTorch versions
    without that argument, each process selects classes for its part of a batch. With `keep_ratio=1` and equal parts the
    gradients are those of the whole batch. With `process_group` they are for all settings.

    Args:
        model: An open_clip `CLIP`, `CustomTextCLIP` or `CoCa`, an OpenAI `clip.model.CLIP`, or a Hugging Face
            `CLIPModel` or `SiglipModel`, in fp32, bf16, fp16 or fp64.
        tokens: [C, L] int64, the tokenised prompt of each class, or [C, T, L], those of T templates. The embedding of a
            class is then the mean of the unit-norm embeddings of its T prompts.
        skip_layers: Blocks skipped in each tower (ω): a number, a fraction of the blocks, or a pair of either
            (image, text).
        keep_ratio: Share of classes that are always kept if below 1, their number if above; 1 keeps every class,
            whatever `max_keep` is.
        max_keep: Largest number of classes that are always kept, unless a batch has more labels.
        decay: λ, decay of the probability to keep a class of the tail.
        tail: "resample" draws the tail in each step, "fixed" once per run, as published.
        max_tail: Bound on the expected number of classes of the tail, for very many classes: another method than the
            published one, which has none (default). See `RankSampler`.
        generator: Random generator of the draws; by default one with seed 0.
        lower_device: Device of parameters and buffers below the cut; by default that of the model.
        train_logit_scale: True also trains the temperature.
        label_smoothing: ε in [0, 1] of the loss, in training over the kept classes.
        class_weight: [C] weights of the classes in the loss. As in `torch.nn.CrossEntropyLoss`, the loss is then the
            weighted mean over the batch: in a batch of one class, as of `sampler="class_pure"`, the weight of this
            class cancels out, and a weight of 0 gives NaN. Both options apply in evaluation mode too.
        trainable: "upper" sets `requires_grad` of every parameter above the cut, and refuses a model with adapters.
            "as_is" trains the parameters above the cut that require gradients, such as only adapters, norms or biases.
            A block with an adapter runs as your module, the others stay fused.
        chunk: Largest number of samples that run below the cut at once.
        memory: What a block above the cut saves for backward. "fast": all but cheap recomputations, about 10·W values
            per token. "min": only its input, and recomputes the rest. "auto": "fast" while that takes less than half
            of the free memory. Results are the same. A block that is not fused saves what autograd saves, except with
            "min".
        attention: Backend of attention. "sdpa": PyTorch, and operators of this package for texts behind a shared prefix
            and for pooled tokens. "xformers": xformers for full and causal attention and behind the prefix, on a GPU
            only, with a host sync in each step.
        text_cache: Folder that stores the text features at the cut, instead of memory, if there are very many classes.
            The first process fills it while others wait; with `process_group` each has a folder of its own classes. A
            GPU holds up to 256 MiB of it; above that, each step has a host sync to read class ids.
        process_group: Processes that train together, by gloo or NCCL: the result is that of one process with the images
            of all, to rounding. Process r of W encodes and scores the classes c ≡ r (mod W). The loss is the mean over
            the images of all processes, and gradients are for the mean over processes, by `DistributedDataParallel` or
            `skipkernels.parallel.all_reduce_gradients`. Construct SkipCLIP with equal arguments on every process. By
            default each process is alone.
        class_parallel: With `process_group`: True shares out prompts and their encoding, False holds and encodes all
            selected classes on each process, with fewer messages. The results are the same. "auto" takes the way with
            the shorter predicted step, see `reductions["text.class_parallel"]`; on a CPU True.

    Attributes:
        prototypes: [C, D] fp32 (fp64 for an fp64 model), unit-norm text embeddings from before tuning. With
            `process_group` those of the classes of this process.
        class_weight: [C] in the dtype of the prototypes, or None. Not part of `state_dict`.
        sampler: The `RankSampler`. Its state is part of `state_dict`.

    Raises:
        UnsupportedModel: If the model is not supported, or a module that SkipCLIP does not call has hooks.
        TypeError: If the model is no module, tokens or class weights are not tensors, or generator is not a
            torch.Generator.
        ValueError: If an argument is out of range.
        RuntimeError: If embeddings or gradients differ from those of the model itself.
        StoreError: If `text_cache` holds features of other prompts, weights or another model.

    Source: Wu et al., "Skip Tuning", CVPR 2025, arXiv 2412.11509.

    Example:
        >>> import logging; logging.disable()  # open_clip warns about random weights
        >>> import open_clip
        >>> from skipkernels.experiments import glyph_tiny
        >>> glyph_tiny.register()
        >>> model = open_clip.create_model("glyph-tiny")
        >>> tokens = open_clip.get_tokenizer("glyph-tiny")([f"the digit {n}." for n in range(10)])
        >>> clip = SkipCLIP(model, tokens, skip_layers=0.5)
        >>> out = clip(torch.rand(4, 3, 32, 32), torch.tensor([3, 3, 3, 3]))
        >>> out.loss.shape, out.class_ids.shape, out.class_ids[out.targets].tolist()
        (torch.Size([]), torch.Size([6]), [3, 3, 3, 3])
    """

    model: Any  # nn.Module; its attributes depend on its library
    prototypes: Tensor
    class_weight: Tensor | None
    _before_lora: tuple[Trainable, list[str]] | None = None  # set by `add_lora`, for `merge_lora`

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
        train_logit_scale: bool = False,
        label_smoothing: float = 0.0,
        class_weight: Tensor | None = None,
        trainable: Trainable = "upper",
        chunk: int = DEFAULT_CHUNK,
        memory: Memory = "auto",
        attention: AttentionName = "sdpa",
        text_cache: str | Path | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
        class_parallel: ClassParallelOption = "auto",
    ):
        super().__init__()
        check_tokens(tokens)
        if not isinstance(chunk, int) or chunk < 1:
            raise ValueError(f"SkipCLIP: chunk must be a whole number, at least 1; got {chunk!r}.")
        if torch.is_inference_mode_enabled():
            raise RuntimeError("SkipCLIP: cannot be created under torch.inference_mode(): its tensors could not train.")
        self._settings = Settings.checked(skip_layers, memory, attention, trainable, train_logit_scale)
        self.label_smoothing = check_label_smoothing(label_smoothing)
        check_rank_options("SkipCLIP", keep_ratio, max_keep, decay, tail, generator, max_tail)
        self.sampler = RankSampler(keep_ratio, max_keep, decay, tail, generator, max_tail)
        self.model = model
        self._parallel = None
        if process_group is not None:
            self._parallel = ClassParallel(process_group, len(tokens), device_of(model))
        self._class_parallel = check_class_parallel(class_parallel, process_group)
        self._trained = TrainedParameters()
        self._snapshot: Snapshot | None = None  # None in a copy and after a move

        parameters = model.parameters() if isinstance(model, nn.Module) else ()  # checked below
        required_grad = [(parameter, parameter.requires_grad) for parameter in parameters]
        try:
            device = torch.device("cpu") if self._parallel is None else device_of(model)
            with agreeing(self._parallel, device, AGREED, lambda: digests_of_clip(self)):
                self._prompts = prompts_digest(tokens) if self._parallel is not None else None
                self._tokens = self._held_prompts(tokens, self._parallel)
                image, texts = build_towers(model, self._tokens)
                self._image_encoder, self._text_encoder = ImageEncoder(image, chunk), TextEncoder(texts, chunk)
                self._set_up(image, texts)
                self._text_encoder.see_called_modules()
                with torch.autocast(texts[0].tokens.device.type, enabled=False):
                    with evaluating([model]):
                        folder = None if text_cache is None else self._folder(Path(text_cache))
                        if folder is not None:
                            self._text_encoder.use_folder(folder)
                        self._set_prototypes(self._text_encoder.prototypes(folder, self._owned_of_held))
                    weight = check_class_weight(class_weight, self.prototypes, self._num_classes)
                    self.register_buffer("class_weight", weight, persistent=False)
                    verify(model, self._image_encoder, self._text_encoder, self._tokens)
        except BaseException:
            for parameter, requires_grad in required_grad:
                parameter.requires_grad_(requires_grad)
            raise

        # After the text features of all classes were computed, on the device of the model.
        self._take_over(None if lower_device is None else torch.device(lower_device))
        self.register_load_state_dict_post_hook(_after_load)

    def _held_prompts(self, tokens: Tensor, parallel: ClassParallel | None) -> Tensor:
        """Prompts of the classes that this process holds, after a choice whether it holds all."""
        if parallel is None:
            return prompts_of(tokens)
        self._way = choose_way(parallel, self._class_parallel, self, tokens)
        return prompts_of(tokens[parallel.held])

    def _folder(self, text_cache: Path) -> Path:
        """The folder of the prompts of this process."""
        if self._parallel is None or self._parallel.replicated:
            return text_cache
        return text_cache / f"process_{self._parallel.rank}_of_{self._parallel.size}"

    def _set_prototypes(self, prototypes: Tensor) -> None:
        if self._parallel is None:
            self.register_buffer("prototypes", prototypes, persistent=False)  # `get_extra_state` holds them
        else:
            self.prototypes = prototypes  # no buffer, which DistributedDataParallel would broadcast

    def _set_up(self, image: ImageTower, texts: Sequence[TextTower]) -> None:
        """Cut the towers, set which parameters train, and take a snapshot of the model to detect later changes."""
        text = texts[0]
        check_vocabulary(self._tokens, text.vocabulary)
        self._settings.apply(image, texts)
        refuse_overrides(self.model, containers(self.model, (image, text)))
        set_trainable(self.model, image, text, self._settings)
        self._snapshot = Snapshot(self.model, image, text)
        for tower, name in ((image, "image"), (text, "text")):
            fused = tower.reductions["fused_block"]
            if tower.can_fuse and not fused.enabled and self._settings.trainable == "upper":
                warn_caller(
                    f"SkipCLIP: not every block of the {name} tower is fused ({fused.reason}). Blocks that are "
                    "not fused run as your modules: the results are the same, with more time and memory."
                )

    # ---- properties --------------------------------------------------------------------------------------------

    @property
    def skip_layers(self) -> tuple[int, int]:
        """Number of blocks skipped in the image tower and in the text tower."""
        return self._image.skip, self._text.skip

    @property
    def reductions(self) -> dict[str, Reduction]:
        """Exact reductions of time and memory by name: `enabled`, or the `reason` why not."""
        no_cut = "nothing is skipped (skip_layers=0), so the embedding trains"
        states: dict[str, Reduction] = {}
        texts = of_every_template([text.reductions for text in self._text_encoder.towers])
        for prefix, tower, reductions in (("image", self._image, self._image.reductions), ("text", self._text, texts)):
            states |= {f"{prefix}.{name}": reduction for name, reduction in reductions.items()}
            if tower.skip == len(tower.blocks):
                states[f"{prefix}.pooled_last_block"] = Reduction(
                    False, "every block is skipped: the last runs once, for every token"
                )
            states[f"{prefix}.no_input_gradient"] = Reduction.unless(None if tower.skip else no_cut)
        states["text.features_kept"] = states["text.no_input_gradient"]
        return states if self._parallel is None else states | {"text.class_parallel": self._way}

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that the model takes."""
        return self._image.image_size

    @property
    def process_group(self) -> torch.distributed.ProcessGroup | None:
        """The processes that train together, or None."""
        return None if self._parallel is None else self._parallel.group

    @property
    def _image(self) -> ImageTower:
        return self._image_encoder.tower

    @property
    def _text(self) -> TextTower:
        """The text tower of the first template."""
        return self._text_encoder.tower

    # ---- training ----------------------------------------------------------------------------------------------

    @torch.compiler.disable  # a compiler would break the graph at each fused block
    def forward(
        self,
        x: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        images: Tensor | None = None,
        return_logits: bool = False,
    ) -> SkipOutput:
        """Run one step: embed the images, select classes, embed these, and compute the loss.

        In evaluation mode all classes are compared, nothing is drawn, and the logits are [B, C].

        With `process_group` a training step is collective, and `class_ids` and the loss are those of the images of all
        processes; `targets` are of own images. In evaluation mode the loss is the mean over own images.

        Args:
            x: Images [B, 3, height, width], or features at the cut [B, N, W].
            labels: [B] int64, classes of the images.
            pixel_values: Another name of x, for trainers that pass their batch by name.
            images: Another name of x.
            return_logits: In training, also return the [B, K] logits; the loss does not need them.

        Returns:
            SkipOutput: the cross-entropy over the selected classes, and these classes.

        Raises:
            TypeError: If x or labels are not tensors, or have the wrong dtype.
            ValueError: If shapes don't fit, the batch is empty, an image is not finite, or a label is out of range.
            RuntimeError: If the model was altered, or in training if called within a backward pass.
        """
        if self._parallel is not None and self.training:
            return sharded_step(self, (x, pixel_values, images), labels, return_logits)
        x = one_batch(x, pixel_values, images)
        refuse_export()
        self._check_step(x, labels)
        assert labels is not None
        if not self.training:
            return self._evaluate(self._image_encoder.encode(x), labels, self.model.logit_scale.exp())
        return self._step(x, labels, self.sampler.draw_on, return_logits=return_logits)

    def _check_step(self, x: Any, labels: Any) -> None:
        """Check a batch of images with one label each, and the model, on the host."""
        self._check_batch(x)
        check_labels(labels, len(x))
        if not self.training and labels.device.type == "cpu":  # in training `class_scores` checks them
            check_label_range(labels, self._num_classes)
        self._check_draw(len(x))

    def _check_batch(self, x: Any) -> None:
        """Check images and the model on the host, and move what belongs to no module to the device of the images."""
        check_images(x)
        self._image_encoder.are_images(x)
        self._check_unaltered(lower_image=True)
        self._follow(x.device)

    def _check_draw(self, labels: int) -> None:
        """Raise a RuntimeError if the step of a number of labels would draw other classes than its first forward."""
        classes = self._num_classes
        in_backward = self.training and torch._C._current_graph_task_id() != -1
        if in_backward and self.sampler.plan(classes, labels)[0] < classes:  # the step would draw from the tail
            raise RuntimeError(
                "SkipCLIP: the step was called again within a backward pass, as activation checkpointing does; it "
                'would draw other classes than the first time. Use memory="min" instead.'
            )

    def _step(
        self,
        x: Tensor,
        labels: Tensor,
        draw_on: Callable[[torch.device, int, int], Tensor],
        *,
        return_logits: bool = False,
    ) -> SkipOutput:
        """Run a training step with the ranks of `draw_on`(device, C, B). With `sampler.take`, no host value enters."""
        image = self._image_encoder.encode(x)
        scale = self.model.logit_scale.exp()
        classes = len(self.prototypes)
        try:
            class_ids, targets = self._select(image, labels, draw_on(image.device, classes, len(labels)))
        except ValueError:
            check_label_range(labels, classes)  # with a message that names SkipCLIP
            raise
        text = self._text_encoder.encode(class_ids)
        weight = None if self.class_weight is None else self.class_weight.index_select(0, class_ids)
        loss = self._loss(image, text, targets, scale, weight)
        logits = functional.class_sampled_logits(image, text, scale) if return_logits else loss.new_empty(len(x), 0)
        return SkipOutput(loss, logits, class_ids, targets)

    def _evaluate(self, image: Tensor, labels: Tensor, scale: Tensor) -> SkipOutput:
        """Loss and logits over all classes. Without gradients, cached class embeddings are used."""
        class_ids = torch.arange(self._num_classes, device=image.device)
        text = self._embeddings_of_all(image)
        loss = self._loss(image, text, labels, scale, self.class_weight)
        return SkipOutput(loss, functional.class_sampled_logits(image, text, scale), class_ids, labels)

    def _embeddings_of_all(self, image: Tensor) -> Tensor:
        """Embeddings [C, D] of all classes for image embeddings; cached ones if there is no gradient."""
        if not torch.is_grad_enabled():
            return self._class_embeddings().to(image.dtype)
        self._refuse_parallel("an evaluation with gradients", "Call it under torch.no_grad().")
        return self._text_encoder.encode(torch.arange(self._num_classes, device=image.device))

    def _loss(self, image: Tensor, text: Tensor, targets: Tensor, scale: Tensor, weight: Tensor | None) -> Tensor:
        return functional.class_sampled_ce(
            image, text, targets, scale, class_weight=weight, label_smoothing=self.label_smoothing
        )

    def select(self, image: Tensor, labels: Tensor) -> ClassSelection:
        """Select the classes of a step from image embeddings [B, D] and labels [B]; draws from the tail."""
        self._refuse_parallel("select")
        return self._select(image, labels, self.sampler.draw_on(image.device, len(self.prototypes), len(labels)))

    def _select(self, image: Tensor, labels: Tensor, ranks: Tensor) -> ClassSelection:
        return select_ranks(self._scores(image, labels), labels, ranks)

    @torch.no_grad()
    def _scores(self, image: Tensor, labels: Tensor | None = None) -> Tensor:
        """Scores of the classes that this process has prototypes of; see `functional.class_scores`."""
        with torch.autocast(image.device.type, enabled=False):  # which would cast all prototypes in each step
            return functional.class_scores(image.to(self.prototypes.dtype), self.prototypes, labels)

    @torch.compiler.disable
    def pair_loss(self, x: Tensor, captions: Tensor) -> Tensor:
        """Symmetric contrastive loss [] of pairs of an image and a caption, see `functional.contrastive_loss`.

        No classes are selected: the captions of a batch are compared with its images. Both towers are cut, so only
        blocks above the cut train. A caption that occurs twice in a batch, or fits two images, counts as a negative of
        the other image, as in open_clip. With `process_group` a call is collective, and the loss is that of all pairs.

        Args:
            x: Images [B, 3, height, width], or features at the cut [B, N, W].
            captions: [B] int64, the caption of each image as an index of the `tokens` that SkipCLIP was made with;
                their features at the cut are cached. Or tokens [B, L] of any captions, which run below the cut in each
                call, cropped to the longest. On a GPU both have a host sync, for the number of tokens.

        Raises:
            TypeError: If x or captions are not tensors, or have the wrong dtype.
            ValueError: If shapes don't fit, an image is not finite, an id or a token is out of range, or SkipCLIP has
                `label_smoothing` or `class_weight`, which this loss does not use.
            RuntimeError: If the model was altered.

        Example:
            >>> import logging; logging.disable()  # open_clip warns about random weights
            >>> import open_clip
            >>> from skipkernels.experiments import glyph_tiny
            >>> glyph_tiny.register()
            >>> captions = open_clip.get_tokenizer("glyph-tiny")([f"a small {n}" for n in range(10)])
            >>> clip = SkipCLIP(open_clip.create_model("glyph-tiny"), captions, skip_layers=0.5)
            >>> images, ids = torch.rand(4, 3, 32, 32), torch.tensor([3, 0, 9, 1])
            >>> torch.allclose(clip.pair_loss(images, ids), clip.pair_loss(images, captions[ids]), atol=1e-4)
            True
        """
        return pair_loss(self, x, captions)

    @torch.compiler.disable
    def sigmoid_loss(
        self, x: Tensor, labels: Tensor, *, max_labels: int, logit_bias: Tensor | float | None = None
    ) -> SkipOutput:
        """Binary cross-entropy of each image with each selected class, for any number of labels per image.

            loss = −1/(B·K) · Σ_b Σ_k log σ(±(logit_scale · ⟨x̂_b, t̂_k⟩ + logit_bias)),   + if k is a label of b, else −

        The classes of a step are selected as in `forward`, with all labels of the batch: m is at least
        min(C, B · max_labels). In evaluation mode all classes are compared. The loss of SigLIP (Zhai et al., ICCV 2023,
        arXiv 2303.15343) is K times this one. With `process_group` a training step is collective, and the loss is the
        mean over the images of all processes; logits are then [B, 0].

        Args:
            x: Images [B, 3, height, width], or features at the cut [B, N, W].
            labels: [B, C] bool, integer or floating-point, 1 where an image has a class and 0 elsewhere. An image may
                have no label.
            max_labels: Largest number of labels of an image. On a GPU it is not compared with the labels, which would
                be a host sync: labels beyond it may be left out of the loss.
            logit_bias: Bias of the logits, a number or a tensor of one element that may train; default: that of the
                model, a constant, or 0. Few classes of many are labels, so without a bias the loss of a model that was
                trained with a softmax begins high: −logit_scale times the mean cosine is a start.

        Returns:
            SkipOutput: the loss, the logits [B, K] with the bias, the selected classes, and their labels, bool [B, K].

        Raises:
            TypeError: If x or labels are not tensors, or have the wrong dtype.
            ValueError: If shapes don't fit, an image is not finite, `max_labels` is below 1, SkipCLIP has
                `label_smoothing` or `class_weight`, which this loss does not use, or, on the CPU, labels are not 0 or
                1, or an image has more than `max_labels`.
            RuntimeError: If the model was altered, or in training if called within a backward pass.

        Example:
            >>> import logging; logging.disable()  # open_clip warns about random weights
            >>> import open_clip
            >>> from skipkernels.experiments import glyph_tiny
            >>> glyph_tiny.register()
            >>> tokens = open_clip.get_tokenizer("glyph-tiny")([f"the digit {n}." for n in range(10)])
            >>> clip = SkipCLIP(open_clip.create_model("glyph-tiny"), tokens, skip_layers=0.5, keep_ratio=0.2)
            >>> labels = torch.zeros(2, 10)
            >>> labels[0, [3, 7]] = labels[1, 3] = 1
            >>> out = clip.sigmoid_loss(torch.rand(2, 3, 32, 32), labels, max_labels=2, logit_bias=-10.0)
            >>> out.loss.shape, out.class_ids[out.targets[0]].tolist(), out.class_ids[out.targets[1]].tolist()
            (torch.Size([]), [3, 7], [3])
        """
        return sigmoid_loss(self, x, labels, max_labels, logit_bias)

    def graphed(self, optimizer: torch.optim.Optimizer, *, batch_size: int) -> GraphedStep:
        """Return a function that runs a whole training step: on a GPU by one replay of a captured CUDA graph.

        See `GraphedStep`.

        Example:
            >>> import logging; logging.disable()  # open_clip warns about random weights
            >>> import open_clip
            >>> from skipkernels.experiments import glyph_tiny
            >>> glyph_tiny.register()
            >>> tokens = open_clip.get_tokenizer("glyph-tiny")([f"the digit {n}." for n in range(10)])
            >>> clip = SkipCLIP(open_clip.create_model("glyph-tiny"), tokens, skip_layers=0.5)
            >>> optimizer = torch.optim.SGD(clip.parameter_groups(text_lr=2e-5, image_lr=5e-6), momentum=0.9)
            >>> step = clip.graphed(optimizer, batch_size=4)
            >>> step(torch.rand(4, 3, 32, 32), torch.tensor([3, 3, 3, 3])).class_ids.shape
            torch.Size([6])
        """
        self._refuse_parallel("graphed", "Run the steps one by one.")
        return GraphedStep(self, optimizer, batch_size)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return every parameter that trains."""
        return [p for group in self.parameter_groups(text_lr=0.0, image_lr=0.0) for p in group["params"]]

    def parameter_groups(self, *, text_lr: float, image_lr: float) -> list[dict[str, Any]]:
        """Return groups for a `torch.optim` optimizer: the text tower and the image tower, each with a learning rate.

        The temperature, if it trains, is in the group of the text tower.

        Raises:
            RuntimeError: If the model was altered or its parameters were replaced.
        """
        self._refuse_training_below()
        text, image = (
            [p for p in tower.upper_parameters() if p.requires_grad or self._settings.trainable == "upper"]
            for tower in (self._text, self._image)
        )
        if self.model.logit_scale.requires_grad:
            text.append(self.model.logit_scale)
        if not {id(p) for p in (*text, *image)} <= {id(p) for p in self.model.parameters()}:
            raise RuntimeError(
                "SkipCLIP: the model's parameters were replaced by others (load_state_dict with assign=True does "
                "that), so they would not train. Call clip.refresh(), or load without assign."
            )
        self._check_unaltered()
        return [{"name": "text", "params": text, "lr": text_lr}, {"name": "image", "params": image, "lr": image_lr}]

    def activation_checkpointing_enable(self, *arguments: Any, **options: Any) -> None:
        """Set `memory="min"`: each block above the cut saves only its input for backward and recomputes the rest.

        Arguments of transformers (`every_n_layers`, `offload`) are accepted and have no effect.
        """
        self.set_grad_checkpointing(True)

    def activation_checkpointing_disable(self) -> None:
        """Set `memory` back to its value at construction, or to "auto" if that was "min"."""
        self.set_grad_checkpointing(False)

    # Their names until transformers 6.
    gradient_checkpointing_enable = activation_checkpointing_enable
    gradient_checkpointing_disable = activation_checkpointing_disable

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable gradient checkpointing, under the name that open_clip uses."""
        disabled: Memory = "auto" if self._settings.memory == "min" else self._settings.memory
        for tower in (self._image, *self._text_encoder.towers):
            tower.memory = "min" if enable else disabled

    # ---- inference ---------------------------------------------------------------------------------------------

    def class_embeddings(self) -> Tensor:
        """Unit-norm text embeddings [C, D] of all classes with the current weights, without gradient.

        Computed in evaluation mode, and again only after the weights have changed, in whatever way. With
        `process_group` that is collective, and each process then has those of all classes.
        """
        self._check_unaltered()
        return self._class_embeddings().clone()  # the original is cached

    def _class_embeddings(self) -> Tensor:
        """Cached embeddings [C, D] of all classes, not to be changed."""
        own = self._own_embeddings()
        return own if self._parallel is None else self._parallel.class_embeddings(own)

    def _own_embeddings(self) -> Tensor:
        """Cached embeddings [C/W, D] of the classes that this process owns, not to be changed."""
        return self._text_encoder.class_embeddings(self._owned_of_held)

    def classifier(self) -> nn.Module:
        """Return a plain module from images [B, 3, height, width] to logits [B, C], with the current class embeddings.

        It shares the weights of the image tower, runs in evaluation mode and contains no SkipCLIP, so `torch.export`
        and ONNX accept it. Create it again after further training.
        """
        self._check_unaltered()
        with torch.no_grad():
            encoder = sharing_weights(self._image.encoder(), self.model)
            return ImageClassifier(encoder, self._class_embeddings().clone(), self.model.logit_scale.exp()).eval()

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Logits [B, C] over all classes, always in evaluation mode.

        With `process_group` every call is collective, and B is the number of images of this process, which may be 0.

        Args:
            x: Images [B, 3, height, width], or features at the cut [B, N, W].
        """
        if self._parallel is not None:
            return sharded_predict(self, self._parallel, x)
        image, classes = self._compared(x)
        with torch.autocast(image.device.type, enabled=False):  # bf16 logits at a scale of 100 are half a unit apart
            return image @ classes.T

    @torch.no_grad()
    def top_k(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest logits of each image over all classes, and these classes, always in evaluation mode.

        The same as `predict(x).topk(k)`, in chunks of classes: with very many classes [B, C] is never in memory. Of
        equal logits that of the lower class comes first. With `process_group` every call is collective, and B is the
        number of images of this process, which may be 0.

        Args:
            x: Images [B, 3, height, width], or features at the cut [B, N, W].
            k: Number of classes, from 1 to C.

        Returns:
            Logits [B, k], descending, and class ids int64 [B, k].

        Raises:
            ValueError: If k is out of range.

        Example:
            >>> import logging; logging.disable()  # open_clip warns about random weights
            >>> import open_clip
            >>> from skipkernels.experiments import glyph_tiny
            >>> glyph_tiny.register()
            >>> tokens = open_clip.get_tokenizer("glyph-tiny")([f"the digit {n}." for n in range(10)])
            >>> clip = SkipCLIP(open_clip.create_model("glyph-tiny"), tokens, skip_layers=0.5)
            >>> images = torch.rand(4, 3, 32, 32)
            >>> logits, class_ids = clip.top_k(images, 3)
            >>> class_ids.shape, class_ids[:, 0].equal(clip.predict(images).argmax(dim=1))
            (torch.Size([4, 3]), True)
        """
        if self._parallel is not None:
            return sharded_top_k(self, self._parallel, x, k)
        image, classes = self._compared(x)
        with torch.autocast(image.device.type, enabled=False):
            return top_k_logits(image, classes, k)

    def _compared(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Unit-norm image embeddings [B, D] times exp(logit_scale), and unit-norm class embeddings [C/W, D]."""
        check_images(x)
        self._check_unaltered(lower_image=True)
        self._follow(x.device)
        classes = self._own_embeddings()
        with evaluating([self.model]):
            image = self._image_encoder.encode(x)
        with torch.autocast(image.device.type, enabled=False):
            image = nn.functional.normalize(image.to(classes.dtype), dim=-1)
            return self.model.logit_scale.exp().to(classes.dtype) * image, classes

    # ---- towers ------------------------------------------------------------------------------------------------

    def encode_lower(self, images: Tensor, *, drop_patches: bool = False) -> Tensor:
        """Images [B, 3, height, width] to features at the cut [B, N, W], constants that may be cached.

        Features of a convolutional tower are the feature maps between its blocks. Below the cut all modules run in
        evaluation mode: no dropout, and batch norms use their running statistics. `drop_patches=True` applies the
        patch dropout of a model in training mode, if it has one; do not cache such features: they are random.

        Features do not record their cut. Those of another `skip_layers` have the same shape in most models, and are
        accepted with wrong results: cache them with `FeatureCache.build`, which compares the cut and the weights.
        """
        check_images(images)
        self._check_unaltered(lower_image=True)
        self._image_encoder.gave_features = True
        return self._image_encoder.lower(images, drop_patches=drop_patches)

    def encode_upper(self, features: Tensor) -> Tensor:
        """Features at the cut [B, N, W] to image embeddings [B, D], not normalised."""
        check_features(features, self._image_encoder.features[0])
        self._check_unaltered()
        return self._image.upper(features)

    def encode_image(self, x: Tensor) -> Tensor:
        """Images [B, 3, height, width], or features at the cut [B, N, W], to image embeddings [B, D], not normalised.

        In training mode the patch dropout of the model, if any, is applied to images.

        Raises:
            ValueError: If x has another shape, or is features although nothing is skipped.
        """
        check_images(x)
        self._image_encoder.are_images(x)
        self._check_unaltered(lower_image=True)
        return self._image_encoder.encode(x)

    def encode_classes(self, class_ids: Tensor) -> Tensor:
        """Class ids [K], int64 in [0, C), to text embeddings [K, D], not normalised. Ids may repeat."""
        self._refuse_parallel("encode_classes", "Read them from class_embeddings().")
        check_class_ids(class_ids, len(self.prototypes))
        self._check_unaltered()
        return self._text_encoder.encode(class_ids, exact=True)

    def lower_copy(self) -> Callable[[Tensor], Tensor]:
        """Return `encode_lower` for another thread: copied modules in evaluation mode that share the weights."""
        return self._image_encoder.lower_copy()

    def lower_identity(self, tower: Literal["image", "text"]) -> dict[str, str | int]:
        """Return everything that determines the features of a tower at the cut, by name, such as digests of weights."""
        if tower == "image":
            self._image_encoder.accept_weights()
        return (self._image if tower == "image" else self._text).lower_identity()

    # ---- changes to the model ----------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Read the model again, after a deliberate change to it or after computing features at the cut again.

        Repeats every check of the construction and sets `requires_grad` again; keeps prototypes and sampler. Create the
        optimizer again if it holds replaced parameters.
        """
        device = self.prototypes.device
        image, texts = build_towers(self.model, self._tokens)
        self._set_up(image, texts)
        for text in texts:
            text.apply(lambda x: x.to(device))
        self._image_encoder.tower = image
        self._text_encoder.replace_towers(texts)
        with torch.autocast(device.type, enabled=False):
            verify(self.model, self._image_encoder, self._text_encoder, self._tokens)
        self._take_over(self._image_encoder.lower_device)

    def set_classes(self, tokens: Tensor, class_weight: Tensor | None = None) -> None:
        """Replace the classes of the task by others, of any number, in place.

        Parameters, their `requires_grad`, optimizer states and the state of the generator stay as they are; a
        `GraphedStep` captures its step again. Every process of a parallel training must call this, and copies, such as
        that of an `AveragedModel`, keep their classes until it is called on them. With `process_group` a call is
        collective.

        The new `prototypes` are computed with the *current* weights, since the weights from before tuning are not kept:
        called before the first step they are the zero-shot embeddings that the method selects with, and later those of
        the tuned model. A fixed tail is drawn again if its length differs.

        Args:
            tokens: As in the constructor.
            class_weight: [C] weights of the new classes in the loss; by default none.

        Raises:
            RuntimeError: If the model was altered, `text_cache` is in use, or embeddings or gradients differ from those
                of the model. The classes are then those from before.

        Example:
            >>> import logging; logging.disable()  # open_clip warns about random weights
            >>> import open_clip
            >>> from skipkernels.experiments import glyph_tiny
            >>> glyph_tiny.register()
            >>> model, tokenizer = open_clip.create_model("glyph-tiny"), open_clip.get_tokenizer("glyph-tiny")
            >>> clip = SkipCLIP(model, tokenizer([f"the digit {n}." for n in range(10)]), skip_layers=0.5)
            >>> clip.set_classes(tokenizer([f"the letter {n}." for n in "abcdefghijklmnopqrstuvwxyz"]))
            >>> clip.predict(torch.rand(4, 3, 32, 32)).shape
            torch.Size([4, 26])
        """
        device, parallel = self.prototypes.device, self._parallel

        def agreed() -> list[str]:
            return [prompts_digest(tokens), digest_tensors([] if weight is None else [("class_weight", weight)])]

        with agreeing(self._parallel, device, ("tokens of set_classes", "class_weight of set_classes"), agreed):
            self._check_unaltered()
            check_tokens(tokens)
            check_vocabulary(tokens, self._text.vocabulary)
            if torch.is_inference_mode_enabled():
                raise RuntimeError("SkipCLIP: set_classes cannot be called under torch.inference_mode().")
            if parallel is not None:
                parallel = parallel.with_classes(len(tokens))
            prompts = self._held_prompts(tokens, parallel)
            encoder = self._text_encoder.of_other_prompts(build_towers(self.model, prompts)[1], device)
            with torch.autocast(device.type, enabled=False):
                with evaluating([self.model]):
                    prototypes = encoder.prototypes(None, slice(None) if parallel is None else parallel.owned_of_held)
                weight = check_class_weight(class_weight, prototypes, len(tokens))
                if encoder.lower_device is None:  # the model itself does not run on two devices
                    verify(self.model, self._image_encoder, encoder, prompts)
        self._tokens, self._text_encoder, self.prototypes, self.class_weight = prompts, encoder, prototypes, weight
        if parallel is not None:
            self._parallel, self._prompts = parallel, prompts_digest(tokens)
        self._snapshot = Snapshot(self.model, self._image, self._text)

    def _take_over(self, lower_device: torch.device | None) -> None:
        """Move the modules below the cut, accept their weights, and supersede other SkipCLIPs on the model."""
        if lower_device is not None:
            for encoder in (self._image_encoder, self._text_encoder):
                encoder.lower_device = lower_device
                encoder.tower.move_lower(lower_device)
        self._image_encoder.accept_weights()
        self._trained.supersede_others(self.model)

    def check_weights(self) -> None:
        """Compare the weights below the cut by content with those that gave the features at the cut.

        Each step compares only identities and versions, which do not show a change through `.data` or `numpy()`. This
        is called at each switch between training and evaluation mode, and by `skipkernels tune` in each epoch. After a
        change, text features are computed again, and calls with image features computed before raise an error.

        Raises:
            RuntimeError: If a parameter below the cut is set to train.
        """
        self._image_encoder.weights.content_changed()
        self._text_encoder.compare_weights()
        self._refuse_training_below()

    @property
    def _num_classes(self) -> int:
        return len(self.prototypes) if self._parallel is None else self._parallel.num_classes

    @property
    def _owned_of_held(self) -> slice:
        return slice(None) if self._parallel is None else self._parallel.owned_of_held

    def _refuse_parallel(self, name: str, remedy: str = "Create SkipCLIP without process_group.") -> None:
        if self._parallel is not None:
            raise RuntimeError(f"SkipCLIP: {name} is not supported with process_group. {remedy}")

    def _refuse_training_below(self) -> None:
        if self._image_encoder.weights.requires_grad() or self._text_encoder.weights.requires_grad():
            raise RuntimeError(
                "SkipCLIP: requires_grad was set on parameters below the cut, which get no gradient. Set it to False "
                "again, or call clip.refresh(), which does; to train them, make a SkipCLIP with fewer skip_layers."
            )

    def _check_unaltered(self, *, lower_image: bool = False) -> None:
        """Raise a RuntimeError if the model was altered, or another SkipCLIP changed which parameters train."""
        if self._trained.superseded:
            raise RuntimeError(
                "SkipCLIP: a later SkipCLIP on the same model trains other parameters, so this one would train the "
                "wrong ones. Use the later one, or call refresh() on this one."
            )
        if self._snapshot is None or not self._snapshot.is_unchanged(lower_image=lower_image):
            refuse_sharded(self)
            refuse_alterations(self.model, self._tokens, self._image, self._text_encoder.towers)
            self._snapshot = Snapshot(self.model, self._image, self._text)

    def train(self, mode: bool = True) -> SkipCLIP:
        """Set training or evaluation mode; a switch compares the weights below the cut, see `check_weights`."""
        switched = mode != self.training
        super().train(mode)
        if switched:
            self.check_weights()
        return self

    def _follow(self, device: torch.device) -> None:
        """Move the tensors beside the model to the device of the images, after the model alone was moved."""
        if self.prototypes.device != device and self.model.logit_scale.device == device:
            self.prototypes = self.prototypes.to(device)
            self.class_weight = None if self.class_weight is None else self.class_weight.to(device)
            self._text_encoder.apply(lambda x: x.to(device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SkipCLIP:
        """Convert or move everything, including tensors of the towers; prototypes and weights stay at least fp32."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        encoders: tuple[ImageEncoder | TextEncoder, ...] = self._image_encoder, self._text_encoder
        dtype, stale = self._image.dtype, [encoder.weights.changed() for encoder in encoders]
        keeps_text = self._text_encoder.is_current()
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            converted = getattr(self, name)
            if buffer.dtype != converted.dtype:
                setattr(self, name, buffer.to(converted.device))
        if self._parallel is not None:
            moved = fn(self.prototypes)
            keeps_dtype = moved.dtype == self.prototypes.dtype
            self.prototypes = moved if keeps_dtype else self.prototypes.to(moved.device)
        replaced = {
            id(parameters[name]): parameter
            for name, parameter in self.model.named_parameters(remove_duplicate=False)
            if parameter is not parameters[name]
        }
        for encoder, is_stale in zip(encoders, stale, strict=True):
            for tower in encoder.towers:
                tower.replace_parameters(replaced)
            if encoder.lower_device is not None:
                encoder.tower.move_lower(encoder.lower_device)
            if not is_stale:  # the digests of another device or dtype differ
                encoder.accept_weights()
        self._text_encoder.apply(fn, keep=keeps_text)
        if self._image.dtype != dtype:
            self._image_encoder.features = self._image_encoder.features[0], self._image.dtype
        self._trained.register(self.model)
        self._snapshot = None
        return self

    # ---- state -------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """Return the state of the sampler and the prototypes as a uint8 tensor: the bytes of a safetensors file.

        With `process_group` the prototypes are those of own classes: nothing is sent, so one process may save alone.
        """
        prompts = self._prompts or prompts_digest(self._tokens)
        return pack_state(self.prototypes, prompts, self.sampler.tensors(), self._shard)

    def set_extra_state(self, state: Any) -> None:
        """Continue from the result of `get_extra_state`, of any process of any number of them.

        Raises:
            ValueError: If it is damaged, or differs in the prompts, the number of classes or the width; or if it has
                the prototypes of a share of the classes, and these are not those that were computed at construction.
        """
        prompts = self._prompts or prompts_digest(self._tokens)
        prototypes, sampler = unpack_state(state, self.prototypes, prompts, self._shard, self._text.dtype)
        self.sampler.load_tensors(sampler)
        self.prototypes.copy_(prototypes)

    @property
    def _shard(self) -> Shard:
        rank, size = (0, 1) if self._parallel is None else (self._parallel.rank, self._parallel.size)
        return Shard(rank, size, self._num_classes)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        refuse_low_rank_updates(self.model, state_dict, f"{prefix}model.")
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        key = f"{prefix}_extra_state"
        if key in missing:
            missing.remove(key)
            warn_caller(
                "SkipCLIP: the state dict has no sampler and no prototypes (it was saved by an older version, or is "
                "the model's own); the sampler keeps its current state."
            )

    def _replicate_for_data_parallel(self) -> SkipCLIP:
        raise RuntimeError(
            "SkipCLIP: torch.nn.DataParallel copies the module in each step, so draws and cached texts would be lost. "
            "Use DistributedDataParallel, with a process for each GPU (torchrun, accelerate launch), or one GPU "
            "(CUDA_VISIBLE_DEVICES=0)."
        )

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_snapshot": None}  # it refers to modules of this process

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._trained.register(self.model)  # a copy has its own model


def check_clip(function: str, clip: Any) -> None:
    """Raise a TypeError unless clip is a SkipCLIP."""
    if not isinstance(clip, SkipCLIP):
        raise TypeError(
            f"{function}: clip must be a SkipCLIP; got {type(clip).__name__}. Make one of the model: "
            "SkipCLIP(model, tokens, skip_layers=…)."
        )


def _after_load(clip: SkipCLIP, keys: Any) -> None:
    """Accept the loaded weights below the cut, unless features of other weights are in use."""
    if not clip._image_encoder.gave_features:
        clip._image_encoder.accept_weights()
