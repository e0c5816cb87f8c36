"""Split steps, soft labels, and steps with the same classes, in fp64 against PyTorch."""

from __future__ import annotations

import copy
import functools

import naive
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import skipkernels as sk
from tests.models import tiny_batch, tiny_clip, tiny_tokens
from tests.processes import run_in_processes

C = 17
IMAGES, LABELS = tiny_batch(4, C)


def make_clip(dtype: torch.dtype = torch.float64, kind=sk.SkipCLIP, **options) -> sk.SkipCLIP:
    return kind(tiny_clip(dtype), tiny_tokens(C), **{"skip_layers": 1, "keep_ratio": 3, "decay": 3.0, **options})


def mixup(labels: Tensor, share: float = 0.7) -> Tensor:
    """Soft labels [B, C] of each image mixed with the next."""
    one_hot = F.one_hot(labels, C).double()
    return share * one_hot + (1 - share) * one_hot.roll(1, 0)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of the parameters of a model, which have none afterwards."""
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def naive_loss(model: nn.Module, images: Tensor, class_ids: Tensor, targets: Tensor, **options) -> Tensor:
    """Cross-entropy over classes [K] by all tokens, with the first block frozen."""
    image, text = (
        F.normalize(embed(model, x, 1, False), dim=1)
        for embed, x in ((naive.embed_images, images), (naive.embed_texts, tiny_tokens(C)[class_ids]))
    )
    return F.cross_entropy(model.logit_scale.exp() * image @ text.T, targets, **options)


def assert_equal_gradients(got: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert got.keys() == right.keys() and got
    for name, gradient in right.items():
        # fp64: rounding of two orders of summation, as in test_clip.py
        assert (got[name] - gradient).norm() <= 1e-9 * gradient.norm() + 1e-15, name


# ---- split step ------------------------------------------------------------------------------------------------------


class ImageModel(nn.Module):
    """SkipCLIP as docs/more-trainers.md shows it to trainers that call `loss_fn(model(x), y)`."""

    def __init__(self, clip: sk.SkipCLIP):
        super().__init__()
        self.clip = clip

    def forward(self, x: Tensor) -> Tensor:
        return self.clip.encode_image(x) if self.training else self.clip.predict(x)


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.parametrize("labels", [LABELS, mixup(LABELS)], ids=["ids", "soft"])
@pytest.mark.parametrize("inputs", ["images", "features"])
def test_split_step_equals_forward(inputs, labels, mode):
    clips = [make_clip(label_smoothing=0.1).train(mode == "train") for _ in range(2)]
    x = IMAGES if inputs == "images" else clips[0].encode_lower(IMAGES)
    with torch.set_grad_enabled(mode != "no_grad"):
        for _ in range(3):  # with a draw each
            whole, split = clips[0](x, labels).loss, clips[1].loss(clips[1].encode_image(x), labels)
            assert whole.equal(split)
            if mode != "no_grad":
                right, got = gradients(clips[0], whole), gradients(clips[1], split)
                assert got.keys() == right.keys() and all(got[name].equal(right[name]) for name in right)
    assert clips[0].get_extra_state().equal(clips[1].get_extra_state())


def test_loop_of_model_and_loss_function():
    """Training with accumulated gradients, and evaluation, through `loss_fn(model(x), y)` alone."""
    losses = []
    for split in (True, False):
        clip = make_clip()
        model = ImageModel(clip)
        optimizer = torch.optim.SGD(clip.parameter_groups(text_lr=0.02, image_lr=0.01), momentum=0.9)
        found = []
        for _ in range(3):
            for part in (slice(0, 2), slice(2, 4)):
                x, y = IMAGES[part], LABELS[part]
                loss = clip.loss(model(x), y) if split else clip(x, y).loss
                (loss / 2).backward()
                found.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        losses.append(found)
        assert model.eval()(IMAGES).equal(clip.predict(IMAGES))
    assert losses[0] == losses[1] and len(set(losses[0])) == 6


@pytest.mark.parametrize("soft", [False, True], ids=["ids", "soft"])
def test_split_step_under_autocast(soft):
    clips = [make_clip(torch.float32) for _ in range(2)]
    x, labels = IMAGES.float(), mixup(LABELS).float() if soft else LABELS
    with torch.autocast("cpu", torch.bfloat16):
        whole, split = clips[0](x, labels).loss, clips[1].loss(clips[1].encode_image(x), labels)
    assert whole.dtype == torch.float32 and whole.equal(split)
    right, got = gradients(clips[0], whole), gradients(clips[1], split)
    assert got.keys() == right.keys() and all(got[name].equal(right[name]) for name in right)


def train_in_ddp(rank: int, size: int = 2) -> dict[str, Tensor]:
    """Train three split steps on this process's share of four images."""
    if size > 1:
        dist.init_process_group("gloo")
    clip = make_clip(keep_ratio=1.0)
    optimizer = torch.optim.SGD(clip.parameter_groups(text_lr=0.02, image_lr=0.01), momentum=0.9)
    model = DistributedDataParallel(ImageModel(clip), broadcast_buffers=False) if size > 1 else ImageModel(clip)
    for _ in range(3):
        clip.loss(model(IMAGES[rank::size]), LABELS[rank::size]).backward()
        optimizer.step()
        optimizer.zero_grad()
    del model  # its Reducer, freed after the group, may wait for a thread that waits for the GIL
    if size > 1:
        dist.destroy_process_group()
    return clip.model.state_dict()


