"""Heads on embeddings: against independent solvers, for other dtypes and layouts, and for input that is refused."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch
import torch.nn.functional as F
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch.utils._python_dispatch import TorchDispatchMode

from skipkernels.app import heads
from skipkernels.app.heads import anchored, logistic

SCALE = 20.0
# Counts of the images of each class, and D: primes, classes without images, one image each, more classes than D, one
# class with images, a single class.
CASES = {
    "odd": ([3, 5, 2, 7], 11),
    "without images": ([4, 0, 3, 0, 2], 7),
    "one image each": ([1, 1, 1], 5),
    "long tail": ([23, 1, 2, 1, 1, 1, 1], 5),
    "one class with images": ([0, 6], 3),
    "one class": ([3], 2),
}
cases = pytest.mark.parametrize("case", CASES)


def data(counts: list[int], width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings [n, D] near their class, labels [n] in random order, and texts [C, D]; fp64, of any norm."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    centre, text = torch.randn(2, len(counts), width, generator=generator, dtype=torch.float64)
    return centre[labels] + torch.randn(len(labels), width, generator=generator, dtype=torch.float64), labels, text


def unit(x: torch.Tensor) -> np.ndarray:
    return (x / x.norm(dim=1, keepdim=True)).numpy()


def solved(image, labels, text, scale, l2) -> np.ndarray:
    """T + Δ by scipy, from a gradient that is written out here: L-BFGS-B, then Newton steps to its zero."""
    x, anchor, one_hot = unit(image), unit(text), np.eye(len(text))[labels]
    known = one_hot.sum(axis=0) > 0

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        delta = np.zeros_like(anchor)
        delta[known] = flat.reshape(-1, x.shape[1])
        logits = scale * x @ (anchor + delta).T
        residual = scipy.special.softmax(logits, axis=1) - one_hot
        loss = -scipy.special.log_softmax(logits, axis=1)[one_hot > 0].sum() + l2 * scale**2 / 2 * (delta**2).sum()
        return loss, (scale * residual.T @ x + l2 * scale**2 * delta)[known].ravel()

    near = scipy.optimize.minimize(objective, np.zeros(known.sum() * x.shape[1]), jac=True, method="L-BFGS-B").x
    found = scipy.optimize.root(lambda flat: objective(flat)[1], near, tol=1e-13)
    assert np.abs(objective(found.x)[1]).max() < 1e-8 * l2 * scale**2, "the reference has converged"
    anchor[known] += found.x.reshape(-1, x.shape[1])
    return anchor


@cases
@pytest.mark.parametrize("l2", [3e-4, 0.1, 10.0])
def test_anchored_probe_is_the_minimum(case, l2):
    """The tolerance is the stated bound 1e-7 on the distance, and that of scipy."""
    image, labels, text = data(*CASES[case])
    head = heads.anchored_probe(image, labels, text, SCALE, l2)
    expected = solved(image, labels, text, SCALE, l2)
    np.testing.assert_allclose(head.weight.numpy() / SCALE, expected, rtol=0, atol=1e-6)
    assert not head.bias.any() and head.scale == SCALE
    without = torch.tensor(CASES[case][0]) == 0
    np.testing.assert_array_equal(head.weight[without].numpy(), (SCALE * torch.tensor(unit(text)))[without].numpy())


def test_anchored_probe_in_chunks(monkeypatch):
    image, labels, text = data([3, 0, 5, 2], 7)
    whole = heads.anchored_probe(image, labels, text, SCALE, 0.1)
    monkeypatch.setattr(logistic, "_LOGITS", 3 * len(text))  # three images at a time, of ten
    chunked = heads.anchored_probe(image, labels, text, SCALE, 0.1)
    torch.testing.assert_close(chunked.weight, whole.weight, rtol=0, atol=2 * SCALE * anchored.TOLERANCE)


@cases
def test_linear_probe_is_the_minimum(case):
    """The gradient is zero. Classes without images have no weight, and are never predicted."""
    (image, labels, _), l2 = data(*CASES[case]), 0.1
    known = torch.tensor(CASES[case][0]) > 0
    head = heads.linear_probe(image, labels, len(known), SCALE, l2)
    weight, bias = head.weight.requires_grad_(), head.bias.masked_fill(~known, 0.0).requires_grad_()
    loss = F.cross_entropy(F.normalize(image) @ weight.T + bias, labels, reduction="sum")
    (loss + l2 / 2 * weight.square().sum()).backward()
    assert max(weight.grad[known].abs().max(), bias.grad[known].abs().max()) < anchored.TOLERANCE * l2 * SCALE
    assert not weight[~known].any() and (head.bias[~known] == -torch.inf).all() and head.scale is None


@pytest.mark.parametrize(("name", "function"), [("anchored", "anchored_probe"), ("probe", "linear_probe")])
def test_probes_warn_before_the_minimum_and_commands_do_not(monkeypatch, name, function):
    monkeypatch.setattr(logistic, "ITERATIONS", 20)
    image, labels, text = data([20] * 9, 30)
    of_classes = text if name == "anchored" else len(text)
    with pytest.warns(UserWarning, match=rf"{function}: .* expected at most 1e-07\. Use a larger l2"):
        getattr(heads, function)(image, labels, of_classes, SCALE, 3e-4)
    with warnings.catch_warnings():  # not of a command: a user of it does not choose the penalty
        warnings.simplefilter("error")
        heads.fit_head(name, heads.Examples(image, labels, text, SCALE), 3e-4)


@pytest.mark.parametrize(
    ("labels", "folds"),
    [([0, 0, 1, 1], [0, 1, 0, 1]), ([2, 0, 2, 2, 0, 1], [0, 0, 0, 1, 1, -1]), ([0, 1], [-1, -1])],
    ids=["pairs", "three, two and one", "one each"],
)
def test_folds_are_halves_of_each_class(labels, folds):
    assert anchored.halves(torch.tensor(labels)).tolist() == folds


@pytest.mark.parametrize("seed", range(3))
def test_anchored_l2_is_that_of_the_best_fold_accuracy(monkeypatch, seed):
    """The fits of the folds have looser tolerances and start from each other; the choice is that of exact ones."""
    image, labels, text = data([4, 2, 1, 5, 0, 2], 6, seed)
    candidates, scores = (0.001, 0.1, 10.0), {}
    fold = anchored.halves(labels)
    for l2 in candidates:
        correct, loss = 0, 0.0
        for held_out in (fold == 0, fold == 1):
            head = heads.anchored_probe(image[~held_out], labels[~held_out], text, SCALE, l2)
            logits = head.logits(image[held_out])
            correct += (logits.argmax(dim=1) == labels[held_out]).sum().item()
            loss += F.cross_entropy(logits, labels[held_out], reduction="sum").item()
        scores[l2] = correct, -loss
    monkeypatch.setattr(anchored, "CANDIDATES", candidates)
    assert heads.anchored_l2(image, labels, text, SCALE) == max(candidates, key=scores.__getitem__)


def test_anchored_l2_follows_what_is_reliable():
    """Texts without information ask for the smallest penalty, images without information for the largest."""
    image, labels, text = data([10] * 4, 16)
    centre = F.normalize(torch.eye(4, 16, dtype=torch.float64))
    assert heads.anchored_l2(centre[labels] + 0.01 * image, labels, text, SCALE) == min(heads.CANDIDATES)
    hidden = 0.3 * centre[labels] + torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    assert heads.anchored_l2(hidden, labels, centre, 5.0) >= 1


def test_anchored_l2_without_two_images_of_a_class():
    image, labels, text = data([1] * 4, 16)
    assert heads.anchored_l2(image, labels, text, SCALE) == anchored.WITHOUT_PAIRS


@pytest.mark.filterwarnings("ignore:Only one sample available")  # scikit-learn's, of classes with one image
@pytest.mark.parametrize("case", ["odd", "without images", "long tail"])
@pytest.mark.parametrize("shrinkage", [0.3, 1.0, 1e-3])
def test_gaussian_head_is_linear_discriminant_analysis(case, shrinkage):
    """scikit-learn weights the covariances of the classes by n_c/n, which is S; its `trace/D` is linear, too."""
    counts, width = CASES[case]
    image, labels, _ = data(counts, width)
    head = heads.gaussian_head(image, labels, len(counts), shrinkage)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(unit(image), labels.numpy())
    known = torch.tensor(counts) > 0
    np.testing.assert_allclose(head.weight[known], theirs.coef_, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(head.bias[known], theirs.intercept_, rtol=1e-8, atol=1e-8)
    assert not head.weight[~known].any() and (head.bias[~known] == -torch.inf).all()
    assert (head.logits(image).argmax(dim=1).numpy() == theirs.predict(unit(image))).all()


@pytest.mark.parametrize("repeats", [1, 3], ids=["one image each", "equal images"])
def test_gaussian_head_without_covariance_is_the_nearest_mean(repeats):
    image, labels, _ = data([1] * 5, 7)
    head = heads.gaussian_head(image.repeat(repeats, 1), labels.repeat(repeats), 5)
    mean, others = torch.tensor(unit(image)), torch.randn(99, 7, dtype=torch.float64)
    nearest = labels[torch.cdist(F.normalize(others), mean).argmin(dim=1)]
    assert head.logits(others).argmax(dim=1).equal(nearest)


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements of a result."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            self.size = max(self.size, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return out


def test_gaussian_head_has_no_matrix_for_each_class():
    image, labels, text = data([2] * 60, 30)
    with LargestTensor() as largest:
        heads.with_text(heads.gaussian_head(image, labels, 60), image, labels, text, SCALE)
    assert largest.size <= 120 * 60 < 60 * 30 * 30


@pytest.mark.parametrize("alpha", [1.0, 0.25])
@pytest.mark.parametrize("case", ["odd", "without images"])
def test_with_text_adds_equally_spread_logits(case, alpha):
    image, labels, text = data(*CASES[case])
    head = heads.gaussian_head(image, labels, len(text))
    found = heads.with_text(head, image, labels, text, SCALE, alpha)
    known, zero_shot = head.bias.isfinite(), SCALE * torch.tensor(unit(image) @ unit(text).T)

    def centred(logits):
        return (logits - logits[:, known].mean(dim=1, keepdim=True))[:, known]

    theirs, ours = centred(zero_shot), centred(head.logits(image))
    expected = zero_shot.clone()
    expected[:, known] += alpha * (theirs.square().mean() / ours.square().mean()).sqrt() * ours
    others = known & (torch.arange(len(text)) != labels[:, None])
    highest, highest_of_text = (x.masked_fill(~others, -torch.inf).amax(1).mean() for x in (expected, zero_shot))
    expected[:, known] -= highest - highest_of_text
    torch.testing.assert_close(found.logits(image), expected, rtol=1e-9, atol=1e-9)  # fp64, two orders of summation
    new = F.normalize(torch.randn(2, text.shape[1], dtype=torch.float64))
    wider = found.with_new_classes(new).logits(image)
    torch.testing.assert_close(wider[:, -2:], SCALE * F.normalize(image) @ new.T)
    assert wider[:, :-2].equal(found.logits(image))


def test_with_text_of_one_class_is_the_text():
    image, labels, text = data([4, 0], 3)
    found = heads.with_text(heads.gaussian_head(image, labels, 2), image, labels, text, SCALE)
    torch.testing.assert_close(found.logits(image), heads.Head.of_text(F.normalize(text), SCALE).logits(image))


def test_balanced_divides_probabilities_by_class_frequencies():
    image, labels, _ = data([9, 1, 3], 5)
    head = heads.gaussian_head(image, labels, 3)
    expected = F.normalize(head.logits(image).softmax(dim=1) / labels.bincount(), p=1)
    torch.testing.assert_close(heads.balanced(head, labels).logits(image).softmax(dim=1), expected)


def test_balanced_changes_nothing_for_equal_counts():
    """The class without images keeps its bias, too."""
    head = heads.Head(torch.zeros(3, 5), torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(heads.balanced(head, torch.tensor([0, 2, 0, 2])).bias, head.bias)


def fitted(image: torch.Tensor, labels: torch.Tensor, text: torch.Tensor) -> dict[str, heads.Head]:
    gaussian = heads.gaussian_head(image, labels, len(text))
    l2 = heads.anchored_l2(image, labels, text, SCALE)
    return {
        "anchored": heads.anchored_probe(image, labels, text, SCALE, l2),
        "gaussian": gaussian,
        "with text": heads.with_text(gaussian, image, labels, text, SCALE),
    }


@pytest.mark.parametrize("layout", ["bf16", "fp16", "strided", "gradient and autocast"])
def test_heads_of_other_dtypes_and_layouts(layout):
    """The arithmetic is in fp64 for all of them, so that equal values give equal heads."""
    image, labels, text = data([3, 0, 4, 2], 7)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(layout, torch.float32)
    image, text = image.to(dtype), text.to(dtype)
    expected = fitted(image.float(), labels, text.float())
    if layout == "strided":
        image, text, labels = image.T.contiguous().T, torch.stack([text, text], 2)[..., 0], labels.repeat(2, 1).T[:, 0]
    with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in layout):
        found = fitted(image.requires_grad_("gradient" in layout), labels, text)
    for name, head in found.items():
        assert head.weight.dtype == torch.float32 and not head.weight.requires_grad
        assert head.weight.equal(expected[name].weight) and head.bias.equal(expected[name].bias), name


IMAGE, LABELS, TEXT = data([2, 2, 2], 4)
ANCHORED = {"image": IMAGE, "labels": LABELS, "text": TEXT, "scale": SCALE, "l2": 0.1}
L2 = {name: value for name, value in ANCHORED.items() if name != "l2"}
GAUSSIAN = {"image": IMAGE, "labels": LABELS, "classes": 3}
HEAD = heads.gaussian_head(**GAUSSIAN)
WITH_TEXT = {"head": HEAD, "image": IMAGE, "labels": LABELS, "text": TEXT, "scale": SCALE}
NAN, ZERO = IMAGE.clone(), IMAGE.clone()
NAN[1, 2], ZERO[3] = torch.nan, 0.0
BAD_DATA = [
    ({"labels": LABELS + 1}, r"labels must be in \[0, 2\], the classes; got 1 to 3"),
    ({"labels": LABELS - 1}, "got -1 to 1"),
    ({"labels": LABELS[:5]}, r"labels must be \[n=6\] to match image \[6, 4\]"),
    ({"labels": LABELS[:, None]}, r"labels must be \[n=6\]"),
    ({"labels": LABELS.double()}, "labels must be int64"),
    ({"image": IMAGE[0]}, r"image must be \[n, D\]"),
    ({"image": IMAGE[:0], "labels": LABELS[:0]}, r"image must be \[n, D\] with n, D ≥ 1"),
    ({"image": IMAGE.long()}, "image must be float32"),
    ({"image": NAN}, "image must be finite with a norm above 0; row 1 is not"),
    ({"image": ZERO}, "row 3 is not"),
]
BAD_TEXT = [
    ({"text": TEXT[:, :3]}, r"text must be \[C.*, D=4\]"),
    ({"text": 0 * TEXT}, "text must be finite with a norm above 0; row 0 is not"),
    ({"scale": 0.0}, "scale must be positive and finite; got 0.0"),
]
BAD = [
    *itertools.product([heads.anchored_probe], [ANCHORED], [*BAD_DATA, *BAD_TEXT, ({"l2": 0.0}, "l2 must be pos")]),
    *itertools.product([heads.anchored_l2], [L2], [*BAD_DATA, *BAD_TEXT]),
    *itertools.product([heads.gaussian_head], [GAUSSIAN], [*BAD_DATA, ({"shrinkage": 0.0}, "shrinkage must be above")]),
    *itertools.product([heads.with_text], [WITH_TEXT], [*BAD_DATA[:5], *BAD_TEXT]),
    (heads.with_text, WITH_TEXT, ({"text": TEXT[:2]}, r"text must be \[C=3, D=4\]")),
    (heads.balanced, {"head": HEAD, "labels": LABELS}, ({"labels": LABELS + 1}, "got 1 to 3")),
    (HEAD.with_new_classes, {"text": TEXT}, ({}, "Head.with_new_classes: this head uses no texts")),
    (heads.Head.of_text(TEXT, SCALE).with_new_classes, {}, ({"text": TEXT[:, :3]}, r"text must be \[C, D=4\]")),
]


@pytest.mark.parametrize(("function", "arguments", "change"), BAD, ids=[f"{f.__name__} {bad[1]}" for f, _, bad in BAD])
def test_heads_refuse(function, arguments, change):
    changed, message = change
    with pytest.raises((ValueError, TypeError), match=message):
        function(**{**arguments, **changed})
