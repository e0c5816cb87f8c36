"""A way to adapt a CLIP: what every method offers, and what several of them share.

Shapes: B images in a batch, n images, C classes of a test, D width of the joint embedding, L tokens of a prompt.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args
from urllib.parse import quote

import torch
import torch.nn.functional as F
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from ...boundary import DEFAULT_CHUNK
from ...clip import SkipCLIP
from ...data import InputError, Protocol, Task
from ...towers import evaluating
from ..registry import MODELS

Tokenizer = Callable[[list[str]], Tensor]
"""Texts to tokens [n, L], as `open_clip.get_tokenizer` gives it."""


@dataclass(frozen=True)
class Recipe:
    """What a method trains with; None where that is nothing to it.

    Attributes:
        epochs: Passes over the training images; 0 for a method without steps.
        batch_size: Images in a step.
        optimizer: "sgd", "adamw", or "lbfgs" for a method that fits by itself.
        text_lr: Learning rate of what it trains on the side of the texts.
        image_lr: The same, on the side of the images.
        momentum: Of SGD.
        weight_decay: Of the optimizer.
        warmup_epochs: Epochs at the warm-up rate before the cosine.
        warmup_lr: Learning rate of these.
        sampler: Images of one class in a batch, or any.
    """

    epochs: int
    batch_size: int | None = None
    optimizer: str | None = None
    text_lr: float | None = None
    image_lr: float | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    warmup_epochs: int | None = None
    warmup_lr: float | None = None
    sampler: Literal["class_pure", "random"] | None = None


class StepOutput(NamedTuple):
    """What a step gives: the mean loss [] of its images, and how many classes they were compared with."""

    loss: Tensor
    classes: int


def wide(dtype: torch.dtype) -> torch.dtype:
    """Fp32, or what is wider: of what is compared, and of weights that a method adds to a model."""
    return torch.promote_types(dtype, torch.float32)


def unit_norm(embeddings: Tensor) -> Tensor:
    """Embeddings [n, D] of unit norm, in fp32 at least.

    >>> unit_norm(torch.tensor([[3.0, 4.0]], dtype=torch.bfloat16))
    tensor([[0.6000, 0.8000]])
    """
    return F.normalize(embeddings.to(wide(embeddings.dtype)), dim=-1)


def mean_embedding(templates: Sequence[Tensor]) -> Tensor:
    """Unit-norm mean [C, D] of the unit-norm embeddings [C, D] of each template; of a single one, itself.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, arXiv
    2103.00020, section 3.1.4 (prompt ensembling in the space of embeddings).

    >>> mean_embedding([torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])])
    tensor([[0.7071, 0.7071]])
    """
    return templates[0] if len(templates) == 1 else unit_norm(torch.stack(list(templates)).mean(dim=0))


def cosine_logits(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Logits [B, C] of images over classes, the way `SkipCLIP.predict` computes them.

        z_bc = exp(logit_scale) · ⟨x_b/|x_b|, t_c⟩

    Args:
        image: [B, D], image embeddings of any length.
        text: [C, D], class embeddings of unit norm; the logits are of their dtype.
        logit_scale: [] or [1], the logarithm of the temperature's inverse. It gets no gradient.

    Example:
        >>> cosine_logits(torch.tensor([[2.0, 0.0]]), torch.eye(2), torch.tensor(100.0).log())
        tensor([[100.0000,   0.0000]])
    """
    with torch.autocast(image.device.type, enabled=False):  # bf16 logits at a scale of 100 are half a unit apart
        image = F.normalize(image.to(text.dtype), dim=-1)
        return logit_scale.detach().exp().to(text.dtype) * image @ text.T


def compare(image: Tensor, text: Tensor, labels: Tensor, logit_scale: Tensor) -> StepOutput:
    """The step of a method that compares images [B, D] with all classes: mean cross-entropy of `cosine_logits`."""
    return StepOutput(F.cross_entropy(cosine_logits(image, text, logit_scale), labels), len(text))