def test_split_step_in_ddp_matches_one_process(tmp_path):
    first, second = run_in_processes(2, tmp_path, train_in_ddp)
    alone, before = train_in_ddp(0, 1), tiny_clip().state_dict()
    assert all(first[name].equal(second[name]) for name in first)
    assert max((first[name] - alone[name]).abs().max() for name in alone) < 1e-12
    assert max((first[name] - before[name]).abs().max() for name in alone) > 1e-4


@pytest.mark.parametrize(
    ("image", "labels", "message"),
    [
        (IMAGES, LABELS, r"SkipCLIP.loss: image must be .* \[B, D=12\]; got .*\[4, 3, 16, 16\]. .*encode_image"),
        (torch.zeros(4, 12).long(), LABELS, r"image must be image embeddings, floating-point .* got torch.int64"),
        (torch.zeros(4, 12).double(), LABELS[:2], r"labels must be class ids, int64 \[B=4\], or probabilities"),
        (torch.zeros(4, 12).double(), LABELS + C, r"labels must be in \[0, C=17\)"),
    ],
    ids=["images", "dtype", "labels", "range"],
)
def test_loss_refuses(image, labels, message):
    with pytest.raises(ValueError, match=message):
        _clip().loss(image, labels)


def test_loss_refuses_another_dtype():
    clip = make_clip(dtype=torch.float32)
    image = torch.ones(4, 12, dtype=torch.bfloat16)
    message = r"SkipCLIP.loss: image must be torch.float32 .*; got torch.bfloat16. Call .* within the same autocast"
    with pytest.raises(TypeError, match=message):
        clip.loss(image, LABELS)
    with torch.autocast("cpu", torch.bfloat16):
        assert clip.loss(image, LABELS).requires_grad


@functools.cache
def _clip() -> sk.SkipCLIP:
    return make_clip()


def refused_in_processes(rank: int) -> list[str]:
    dist.init_process_group("gloo")
    clip, errors = make_clip(kind=sk.parallel.ShardedSkipCLIP, process_group=dist.group.WORLD), []
    for call in (
        lambda: clip.loss(clip.encode_image(IMAGES), LABELS),
        lambda: clip(IMAGES, mixup(LABELS)),
    ):
        with pytest.raises((RuntimeError, ValueError)) as caught:
            call()
        errors.append(str(caught.value))
    other = tiny_tokens(5, seed=4)
    assert clip.predict(IMAGES, tokens=other).equal(make_clip().predict(IMAGES, tokens=other))
    dist.destroy_process_group()
    return errors


