"""`graphed` as on a GPU, with the stand-in of `gpu_stand_in.py`: replays of a captured step equal plain steps."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import skipkernels as sk
from skipkernels import optimizer
from skipkernels.graphs import graphed_step as graphed
from skipkernels.graphs import parts
from skipkernels.ops import sgd_momentum
from skipkernels.selection import RankSampler
from tests.graphs.gpu_stand_in import stand_in
from tests.graphs.graph_runs import CLASSES, Run, batches, skip_clip
from tests.models import tiny_tokens


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(Run, "captures", True)
    with stand_in() as gpu:
        yield gpu


@pytest.fixture(params=["cpu", "captured"])
def path(request) -> str:
    """The plain loop of the CPU, and the captured path with the stand-in."""
    if request.param == "captured":
        request.getfixturevalue("gpu")
    return request.param


@pytest.mark.parametrize(
    ("path", "kind"),
    [("cpu", "in_backward"), *(("captured", kind) for kind in ("in_backward", "in_step", "stochastic", "torch"))],
    indirect=["path"],
)
def test_graphed_equals_the_loop(path, kind, request):
    """Weights, draws, learning rates and rounding have the same bits, with evaluation and a short batch in between."""
    ours, theirs = Run(kind, by_graph=True), Run(kind, by_graph=False)
    some, short = batches(ours.clip, 8), batches(ours.clip, 1, batch=3)
    for part in (some, short, some[:3]):
        assert ours.train(part) == theirs.train(part)
        for run in (ours, theirs):
            run.clip.eval()
        assert ours.clip.predict(some[0][0]).equal(theirs.clip.predict(some[0][0]))
        for run in (ours, theirs):
            run.clip.train()
    replays = 8 - graphed.WARMUP + 3  # not of the short batch
    assert path == "cpu" or request.getfixturevalue("gpu").replays == replays


def test_updates_on_both_streams_equal_the_loop(gpu, monkeypatch):
    """The weights of both sides are in one group, and few gradients are gathered; a graph holds its own tables."""
    monkeypatch.setattr(optimizer, "_GATHERED_BYTES", 2048)
    found = []
    for by_graph in (True, False):
        run = Run("one group", by_graph=by_graph)
        for batch in batches(run.clip, 10):
            found.append(run.train([batch]))
            sgd_momentum._kept_table.cache_clear()
    assert found[:10] == found[10:] and gpu.captures == 1


@pytest.mark.parametrize("images", [False, True], ids=["features", "images"])
def test_warm_up_capture_and_replays_read_the_same_tensors(gpu, monkeypatch, images):
    """Whatever the caller passes: other strides or alignments would need other kernels, loaded during the capture."""
    ours, theirs, seen = Run("in_step", by_graph=True), Run("in_step", by_graph=False), set()
    encode, classes_at_ranks = ours.clip.images.encode, parts.classes_at_ranks

    def at_ranks(scores: Tensor, ranks: Tensor, labels: Tensor) -> Any:
        seen.add(("labels", labels.data_ptr(), labels.stride()))
        return classes_at_ranks(scores, ranks, labels)

    def encoded(x: Tensor) -> Tensor:
        seen.add(("images", x.data_ptr(), x.stride()))
        return encode(x)

    some = [(x[::2], labels[:1].expand(4)) for x, labels in batches(ours.clip, 3, batch=8, images=images)]
    some += batches(ours.clip, 3, images=images)
    expected = theirs.train(some)
    monkeypatch.setattr(parts, "classes_at_ranks", at_ranks)
    monkeypatch.setattr(ours.clip.images, "encode", encoded)
    assert ours.train(some) == expected
    assert len(seen) == 2 and gpu.captures == 1 and gpu.replays == 6 - graphed.WARMUP


@pytest.mark.parametrize(("path", "kind"), [("cpu", "in_backward"), ("captured", "stochastic")], indirect=["path"])
def test_graphed_resumes_within_an_epoch(path, kind):
    whole, cut = Run(kind, by_graph=True), Run(kind, by_graph=True)
    some = batches(whole.clip, 7)
    whole.train(some[:5])
    state = whole.state()
    rest = whole.train(some[5:])
    cut.train(some[2:7])  # other steps, with captured graphs
    cut.load(state)
    assert cut.train(some[5:]) == rest
    whole.load(state)
    assert whole.train(some[5:]) == rest


def test_graphed_begins_again_on_another_gpu(gpu):
    """The stand-in has one device, so the steps before are put on another: streams and graphs are new."""
    ours, theirs = Run("torch", by_graph=True), Run("torch", by_graph=False)
    some = batches(ours.clip, 5)
    before = ours.train(some)
    static = ours.step._static
    static.kind = tuple(torch.device("meta") if isinstance(x, torch.device) else x for x in static.kind)
    streams = ours.step._streams = ours.step._streams._replace(device=torch.device("meta"))
    after = ours.train(some)
    assert gpu.captures == 2 and ours.step._streams.step is not streams.step
    assert [before, after] == [theirs.train(some), theirs.train(some)]


def _freeze(run: Run) -> None:
    run.clip.model.ln_final.weight.requires_grad_(False)


def _without_momentum(run: Run) -> None:
    for group in run.optimizer.param_groups:
        group["momentum"] = 0.0


def _load(run: Run) -> None:
    run.load(run.state())


def _replace_parameter(run: Run) -> None:
    run.clip.model.ln_final.weight = nn.Parameter(run.clip.model.ln_final.weight.detach().clone())


def _checkpoint(run: Run) -> None:
    run.clip.set_grad_checkpointing()


def _sample(run: Run, **options: Any) -> None:
    for name, value in options.items():
        setattr(run.clip.sampler, name, value)


def _set_classes(run: Run) -> None:
    run.clip.set_classes(tiny_tokens(CLASSES, seed=5))
    run.clip.set_classes(tiny_tokens(CLASSES + 1, seed=10), torch.linspace(0, 2, CLASSES + 1))


def _cut_again(run: Run) -> None:
    tower = run.clip.images.tower
    tower.cut = replace(tower.cut, chunk=7)  # any field


def _larger_batch(run: Run) -> None:
    run.train(batches(run.clip, 1, batch=20))  # raises the number of kept classes for the rest of the run


def _other_sampler(run: Run) -> None:
    run.clip.sampler = RankSampler(keep_ratio=0.3, generator=torch.Generator().manual_seed(8))


def _smooth(run: Run) -> None:
    run.clip.label_smoothing = 0.2


CHANGES = {
    "weight frozen": _freeze,
    "without momentum": _without_momentum,
    "another parameter": _replace_parameter,
    "checkpointing": _checkpoint,
    "state loaded": _load,
    "tail drawn once": partial(_sample, tail="fixed"),
    "fewer classes": partial(_sample, keep_ratio=0.2, decay=3.0, max_tail=2),
    "other classes": _set_classes,
    "another sampler": _other_sampler,
    "larger batch": _larger_batch,
    "label smoothing": _smooth,
    "another cut": _cut_again,
}


@pytest.mark.parametrize("change", CHANGES)
def test_graphed_captures_again_after_a_change(gpu, change):
    ours, theirs = Run("in_step", by_graph=True), Run("in_step", by_graph=False)
    some = batches(ours.clip, 5)
    assert ours.train(some) == theirs.train(some)
    captured = weakref.ref(ours.clip.texts)
    for run in (ours, theirs):
        CHANGES[change](run)
    assert captured() is not None, "else its addresses could be used again, and the graph would not be dropped"
    assert ours.train(some) == theirs.train(some)
    assert gpu.replays == 2 + 2, "three more steps one by one, before the next capture"
    assert gpu.captures == 2


def test_graphed_captures_once_with_a_cycled_momentum(gpu):
    """OneCycleLR changes rate and momentum in each step, and here the weight decay changes, too."""
    runs = Run("in_backward", by_graph=True), Run("in_backward", by_graph=False)
    some, found = batches(runs[0].clip, 12), []
    for run in runs:
        run.schedule = torch.optim.lr_scheduler.OneCycleLR(run.optimizer, [0.02] * len(run.optimizer.param_groups), 24)
        found.append(run.train(some))
        for group in run.optimizer.param_groups:
            group["weight_decay"] = 0.5
        found[-1] += run.train(some)
    assert found[0] == found[1]
    assert (gpu.captures, gpu.replays) == (1, 24 - graphed.WARMUP)


def test_a_held_loss_keeps_no_node_of_an_earlier_step(gpu):
    """A node that a loss keeps alive accumulates on the stream of its step, which would break the capture."""
    run = Run("in_step", by_graph=True)
    x, labels = batches(run.clip, 1)[0]
    held = run.clip(x, labels)

    def node(parameter):
        return parameter.view_as(parameter).grad_fn.next_functions[0][0]

    weights = run.clip.trainable_parameters()
    for weight in weights:
        node(weight).metadata["of"] = "the held loss"
    at_capture, record = [], graphed.capture_graph

    def watched(*arguments):
        at_capture.extend(node(weight).metadata.get("of") for weight in weights)
        return record(*arguments)

    addresses, hooks = [weight.data_ptr() for weight in weights], []
    handle = weights[0].register_hook(hooks.append)
    with mock.patch.object(graphed, "capture_graph", watched):
        run.train([(x, labels)] * (graphed.WARMUP + 2))
    # A replay runs no hook.
    assert at_capture == [None] * len(weights) and gpu.replays == 2 and len(hooks) == graphed.WARMUP + 1
    assert [weight.data_ptr() for weight in weights] == addresses
    handle.remove()
    assert held.loss.requires_grad, "it was alive"


@pytest.mark.parametrize(("kind", "error"), [("in_backward", RuntimeError), ("in_step", ValueError)])
def test_steps_run_the_loop_after_a_failed_capture(gpu, kind, error):
    """Also when it fails within backward: weights, draws and the optimizer are those of the loop."""
    ours, theirs = Run(kind, by_graph=True), Run(kind, by_graph=False)
    for run in (ours, theirs):
        run.clip.sampler.tail = "fixed"  # the K of a graph and of other steps are equal

    def stop(*_):
        raise error("operation not permitted when stream is capturing\nCUDA kernel errors might …")

    def fails(*arguments):
        handle = ours.clip.model.visual.ln_post.weight.register_hook(stop)
        try:
            gpu.capture_graph(*arguments)
        except error as first:
            raise RuntimeError("the capture was invalidated") from first  # by its end
        finally:
            handle.remove()

    some = batches(ours.clip, 8)
    warned = pytest.warns(
        UserWarning,
        match=r"^graphed: steps run one by one until reset\(\): the capture failed: operation .* capturing\.$",
    )
    with warned, mock.patch.object(graphed, "capture_graph", fails):
        found = ours.train(some)
    assert found == theirs.train(some)
    assert (gpu.captures, gpu.replays) == (1, 0) and "the capture failed" in repr(ours.step)
    ours.step.reset()
    assert ours.train(some) == theirs.train(some)
    assert (gpu.captures, gpu.replays) == (2, len(some) - graphed.WARMUP)


@pytest.mark.filterwarnings("ignore:skipkernels. a block is not fused")
@pytest.mark.parametrize(("name", "of_all_modules"), [("ln_post", True), ("transformer.resblocks.2.ln_1", False)])
def test_graphed_runs_hooks_of_called_modules(gpu, name, of_all_modules):
    """Hooks of blocks and heads, which SkipCLIP calls, run in each step and not only at the capture."""
    run, calls = Run("in_step", by_graph=True), []
    some = batches(run.clip, 5)
    run.train(some)
    head = run.clip.model.visual.get_submodule(name)
    register = nn.modules.module.register_module_forward_hook if of_all_modules else head.register_forward_hook
    handle = register(lambda module, *_: calls.append(1) if module is head else None)
    with pytest.warns(UserWarning, match=r"^graphed: steps run one by one until reset\(\): .* hooks") as warned:
        run.train(some)
    assert len(calls) == 5 and sum(str(x.message).startswith("graphed") for x in warned) == 1
    handle.remove()
    run.step.reset()
    replays = gpu.replays
    run.train(some)
    assert len(calls) == 5 and gpu.replays == replays + len(some) - graphed.WARMUP


def test_graphed_needs_training_mode(path):
    run = Run("in_step", by_graph=True)
    some = batches(run.clip, 5)
    run.train(some)
    run.clip.eval()
    with pytest.raises(RuntimeError, match=r"^graphed: a step needs clip.train\(\)"):
        run.step(*some[0])


def test_graphed_refuses_an_optimizer_of_other_parameters(path):
    run, other = Run("in_step", by_graph=True), skip_clip()
    with pytest.raises(ValueError, match="graphed: optimizer must hold parameters of this SkipCLIP that train"):
        sk.graphed(other, run.optimizer, batch_size=4)
    some = batches(run.clip, graphed.WARMUP + 2)
    for x, labels in some:
        run.step(x, labels)
    sk.add_lora(run.clip, 2)
    drawn = run.clip.sampler.state_dict()
    with pytest.raises(ValueError, match="after add_lora or merge_lora"):
        run.step(*some[0])
    assert run.clip.sampler.state_dict()["generator"].equal(drawn["generator"]), "refused before the draw"


def _sgd(clip: sk.SkipCLIP, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(clip.parameter_groups(text_lr=0.1, image_lr=0.1), **options)


def _fused(clip: sk.SkipCLIP) -> sk.FusedSGD:
    return sk.FusedSGD(clip.trainable_parameters())


def _hooked_module(clip: sk.SkipCLIP) -> torch.optim.Optimizer:
    clip.model.visual.ln_post.register_forward_hook(lambda *_: None)
    return _fused(clip)


def _hooked_optimizer(clip: sk.SkipCLIP) -> torch.optim.Optimizer:
    (optimizer := _fused(clip)).register_step_post_hook(lambda *_: None)
    return optimizer


def _own_sampler(clip: sk.SkipCLIP) -> torch.optim.Optimizer:
    clip.sampler.select = lambda *_: None  # as in a subclass
    return _fused(clip)


# The optimizer of a SkipCLIP, and words of the reason against a capture
NOT_CAPTURABLE: list[tuple[Callable[[sk.SkipCLIP], torch.optim.Optimizer], str]] = [
    (_sgd, "SGD is not capturable. Construct it with fused=True"),
    (partial(_sgd, fused=True), "SGD has learning rates that a graph would take as constant"),
    (lambda clip: torch.optim.AdamW(clip.model.parameters()), "AdamW is not capturable. Construct it with capturable="),
    (_hooked_module, "visual.ln_post has hooks"),
    (_hooked_optimizer, "FusedSGD has step hooks"),
    (_own_sampler, "a graph takes the ranks that RankSampler.draw returns"),
]


@pytest.mark.parametrize(("make", "words"), NOT_CAPTURABLE, ids=[words for _, words in NOT_CAPTURABLE])
def test_graphed_refuses_what_cannot_be_captured(gpu, make, words):
    clip = skip_clip()
    with pytest.raises(ValueError, match=f"^graphed: this step cannot be captured: {words}"):
        sk.graphed(clip, make(clip), batch_size=4)


def test_graphed_refuses_an_allocator_and_a_batch_size(gpu, monkeypatch):
    clip = skip_clip()
    with pytest.raises(ValueError, match="^graphed: batch_size must be at least 1, a whole number; got 0"):
        sk.graphed(clip, _fused(clip), batch_size=0)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    with pytest.raises(ValueError, match="cannot be captured: the allocator cudaMallocAsync"):
        sk.graphed(clip, _fused(clip), batch_size=4)


def test_graphed_refuses_a_text_cache_unless_texts_are_constant(gpu, tmp_path):
    cached, in_memory = skip_clip(text_cache=tmp_path / "trained"), copy.deepcopy(skip_clip())
    constant = skip_clip(text_cache=tmp_path / "constant", train_text=False)
    with pytest.raises(ValueError, match="^graphed: this step cannot be captured: text_cache, as large as here"):
        sk.graphed(cached, _fused(cached), batch_size=4)
    for clip in (in_memory, constant):
        assert not sk.graphed(clip, _fused(clip), batch_size=4).is_captured


def test_graphed_refuses_batches(gpu):
    (x, labels), step = batches(skip_clip(), 1)[0], Run("in_step", by_graph=True).step
    with pytest.raises(RuntimeError, match="^graphed: fp16 autocast needs a GradScaler"):
        with torch.autocast("cpu", torch.float16):
            step(x, labels)
    with pytest.raises(ValueError, match="^graphed: pixel_values must not require grad"):
        step(x.clone().requires_grad_(), labels)
    with pytest.raises(TypeError, match="labels must be an int64 tensor"):
        step(x, labels.tolist())


def test_graphed_follows_autocast(gpu):
    """One graph for each setting; casts of one step are not used in another."""
    ours, theirs = Run("in_step", by_graph=True), Run("in_step", by_graph=False)
    some = batches(ours.clip, 6)
    for enabled in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            a = ours.train(some)
        b = []
        for x, labels in some:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                out = theirs.forward(x, labels)
            out.loss.backward()
            theirs.optimizer.step()
            theirs.optimizer.zero_grad()
            theirs.schedule.step()
            b += [out.loss.item(), out.class_ids.tolist()]
        assert a == [*b, *(p.detach().tolist() for p in theirs.clip.parameters())]


@pytest.fixture
def casts_of_captures(gpu) -> Iterator[list[int]]:
    """Number of copies of weights that train, in each capture."""
    found: list[int] = []
    cast: list[bool] = []
    foreach_copy, capture = torch._foreach_copy_, gpu.capture_graph

    def copied(targets, sources):
        cast.append(sources[0].requires_grad)
        foreach_copy(targets, sources)

    def captured(*arguments):
        cast.clear()
        result = capture(*arguments)
        found.append(sum(cast))
        return result

    with mock.patch.object(torch, "_foreach_copy_", copied), mock.patch.object(graphed, "capture_graph", captured):
        yield found


@pytest.mark.parametrize("kind", ["in_backward", "in_step"])
def test_graph_with_kept_casts(gpu, casts_of_captures, kind):
    """A replay casts no weight that trains, and follows changed weights, evaluations and another graph."""
    ours, theirs = Run(kind, by_graph=True), Run(kind, by_graph=False)
    other, (x, labels) = sk.graphed(ours.clip, ours.optimizer, batch_size=4), batches(ours.clip, 1)[0]

    def train(step: Any, count: int) -> None:
        for _ in range(count):
            with torch.autocast("cpu", torch.bfloat16):
                assert step(x, labels).loss.item() == theirs.step(x, labels).loss.item()
        assert all(map(torch.equal, ours.clip.parameters(), theirs.clip.parameters()))

    train(ours.step, graphed.WARMUP + 2)
    for run in (ours, theirs):
        with torch.no_grad():
            run.clip.model.visual.transformer.resblocks[-1].mlp.c_fc.weight.mul_(1.5)
            run.clip.eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert ours.clip.predict(x).equal(theirs.clip.predict(x))
    for run in (ours, theirs):
        run.clip.train()
    train(ours.step, 2)
    assert casts_of_captures == [0] and gpu.replays == 4
    train(other, graphed.WARMUP + 2)
    train(ours.step, 2)  # the weights that the other graph changed are copied before a replay
    assert casts_of_captures == [0, 0] and gpu.replays == 8


def test_replays_increase_the_versions_of_weights(gpu, monkeypatch):
    """By which the casts of another graph, and autograd, detect the update."""
    run, increased = Run("in_step", by_graph=True), []
    (x, labels) = batches(run.clip, 1)[0]
    monkeypatch.setattr(torch.autograd.graph, "increment_version", lambda weights: increased.append(list(weights)))
    for _ in range(graphed.WARMUP + 1):
        run.step(x, labels)
    held = {id(p) for p in run.clip.trainable_parameters()}
    assert gpu.replays == 1 and {id(p) for p in increased[-1]} == held
