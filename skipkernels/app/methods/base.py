"""`Method`, the base class of all methods that adapt a CLIP.

Shapes: B images in a batch, n images, C classes of a test, D width of the joint embedding, L tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor, nn

from ...boundary import DEFAULT_CHUNK
from ...clip import SkipCLIP
from ...reference import unit_norm
from ...selection import RankSampler
from ..data import InputError, Task
from ..heads import AffineHead, Head, cosine_logits
from .recipe import Recipe, TrainingData
from .registry import PACKAGED, packaged

Tokenizer = Callable[[list[str]], Tensor]
"""Function from texts to tokens [n, L], such as a tokenizer of `open_clip.get_tokenizer`."""
_ANY = TrainingData()


class StepOutput(NamedTuple):
    """Mean loss [] of a step, and the number of classes in its softmax."""

    loss: Tensor
    classes: int


class Method:
    """Method that adapts a CLIP, in place, to the classes of a task's first test.

    Training uses the first template. All random numbers except those of dropout, which are PyTorch's, are drawn from
    `generator`, by default with seed 0. A model or task that the method does not support is an InputError.

    A subclass defines its recipe, what it trains, a `step` or a `fit`, and what it changes in the embeddings: the first
    two sections. The others are what runs and exports call. Logits and class embeddings are those of evaluation mode
    after `train(False)`, which new methods are in.

    Attributes:
        name: Name of the method in `METHODS`.
        settings: Settings of a run that its constructor takes.
        takes_head: A head can classify its embeddings; False for a method that is a head itself, or adapts them.
        trains_model: It trains weights of the model itself, so that its state is a whole model, which can be blended
            with the model before.
        class_sampler: Sampler of the classes of a step, of which the state is part of a checkpoint; None: all classes.
        caches: SkipCLIP of which the features at the cut can be cached on disk; None: they cannot.
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
    settings: ClassVar[tuple[str, ...]] = ()
    takes_head: ClassVar[bool] = True
    trains_model: ClassVar[bool] = False
    class_sampler: RankSampler | None = None
    caches: SkipCLIP | None = None
    fitted: Head | None = None

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, task: Task, *, generator: torch.Generator | None = None):
        self.model: Any = model
        self.task = task
        self.notes: list[str] = []
        self._generator = torch.Generator().manual_seed(0) if generator is None else generator
        self._train_test = task.tests[0].name
        device = next(model.parameters()).device
        self._tokens = {test.name: [tokenizer(texts).to(device) for texts in test.prompts] for test in task.tests}
        self._embeddings: dict[str, Tensor] = {}  # of classes, by test
        self._head_classes: list[str] = []  # of `fitted`

    # ---- what a method defines: training -----------------------------------------------------------------------------

    @classmethod
    def _published(cls, data: TrainingData) -> Recipe:
        """Return the recipe of the paper. By default there are no steps."""
        return Recipe(epochs=0)

    def parameter_groups(self, *, text_lr: float, image_lr: float) -> list[dict[str, Any]]:
        """Return groups for a `torch.optim` optimizer, each with a learning rate and a "name", "text" or "image"."""
        return []

    def _tensors(self) -> dict[str, Tensor]:
        """Tensors that training changes, by name."""
        return {}

    def encode_frozen(self, images: Tensor) -> Tensor:
        """Run the frozen part on images [B, 3, H, W], for `step` and `logits`. By default there is no frozen part."""
        return images

    def step(self, inputs: Tensor, labels: Tensor) -> StepOutput:
        """Compute the differentiable loss of `encode_frozen` of B images, with their classes in the first test, [B].

        By default it is the mean cross-entropy over all classes.
        """
        return self._cross_entropy_step(self.embed(inputs), self._encoded_texts(), labels)

    def graphed(
        self, optimizer: torch.optim.Optimizer, batch_size: int
    ) -> Callable[[Tensor, Tensor], StepOutput] | None:
        """Return a whole training step, update included, captured in a CUDA graph; None if there is none.

        Raises:
            ValueError: If the step cannot be captured; names the reason.
        """
        return None

    def fit(self, inputs: Tensor, labels: Tensor) -> None:
        """Fit a head, in a method without steps, to `encode_frozen` of all training images, and their classes [n]."""

    def merge(self) -> None:
        """Make the model a plain CLIP, with all that the method trained in it. By default it is one."""

    # ---- what a method defines: embeddings ---------------------------------------------------------------------------

    def embed(self, inputs: Tensor) -> Tensor:
        """Image embeddings [B, D] of any norm, from `inputs` of `encode_frozen`."""
        return self.model.encode_image(inputs, normalize=False)

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """Text embeddings [n, D] of any norm, from tokens [n, L]."""
        return self.model.encode_text(tokens, normalize=False)

    # ---- parts of a `step` -------------------------------------------------------------------------------------------

    def _encoded_texts(self) -> Tensor:
        """Unit-norm class embeddings [C, D] of the training classes, with gradient."""
        return unit_norm(self.encode_texts(self._tokens[self._train_test][0]))

    def _cross_entropy_step(self, image: Tensor, text: Tensor, labels: Tensor) -> StepOutput:
        """Mean cross-entropy over all classes, of image embeddings and unit-norm class embeddings."""
        return StepOutput(F.cross_entropy(cosine_logits(image, text, self.model.logit_scale), labels), len(text))

    # ---- what runs call: training ------------------------------------------------------------------------------------

    @classmethod
    def recipe(cls, model_name: str, data: TrainingData = _ANY) -> Recipe:
        """Return the default recipe: the published one, with the changes of the packaged model."""
        changes = packaged().RECIPES.get(cls.name, {}) if model_name == PACKAGED else {}
        return replace(cls._published(data), **changes)

    def train(self, training: bool) -> None:
        """Set training or evaluation mode of the trained modules, and forget the embeddings of classes."""
        self.model.train(training)
        self._embeddings.clear()

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
        self._embeddings.clear()

    # ---- what runs call: classification ------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, test: str, inputs: Tensor) -> Tensor | None:
        """Logits [B, C] over the classes of a test; None if the method can't classify them.

        `inputs` is `encode_frozen` of B images.
        """
        return self.logits_of(test, self.embed(inputs))

    @torch.no_grad()
    def logits_of(self, test: str, image: Tensor) -> Tensor | None:
        """Return `logits` of images by their embeddings [B, D] from `embed`."""
        if self.fitted is not None:
            head = self._fitted_of(test)
            return None if head is None else head.logits(image)
        return cosine_logits(image, self.class_embeddings(test), self.model.logit_scale)

    def class_embeddings(self, test: str) -> Tensor:
        """Unit-norm embeddings [C, D] of the classes of a test, without gradient.

        They are the normalized mean over the templates of the embeddings of each (Radford et al., CLIP, ICML 2021,
        arXiv 2103.00020, section 3.1.4), and kept until `train` or `load_state_dict` is called.
        """
        if test not in self._embeddings:
            embeddings = [self._embedded(prompts) for prompts in self._tokens[test]]
            mean = embeddings[0] if len(embeddings) == 1 else unit_norm(torch.stack(embeddings).mean(dim=0))
            self._embeddings[test] = mean
        return self._embeddings[test]

    @torch.no_grad()
    def _embedded(self, prompts: Tensor) -> Tensor:
        """Unit-norm embeddings [C, D] of prompts [C, L], in chunks and without gradient."""
        return torch.cat([unit_norm(self.encode_texts(chunk)) for chunk in prompts.split(DEFAULT_CHUNK)])

    def use_head(self, head: Head | None, classes: Sequence[str]) -> None:
        """Classify by a head of embeddings over `classes`, instead of their texts; None: by the texts again.

        Classes of a test that are not among `classes` are classified by their texts, if the head uses texts.
        """
        self.fitted, self._head_classes = head, list(classes)

    def _fitted_of(self, test: str) -> Head | None:
        """Return `fitted` for the classes of a test; None if it has no logits for some of them."""
        assert self.fitted is not None
        names = next(each.classes for each in self.task.tests if each.name == test)
        return self.fitted.of_classes(names, self._head_classes, lambda: self.class_embeddings(test))

    # ---- what exports call -------------------------------------------------------------------------------------------

    def head(self) -> nn.Module:
        """Return the module for exports: embeddings of the plain model → logits of the trained classes, embeddings."""
        return AffineHead(self._trained_head())

    @property
    def head_code(self) -> str:
        """Python that computes `logits` from `image`, the embeddings of `model`, and `head`, the state of `head()`.

        It is for the model card; empty if the model itself has all that classifies: by default, without `fitted`.
        """
        return "" if self.fitted is None else self._trained_head().code

    def _trained_head(self) -> Head:
        """Return `fitted`, or the head that classifies by the texts, for the trained classes."""
        if self.fitted is None:
            text = self.class_embeddings(self._train_test).float()
            return Head.of_text(text, self.model.logit_scale.detach().float().exp())
        head = self._fitted_of(self._train_test)
        assert head is not None
        return head


def check_open_clip(method: str, model: nn.Module) -> None:
    """Raise an InputError if the model is not one of open_clip."""
    if not isinstance(model, (CLIP, CustomTextCLIP, CoCa)):
        raise InputError(
            f"{method}: model must be an open_clip CLIP, CustomTextCLIP or CoCa; got {type(model).__name__}. Create it "
            "with open_clip.create_model."
        )
