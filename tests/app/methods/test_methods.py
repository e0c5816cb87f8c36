"""Properties of all methods: trained weights, logits before training, checkpoints, errors."""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from skipkernels.app.data import InputError
from skipkernels.app.heads import Head
from skipkernels.app.methods import METHODS, Recipe, TrainingData
from tests.app.methods.method_tasks import (
    BASE,
    CONTEXT,
    FAMILIES,
    NEW,
    STEPS,
    answers,
    made,
    stacked,
    tiny_model,
    tiny_task,
    trained,
    zero_shot,
)

# Logits up to 14 in fp64, with another order of summation; measured 1e-14.
CLOSE = {"rtol": 0, "atol": 1e-11}


def changed_by(method, family) -> set[str]:
    """Names of the model weights that a method changes."""
    names = {name for name, _ in method.model.named_parameters()}
    if method.name == "full":
        return names - {"logit_scale"}
    if method.name == "lora":
        return {name for name in names if name.endswith(("lora_A", "lora_B"))}
    if method.name == "skip":
        text = "" if family is open_clip.CLIP else "text."
        heads = ("visual.ln_post.", "visual.proj", f"{text}ln_final.", f"{text}text_projection")
        blocks = tuple(f"{tower}transformer.resblocks.{n}." for tower in ("visual.", text) for n in (2,))
        return {name for name in names if name.startswith(heads + blocks)}
    return set()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
@pytest.mark.parametrize("name", STEPS)
def test_training_changes_own_weights_only(name, family):
    method = made(name, tiny_model(family))
    assert method.name == name
    before = copy.deepcopy(method.model.state_dict())
    groups = method.parameter_groups(text_lr=0.1, image_lr=0.2)
    assert {(group["name"], group["lr"]) for group in groups} <= {("text", 0.1), ("image", 0.2)}
    own = [(p, p.detach().clone()) for group in groups for p in group["params"]]

    losses = trained(method, steps=8, rate=0.02 if name in ("skip", "full") else 0.05)
    assert losses[-1] < losses[0] - 0.02
    assert all(not p.equal(first) for p, first in own if first.any() or not p.any())
    moved = {key for key, tensor in method.model.state_dict().items() if not tensor.equal(before[key])}
    padding = {"token_embedding.weight", "text.token_embedding.weight"}
    assert moved - padding == changed_by(method, family) - padding


