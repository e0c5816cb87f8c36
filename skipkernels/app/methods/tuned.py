"""Methods that train a model by SkipCLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...clip import SkipCLIP, SkipOutput
from ...memory import out_of_memory
from ..data import InputError, Task
from .base import Method, StepOutput, Tokenizer


class ClipMethod(Method):
    """Method that trains the weights of `clip`, a SkipCLIP over the trained classes."""

    clip: SkipCLIP

    def step(self, inputs: Tensor, labels: Tensor) -> StepOutput:
        """Compute the loss of a batch over its kept classes."""
        return step_output(self.clip(inputs, labels))

    def embed(self, inputs: Tensor) -> Tensor:  # noqa: D102
        return self.clip.encode_image(inputs)

    def parameter_groups(self, *, text_lr: float, image_lr: float) -> list[dict[str, Any]]:  # noqa: D102
        return self.clip.parameter_groups(text_lr=text_lr, image_lr=image_lr)


def step_output(out: SkipOutput) -> StepOutput:
    """Return the loss of a step of SkipCLIP, and the number of its kept classes."""
    return StepOutput(out.loss, len(out.class_ids))


class TunedModel(ClipMethod):
    """Method that trains weights of the model itself, so that its state is a whole model.

    A SkipCLIP with `settings` trains on the first template. With several templates, another one for each test averages
    over them.
    """

    trains_model = True

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        task: Task,
        *,
        generator: torch.Generator | None = None,
        cache: str | Path | None = None,
        class_weight: Tensor | None = None,
        **settings: Any,
    ):
        super().__init__(model, tokenizer, task, generator=generator)
        self._cache = cache
        trained, first = self._train_test, self._tokens[self._train_test][:1]
        self.clip = self._skip_clip(trained, first, generator=self._generator, class_weight=class_weight, **settings)
        self.class_sampler = self.clip.sampler
        self._clips: dict[str, SkipCLIP] = {}  # with all templates, by test
        for test, templates in self._tokens.items():
            is_trained = test == trained and len(templates) == 1
            self._clips[test] = self.clip if is_trained else self._skip_clip(test, templates, **settings)

    def _skip_clip(self, test: str, templates: list[Tensor], **settings: Any) -> SkipCLIP:
        """Make a SkipCLIP over the classes of a test, with their prompts [C, L] by template."""
        several = len(templates) > 1
        folder = None if self._cache is None else Path(self._cache, f"texts-{test}{'+templates' if several else ''}")
        tokens = torch.stack(templates, dim=1) if several else templates[0]
        try:
            return SkipCLIP(self.model, tokens, text_cache=folder, **settings)
        except (ValueError, RuntimeError) as error:  # RuntimeError: of the comparison of SkipCLIP with the model
            if isinstance(error, RuntimeError) and out_of_memory(error):
                raise
            raise InputError(str(error)) from error

    def train(self, training: bool) -> None:
        """Set the mode of the model, and check the weights below the cut; see `SkipCLIP.check_model`."""
        super().train(training)
        self.clip.check_model()

    def class_embeddings(self, test: str) -> Tensor:  # noqa: D102
        return self._clips[test].class_embeddings()

    def _tensors(self) -> dict[str, Tensor]:
        return self.model.state_dict()
