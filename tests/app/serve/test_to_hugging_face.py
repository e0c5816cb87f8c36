"""Exports to transformers: the same logits, or a refusal."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import open_clip
import pytest
import torch
from PIL import Image

import skipkernels as sk
from skipkernels.app.data import InputError
from skipkernels.app.serve import to_hugging_face
from skipkernels.app.serve.exporting import Exported
from skipkernels.app.serve.loading import TunedRun
from tests.app.serve.conftest import ATOL, NATIVE, PREPROCESS, card_names, rotated

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def exported(native_run, tmp_path_factory) -> Exported:
    return sk.export(native_run, "hugging-face", tmp_path_factory.mktemp("exported") / "out")


@pytest.fixture(scope="module")
def tuned(native_run) -> sk.Classifier:
    return sk.Classifier.load(native_run, device="cpu")


@pytest.fixture
def picture(run) -> Image.Image:
    """A test image in the size of the model, so that nothing is interpolated."""
    return run.task.tests[0].images[0][0].resize((16, 16))


@torch.no_grad()
def test_logits(exported, tuned, images):
    images = images[..., :16, :16]
    assert not exported.notes
    model = transformers.CLIPModel.from_pretrained(exported.folder).eval()
    tokenizer = transformers.CLIPProcessor.from_pretrained(exported.folder).tokenizer
    classes = json.loads((exported.folder / "classes.json").read_text())["classes"]
    tokens = tokenizer([f"an icon of a {name}" for name in classes], padding=True, return_tensors="pt")
    found = model(**tokens, pixel_values=images).logits_per_image
    torch.testing.assert_close(found, tuned.logits(images), atol=ATOL, rtol=0)


def test_preprocessing(exported, tuned, picture):
    processor = transformers.CLIPProcessor.from_pretrained(exported.folder).image_processor
    pixels = processor(picture, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(pixels, tuned.transform(picture), atol=1e-5, rtol=0)


def test_card_gives_the_probabilities(exported, tuned, picture, tmp_path):
    photo = rotated(picture, tmp_path / "photo.png")
    found = tuned.predict([photo], top=9)
    probabilities = card_names(exported, photo)["probabilities"][0]
    torch.testing.assert_close(probabilities[found.ids[0]], found.probabilities[0], atol=1e-5, rtol=0)


def plain(kind=open_clip.CLIP, vision=None, text=None, interpolation="bicubic", tokenizer=None, **settings) -> TunedRun:
    """A narrow CLIP with random weights, and changes of its configuration, preprocessing or tokenizer."""
    logging.disable(logging.WARNING)
    towers = {"vision_cfg": NATIVE["vision_cfg"] | (vision or {}), "text_cfg": NATIVE["text_cfg"] | (text or {})}
    model = kind(embed_dim=NATIVE["embed_dim"], **towers, **settings).eval()
    logging.disable(logging.NOTSET)
    open_clip.set_model_preprocess_cfg(model, PREPROCESS | {"interpolation": interpolation})
    return TunedRun(
        described=SimpleNamespace(templates=["a {}"]),
        classes=["cat", "dog"],
        model=model,
        method=None,
        transform=None,
        tokenizer=tokenizer or open_clip.SimpleTokenizer(context_length=16),
        precision="fp32",
    )


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_activations(quick_gelu):
    to_hugging_face.convert(plain(quick_gelu=quick_gelu))  # compares embeddings


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"init_logit_bias": -10.0}, "a logit bias"),
        ({"vision": {"pool_type": "avg"}}, "its image embeddings differ"),
        ({"vision": {"no_ln_pre": True}}, "no counterpart there .*Identity"),
        ({"vision": {"ls_init_value": 0.1}}, "its image embeddings differ"),
        ({"text": {"no_causal_mask": True}}, "its text embeddings differ"),
        ({"text": {"pool_type": "last"}}, "its text embeddings differ"),
        ({"kind": open_clip.CustomTextCLIP}, "it is a CustomTextCLIP"),
        ({"vision": {"layers": [1, 1, 1, 1], "image_size": 32}}, "it has a ModifiedResNet as image tower"),
        ({"tokenizer": lambda texts: None}, "a tokenizer other than CLIP's"),
        ({"interpolation": "nearest"}, "it has the interpolation 'nearest'"),
    ],
)
def test_models_that_are_refused(changes, what):
    with pytest.raises(InputError, match=what):
        to_hugging_face.convert(plain(**changes))


def test_names_classes_with_other_tokens(tmp_path):
    """open_clip's tokenizer replaces entities of HTML first."""
    names = ["a cat", *(f"{letter} &amp; {letter}" for letter in "abcdefg")]
    (note,) = to_hugging_face.write(
        plain()._replace(classes=names, described=SimpleNamespace(templates=["{}"])), tmp_path
    )
    assert note.endswith("e &amp; e and 2 more")
