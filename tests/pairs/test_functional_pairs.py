"""Losses of pairs of embeddings: equal to those of open_clip, no worse than eager, in chunks."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import SigLipLoss

from skipkernels import functional, reference
from skipkernels.testing import SLACK, relative_error, saved_bytes
from tests.allocations import allocated_bytes


def make_pairs(B, D, dtype=torch.float64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(B, D, generator=rng, dtype=torch.float64).mul(3).to(dtype) for _ in range(2))
    scale = torch.tensor(10.0, dtype=torch.promote_types(dtype, torch.float32))
    return tuple(x.requires_grad_() for x in (image, text, scale))


def plain_loss(image, text, scale, reduction="mean"):
    logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    labels = torch.arange(len(image))
    return sum(F.cross_entropy(z, labels, reduction=reduction) for z in (logits, logits.T)) / 2


def loss_and_gradients(function, inputs, reduction):
    loss = function(*inputs, reduction=reduction)
    upstream = torch.arange(1, loss.numel() + 1, dtype=loss.dtype).view(loss.shape)
    return loss, *torch.autograd.grad(loss, inputs, upstream)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(1, 7), (5, 16), (33, 129)], ids=lambda s: "B{}-D{}".format(*s))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_contrastive_loss_no_worse_than_eager(dtype, shape, reduction):
    inputs = make_pairs(*shape, dtype)
    exact = loss_and_gradients(plain_loss, [x.detach().double().requires_grad_() for x in inputs], reduction)
    eager = loss_and_gradients(plain_loss, inputs, reduction)
    for function in (functional.contrastive_loss, reference.contrastive_loss):
        for ours, theirs, right in zip(loss_and_gradients(function, inputs, reduction), eager, exact, strict=True):
            assert relative_error(ours, right) <= relative_error(theirs, right) + SLACK[ours.dtype]


def test_contrastive_loss_does_not_save_the_logits():
    assert saved_bytes(lambda: functional.contrastive_loss(*make_pairs(300, 8, torch.float32))) < 4 * 300 * 300


def test_losses_export_with_a_dynamic_batch():
    class Losses(torch.nn.Module):
        def forward(self, image, text):
            contrastive = (module.contrastive_loss(image, text, 10.0) for module in (functional, reference))
            sigmoid = (module.pairwise_sigmoid_loss(image, text, 10.0, -10.0) for module in (functional, reference))
            return [*contrastive, *sigmoid]

    inputs, others = (tuple(x.detach() for x in make_pairs(B, 16)[:2]) for B in (5, 3))
    batch = {0: torch.export.Dim("batch", max=256)}
    exported = torch.export.export(Losses(), inputs, dynamic_shapes=(batch, batch)).module()
    torch.testing.assert_close(exported(*others), Losses()(*others))


def test_pairwise_sigmoid_compiles_into_one_graph():
    def loss(image, text, labels):
        return functional.pairwise_sigmoid(image, text, labels, 10.0, -10.0)

    image, text, _ = make_pairs(5, 16)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    labels = torch.tensor([0, 2, -1, 4, 4])
    torch.testing.assert_close(compiled(image, text, labels), loss(image, text, labels))
    with pytest.raises(RuntimeError, match="labels must be rows of text, 0 to 4"):
        compiled(image, text, labels + 1)


@pytest.fixture(params=[None, 1, 70], ids=["whole", "rows", "chunks"])
def chunks(request, monkeypatch):
    """The loss of all pairs at once, of one image at a time, and of chunks of which the last is smaller."""
    if request.param is not None:
        monkeypatch.setattr(functional, "PAIRS_IN_MEMORY", request.param)


@pytest.mark.parametrize("shape", [(1, 7), (5, 16), (33, 640)], ids=lambda s: "B{}-D{}".format(*s))
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (100.0, 3.5)])
def test_pairwise_sigmoid_loss_equals_siglip_loss_of_open_clip(shape, scale, bias, chunks):
    image, text, _ = make_pairs(*shape)
    numbers = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (scale, bias)]
    theirs = SigLipLoss()(F.normalize(image, dim=1), F.normalize(text, dim=1), *numbers)
    theirs = theirs, *torch.autograd.grad(theirs, [image, text, *numbers])
    for function in (functional.pairwise_sigmoid_loss, reference.pairwise_sigmoid_loss):
        loss = function(image, text, *numbers)
        ours = loss, *torch.autograd.grad(loss, [image, text, *numbers])
        for own, right in zip(ours, theirs, strict=True):
            torch.testing.assert_close(own, right, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_pairwise_sigmoid_loss_no_worse_than_eager(dtype, chunks):
    """Gradients of the text are sums over chunks, which bf16 would round each time."""
    image, text, scale = make_pairs(33, 129, dtype)
    inputs = image, text, scale, torch.tensor(-10.0, requires_grad=True)

    def plain(image, text, scale, bias):
        return SigLipLoss()(F.normalize(image, dim=1), F.normalize(text, dim=1), scale.to(dtype), bias.to(dtype))

    def results(function, inputs):
        loss = function(*inputs)
        return loss, *torch.autograd.grad(loss, inputs)

    exact = results(reference.pairwise_sigmoid_loss, [x.detach().double().requires_grad_() for x in inputs])
    three = results(functional.pairwise_sigmoid_loss, inputs), results(plain, inputs), exact
    for ours, theirs, right in zip(*three, strict=True):
        assert relative_error(ours, right) <= relative_error(theirs, right) + SLACK[ours.dtype]


def test_pairwise_sigmoid_loss_saves_no_more_than_a_chunk_of_logits(monkeypatch):
    """Nor has backward, which computes the logits of a chunk again; all of them would be 1.4 MB."""
    inputs = *make_pairs(600, 8, torch.float32), -10.0
    monkeypatch.setattr(functional, "PAIRS_IN_MEMORY", 10 * 600)
    assert saved_bytes(lambda: functional.pairwise_sigmoid_loss(*inputs)) < 600 * 600
    assert allocated_bytes(lambda: functional.pairwise_sigmoid_loss(*inputs).backward()) < 600 * 600


def test_blocks_of_pairs_add_up(chunks):
    """Blocks of images and of texts, each with the labels that are in it, have the loss of all."""
    image, text, scale = make_pairs(7, 16)
    labels = torch.tensor([3, -1, 6, 6, 0, -1, 2])  # images without a text, and two with the same
    blocks = []
    for images, texts in itertools.product((slice(0, 3), slice(3, 7)), (slice(0, 5), slice(5, 7))):
        own = labels[images] - texts.start
        own = torch.where((own >= 0) & (own < len(text[texts])), own, -1)
        blocks.append(functional.pairwise_sigmoid(image[images], text[texts], own, scale, -3.0))
    whole = reference.pairwise_sigmoid(image, text, labels, scale, -3.0)
    torch.testing.assert_close(sum(blocks), whole, rtol=1e-13, atol=0)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("scale", "bias"), [(100.0, -10.0), (1e4, 0.0), (0.0, -30.0)])
def test_pairwise_sigmoid_of_extreme_logits(sign, scale, bias):
    """A pair that is as wrong as can be costs |z|, and one that is right exp(−|z|), which 1 + x would lose in fp32."""
    rows = torch.eye(3)
    numbers = [torch.tensor(x, requires_grad=True) for x in (scale, bias)]
    wide = [x.detach().double().requires_grad_() for x in numbers]
    for labels in (torch.arange(3), torch.full((3,), -1)):
        loss = functional.pairwise_sigmoid(rows, sign * rows, labels, *numbers)
        exact = reference.pairwise_sigmoid(rows.double(), sign * rows.double(), labels, *wide)
        gradients = torch.autograd.grad(loss, numbers), torch.autograd.grad(exact, wide)
        for ours, right in zip((loss, *gradients[0]), (exact, *gradients[1]), strict=True):
            torch.testing.assert_close(ours, right.float(), rtol=1e-5, atol=0)
