"""Methods that train a model by SkipCLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...clip import SkipCLIP, SkipOutput
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
        **settings: Any,
    ):
        super().__init__(model, tokenizer, task, generator=generator)

        def skip_clip(
            test: str, tokens: Tensor, own: torch.Generator | None = None, weight: Tensor | None = None
        ) -> SkipCLIP:
            name = f"texts-{test}" + ("+templates" if tokens.ndim == 3 else "")
            folder = None if text_cache is None else Path(text_cache, name)
            try:
                return SkipCLIP(model, tokens, generator=own, text_cache=folder, class_weight=weight, **settings)
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

    def class_embeddings(self, test: str, templates: int | None = None) -> Tensor:  # noqa: D102
        self._test_tokens(test)
        return self._clips[test].class_embeddings()

    def _tensors(self) -> dict[str, Tensor]:
        return self.model.state_dict()