def test_several_processes_refuse(tmp_path):
    for in_loss, soft in run_in_processes(2, tmp_path, refused_in_processes):
        assert in_loss.startswith("ShardedSkipCLIP: loss in training mode is not supported")
        assert soft.startswith("ShardedSkipCLIP: labels must be class ids [B] and return_logits False")


# ---- soft labels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.2}, {"class_weight": torch.linspace(0.5, 1.5, C)}], ids=str
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_soft_labels_equal_naive_step(training, options):
    labels = mixup(LABELS)
    clip = make_clip(train_logit_scale=True, **options).train(training)
    plain = copy.deepcopy(clip.model)
    out = clip(IMAGES, labels)
    assert (len(out.class_ids) < C) == training and out.targets.equal(labels[:, out.class_ids])
    assert out.targets.sum().item() == pytest.approx(4, abs=1e-12), "every label is kept"

    theirs = {"label_smoothing": options.get("label_smoothing", 0.0)}
    if "class_weight" in options:
        theirs["weight"] = options["class_weight"].double()[out.class_ids]
    loss = naive_loss(plain, IMAGES, out.class_ids, out.targets, **theirs)
    torch.testing.assert_close(out.loss, loss, rtol=1e-12, atol=0)
    assert_equal_gradients(gradients(clip.model, out.loss), gradients(plain, loss))


def test_one_hot_labels_are_class_ids():
    one, other = make_clip(), make_clip()
    for _ in range(3):
        ids, soft = one(IMAGES, LABELS), other(IMAGES, F.one_hot(LABELS, C).double())
        assert ids.class_ids.equal(soft.class_ids)
        torch.testing.assert_close(ids.loss, soft.loss, rtol=1e-12, atol=0)


def test_soft_labels_with_more_classes_than_images_are_all_kept():
    labels = torch.zeros(4, C).double()
    labels[0, :11], labels[1:, 16] = 1 / 11, 1.0
    out = make_clip()(IMAGES, labels)
    assert out.targets.sum().item() == pytest.approx(4) and len(out.class_ids) < C


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (mixup(LABELS)[:, :-1], r"or probabilities of the classes, floating-point \[B=4, C=17\]; got .* \[4, 16\]"),
        (F.one_hot(LABELS, C), r"got torch.int64 \[4, 17\]. .* for one-hot labels pass labels.argmax"),
        (2 * mixup(LABELS), "must be probabilities, not negative, that sum to 1 for each image; got sums from 2 to 2"),
        (mixup(LABELS, 1.5), "must be probabilities, not negative.* and values from -0.5"),
    ],
    ids=["classes", "integers", "sum", "negative"],
)
def test_soft_labels_refused(labels, message):
    with pytest.raises(ValueError, match=f"^SkipCLIP: labels .*{message}"):
        _clip()(IMAGES, labels)


def test_graphed_refuses_soft_labels():
    clip = make_clip()
    step = sk.graphed(clip, sk.FusedSGD(clip.parameter_groups(text_lr=0.1, image_lr=0.1)), batch_size=4)
    with pytest.raises(ValueError, match=r"graphed: labels must be class ids, int64 \[B\]; got torch.float64"):
        step(IMAGES, mixup(LABELS))
    with pytest.raises(TypeError, match=r"labels must be an int64 tensor \[B\]; got list"):
        step(IMAGES, LABELS.tolist())


# ---- the same classes ------------------------------------------------------------------------------------------------


def draws_of(clip: sk.SkipCLIP) -> Tensor:
    return clip.sampler.generator.get_state()


