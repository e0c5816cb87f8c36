"""`graphed` on a GPU: replays equal eager steps."""

from __future__ import annotations

import contextlib

import pytest
import torch

import skipkernels as sk
from skipkernels.graphs import graphed_step as graphed
from tests.graphs.graph_runs import CLASSES, Run, batches, skip_clip
from tests.graphs.test_capture import CHANGES
from tests.models import tiny_tokens

pytestmark = pytest.mark.gpu


@contextlib.contextmanager
def sync_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("kind", "cast", "images"),
    [("in_backward", False, False), ("in_backward", True, False), ("in_step", True, True), ("stochastic", False, True)],
)
def test_replays_equal_eager_steps(kind, cast, images):
    """Ten replays and ten eager steps: weights, draws, learning rates through a schedule, rounding, kept casts.

    The first labels have stride 0, as in the benchmark.
    """
    runs = Run(kind, by_graph=True), Run(kind, by_graph=False)
    step = runs[0].step
    if cast:
        for run in runs:
            run.step = torch.autocast("cuda", torch.bfloat16)(run.step)  # once for each step
    found = []
    some, short = (
        [(x.cuda(), labels.cuda()) for x, labels in batches(runs[0].clip, count, size, images=images)]
        for count, size in ((graphed.WARMUP + 11, 4), (1, 3))
    )
    some[0] = some[0][0], some[0][1][:1].expand(4)
    for run in runs:
        run.clip.cuda()
        run.train(some[: graphed.WARMUP + 1])
        with sync_is_an_error():
            outs = []
            for x, labels in some[graphed.WARMUP + 1 :]:
                out = run.step(x, labels)
                outs += [out.loss.clone(), out.class_ids.clone()]
                run.schedule.step()
        found.append([*(x.tolist() for x in outs), *run.train(short), *run.train(some[:2])])
    assert found[0] == found[1]
    assert step.is_captured


def test_graph_is_captured_again():
    """After eager steps with a loss that is held, a loaded state, new classes, other options and a larger batch."""
    ours, theirs = Run("in_backward", by_graph=True), Run("in_backward", by_graph=False)
    some, large = ([(x.cuda(), labels.cuda()) for x, labels in batches(ours.clip, 5, n)] for n in (4, 20))
    for run in (ours, theirs):
        run.clip.cuda()
    held = [run.plain(*some[0]) for run in (ours, theirs)]

    def new_classes(run: Run) -> None:
        run.clip.set_classes(tiny_tokens(CLASSES + 5, seed=5).cuda())

    def smooth(run: Run) -> None:
        run.clip.label_smoothing = 0.2

    for change in (lambda run: None, CHANGES["state loaded"], new_classes, smooth, CHANGES["without momentum"]):
        for run in (ours, theirs):
            change(run)
        assert ours.train(some) == theirs.train(some)
        assert ours.step.is_captured
    assert ours.train(large) == theirs.train(large)
    assert ours.train(some) == theirs.train(some) and held[0].loss.equal(held[1].loss)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_replays_of_other_optimizers(kind):
    losses = []
    for by_graph in (True, False):
        clip = skip_clip(tail="fixed").cuda()  # the K of a graph and of other steps are equal
        groups = clip.parameter_groups(text_lr=torch.tensor(0.02).cuda(), image_lr=torch.tensor(0.01).cuda())
        optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(groups, momentum=0.9, fused=True)
            if kind == "sgd"
            else torch.optim.AdamW(groups, capturable=True)
        )
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        step = sk.graphed(clip, optimizer, batch_size=4 if by_graph else 5)  # batches of 4: captured, or not
        found = []
        for x, labels in batches(skip_clip(), 10):
            found.append(step(x.cuda(), labels.cuda()).loss.item())
            schedule.step()
        assert step.is_captured == by_graph
        losses.append(found)
    assert losses[0] == losses[1]


@pytest.mark.filterwarnings("ignore:graphed. steps run one by one")
def test_memory_is_reused_after_a_failed_capture():
    """A host sync fails the capture. Steps then run eagerly, and the allocator frees what two streams used."""
    run = Run("in_backward", by_graph=True)
    run.clip.cuda()
    some = [(x.cuda(), labels.cuda()) for x, labels in batches(skip_clip(), graphed.WARMUP)]
    run.train(some)
    handle = run.clip.model.visual.ln_post.weight.register_hook(lambda gradient: gradient.sum().item() and None)
    run.train(some[:1])
    handle.remove()
    assert not run.step.is_captured and torch.cuda.current_stream() == torch.cuda.default_stream()
    run.train(some)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    side = torch.cuda.Stream()
    for _ in range(3):
        x = torch.empty(1 << 20, device="cuda")
        x.record_stream(side)
        del x
    torch.cuda.synchronize()
    torch.empty(1, device="cuda")  # the allocator frees what was recorded at its next call
    assert torch.cuda.memory_allocated() <= held + (1 << 10)
