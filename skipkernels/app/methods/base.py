"""Base classes of the methods that adapt a CLIP.

Shapes: B images in a batch, n images, C classes of a test, D width of the joint embedding, L tokens of a prompt.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from urllib.parse import quote

import torch
import torch.nn.functional as F
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor, nn

from ...boundary import DEFAULT_CHUNK
from ...clip import SkipCLIP
from ...options import Protocol, SamplerKind
from ...parallel import ShardedSkipCLIP
from ...reference import unit_norm
from ...retrieval import top_k_probabilities
from ...towers.modes import evaluating
from ..data import InputError, Task
from ..heads import Head
from .export_heads import AFFINE_CODE, AffineHead, CosineHead
from .registry import MODELS

Tokenizer = Callable[[list[str]], Tensor]
"""Function from texts to tokens [n, L], such as a tokenizer of `open_clip.get_tokenizer`."""


@dataclass(frozen=True)
class Recipe:
    """Default training settings of a method; None for settings that it does not use."""

    epochs: int  # Passes over the training images; 0 for a method without steps
    batch_size: int | None = None  # Images per step
    optimizer: str | None = None  # "sgd", "adamw", or "lbfgs" for a method without steps
    text_lr: float | None = None  # Learning rate of the weights on the text side
    image_lr: float | None = None  # Learning rate of the weights on the image side
    momentum: float | None = None
    weight_decay: float | None = None
    warmup_epochs: int | None = None  # Epochs at the warm-up rate, before the cosine
    warmup_lr: float | None = None  # Learning rate of the warm-up
    sampler: SamplerKind | None = None  # "class_pure" or "random"


class StepOutput(NamedTuple):
    """Mean loss [] of a step, and the number of classes in its softmax."""

    loss: Tensor
    classes: int


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """Return fp32, or `dtype` if it is wider: the dtype of logits, and of weights that a method adds to a model."""
    return torch.promote_types(dtype, torch.float32)


def cosine_logits(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Logits [B, C] of images over classes, computed as in `SkipCLIP.predict`.

        z_bc = exp(logit_scale) · ⟨x_b/|x_b|, t_c⟩

    `image` x [B, D] may have any norm; `text` t [C, D] has unit norm; `logit_scale`, [] or [1], gets no gradient.
    """
    with torch.autocast(image.device.type, enabled=False):  # bf16 logits at a scale of 100 are half a unit apart
        return _scaled(image, text, logit_scale) @ text.T