def test_sam_with_the_same_classes_equals_naive():
    clip = make_clip()
    plain = copy.deepcopy(clip.model)
    before, once = draws_of(clip), make_clip()
    once(IMAGES, LABELS)

    def perturbed(model: nn.Module, d_model: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, gradient in d_model.items():
                model.get_parameter(name).add_(0.05 * gradient)

    with clip.sampler.same_classes():
        first = clip(IMAGES, LABELS)
        perturbed(clip.model, gradients(clip.model, first.loss))
        second = clip(IMAGES, LABELS)
    assert second.class_ids is first.class_ids and second.targets.equal(first.targets)
    assert draws_of(clip).equal(draws_of(once)) and not draws_of(clip).equal(before)

    kept = first.class_ids, first.targets
    perturbed(plain, gradients(plain, naive_loss(plain, IMAGES, *kept)))
    loss = naive_loss(plain, IMAGES, *kept)
    torch.testing.assert_close(second.loss, loss, rtol=1e-12, atol=0)
    assert_equal_gradients(gradients(clip.model, second.loss), gradients(plain, loss))
    assert draws_of(clip).equal(draws_of(once)) and not clip(IMAGES, LABELS).class_ids.equal(kept[0]), "drawn again"


def test_lbfgs_with_the_same_classes():
    clip, evaluations = make_clip(), []
    optimizer = torch.optim.LBFGS(clip.trainable_parameters(), max_iter=4, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        evaluations.append(out := clip(IMAGES, LABELS))
        out.loss.backward()
        return out.loss

    with clip.sampler.same_classes():
        optimizer.step(closure)
    assert len(evaluations) > 2 and all(out.class_ids is evaluations[0].class_ids for out in evaluations)
    assert evaluations[-1].loss < 0.9 * evaluations[0].loss


def test_same_classes_for_every_kind_of_labels():
    """Class ids, soft labels and several labels, on subsets of the labels of the first step."""
    clip = make_clip()
    many = F.one_hot(LABELS, C)
    for first in (LABELS, mixup(LABELS), many):
        with clip.sampler.same_classes():
            steps = [
                sk.pairs.sigmoid_loss(clip, IMAGES[rows], y[rows], max_labels=1)
                if y is many
                else clip(IMAGES[rows], y[rows])
                for y, rows in [(first, slice(None)), (LABELS, slice(2)), (mixup(LABELS), slice(2)), (many, slice(2))]
            ]
        assert len(steps[0].class_ids) < C and all(out.class_ids is steps[0].class_ids for out in steps)
        assert steps[1].class_ids[steps[1].targets].equal(LABELS[:2])
        assert steps[3].targets.sum() == 2


def test_checkpointed_step_within_same_classes():
    """The second forward of activation checkpointing, which elsewhere would draw other classes."""
    clip, plain = make_clip(), make_clip()
    right = gradients(plain, plain(IMAGES, LABELS).loss)
    features = clip.encode_lower(IMAGES)
    with clip.sampler.same_classes():
        step = functools.partial(torch.utils.checkpoint.checkpoint, clip, features, LABELS, use_reentrant=False)
        assert_equal_gradients(gradients(clip, step().loss), right)


def test_same_classes_ends_with_an_error():
    clip = make_clip()
    with pytest.raises(ZeroDivisionError), clip.sampler.same_classes():
        clip(IMAGES, LABELS)
        raise ZeroDivisionError
    assert not clip(IMAGES, LABELS).class_ids.equal(clip(IMAGES, LABELS).class_ids)


def test_same_classes_refuses():
    clip = make_clip()
    with clip.sampler.same_classes():
        kept = clip(IMAGES, LABELS).class_ids
        other = next(c for c in range(C) if c not in kept)
        message = rf"the classes that its first step kept, {len(kept)} of 17; got 1 others, such as {other}"
        for labels in (torch.full((4,), other), F.one_hot(torch.full((4,), other), C).double()):
            with pytest.raises(ValueError, match=message):
                clip(IMAGES, labels)
        with pytest.raises(RuntimeError, match="cannot be nested"), clip.sampler.same_classes():
            pass
        step = sk.graphed(clip, sk.FusedSGD(clip.parameter_groups(text_lr=0.1, image_lr=0.1)), batch_size=4)
        with pytest.raises(RuntimeError, match="graphed: a step selects its own classes. Leave same_classes"):
            step(IMAGES, LABELS)
        assert clip(IMAGES, LABELS).class_ids is kept
