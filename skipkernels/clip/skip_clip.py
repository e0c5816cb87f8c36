"""SkipCLIP: a CLIP model with the training step of Skip Tuning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..boundary import DEFAULT_CHUNK
from ..options import AttentionName, Tail
from ..parallel import ClassParallel
from ..selection import RankSampler, check_rank_options
from ..store import digest_tensors
from ..towers import ImageTower, Memory, TextTower, build_towers, evaluating
from ..towers.structure import containers, refuse_overrides
from .batch import LabelOrder
from .classes import check_class_weight, check_label_smoothing, prompts_of
from .image_encoder import ImageEncoder
from .inference import Inference
from .processes import AGREED, agreeing, device_of, digests_of_clip
from .settings import Settings, Trainable, check_tokens, check_vocabulary
from .snapshot import Snapshot
from .state import prompts_digest
from .text_encoder import TextEncoder
from .trainable import TrainedParameters, set_trainable
from .training import Training
from .verify import verify


class SkipCLIP(Training, Inference):
    """Tune a CLIP by Skip Tuning: train the blocks above `skip_layers` on the classes selected for each batch.

    The model is tuned in place: its parameters are shared, and the keys of its `state_dict` do not change. The *cut* is
    behind the first `skip_layers` blocks of each tower. Parameters below the cut are frozen (`requires_grad` False),
    parameters above it train. With `skip_layers=0` only `logit_scale` is frozen: full fine-tuning with class selection.

    In evaluation mode (`clip.eval()`) `clip(x, labels)` compares all classes, returns [B, C] logits and the loss over
    them, and changes no state. `clip.state_dict()` holds the model, and in `_extra_state` the sampler and the
    prototypes, so that a resumed training draws the same classes. `keep_ratio`, `max_keep`, `decay` and `tail` are not
    in it: pass the same values to the constructor when resuming.

    After construction do not alter the model (add a hook; replace a layer or the mask; change the number of heads):
    calls then raise an error until `refresh` is called. Changes of the weights below the cut are detected by their
    content at each switch between training and evaluation mode, and by their version counters in each step. While
    global module hooks (`torch.nn.modules.module.register_module_forward_hook`) are registered, every block runs its
    own forward, with them; modules around the blocks, such as the model itself, are not called.

    `torch.compile(clip)` does not compile the step. Activation checkpointing around SkipCLIP raises an error, since its
    second forward would draw other classes: use `memory="min"`.

    With `DistributedDataParallel(clip, forward_sync_buffers=False)`, or `broadcast_buffers=False` in PyTorch versions
    without that argument, each process selects classes for its part of a batch. With `keep_ratio=1` and equal parts the
    gradients are those of the whole batch. With `process_group` the gradients are those of the whole batch for all
    settings.

    Args:
        model: An open_clip `CLIP`, `CustomTextCLIP` or `CoCa`, an OpenAI `clip.model.CLIP`, or a Hugging Face
            `CLIPModel` or `SiglipModel`, in fp32, bf16, fp16 or fp64.
        tokens: [C, L] int64, the tokenised prompt of each class, or [C, T, L], its prompts in T templates. The
            embedding of a class is then the mean of the unit-norm embeddings of its T prompts.
        skip_layers: Number of frozen blocks in each tower (ω): a whole number, a fraction of the blocks, or a pair
            (image, text) of these.
        keep_ratio: Below 1, the share of the classes that is always kept; above 1, their number. 1 keeps every class,
            whatever `max_keep` is.
        max_keep: Largest number of classes that are always kept, unless a batch has more labels.
        decay: λ. The other classes, the tail, are kept with a probability that falls exponentially with the rank of the
            class; the larger λ is, the more are kept.
        tail: "resample" draws classes of the tail in each step, "fixed" once per run, as published.
        max_tail: Upper bound on the expected number of classes drawn from the tail, for tasks with very many classes.
            It changes the method; default: None, no bound, as published. See `RankSampler`.
        generator: Random generator of the draws; by default one with seed 0.
        lower_device: Device of parameters and buffers below the cut; by default that of the model.
        train_logit_scale: True also trains the temperature.
        label_smoothing: ε in [0, 1] of the loss, in training over the kept classes.
        class_weight: [C] weights of the classes in the loss. As in `torch.nn.CrossEntropyLoss`, the loss is then the
            weighted mean over the batch: in a batch of one class, as `sampler="class_pure"` draws, the weight of this
            class cancels out, and a weight of 0 gives NaN. `label_smoothing` and `class_weight` apply in evaluation
            mode too.
        trainable: "upper" sets `requires_grad` of every parameter above the cut, and refuses a model with adapters.
            "as_is" trains the parameters above the cut that require gradients, such as only adapters, norms or biases.
            A block with an adapter runs its own `forward`, the others stay fused.
        chunk: Largest number of images or prompts in one forward pass below the cut.
        memory: What a block above the cut saves for backward. "fast": all but what is cheap to recompute, about 10·W
            values per token. "min": only its input; the rest is recomputed. "auto": "fast" if that takes less than half
            of the free memory, else "min". Results are the same. A block that is not fused saves what autograd saves,
            except with "min".
        attention: Backend of attention. "sdpa": PyTorch's `scaled_dot_product_attention`, and operators of this package
            for prompts with a shared prefix and for pooled tokens. "xformers": xformers for full and causal attention
            and for prompts with a shared prefix; GPU only, with a host sync in each step.
        text_cache: Folder that stores the text features at the cut, for more classes than fit in memory; default: None,
            they stay in memory. The first process fills it while the others wait; with `process_group` each process has
            a subfolder for its own classes. A GPU holds all features if they take at most 256 MiB; otherwise each step
            has a host sync to read class ids.
        process_group: Processes that train together, by gloo or NCCL. The result equals that of one process with the
            images of all processes, up to rounding. Process r of W encodes and scores the classes c ≡ r (mod W). The
            loss is the mean over the images of all processes, and gradients are for the mean over processes, by
            `DistributedDataParallel` or `skipkernels.parallel.all_reduce_gradients`. Construct SkipCLIP with equal
            arguments on every process. Default: None, each process trains independently.
        class_parallel: With `process_group`: True, the default, shares out the prompts and their encoding. False holds
            all prompts on each process, which encodes all selected classes, with fewer messages. The results are equal.

    Attributes:
        prototypes: [C, D] fp32 (fp64 for an fp64 model), unit-norm text embeddings from before tuning. With
            `process_group` only the rows of the classes of this process.
        class_weight: [C] in the dtype of the prototypes, or None. Not part of `state_dict`.
        sampler: The `RankSampler`. Its state is part of `state_dict`.

    Raises:
        UnsupportedModel: If the model is not supported, or a module that SkipCLIP does not call has hooks.
        TypeError: If the model is not an `nn.Module`, tokens or class weights are not tensors, or generator is not a
            torch.Generator.
        ValueError: If an argument is out of range.
        RuntimeError: If embeddings or gradients differ from those that the model computes itself.
        StoreError: If `text_cache` holds features of other prompts, other weights or another model.

    Source: Wu et al., "Skip Tuning", CVPR 2025, arXiv 2412.11509.

    Example:
        >>> from skipkernels.app.demo import glyph_tiny
        >>> model, _, tokenizer = glyph_tiny.load()
        >>> clip = SkipCLIP(model, tokenizer([f"the digit {n}." for n in range(10)]), skip_layers=0.5)
        >>> out = clip(torch.rand(4, 3, 32, 32), torch.tensor([3, 3, 3, 3]))
        >>> out.loss.shape, out.class_ids.shape, out.class_ids[out.targets].tolist()
        (torch.Size([]), torch.Size([6]), [3, 3, 3, 3])
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
        train_logit_scale: bool = False,
        label_smoothing: float = 0.0,
        class_weight: Tensor | None = None,
        trainable: Trainable = "upper",
        chunk: int = DEFAULT_CHUNK,
        memory: Memory = "auto",
        attention: AttentionName = "sdpa",
        text_cache: str | Path | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
        class_parallel: bool = True,
    ):
        super().__init__()
        check_tokens(tokens)
        self.model = model
        self._parallel = None
        if process_group is not None:
            self._parallel = ClassParallel(process_group, len(tokens), device_of(model))
        self._trained, self._label_order = TrainedParameters(), LabelOrder()
        self._snapshot: Snapshot | None = None  # None in a copy and after a move

        parameters = model.parameters() if isinstance(model, nn.Module) else ()  # checked below
        required_grad = [(parameter, parameter.requires_grad) for parameter in parameters]
        try:
            device = torch.device("cpu") if self._parallel is None else device_of(model)
            with agreeing(self._parallel, device, AGREED, lambda: digests_of_clip(self)):
                if not isinstance(chunk, int) or chunk < 1:
                    raise ValueError(f"SkipCLIP: chunk must be a whole number, at least 1; got {chunk!r}.")
                if torch.is_inference_mode_enabled():
                    raise RuntimeError(
                        "SkipCLIP: cannot be created under torch.inference_mode(): its tensors could not train."
                    )
                self._settings = Settings.checked(skip_layers, memory, attention, trainable, train_logit_scale)
                self.label_smoothing = check_label_smoothing(label_smoothing)
                check_rank_options("SkipCLIP", keep_ratio, max_keep, decay, tail, generator, max_tail)
                self.sampler = RankSampler(keep_ratio, max_keep, decay, tail, generator, max_tail)
                if self._parallel is not None:
                    self._parallel.replicated = not class_parallel
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

        # The text features of all classes are computed by now, so the lower text tower can move to another device.
        self._take_over(None if lower_device is None else torch.device(lower_device))
        self.register_load_state_dict_post_hook(_after_load)

    def _held_prompts(self, tokens: Tensor, parallel: ClassParallel | None) -> Tensor:
        """Return the prompts that this process holds: of all classes, or of its own."""
        if parallel is None:
            return prompts_of(tokens)
        return prompts_of(tokens[parallel.held])

    def _folder(self, text_cache: Path) -> Path:
        """Folder of the text features of the classes of this process."""
        if self._parallel is None or self._parallel.replicated:
            return text_cache
        return text_cache / f"process_{self._parallel.rank}_of_{self._parallel.size}"

    def _set_prototypes(self, prototypes: Tensor) -> None:
        if self._parallel is None:
            self.register_buffer("prototypes", prototypes, persistent=False)  # `get_extra_state` holds them
        else:
            self.prototypes = prototypes  # not a buffer: DistributedDataParallel would broadcast it

    def _set_up(self, image: ImageTower, texts: Sequence[TextTower]) -> None:
        """Cut the towers, set which parameters train, and take a snapshot of the model to detect later changes."""
        text = texts[0]
        check_vocabulary(self._tokens, text.vocabulary)
        self._settings.apply(image, texts)
        refuse_overrides(self.model, containers(self.model, (image, text)))
        set_trainable(self.model, image, text, self._settings)
        self._snapshot = Snapshot(self.model, image, text)
        self._warn_of_unfused(image, text)

    def refresh(self) -> None:
        """Read the model again, after a deliberate change to it or to its weights below the cut.

        After a change of weights, compute stored features at the cut again first. This call repeats every check of the
        constructor and sets `requires_grad` again; prototypes and sampler do not change. Create the optimizer again if
        it holds replaced parameters.
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
        """Replace the classes of the task in place. The number of classes may change.

        Parameters, their `requires_grad`, optimizer states and the state of the generator stay as they are; a
        `GraphedStep` captures its step again. In distributed training every process must make this call, which is
        collective with `process_group`. Copies, such as the one in an `AveragedModel`, keep their classes until it is
        called on them.

        The new `prototypes` are computed with the *current* weights, since the weights from before tuning are not kept.
        If the call precedes the first step, they are the zero-shot embeddings that the published method selects with;
        later they are embeddings of the tuned model. A fixed tail is drawn again if its length differs.

        Args:
            tokens: As in the constructor.
            class_weight: [C] weights of the new classes in the loss; by default none.

        Raises:
            RuntimeError: If the model was altered, `text_cache` is in use, or embeddings or gradients differ from those
                of the model. The previous classes then stay in use.

        Example:
            >>> from skipkernels.app.demo import glyph_tiny
            >>> model, _, tokenizer = glyph_tiny.load()
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
                if encoder.lower_device is None:  # verify runs the model itself, which must be on one device
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


def check_clip(function: str, clip: Any) -> None:
    """Raise a TypeError unless clip is a SkipCLIP."""
    if not isinstance(clip, SkipCLIP):
        raise TypeError(
            f"{function}: clip must be a SkipCLIP; got {type(clip).__name__}. Wrap the model: "
            "SkipCLIP(model, tokens, skip_layers=…)."
        )


def _after_load(clip: SkipCLIP, keys: Any) -> None:
    """Accept the loaded weights below the cut, unless features at the cut were computed with the previous weights."""
    if not clip._image_encoder.gave_features:
        clip._image_encoder.accept_weights()