def _scaled(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Return exp(logit_scale) · x/|x|, [B, D], with the arguments of `cosine_logits`."""
    return logit_scale.detach().exp().to(text.dtype) * F.normalize(image.to(text.dtype), dim=-1)


def check_open_clip(method: str, model: nn.Module) -> None:
    """Raise an InputError if the model is not one of open_clip."""
    if not isinstance(model, (CLIP, CustomTextCLIP, CoCa)):
        raise InputError(
            f"{method}: model must be an open_clip CLIP, CustomTextCLIP or CoCa; got {type(model).__name__}. Create it "
            "with open_clip.create_model."
        )


class Method(ABC):
    """Method that adapts a CLIP, in place, to the classes of a task's first test.

    Training uses the first template. All random numbers except those of dropout, which are PyTorch's, are drawn from
    `generator`, by default with seed 0. A model or task that the method does not support is an InputError.

    Attributes:
        name: Name of the method in `METHODS`.
        head_code: Python that computes `logits` from `image`, the embeddings of `model`, and `head`, the state dict of
            `head()`, for the model card; empty if the model itself has all that training changes.
        takes_head: A head can classify its embeddings; False for a method that is a head itself, or adapts them.
        can_blend: It trains weights of the model itself, so that they can be blended with those before.
        published_quarter: Datasets on which the published recipe trains a quarter of the epochs.
        cut: SkipCLIP that computes the features of a cache on disk, by its lower image tower; None: no such cache.
        fitted: Head that classifies instead of the texts, set by `use_head`; None: the texts.
        notes: Notes for the user about the setup.

    Example:
        >>> from skipkernels.app.data import TaskOptions, load_task
        >>> from skipkernels.app.demo import pictogram_tiny
        >>> from skipkernels.app.methods import METHODS
        >>> model, _, tokenizer = pictogram_tiny.load()
        >>> task = load_task("pictograms:food", TaskOptions(protocol="base-to-new", shots=1, max_classes=6))
        >>> method, images = METHODS["lora"](model, tokenizer, task), torch.rand(2, 3, 32, 32)
        >>> loss, classes = method.step(method.encode_frozen(images), torch.tensor([0, 2]))
        >>> classes, method.logits("new", method.encode_frozen(images)).shape
        (3, torch.Size([2, 3]))
    """

    name: ClassVar[str]
    head_code: ClassVar[str] = ""
    takes_head: ClassVar[bool] = True
    can_blend: ClassVar[bool] = False
    published_quarter: ClassVar[tuple[str, ...]] = ()
    cut: SkipCLIP | None = None
    fitted: Head | None = None

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, task: Task, *, generator: torch.Generator | None = None):
        self.model: Any = model
        self.task = task
        self.notes: list[str] = []
        self._generator = torch.Generator().manual_seed(0) if generator is None else generator
        self._train_test = task.tests[0].name
        device = next(model.parameters()).device
        self._tokens = {test.name: [tokenizer(texts).to(device) for texts in test.prompts] for test in task.tests}
        self._embeddings: dict[tuple[str, int | None], tuple[Any, Tensor]] = {}  # with the version of their weights
        self._rows_of_head: dict[str, int] = {}  # by class name
        self._heads: dict[str, Head] = {}  # by test

    @classmethod
    def options(cls) -> set[str]:
        """Names of the options of the constructor."""
        return set(inspect.signature(cls).parameters)

    @classmethod
    def recipe(cls, model_name: str, protocol: Protocol, shots: int, classes: int = 100) -> Recipe:
        """Return the default recipe: the published one, with the changes of a model in `MODELS`.

        `classes` is used by methods with a published number of steps, not of epochs.
        """
        changes = MODELS[model_name].recipes.get(cls.name, {}) if model_name in MODELS else {}
        return replace(cls._published(protocol, shots, classes), **changes)

    @classmethod
    @abstractmethod
    def _published(cls, protocol: Protocol, shots: int, classes: int) -> Recipe:
        """Return the recipe of the paper."""

    def encode_frozen(self, images: Tensor) -> Tensor:
        """Run the frozen part on images [B, 3, H, W], for `step` and `logits`. By default there is no frozen part."""
        return images

    def step(self, inputs: Tensor, labels: Tensor) -> StepOutput:
        """Compute the differentiable loss of `encode_frozen` of B images, with their classes in the first test, [B]."""
        raise TypeError(f"{self.name}: the method has no steps; call fit.")

    def _cross_entropy_step(self, image: Tensor, text: Tensor, labels: Tensor) -> StepOutput:
        """Mean cross-entropy over all classes, of image embeddings and unit-norm class embeddings."""
        return StepOutput(F.cross_entropy(cosine_logits(image, text, self.model.logit_scale), labels), len(text))

    def _encoded_texts(self) -> Tensor:
        """Unit-norm class embeddings [C, D] of the training classes, with gradient."""
        return unit_norm(self.encode_texts(self._test_tokens(self._train_test)[0]))

    def graphed(
        self, optimizer: torch.optim.Optimizer, batch_size: int
    ) -> Callable[[Tensor, Tensor], StepOutput] | None:
        """Return a whole training step, update included, captured in a CUDA graph; None if there is none.

        Raises:
            ValueError: If the step cannot be captured; names the reason.
        """
        return None

    def fit(self, inputs: Tensor, labels: Tensor) -> None:
        """Train on all images at once, `encode_frozen` of n images and classes [n]; for methods without epochs."""
        raise TypeError(f"{self.name}: the method trains by steps; call step.")

    @abstractmethod
    def parameter_groups(self, *, text_lr: float, image_lr: float) -> list[dict[str, Any]]:
        """Return groups for a `torch.optim` optimizer, each with a learning rate and a "name", "text" or "image"."""

    def train(self, training: bool) -> None:
        """Set training or evaluation mode of the trained modules."""
        self.model.train(training)

    def embed(self, inputs: Tensor) -> Tensor:
        """Image embeddings [B, D] of any norm, from `inputs` of `encode_frozen`."""
        return self.model.encode_image(inputs, normalize=False)

    def use_head(self, head: Head | None, classes: Sequence[str]) -> None:
        """Classify by a head of embeddings over `classes`, instead of their texts; None: by the texts again.

        Classes of a test that are not among `classes` are classified by their texts, if the head uses texts.
        """
        self.fitted, self._rows_of_head = head, {name: row for row, name in enumerate(classes)}
        self._heads.clear()

    def _head_of(self, test: str) -> Head | None:
        """Return the rows of `fitted` for the classes of a test; None if it has no logits for some of them."""
        assert self.fitted is not None
        if test not in self._heads:
            self._test_tokens(test)  # raises for an unknown test
            names = next(each.classes for each in self.task.tests if each.name == test)
            whole, rows = self.fitted, self._rows_of_head
            if not rows.keys() >= set(names):
                if whole.scale is None:
                    return None
                whole = whole.with_new_classes(self.class_embeddings(test))
            chosen = [rows.get(name, len(rows) + place) for place, name in enumerate(names)]
            self._heads[test] = replace(whole, weight=whole.weight[chosen], bias=whole.bias[chosen])
        return self._heads[test]

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """Text embeddings [n, D] of any norm, from tokens [n, L]."""
        return self.model.encode_text(tokens, normalize=False)

    def class_embeddings(self, test: str, templates: int | None = None) -> Tensor:
        """Unit-norm embeddings [C, D] of the classes of a test, in evaluation mode and without gradient.

        They are the normalized mean over the first `templates`, by default all, of the embeddings of each (Radford et
        al., CLIP, ICML 2021, arXiv 2103.00020, section 3.1.4), and cached until weights on the text side change.
        """
        tokens, version = self._test_tokens(test), self._text_version()
        cached = self._embeddings.get((test, templates))
        if cached is None or cached[0] != version:
            with torch.no_grad(), evaluating([self.model]):
                embeddings = [
                    torch.cat([unit_norm(self.encode_texts(chunk)) for chunk in prompts.split(DEFAULT_CHUNK)])
                    for prompts in tokens[:templates]
                ]
            mean = embeddings[0] if len(embeddings) == 1 else unit_norm(torch.stack(embeddings).mean(dim=0))
            cached = self._embeddings[test, templates] = version, mean
        return cached[1]

    def _test_tokens(self, test: str) -> list[Tensor]:
        """Tokens [C, L] of a test in each template."""
        if test not in self._tokens:
            raise InputError(f"{self.name}: test must be one of the task's, {', '.join(self._tokens)}; got {test!r}.")
        return self._tokens[test]

    def _text_version(self) -> Any:
        """Value that changes with the text weights. The hash detects a change through .data, the version does not."""
        groups = self.parameter_groups(text_lr=0.0, image_lr=0.0)
        weights = [p for group in groups if group["name"] == "text" for p in group["params"]]
        device = self.model.logit_scale.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return autocast, [(p.data_ptr(), p._version, torch.hash_tensor(p.detach()).item()) for p in weights]

    @torch.no_grad()
    def logits(self, test: str, inputs: Tensor) -> Tensor | None:
        """Logits [B, C] over the classes of a test, in evaluation mode; None if the method can't classify them.

        `inputs` is `encode_frozen` of B images.
        """
        with evaluating([self.model]):
            image = self.embed(inputs)
        return self.logits_of(test, image)

    @torch.no_grad()
    def logits_of(self, test: str, image: Tensor) -> Tensor | None:
        """Return `logits` of images by their embeddings [B, D] from `embed`."""
        if self.fitted is not None:
            head = self._head_of(test)
            return None if head is None else head.logits(image)
        return cosine_logits(image, self.class_embeddings(test), self.model.logit_scale)

    @torch.no_grad()
    def top_k(self, test: str, inputs: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
        """Return the k largest probabilities softmax(`logits`) of each image, descending, and their classes, [B, k].

        Computed in chunks of classes, without [B, C] in memory. A method with other `logits_of` overrides both.
        Probabilities are NaN if a logit is NaN or +inf; k is at most C.
        """
        if self.fitted is not None:
            return self._top_of_logits(test, inputs, k)
        text = self.class_embeddings(test)
        with evaluating([self.model]):
            image = self.embed(inputs)
        with torch.autocast(image.device.type, enabled=False):
            return top_k_probabilities(_scaled(image, text, self.model.logit_scale), text, min(k, len(text)))

    def _top_of_logits(self, test: str, inputs: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
        """Return `top_k` with all logits in memory."""
        logits = self.logits(test, inputs)
        if logits is None:
            return None
        probabilities, class_ids = logits.softmax(dim=1).sort(dim=1, descending=True, stable=True)
        return probabilities[:, :k], class_ids[:, :k]

    def export_head(self) -> tuple[nn.Module, str]:
        """Return `head`, or the one set by `use_head`, and the code that does the same, as a `head_code`."""
        if self.fitted is None:
            return self.head(), self.head_code
        head = self._head_of(self._train_test)
        assert head is not None
        return AffineHead(head.weight.float(), head.bias.float()), AFFINE_CODE

    def head(self) -> nn.Module:
        """Return the module for exports: embeddings of the plain model → logits of the trained classes, embeddings.

        A method with other `logits_of` overrides it.
        """
        return CosineHead(self.class_embeddings(self._train_test).float(), self.model.logit_scale)

    def merge(self) -> None:  # noqa: B027
        """Make the model a plain CLIP, with all that the method trained in it. By default it is one."""

    @abstractmethod
    def _tensors(self) -> dict[str, Tensor]:
        """Tensors that training changes, by name."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint needs besides the pretrained model, without copies."""
        return {name: tensor.detach() for name, tensor in self._tensors().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the result of `state_dict`."""
        own = self.state_dict()
        for name in [*own, *state]:
            expected, got = (str(list(part[name].shape)) if name in part else "nothing" for part in (own, state))
            if expected != got:
                raise InputError(
                    f"{self.name}: the state has {got} for {name}, and this model and task need {expected}. Load a "
                    "state of the same method, with the same settings and classes."
                )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])


class FrozenModel(Method):
    """Method that freezes the weights of the model, in evaluation mode. The image tower runs once per image."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, task: Task, *, generator: torch.Generator | None = None):
        check_open_clip(self.name, model)
        super().__init__(model, tokenizer, task, generator=generator)
        model.eval()

    @torch.no_grad()
    def encode_frozen(self, images: Tensor) -> Tensor:
        """Embeddings [B, D] of images [B, 3, H, W] by the pretrained model; embeddings are returned as they are."""
        if images.ndim == 2:
            return images
        with evaluating([self.model]):
            return self.model.encode_image(images, normalize=False)

    def _empty_embedding(self) -> Tensor:
        """Uninitialised tensor [D], on the device of the embeddings, in the dtype of the logits."""
        with torch.no_grad():
            first = self.model.encode_text(self._test_tokens(self._train_test)[0][:1], normalize=False)
        return torch.empty_like(first[0], dtype=at_least_fp32(first.dtype))

    def embed(self, inputs: Tensor) -> Tensor:  # noqa: D102
        return self.encode_frozen(inputs)

    def train(self, training: bool) -> None:
        """Do nothing: the model stays in evaluation mode."""


class TunedModel(Method):
    """Method that trains weights of the model itself, so that its state is a whole model.

    A SkipCLIP with `settings` trains on the first template. With several templates, another one for each test averages
    over them.
    """

    can_blend = True

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        task: Task,
        *,
        generator: torch.Generator | None = None,
        text_cache: str | Path | None = None,
        class_weight: Tensor | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
        **settings: Any,
    ):
        super().__init__(model, tokenizer, task, generator=generator)
        make = SkipCLIP if process_group is None else partial(ShardedSkipCLIP, process_group=process_group)

        def skip_clip(
            test: str, tokens: Tensor, own: torch.Generator | None = None, weight: Tensor | None = None
        ) -> SkipCLIP:
            name = f"texts-{quote(test, safe=' ')}" + ("+templates" if tokens.ndim == 3 else "")  # quote escapes +
            folder = None if text_cache is None else Path(text_cache, name)
            try:
                return make(model, tokens, generator=own, text_cache=folder, class_weight=weight, **settings)
            except (ValueError, RuntimeError) as error:
                raise InputError(str(error)) from error

        # SkipCLIP over the trained classes; `clip.sampler` has the state of its random numbers
        self.clip = skip_clip(self._train_test, self._tokens[self._train_test][0], self._generator, class_weight)
        self._clips = {self._train_test: self.clip}
        for test, templates in self._tokens.items():
            if len(templates) > 1:
                self._clips[test] = skip_clip(test, torch.stack(templates, dim=1))
            elif test != self._train_test:
                self._clips[test] = skip_clip(test, templates[0])

    def train(self, training: bool) -> None:
        """Set the mode of the model, and check the weights below the cut; see `SkipCLIP.check_model`."""
        super().train(training)
        self.clip.check_model()

    def embed(self, inputs: Tensor) -> Tensor:  # noqa: D102
        return self.clip.encode_image(inputs)

    def class_embeddings(self, test: str, templates: int | None = None) -> Tensor:  # noqa: D102
        self._test_tokens(test)
        return self._clips[test].class_embeddings()

    def parameter_groups(self, *, text_lr: float, image_lr: float) -> list[dict[str, Any]]:  # noqa: D102
        return self.clip.parameter_groups(text_lr=text_lr, image_lr=image_lr)

    def _tensors(self) -> dict[str, Tensor]:
        return self.model.state_dict()
