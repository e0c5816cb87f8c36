"""Zero-shot classification by the pretrained model."""

from __future__ import annotations

from .frozen import FrozenModel


class ZeroShot(FrozenModel):
    """Zero-shot classification (Radford et al. 2021). Nothing is trained, and nothing in the model is changed.

        z_bc = exp(logit_scale) · ⟨x̂_b, t̂_c⟩,   t̂_c the unit-norm mean of the class's prompts

    Source: Radford et al., CLIP, ICML 2021, arXiv 2103.00020.
    """

    name = "zero-shot"