def check_open_clip(method: str, model: nn.Module) -> None:
    """Refuse what is no model of open_clip with an InputError."""
    if not isinstance(model, (CLIP, CustomTextCLIP, CoCa)):
        raise InputError(
            f"{method}: model must be an open_clip CLIP, CustomTextCLIP or CoCa; got {type(model).__name__}. Make it "
            "with open_clip.create_model."
        )


def text_transformer(method: str, model: nn.Module) -> Any:
    """Who has the modules of the text tower, `CLIP` itself or a `TextTransformer`; other towers are an InputError."""
    if isinstance(model, CLIP):
        return model
    text = getattr(model, "text", None)
    if isinstance(model, CustomTextCLIP) and isinstance(text, TextTransformer):
        return text
    got = type(model).__name__ if text is None else f"{type(model).__name__} with a {type(text).__name__}"
    raise InputError(
        f"{method}: model must be an open_clip CLIP, or a CustomTextCLIP with a TextTransformer; got {got}. Use "
        "another model, or another method."
    )


class Method(ABC):
    """A way to adapt a CLIP to the classes of a task's first test; the model is changed in place.

    Args:
        model: An open_clip model.
        tokenizer: Its tokenizer.
        task: Whose first test has the classes that are tuned on; the first of its templates is that of training.
        generator: Source of all that is drawn but for dropout, which takes PyTorch's own; seeded with 0 if not given.

    Attributes:
        name: Its key in `METHODS`.
        cut: SkipCLIP whose lower image tower is frozen, for a cache on the disk; None: nothing is kept there.
        notes: What a user should be told of how it was set up.

    Raises:
        InputError: If it can't adapt this model, or not to this task.

    Example:
        >>> import logging; logging.disable()  # open_clip warns of random weights
        >>> import open_clip
        >>> from skipkernels.data import load_task
        >>> from skipkernels.experiments import glyph_tiny
        >>> from skipkernels.tuner.methods import METHODS
        >>> glyph_tiny.register()
        >>> model, tokenizer = open_clip.create_model("glyph-tiny"), open_clip.get_tokenizer("glyph-tiny")
        >>> task = load_task("glyphs:greek", protocol="base-to-new", shots=1, classes=6, seed=0)
        >>> method, images = METHODS["lora"](model, tokenizer, task), torch.rand(2, 3, 32, 32)
        >>> loss, classes = method.step(method.encode_frozen(images), torch.tensor([0, 2]))
        >>> classes, method.logits("new", method.encode_frozen(images)).shape
        (3, torch.Size([2, 3]))
    """

    name: ClassVar[str]
    cut: SkipCLIP | None = None

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, task: Task, *, generator: torch.Generator | None = None):
        self.model: Any = model
        self.task = task
        self.notes: list[str] = []
        self._generator = torch.Generator().manual_seed(0) if generator is None else generator
        self._tuned = task.tests[0].name
        device = next(model.parameters()).device
        self._tokens = {test.name: [tokenizer(texts).to(device) for texts in test.prompts] for test in task.tests}
        self._kept: dict[tuple[str, int | None], tuple[Any, Tensor]] = {}  # class embeddings, and of which weights

    # ---- how it trains -----------------------------------------------------------------------------------------

    @classmethod
    def recipe(
        cls, model_name: str, protocol: Protocol, shots: int, classes: int = 100, *, data: str = "glyphs"
    ) -> Recipe:
        """Return the default recipe: the published one, with the changes of a model in `MODELS`.

        Args:
            model_name: Name of the open_clip model.
            protocol: "base-to-new", "cross-dataset", "domain-generalization" or "few-shot".
            shots: Training images per class.
            classes: Number of classes that are tuned on. Used where the paper gives steps, not epochs.
            data: Dataset. Used for a model in `MODELS`.

        Raises:
            InputError: If there is no such protocol.
        """
        if protocol not in get_args(Protocol):
            raise InputError(f"--protocol: no protocol {protocol!r}; choose {', '.join(get_args(Protocol))}.")
        changes = MODELS[model_name].recipe(cls.name, data) if model_name in MODELS else {}
        return replace(cls._published(protocol, shots, classes), **changes)

    @classmethod
    @abstractmethod
    def _published(cls, protocol: Protocol, shots: int, classes: int) -> Recipe:
        """What its paper trains with."""

    def encode_frozen(self, images: Tensor) -> Tensor:
        """What never changes of images [B, 3, H, W], as `step` and `logits` take it: here the images themselves."""
        return images

    def step(self, inputs: Tensor, labels: Tensor) -> StepOutput:
        """The loss of a batch, to be differentiated.

        Args:
            inputs: As `encode_frozen` gives them, of B images.
            labels: int64 [B], classes of the first test.
        """
        raise TypeError(f"{self.name}: it has no steps; call fit.")

    def fit(self, inputs: Tensor, labels: Tensor) -> None:
        """Train on all images at once: for methods whose recipe has no epochs, in place of steps.

        Args:
            inputs: As `encode_frozen` gives them, of all n training images.
            labels: int64 [n].
        """
        raise TypeError(f"{self.name}: it trains by steps; call step.")

    @abstractmethod
    def parameter_groups(self, *, text_lr: float, image_lr: float) -> list[dict[str, Any]]:
        """Groups for a `torch.optim` optimizer, each with a learning rate and the "name" of its side, text or image."""

    def train(self, training: bool) -> None:
        """Training mode, or evaluation mode, of what trains."""
        self.model.train(training)

    # ---- what it answers ---------------------------------------------------------------------------------------

    def embed(self, inputs: Tensor) -> Tensor:
        """Image embeddings [B, D] of any length, from `inputs` as `encode_frozen` gives them."""
        return self.model.encode_image(inputs, normalize=False)

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """Text embeddings [n, D] of any length, from tokens [n, L]."""
        return self.model.encode_text(tokens, normalize=False)

    def class_embeddings(self, test: str, *, templates: int | None = None) -> Tensor:
        """Unit-norm embeddings [C, D] of the classes of a test, without gradient, with the weights as they are.

        They are those of evaluation mode, and are kept as long as what trains on the side of the texts is the same.

        Args:
            test: Name of the test.
            templates: Take the mean of the first so many; of all by default.
        """
        tokens, seen = self._of(test), self._seen()
        kept = self._kept.get((test, templates))
        if kept is None or kept[0] != seen:
            with torch.no_grad(), evaluating([self.model]):
                embeddings = [
                    torch.cat([unit_norm(self.encode_texts(chunk)) for chunk in of_template.split(DEFAULT_CHUNK)])
                    for of_template in tokens[:templates]
                ]
            kept = self._kept[test, templates] = seen, mean_embedding(embeddings)
        return kept[1]

    def _of(self, test: str) -> list[Tensor]:
        """Tokens [C, L] of a test, for each template."""
        if test not in self._tokens:
            raise InputError(f"{self.name}: test must be one of the task's, {', '.join(self._tokens)}; got {test!r}.")
        return self._tokens[test]

    def _seen(self) -> Any:
        """Changes when a class embedding may: the version counter misses a change through .data, the hash few."""
        groups = self.parameter_groups(text_lr=0.0, image_lr=0.0)
        weights = [p for group in groups if group["name"] == "text" for p in group["params"]]
        device = self.model.logit_scale.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return autocast, [(p.data_ptr(), p._version, torch.hash_tensor(p.detach()).item()) for p in weights]

    @torch.no_grad()
    def logits(self, test: str, inputs: Tensor) -> Tensor | None:
        """Logits [B, C] over the classes of a test, those of evaluation mode.

        Args:
            test: Name of the test.
            inputs: As `encode_frozen` gives them, of B images.

        Returns:
            None if it can't tell these classes apart.

        Raises:
            InputError: If the task has no such test.
        """
        text = self.class_embeddings(test)
        with evaluating([self.model]):
            image = self.embed(inputs)
        return cosine_logits(image, text, self.model.logit_scale)

    # ---- checkpoints -------------------------------------------------------------------------------------------

    @abstractmethod
    def _tensors(self) -> dict[str, Tensor]:
        """What training changes, by name."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: with the model's first weights, all of it. As of a module, these are no copies."""
        return {name: tensor.detach() for name, tensor in self._tensors().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state_dict` gave.

        Raises:
            InputError: If it is of something else; nothing has changed then.
        """
        own = self.state_dict()
        for name in [*own, *state]:
            expected, got = (str(list(part[name].shape)) if name in part else "nothing" for part in (own, state))
            if expected != got:
                raise InputError(
                    f"{self.name}: the state has {got} for {name}, and this model and task take {expected}. Load what "
                    "the same method saved, with the same settings and classes."
                )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])


class FrozenModel(Method):
    """A method that leaves the model's own weights as they are, in evaluation mode.

    Args:
        keep_embeddings: What is kept of an image is its embedding [D], so that the image tower runs once for each and
            not in every step: the same results, as long as images are not augmented.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        task: Task,
        *,
        keep_embeddings: bool,
        generator: torch.Generator | None = None,
    ):
        check_open_clip(self.name, model)
        super().__init__(model, tokenizer, task, generator=generator)
        self._keep_embeddings = keep_embeddings
        model.eval()

    def encode_frozen(self, images: Tensor) -> Tensor:
        """Embeddings [B, D] of images [B, 3, H, W] if they are kept, else the images."""
        return self.frozen_embedding(images) if self._keep_embeddings else images

    def frozen_embedding(self, inputs: Tensor) -> Tensor:
        """The model's own embeddings [B, D] of images, or those that `encode_frozen` gave, without gradient."""
        if inputs.ndim == 2:
            return inputs
        with torch.no_grad(), evaluating([self.model]):
            return self.model.encode_image(inputs, normalize=False)

    def _like_an_embedding(self) -> Tensor:
        """[D] where embeddings are, in the dtype of what is compared."""
        with torch.no_grad():
            first = self.model.encode_text(self._of(self._tuned)[0][:1], normalize=False)
        return torch.empty_like(first[0], dtype=wide(first.dtype))

    def embed(self, inputs: Tensor) -> Tensor:  # noqa: D102
        return self.frozen_embedding(inputs)

    def train(self, training: bool) -> None:
        """Nothing changes: the model stays in evaluation mode."""


class TunedModel(Method):
    """A method that changes the model's own weights, so that the checkpoint is a whole model.

    The classes of every test, in every template, are embedded by a SkipCLIP on the model.

    Args:
        text_cache: Folder to keep the texts' features at the cut in.
        settings: Of SkipCLIP.

    Attributes:
        clip: SkipCLIP over the classes that are tuned on; its `sampler` has the state of its draws, for a checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        task: Task,
        *,
        generator: torch.Generator | None = None,
        text_cache: str | Path | None = None,
        **settings: Any,
    ):
        super().__init__(model, tokenizer, task, generator=generator)

        def over(test: str, template: int, tokens: Tensor) -> SkipCLIP:
            name = f"texts-{quote(test, safe=' ')}" + (f"+{template}" if template else "")  # quote leaves no +
            draws = self._generator if (test, template) == (self._tuned, 0) else None
            folder = None if text_cache is None else Path(text_cache, name)
            try:
                return SkipCLIP(model, tokens, generator=draws, text_cache=folder, **settings)
            except (ValueError, RuntimeError) as error:
                raise InputError(str(error)) from error

        self._clips = {
            test: [over(test, number, tokens) for number, tokens in enumerate(templates)]
            for test, templates in self._tokens.items()
        }
        self.clip = self._clips[self._tuned][0]

    def train(self, training: bool) -> None:
        """Set the mode of the model, and compare the weights below the cut with those that gave the features."""
        super().train(training)
        self.clip.check_weights()

    def embed(self, inputs: Tensor) -> Tensor:  # noqa: D102
        return self.clip.encode_image(inputs)

    def class_embeddings(self, test: str, *, templates: int | None = None) -> Tensor:  # noqa: D102
        self._of(test)
        return mean_embedding([clip.class_embeddings() for clip in self._clips[test][:templates]])

    def parameter_groups(self, *, text_lr: float, image_lr: float) -> list[dict[str, Any]]:  # noqa: D102
        return self.clip.parameter_groups(text_lr=text_lr, image_lr=image_lr)

    def _tensors(self) -> dict[str, Tensor]:
        return self.model.state_dict()