@pytest.mark.parametrize("templates", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_logits_before_training(name, templates):
    """Skip, full, lora and the probe start at zero-shot, coop and the adapter at random."""
    model, task = tiny_model(), tiny_task(templates)
    expected = {test.name: zero_shot(model, stacked(test.images)[0], test.prompts) for test in task.tests}
    got = answers(made(name, model, task))
    for test in ("base", "new"):
        same = torch.allclose(got[test], expected[test], **CLOSE)
        assert same == (name not in ("coop", "clip-adapter"))


@pytest.mark.parametrize("name", METHODS)
def test_head_of_the_plain_model_gives_the_logits(name):
    """So does the code for the model card, if the model does not have all that training changes."""
    method = made(name)
    images, labels = stacked(method.task.train)
    if name in STEPS:
        trained(method)
    else:
        method.fit(method.encode_frozen(images), labels)
    expected = method.logits("base", method.encode_frozen(images)).float()
    head = method.head()
    method.merge()
    image = method.model.encode_image(images, normalize=False).detach().to(expected)
    close = {"rtol": 0, "atol": 1e-4}  # class embeddings in fp32, logits up to 14
    torch.testing.assert_close(head.float()(image)[0], expected, **close)
    if method.head_code:
        names = {"F": F, "model": method.model.float(), "image": image, "head": head.state_dict()}
        exec(method.head_code, names)
        torch.testing.assert_close(names["logits"], expected, **close)


@pytest.mark.parametrize("name", METHODS)
def test_state_dict_round_trip(name):
    method, again = made(name), made(name, generator=torch.Generator().manual_seed(5))
    trained(method)
    again.use_head(method.fitted, BASE)  # which is not in the state
    state = {key: tensor.clone() for key, tensor in method.state_dict().items()}
    assert (state.keys() == method.model.state_dict().keys()) == (name in ("skip", "full"))
    expected = answers(method)
    answers(again)  # caches class embeddings
    again.load_state_dict(state)
    assert all(state[key].equal(tensor) for key, tensor in again.state_dict().items())
    for test, logits in answers(again).items():
        assert logits is None if expected[test] is None else logits.equal(expected[test])


def test_head_classifies_its_classes_and_texts_the_others():
    method = made("zero-shot")
    image = method.encode_frozen(stacked(method.task.train)[0])
    expected = 5 * F.normalize(image) @ method.class_embeddings("base").T
    method.use_head(Head(2 * torch.eye(1, 12, dtype=torch.float64), torch.ones(1), scale=torch.tensor(5.0)), BASE[:1])
    expected[:, 0] = 2 * F.normalize(image)[:, 0] + 1
    torch.testing.assert_close(method.logits("base", image), expected)


@pytest.mark.parametrize("name", ["skip", "coop", "lora"])
def test_load_state_dict_refuses_other_state(name):
    method = made(name)
    first = {key: tensor.clone() for key, tensor in method.state_dict().items()}
    last = list(first)[-1]
    other_size = first | {last: torch.zeros(7, 7)}
    for wrong, message in (
        (other_size, rf"{name}: the state has \[7, 7\] for {last}"),
        ({key: tensor for key, tensor in first.items() if key != last}, f"the state has nothing for {last}"),
        (first | {"more": torch.zeros(1)}, "for more, and this model and task need nothing"),
    ):
        shifted = {key: tensor + 1 if tensor.is_floating_point() else tensor for key, tensor in wrong.items()}
        with pytest.raises(InputError, match=message):
            method.load_state_dict(shifted)
    assert all(first[key].equal(tensor) for key, tensor in method.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_class_embeddings_are_kept_until_train_is_called(name, monkeypatch):
    method, task = made(name), tiny_task()
    calls = []
    real = nn.Embedding.forward
    monkeypatch.setattr(nn.Embedding, "forward", lambda self, x: calls.append(len(x)) or real(self, x))
    answers(method)
    calls.clear()
    first = answers(method)
    assert not calls
    groups = [group for group in method.parameter_groups(text_lr=0, image_lr=0) if group["name"] == "text"]
    for group in groups:
        for parameter in group["params"]:
            parameter.data.mul_(1.5).add_(0.1)  # not seen by version counters
    method.train(False)
    changed = answers(method)
    assert bool(groups) == (name in ("skip", "full", "coop", "lora"))
    for test in task.tests:
        assert torch.equal(first[test.name], changed[test.name]) == (not groups)


@pytest.mark.parametrize("name", METHODS)
def test_methods_autocast_bf16(name):
    method = made(name, tiny_model(dtype=torch.float32), tiny_task())
    images, labels = stacked(method.task.train)
    with torch.autocast("cpu", torch.bfloat16):
        inputs = method.encode_frozen(images.float())
        if name in STEPS:
            loss = method.step(inputs, labels).loss
            assert loss.dtype == torch.float32
        logits = method.logits("base", inputs)
    assert logits.dtype == torch.float32
    if name in STEPS:
        loss.backward()
        close = method.logits("base", method.encode_frozen(images.float()))
        assert (logits - close).abs().max() < 1.5  # a hundredth of the largest angle at a scale of 14, and rounding
        assert (logits != close).any()


@pytest.mark.parametrize("name", METHODS)
def test_methods_add_fp32_weights_to_bf16_model(name):
    method = made(name, tiny_model(dtype=torch.float32).to(torch.bfloat16))
    own = [tensor.dtype for key, tensor in method.state_dict().items()]
    assert set(own) <= {torch.bfloat16 if name in ("skip", "full") else torch.float32}


@pytest.mark.parametrize("name", ["skip", "coop", "clip-adapter", "lora"])
def test_methods_draw_from_their_generator(name):
    settings = {"keep_ratio": 0.2, "decay": 10.0} if name == "skip" else {}  # one class always kept, some of four

    def after(seed: int):
        method = made(name, generator=torch.Generator().manual_seed(seed), **settings)
        trained(method, images=1)
        return method.state_dict()

    one, same, other = after(1), after(1), after(2)
    assert all(one[key].equal(same[key]) for key in one)
    assert not all(one[key].equal(other[key]) for key in one)


@pytest.mark.parametrize("name", ["coop", "clip-adapter", "linear-probe"])
def test_frozen_methods_embed_each_image_once(name):
    method = made(name)
    images, labels = stacked(method.task.train)
    embeddings = method.encode_frozen(images)
    assert embeddings.shape == (20, 12) and not embeddings.requires_grad
    method.model.visual.register_forward_hook(lambda *_: pytest.fail("the image tower runs again"))
    (method.fit if name == "linear-probe" else method.step)(embeddings, labels)
    if name == "clip-adapter":
        hook = method.model.token_embedding.register_forward_hook(lambda *_: pytest.fail("the text tower runs again"))
        method.step(embeddings, labels)
        hook.remove()
    assert method.logits("base", embeddings).shape == (20, 5)


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = tiny_model()
        self.logit_scale = self.inner.logit_scale


LONG = " ".join("abcdefghijkl")
# Method, model, settings, class names of the second test, and the message.
REFUSED = [
    *((name, Wrapped, {}, [], r"(?s)model must be .*; got .*Wrapped") for name in METHODS),
    *((name, lambda: tiny_model(context_length=CONTEXT + 1), {}, [],
       f"tokens must be .* as long as the model's context; got .*{CONTEXT}") for name in ("skip", "full")),
    ("skip", tiny_model, {"skip_layers": 9}, [], "skip_layers must be"),
    ("skip", tiny_model, {"skip_layers": 0, "cache": "nowhere"}, [], "text_cache keeps features at the cut"),
    ("coop", tiny_model, {}, [LONG], f"coop: no context fits beside the class name '{LONG}', which takes all 12"),
    *(("coop", lambda text=text: tiny_model(FAMILIES[1], **text), {}, [],
       f"coop: the text tower of model must pool the end-of-text token; that of this CustomTextCLIP pools '{pool}'")
      for text, pool in (({"pool_type": "last"}, "last"), ({"embed_cls": True}, "cls_emb"))),
    ("lora", lambda: made("lora").model, {}, [], "lora: .* is an adapter"),
    ("lora", lambda: tiny_model(qk_norm=True), {}, [], "lora: .*must be fused"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "make", "settings", "new", "message"), REFUSED)
def test_methods_refuse(name, make, settings, new, message):
    with pytest.raises(InputError, match=message):
        made(name, make(), tiny_task(new=new or NEW), **settings)


def test_published_recipes():
    def of(name: str, protocol: str, shots: int = 16, **data) -> Recipe:
        return METHODS[name].recipe("ViT-B-16-quickgelu", TrainingData(protocol=protocol, shots=shots, **data))

    sgd = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 5e-4}
    skip = {"batch_size": 4, "sampler": "class_pure", "tail": "resample", **sgd}
    warm = {"warmup_epochs": 1}
    base_to_new = Recipe(epochs=20, text_lr=2e-5, image_lr=5e-6, warmup_lr=1e-6, **warm, **skip)
    assert of("skip", "base-to-new") == base_to_new
    for protocol in ("cross-dataset", "domain-generalization"):
        assert of("skip", protocol) == Recipe(epochs=20, text_lr=1e-5, image_lr=1e-6, warmup_lr=1e-8, **warm, **skip)
    few_shot = Recipe(epochs=40, text_lr=1e-5, image_lr=1e-5, warmup_epochs=0, warmup_lr=0.0, **skip)
    assert of("skip", "few-shot") == few_shot
    assert of("full", "few-shot") == Recipe(**(vars(few_shot) | {"sampler": "random", "tail": None}))

    coop = {"batch_size": 32, "warmup_epochs": 1, "warmup_lr": 1e-5, "sampler": "random", **sgd}
    assert of("coop", "base-to-new") == Recipe(epochs=50, text_lr=2e-3, **coop)
    assert [of("coop", "few-shot", shots).epochs for shots in (1, 2, 4, 8, 16)] == [50, 100, 100, 200, 200]
    assert of("clip-adapter", "few-shot") == Recipe(epochs=200, image_lr=2e-3, **coop)
    assert (of("zero-shot", "few-shot").epochs, of("linear-probe", "few-shot").epochs) == (0, 0)

    adamw = {"optimizer": "adamw", "weight_decay": 1e-2, "warmup_epochs": 0, "warmup_lr": 0.0, "sampler": "random"}
    lora = Recipe(epochs=200, batch_size=32, text_lr=2e-4, image_lr=2e-4, **adamw)
    assert of("lora", "few-shot", 4, classes=lambda: 78) == lora, "2,000 steps in epochs of 10"
