"""Inference with SkipCLIP: class embeddings, logits, and the parts of the towers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .base import SkipCLIPBase
from .image import check_images, sharing_weights
from .text import check_range, check_tokens, check_vocabulary


class Inference(SkipCLIPBase):
    """Base of `SkipCLIP`: its inference."""

    def class_embeddings(self, tokens: Tensor | None = None) -> Tensor:
        """Unit-norm text embeddings [C, D] of all classes with the current weights, without gradient or dropout.

        Computed again only after a change of the weights, of any kind; with `process_group` that call is collective.

        Args:
            tokens: Prompts [C', L] or [C', T, L], as in the constructor, of other classes: their embeddings [C', D] are
                returned, computed in each call, with `process_group` by each process alone. The task stays.

        Example:
            >>> import skipkernels as sk
            >>> from skipkernels.app.demo import pictogram_tiny
            >>> model, _, tokenizer = pictogram_tiny.load()
            >>> clip = sk.SkipCLIP(model, tokenizer([f"the digit {n}." for n in range(10)]), skip_layers=0.5)
            >>> letters = clip.class_embeddings(tokenizer([f"the letter {n}." for n in "abc"]))
            >>> clip.predict(torch.rand(4, 3, 32, 32), class_embeddings=letters).shape
            torch.Size([4, 3])
        """
        self._check_unaltered()
        if tokens is None:
            return self._class_embeddings().clone()  # the original is cached
        check_tokens(tokens)
        check_vocabulary(tokens, self._text.vocabulary)
        return self._text_encoder.embeddings_of(tokens)

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
    def predict(self, x: Tensor, *, tokens: Tensor | None = None, class_embeddings: Tensor | None = None) -> Tensor:
        """Logits [B, C] over all classes, or over other classes, always in evaluation mode.

        With `process_group` a call over all classes is collective, and B is the number of images of this process, which
        may be 0.

        Args:
            x: Images [B, 3, height, width], or features at the cut [B, N, W].
            tokens: Prompts of other classes; the same as `class_embeddings=clip.class_embeddings(tokens)`.
            class_embeddings: Embeddings [C', D] of other classes, from the method of this name, for several batches;
                unit norm, any floating dtype. Logits are computed in the dtype of `prototypes`.
        """
        if tokens is not None:
            if class_embeddings is not None:
                raise TypeError("SkipCLIP.predict: pass tokens or class_embeddings; got both.")
            class_embeddings = self.class_embeddings(tokens)
        if class_embeddings is not None:
            remedy = "Compute them with clip.class_embeddings(tokens), or pass tokens."
            width = self.prototypes.shape[1]
            check_embeddings(
                "SkipCLIP.predict: class_embeddings", class_embeddings, "floating-point [C'", width, remedy
            )
            _check_unit_norm(class_embeddings, remedy)
            class_embeddings = class_embeddings.to(self.prototypes.dtype)
        elif self._parallel is not None:
            from .sharded import sharded_predict

            return sharded_predict(self, self._parallel, x)
        image, class_embeddings = self._scaled_embeddings(x, class_embeddings)
        with torch.autocast(image.device.type, enabled=False):  # bf16 logits at a scale of 100 are half a unit apart
            return image @ class_embeddings.T

    @torch.no_grad()
    def top_k(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest logits of each image over all classes, and these classes, always in evaluation mode.

        The same as `predict(x).topk(k)`, in chunks of classes: with very many classes [B, C] is never in memory. Of
        equal logits that of the lower class comes first. With `process_group` as for `predict`.

        Args:
            x: Images [B, 3, height, width], or features at the cut [B, N, W].
            k: Number of classes, from 1 to C.

        Returns:
            Logits [B, k], descending, and class ids int64 [B, k].

        Example:
            >>> import skipkernels as sk
            >>> from skipkernels.app.demo import pictogram_tiny
            >>> model, _, tokenizer = pictogram_tiny.load()
            >>> clip = sk.SkipCLIP(model, tokenizer([f"the digit {n}." for n in range(10)]), skip_layers=0.5)
            >>> images = torch.rand(4, 3, 32, 32)
            >>> logits, class_ids = clip.top_k(images, 3)
            >>> class_ids.shape, class_ids[:, 0].equal(clip.predict(images).argmax(dim=1))
            (torch.Size([4, 3]), True)
        """
        if self._parallel is not None:
            from .sharded import sharded_top_k

            return sharded_top_k(self, self._parallel, x, k)
        from ..retrieval import top_k_logits

        image, classes = self._scaled_embeddings(x)
        with torch.autocast(image.device.type, enabled=False):
            return top_k_logits(image, classes, k)

    # ---- towers -------------------------------------------------------------------------------------------------

    def encode_lower(self, images: Tensor) -> Tensor:
        """Images [B, 3, height, width] to features at the cut [B, N, W], constants that may be cached.

        Below the cut all modules run in evaluation mode, without dropout. Features do not record their cut: those of
        another `skip_layers` are often accepted, with wrong results. `FeatureCache.build` compares cut and weights.
        """
        check_images(images)
        self._check_unaltered()
        self._image_encoder.watch_weights()
        return self._image_encoder.lower(images)

    def encode_upper(self, features: Tensor) -> Tensor:
        """Features at the cut [B, N, W] to image embeddings [B, D], not normalised."""
        shape, _ = self._image_encoder.features
        if not isinstance(features, Tensor) or features.shape[1:] != shape:
            found = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"SkipCLIP.encode_upper: features must be features at the cut, [B, {', '.join(map(str, shape))}]; got "
                f"{found}. For images use encode_image."
            )
        self._check_unaltered()
        return self._image_encoder.upper(features)

    def encode_image(self, x: Tensor) -> Tensor:
        """Images [B, 3, height, width], or features at the cut [B, N, W], to image embeddings [B, D], any norm."""
        check_images(x)
        self._image_encoder.are_images(x)
        self._check_unaltered()
        return self._image_encoder.encode(x)

    def encode_classes(self, class_ids: Tensor) -> Tensor:
        """Class ids [K], int64 in [0, C), to text embeddings [K, D], not normalised. Ids may repeat."""
        self._refuse_parallel("encode_classes", "Read them from class_embeddings().")
        valid = isinstance(class_ids, Tensor) and class_ids.dtype in (torch.int64, torch.int32) and class_ids.ndim == 1
        if not valid or len(class_ids) == 0:
            found = f"{class_ids.dtype} {list(class_ids.shape)}" if isinstance(class_ids, Tensor) else repr(class_ids)
            raise ValueError(f"SkipCLIP: class_ids must be int64 [K], at least one; got {found:.80}.")
        if class_ids.device.type == "cpu":
            remedy = "Encode other texts with the model itself."
            check_range("SkipCLIP", "class_ids", class_ids, len(self.prototypes), remedy)
        self._check_unaltered()
        return self._encode_classes(class_ids, self._image.dtype, exact=True)

    def lower_copy(self) -> Callable[[Tensor], Tensor]:
        """Return `encode_lower` for another thread: copied modules in evaluation mode that share the weights."""
        return self._image_encoder.lower_copy()

    def lower_identity(self, tower: Literal["image", "text"]) -> dict[str, str | int]:
        """Return everything that determines the features of a tower at the cut, by name, such as digests of weights."""
        if tower == "image":
            self._image_encoder.accept_weights()
        return (self._image if tower == "image" else self._text).lower_identity()


def check_embeddings(argument: str, embeddings: Any, expected: str, width: int, remedy: str) -> None:
    """Raise unless an argument has embeddings [n, D=width]; `expected` begins their description."""
    is_tensor = isinstance(embeddings, Tensor)
    if not is_tensor or not embeddings.is_floating_point() or embeddings.shape[1:] != (width,):
        found = f"{embeddings.dtype} {list(embeddings.shape)}" if is_tensor else type(embeddings).__name__
        raise ValueError(f"{argument} must be {expected}, D={width}]; got {found}. {remedy}")


def _check_unit_norm(class_embeddings: Tensor, remedy: str) -> None:
    norms = class_embeddings.detach().float().norm(dim=1)
    # bf16 rounds each element by up to 2^-9. Checked on the CPU only: on a GPU it would be a host sync.
    if class_embeddings.device.type == "cpu" and not ((norms - 1).abs() < 0.01).all():
        low, high = norms.aminmax()
        raise ValueError(
            f"SkipCLIP.predict: class_embeddings must have unit norm; got norms from {low:.3g} to {high:.3g}. {remedy}"
        )


class ImageClassifier(nn.Module):
    """A tuned model as a plain module, for `torch.export` and ONNX: images [B, 3, height, width] to logits [B, C].

    logits = scale · cos(image, class), over fixed class embeddings.

    Args:
        encoder: Module that returns embeddings [B, D] of images, or a tuple with the embeddings first.
        class_embeddings: [C, D], unit norm.
        scale: [], the exponential of `logit_scale`.
    """

    class_embeddings: Tensor
    scale: Tensor

    def __init__(self, encoder: nn.Module, class_embeddings: Tensor, scale: Tensor):
        super().__init__()
        self.encoder = encoder
        self.register_buffer("class_embeddings", class_embeddings.detach().clone())
        self.register_buffer("scale", scale.detach().clone().to(class_embeddings.dtype))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, C]."""
        image = self.encoder(images)
        image = image[0] if isinstance(image, tuple) else image
        image = nn.functional.normalize(image.to(self.class_embeddings.dtype), dim=-1)
        return self.scale * image @ self.class_embeddings.T
