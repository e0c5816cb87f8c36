"""`graphed`: nothing in a step depends on the host, and replays of a captured step equal plain steps.

Without a GPU, the first is tested on the meta device: the code takes the paths of a GPU, and whatever needs a value on
the host raises. The second is tested on the CPU with `FakeGraph`.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from typing import Any

import pytest
import torch
from models import tiny_batch, tiny_clip, tiny_tokens
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import skipkernels as sk
from bench.meta_device import meta_as_gpu
from skipkernels.clip.step import LossOptions, step
from skipkernels.graphs import capturable
from skipkernels.graphs import graphed_step as graphed

CLASSES = 30
COPIES = torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default


class DeviceOnly(TorchDispatchMode):
    """Refuse operators that mix host and device, or read a value of the device, and count those of the device.

    The ranks of a step are the one exception: `copies` counts copies of int64 from the host that do not wait.
    """

    def __init__(self):
        super().__init__()
        self.count = self.copies = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        devices = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = function(*args, **(kwargs or {}))
        devices |= {x.device.type for x in tree_leaves(out) if isinstance(x, Tensor)}
        if devices == {"cpu", "meta"} and function in COPIES and out.dtype == torch.int64:
            self.copies += True in (*args[2:], (kwargs or {}).get("non_blocking"))
        elif "meta" in devices:
            assert devices == {"meta"}, f"{function} takes or returns a tensor of the host"
            assert torch.Tag.data_dependent_output not in function.tags, f"{function} is a host sync"
            # `index` has the tag because of masks, which raise an error on the meta device.
            dynamic = torch.Tag.dynamic_output_shape in function.tags and function is not torch.ops.aten.index.Tensor
            assert not dynamic, f"{function} has a data-dependent shape"
            self.count += 1
        return out


@pytest.fixture
def as_on_a_gpu():
    with meta_as_gpu():
        yield


def skip_clip(dtype: torch.dtype = torch.float32, **options: Any) -> sk.SkipCLIP:
    """SkipCLIP in training mode, with weights in `dtype` and the logit scale in fp32."""
    model = tiny_clip(torch.float32)
    if options.pop("unfused", False):
        model.transformer.resblocks[1].mlp.gelu = nn.SiLU()
    for name, parameter in model.named_parameters():
        if name != "logit_scale":
            parameter.data = parameter.data.to(dtype)
    return sk.SkipCLIP(model, **{"tokens": tiny_tokens(CLASSES), "skip_layers": 1, **options}).train()


def batches(clip: sk.SkipCLIP, count: int, batch: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Batches (features at the cut, labels); without a cut, (images, labels)."""
    found = []
    for seed in range(count):
        images, labels = tiny_batch(batch, CLASSES, clip.images.tower.dtype, seed=seed)
        found.append((clip.encode_lower(images) if clip.skip_layers[0] else images, labels))
    return found


def groups_of(clip: sk.SkipCLIP, *, stochastic: bool = False) -> list[dict[str, Any]]:
    """Parameter groups for FusedSGD; with `stochastic`, bf16 parameters are in groups with stochastic rounding."""
    groups = clip.parameter_groups(text_lr=0.02, image_lr=0.01)
    return [
        {**group, "params": params, "stochastic_rounding": bf16}
        for group in groups
        for bf16 in ((True, False) if stochastic else (False,))
        if (params := [p for p in group["params"] if not stochastic or (p.dtype == torch.bfloat16) == bf16])
    ]


def persistent_tensors(clip: sk.SkipCLIP, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Tensors that exist between steps and are read by the kernels of a step."""
    found = dict(clip.model.named_parameters()) | dict(clip.model.named_buffers())
    found |= {f"of texts {number}": x for number, x in enumerate(clip.texts.step_tensors())}
    found |= {"ranks": clip.sampler.reserved}
    for number, state in enumerate(optimizer.state.values()):
        found |= {f"{name} {number}": x for name, x in state.items() if isinstance(x, Tensor)}
    if isinstance(optimizer, sk.FusedSGD):
        found |= {f"option {key}": copy for key, (copy, _) in optimizer._numbers.items()}
    for number, group in enumerate(optimizer.param_groups):
        found |= {f"{name} of group {number}": x for name, x in group.items() if isinstance(x, Tensor)}
    return found


@pytest.mark.parametrize(
    ("precision", "in_backward", "options"),
    [
        ("fp32", False, {}),
        ("bf16", True, {"memory": "min"}),
        ("bf16-sr", True, {"label_smoothing": 0.1, "class_weight": torch.linspace(0, 2, CLASSES)}),
        ("bf16-sr", False, {"tail": "fixed"}),
        ("bf16", True, {"tokens": torch.stack([tiny_tokens(CLASSES, seed=seed) for seed in range(2)], dim=1)}),
        ("fp32", False, {"unfused": True}),
        ("fp32", True, {"skip_layers": 0, "train_logit_scale": True}),
        ("bf16", True, {"train_text": False}),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else str(value),
)
def test_nothing_from_the_host_enters_a_step(as_on_a_gpu, monkeypatch, options, precision, in_backward):
    clip = skip_clip(torch.bfloat16 if precision == "bf16-sr" else torch.float32, **options)
    x, labels = batches(clip, 1)[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        clip(x, labels)  # caches the text features at the cut, which needs values
    clip.to("meta")
    x, labels = x.to("meta"), labels.to("meta")
    groups = groups_of(clip, stochastic=precision == "bf16-sr")
    optimizer = sk.FusedSGD(groups, momentum=0.9, weight_decay=0.01, in_backward=in_backward)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    step, modes, held = sk.graphed(clip, optimizer, batch_size=4), [], []
    for number in range(4):
        modes.append(DeviceOnly() if number else contextlib.nullcontext())
        if number == 2:  # a query of the free memory is a call of the driver
            monkeypatch.setattr("skipkernels.memory.free_bytes", lambda device: 1 / 0)
        with modes[number], torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            step(x, labels)
        schedule.step()
        held.append(persistent_tensors(clip, optimizer))
    for name, tensor in held[0].items():
        assert all(other[name] is tensor for other in held[1:]), f"{name} is another tensor in each step"
    assert modes[2].count == modes[3].count > 0 and [mode.copies for mode in modes[1:]] == [1, 1, 1]


def test_no_host_value_enters_the_sigmoid_loss(as_on_a_gpu):
    clip, labels = skip_clip(keep_ratio=3), torch.zeros(4, CLASSES)
    x, _ = batches(clip, 1)[0]
    kept = len(sk.pairs.sigmoid_loss(clip, x, labels, max_labels=3).class_ids)  # caches the text features at the cut
    clip.to("meta")
    x, labels = x.to("meta"), labels.to("meta")
    with DeviceOnly() as mode:
        out = sk.pairs.sigmoid_loss(clip, x, labels, max_labels=3)
        out.loss.backward()
    assert mode.count > 0 and mode.copies == 1 and abs(len(out.class_ids) - kept) <= 1, "Σq is rounded down or up"


def test_move_carries_tensors_of_no_module():
    clip = skip_clip(torch.float32)
    x, labels = batches(clip, 1)[0]
    clip(x, labels)
    rows = clip.texts.table().features
    clip.to("meta")
    prompts, head = clip.texts.templates[0].tensors().values(), clip.images.tower.head
    for tensor in (clip.prototypes, clip.texts.table().features, *prompts, *head[1].parameters(), head[2]):
        assert tensor.device.type == "meta"
    assert clip.texts.table().shape == rows.shape[1:] and not clip.images.is_stale()


# ---- on the CPU: the plain loop, and the captured path with a fake graph --------------------------------------------


class FakeGraph:
    """Replacement of a CUDA graph: a replay runs the step again and copies its results into the static buffers."""

    replays = 0

    def __init__(self, step, out, pool):
        self.step, self.out = step, out
        weakref.finalize(self, FakePools.release, pool)

    def replay(self) -> None:
        FakeGraph.replays += 1
        for static, new in zip(self.out, self.step(), strict=True):
            if static is not None:  # logits
                static.copy_(new)


class FakePools:
    """Memory pools of graphs, as the caching allocator counts their users: one without users cannot be used again."""

    users: dict[int, int] = {}
    captures = 0

    @classmethod
    def create(cls) -> int:
        cls.users[len(cls.users)] = 0
        return len(cls.users) - 1

    @classmethod
    def begin(cls, pool: int) -> None:
        assert cls.users[pool] >= 0, "INTERNAL ASSERT FAILED: it->second->use_count > 0"
        cls.users[pool] += 1
        cls.captures += 1

    @classmethod
    def release(cls, pool: int) -> None:
        cls.users[pool] -= 1
        if cls.users[pool] == 0:
            cls.users[pool] = -1


class FakeStream:
    """A stream that remembers the streams for which it waited."""

    def __init__(self, *_: Any):
        self.waited: list[FakeStream] = []

    def wait_stream(self, other: FakeStream) -> None:
        self.waited.append(other)


@pytest.fixture
def fake_cuda(monkeypatch):
    """Run the captured path on the CPU; return a function that returns the number of replays."""

    def record(step, stream, pool):
        """A capture launches nothing: undo what the function does."""
        FakePools.begin(pool)
        clip, optimizer = GRAPHED[-1]._clip, GRAPHED[-1]._optimizer
        tensors = list(persistent_tensors(clip, optimizer).values())
        before = [x.detach().clone() for x in tensors]
        random = torch.get_rng_state()
        draws, out = clip.sampler.generator.get_state(), step()
        assert clip.sampler.generator.get_state().equal(draws), "a capture draws nothing on the host"
        torch.set_rng_state(random)
        with torch.no_grad():
            for x, value in zip(tensors, before, strict=True):
                x.copy_(value)
        return FakeGraph(step, out, pool), out

    monkeypatch.setattr(Run, "captures", True)
    monkeypatch.setattr(graphed.GraphedStep, "_on_gpu", lambda self: GRAPHED.append(self) or True)
    monkeypatch.setattr(graphed, "record", record)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", FakePools.create)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None)
    FakeGraph.replays = FakePools.captures = 0
    yield lambda: FakeGraph.replays
    GRAPHED.clear()


GRAPHED: list[graphed.GraphedStep] = []  # steps of a test; the last one is captured


@pytest.fixture(params=["cpu", "captured"])
def path(request) -> str:
    """The plain loop of the CPU, and the captured path with a fake graph."""
    if request.param == "captured":
        request.getfixturevalue("fake_cuda")
    return request.param


def optimizer_of(kind: str, clip: sk.SkipCLIP) -> torch.optim.Optimizer:
    groups = groups_of(clip, stochastic=kind == "stochastic")
    if kind == "adam":
        return torch.optim.AdamW([{k: v for k, v in g.items() if k != "stochastic_rounding"} for g in groups])
    return sk.FusedSGD(groups, momentum=0.9, weight_decay=0.01, in_backward=kind == "in_backward")


class Run:
    """SkipCLIP, optimizer and schedule, trained by `graphed` or in a plain loop."""

    captures = False  # True where graphs are captured: K is the same in every step

    def __init__(self, kind: str, *, by_graph: bool):
        self.clip = skip_clip(torch.bfloat16 if kind == "stochastic" else torch.float32)
        self.optimizer = optimizer_of(kind, self.clip)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.8)
        self.step = sk.graphed(self.clip, self.optimizer, batch_size=4) if by_graph else self.plain

    def plain(self, x: Tensor, labels: Tensor) -> sk.SkipOutput:
        out = self.forward(x, labels)
        out.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return out

    def forward(self, x: Tensor, labels: Tensor) -> sk.SkipOutput:
        if not (self.captures or x.is_cuda):
            return self.clip(x, labels)
        sampler = self.clip.sampler
        sampler.reserve(x.device, len(self.clip.prototypes), len(x))
        ranks, image = graphed._ReservedRanks(sampler), self.clip.images.encode(x)
        options = LossOptions(self.clip.label_smoothing, self.clip.class_weight)
        return step(image, labels, self.clip.texts, ranks, self.clip.scale, options)

    def train(self, some: list[tuple[Tensor, Tensor]]) -> list[Any]:
        """Losses and classes of the steps, and the weights after them."""
        found: list[Any] = []
        for x, labels in some:
            out = self.step(x, labels)
            found += [out.loss.item(), out.class_ids.tolist()]
            self.schedule.step()
        return [*found, *(p.detach().tolist() for p in self.clip.parameters())]

    def state(self) -> Any:
        states = self.clip.state_dict(), self.optimizer.state_dict(), self.schedule.state_dict()
        return copy.deepcopy(states)

    def load(self, state: Any) -> None:
        for part, saved in zip((self.clip, self.optimizer, self.schedule), copy.deepcopy(state), strict=True):
            part.load_state_dict(saved)


@pytest.fixture
def without_capturable(monkeypatch):
    """Do not check that an optimizer is capturable: on a CPU Adam cannot be, and the fake graph does not need it."""
    monkeypatch.setattr(capturable, "_why_optimizer_is_not_capturable", lambda optimizer: None)


@pytest.mark.parametrize(
    ("path", "kind"),
    [("cpu", "in_backward"), ("captured", "in_backward"), ("captured", "in_step"), ("captured", "stochastic")],
    indirect=["path"],
)
def test_graphed_equals_the_loop(path, kind):
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
    assert FakeGraph.replays == (replays if path == "captured" else 0)


def test_graphed_follows_a_larger_batch(fake_cuda):
    """A larger batch raises the number of kept classes for the rest of the run: the graph reads them elsewhere."""
    ours, theirs = Run("in_step", by_graph=True), Run("in_step", by_graph=False)
    some, large = batches(ours.clip, 4), batches(ours.clip, 1, batch=20)
    kept = []
    for part in (some, large, some):
        assert ours.train(part) == theirs.train(part)
        kept.append(ours.clip.sampler.expected_keep(CLASSES, 4))
    assert kept[0] < kept[1] == kept[2] and fake_cuda() == 2


def test_graphed_follows_changed_options(fake_cuda):
    ours, theirs = Run("in_step", by_graph=True), Run("in_step", by_graph=False)
    some, kept = batches(ours.clip, graphed.WARMUP + 2), []
    for options in ({}, {"decay": 3.0}, {"max_tail": 2}, {"tail": "fixed"}, {"keep_ratio": 0.2}):
        for run in (ours, theirs):
            for name, value in options.items():
                setattr(run.clip.sampler, name, value)
        found = ours.train(some)
        assert found == theirs.train(some)
        kept.append(len(found[1]))
    assert kept[0] < kept[2] < kept[1] and fake_cuda() == 5 * 2


def test_graphed_follows_new_classes_and_label_smoothing(fake_cuda):
    ours, theirs = Run("in_step", by_graph=True), Run("in_step", by_graph=False)
    some = batches(ours.clip, graphed.WARMUP + 1)
    for seed in range(2):
        assert ours.train(some) == theirs.train(some)
        captured = weakref.ref(ours.clip.texts)
        for run in (ours, theirs):
            run.clip.set_classes(tiny_tokens(CLASSES, seed=seed + 5))
            run.clip.set_classes(tiny_tokens(CLASSES + seed, seed=seed + 10), torch.linspace(0, 2, CLASSES + seed))
        assert captured() is not None, "else its addresses could be used again, and the graph would not be dropped"
    assert ours.train(some) == theirs.train(some)
    for run in (ours, theirs):
        run.clip.label_smoothing = 0.2
    assert ours.train(some) == theirs.train(some)
    assert fake_cuda() == 4


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


def test_graphed_takes_new_rates_of_other_optimizers(fake_cuda, without_capturable):
    ours, theirs = Run("adam", by_graph=True), Run("adam", by_graph=False)
    some = batches(ours.clip, 6)
    a, b = ours.train(some)[:12], theirs.train(some)[:12]
    assert fake_cuda() == 3 and a[1::2] == b[1::2]
    # The rate is a tensor in fp32, and Adam divides by small roots.
    assert a[::2] == pytest.approx(b[::2], rel=1e-3)
    assert [type(group["lr"]) for group in ours.optimizer.param_groups] == [float, float]


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


@pytest.mark.parametrize("change", [_freeze, _without_momentum, _replace_parameter, _checkpoint, _load])
def test_graphed_captures_again_after_a_change(fake_cuda, change):
    ours, theirs = Run("in_step", by_graph=True), Run("in_step", by_graph=False)
    some = batches(ours.clip, 5)
    assert ours.train(some) == theirs.train(some)
    for run in (ours, theirs):
        change(run)
    assert ours.train(some) == theirs.train(some)
    assert fake_cuda() == 2 + 2, "three more steps one by one, before the next capture"
    assert FakePools.captures == 2


def test_graphed_captures_once_with_a_cycled_momentum(fake_cuda):
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
    assert (FakePools.captures, fake_cuda()) == (1, 24 - graphed.WARMUP)


def test_a_held_loss_keeps_no_node_of_an_earlier_step(fake_cuda, monkeypatch):
    """A node that a loss keeps alive accumulates on the stream of its step, which would break the capture."""
    run = Run("in_step", by_graph=True)
    x, labels = batches(run.clip, 1)[0]
    held = run.clip(x, labels)

    def node(parameter):
        return parameter.view_as(parameter).grad_fn.next_functions[0][0]

    weights = run.clip.trainable_parameters()
    for weight in weights:
        node(weight).metadata["of"] = "the held loss"
    at_capture, record = [], graphed.record

    def watched(*arguments):
        at_capture.extend(node(weight).metadata.get("of") for weight in weights)
        return record(*arguments)

    monkeypatch.setattr(graphed, "record", watched)
    addresses, hooks = [weight.data_ptr() for weight in weights], []
    handle = weights[0].register_hook(hooks.append)
    run.train([(x, labels)] * (graphed.WARMUP + 2))
    assert at_capture == [None] * len(weights) and fake_cuda() == 2 and len(hooks) == graphed.WARMUP + 3
    assert [weight.data_ptr() for weight in weights] == addresses
    handle.remove()
    assert held.loss.requires_grad, "it was alive"


def test_overlapped_sides_wait_for_each_other(fake_cuda, monkeypatch):
    current, now, used = FakeStream(), [], []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: now[-1] if now else current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: on(stream))
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: used.append((self, stream)))

    @contextlib.contextmanager
    def on(stream):
        now.append(stream)
        yield
        now.pop()

    ours, theirs = Run("in_backward", by_graph=True), Run("in_backward", by_graph=False)
    ours.step = sk.graphed(ours.clip, ours.optimizer, batch_size=4)
    encode, seen = ours.clip.texts.encode, []

    def watched(class_ids):
        text = encode(class_ids)
        seen.append((now[-1], class_ids, text))
        return text

    monkeypatch.setattr(ours.clip.texts, "encode", watched)
    some = batches(ours.clip, 1)
    assert ours.train(some) == theirs.train(some)
    ((stream, class_ids, text),) = seen
    of_step, of_text = ours.step._gpu.stream, ours.step._gpu.text_stream
    assert stream is of_text and of_text.waited == [of_step] and of_step.waited == [current, of_text]
    assert any(x is class_ids and s is of_text for x, s in used) and any(x is text and s is of_step for x, s in used)


@pytest.mark.parametrize("kind", ["in_backward", "in_step"])
def test_steps_run_eagerly_after_a_failed_capture(fake_cuda, monkeypatch, kind):
    """Also when it fails within backward: weights, draws and the optimizer are those of the loop."""
    ours, theirs = Run(kind, by_graph=True), Run(kind, by_graph=False)

    def fails(step, stream, pool):
        FakePools.begin(pool)
        tensors = list(persistent_tensors(ours.clip, ours.optimizer).values())
        before = [x.detach().clone() for x in tensors]

        def stop(*_):
            raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might …")

        handle = ours.clip.model.visual.ln_post.weight.register_hook(stop)
        try:
            step()
        finally:
            handle.remove()
            with torch.no_grad():
                for x, value in zip(tensors, before, strict=True):
                    x.copy_(value)

    monkeypatch.setattr(graphed, "record", fails)
    some = batches(ours.clip, 8)
    with pytest.warns(UserWarning, match=r"^graphed: the capture failed, .*: operation not permitted .* capturing\.$"):
        found = ours.train(some)
    assert found == theirs.train(some)
    assert (FakePools.captures, fake_cuda()) == (1, 0)


@pytest.mark.filterwarnings("ignore:skipkernels. a block is not fused")
@pytest.mark.parametrize(("name", "of_all_modules"), [("ln_post", True), ("transformer.resblocks.2.ln_1", False)])
def test_graphed_runs_hooks_of_called_modules(fake_cuda, name, of_all_modules):
    """Hooks of blocks and heads, which SkipCLIP calls, run in each step and not only at the capture."""
    run, calls = Run("in_step", by_graph=True), []
    some = batches(run.clip, 5)
    run.train(some)
    head = run.clip.model.visual.get_submodule(name)
    register = nn.modules.module.register_module_forward_hook if of_all_modules else head.register_forward_hook
    handle = register(lambda module, *_: calls.append(1) if module is head else None)
    run.train(some)
    assert len(calls) == 5
    handle.remove()
    run.train(some)
    assert len(calls) == 5


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
    with pytest.raises(ValueError, match="after add_lora or merge_lora"):
        run.step(*some[0])


def test_graphed_refuses_what_cannot_be_captured(fake_cuda, tmp_path):
    clip = skip_clip()
    groups = clip.parameter_groups(text_lr=0.1, image_lr=0.1)

    def refused(match: str, optimizer: torch.optim.Optimizer | None = None, clip: sk.SkipCLIP = clip) -> None:
        with pytest.raises(ValueError, match=f"^graphed: this step cannot be captured: .*{match}"):
            sk.graphed(clip, optimizer or sk.FusedSGD(clip.trainable_parameters()), batch_size=4)

    refused("SGD reads its learning rate on the host", torch.optim.SGD(groups))
    refused("AdamW is not capturable. Construct it with capturable=True", torch.optim.AdamW(groups))
    refused("text_cache, as large as here", clip=skip_clip(text_cache=tmp_path))
    hooked = skip_clip()
    hooked.model.visual.ln_post.register_forward_hook(lambda *_: None)
    refused("visual.ln_post has hooks", clip=hooked)
    stepped = sk.FusedSGD(groups)
    stepped.register_step_post_hook(lambda *_: None)
    refused("FusedSGD has step hooks", stepped)
    with pytest.raises(ValueError, match="^graphed: batch_size must be at least 1, a whole number; got 0"):
        sk.graphed(clip, sk.FusedSGD(groups), batch_size=0)
    (x, labels), run = batches(clip, 1)[0], Run("in_step", by_graph=True)
    with pytest.raises(RuntimeError, match="^graphed: fp16 autocast needs a GradScaler"):
        with torch.autocast("cpu", torch.float16):
            run.step(x, labels)
    with pytest.raises(ValueError, match="^graphed: pixel_values must not require grad"):
        run.step(x.requires_grad_(), labels)


def test_graphed_follows_autocast(fake_cuda):
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


@pytest.mark.parametrize("kind", ["in_backward", "in_step"])
def test_graph_with_kept_casts(fake_cuda, monkeypatch, kind):
    """A replay casts no weight that trains, and follows changed weights, evaluations and another graph."""
    ours, theirs = Run(kind, by_graph=True), Run(kind, by_graph=False)
    other = sk.graphed(ours.clip, ours.optimizer, batch_size=4)
    (x, labels), cast, whole, replay = batches(ours.clip, 1)[0], [], torch._foreach_copy_, FakeGraph.replay
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, by: cast.append(by[0].requires_grad) or whole(to, by))

    def counted(graph):
        cast.clear()
        replay(graph)
        casts_of_replays.append(sum(cast))

    def train(count: int, step: Any = None) -> None:
        for _ in range(count):
            losses = []
            for one in (step or ours.step, theirs.step):
                GRAPHED.append(other if one is other else ours.step)
                with torch.autocast("cpu", torch.bfloat16):
                    losses.append(one(x, labels).loss.item())
            assert losses[0] == losses[1]
        assert all(map(torch.equal, ours.clip.parameters(), theirs.clip.parameters()))

    casts_of_replays: list[int] = []
    monkeypatch.setattr(FakeGraph, "replay", counted)
    train(graphed.WARMUP + 2)
    for run in (ours, theirs):
        with torch.no_grad():
            run.clip.model.visual.transformer.resblocks[-1].mlp.c_fc.weight.mul_(1.5)
            run.clip.eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert ours.clip.predict(x).equal(theirs.clip.predict(x))
    for run in (ours, theirs):
        run.clip.train()
    train(2)
    assert casts_of_replays == [0] * 4 and fake_cuda() == 4
    train(graphed.WARMUP + 2, other)
    train(2)
    assert casts_of_replays[4:] == [0] * 4, "the weights that the other graph changed are copied before a replay"


def test_replays_increase_the_versions_of_weights(fake_cuda, monkeypatch):
    """By which the casts of another graph, and autograd, detect the update."""
    run, increased = Run("in_step", by_graph=True), []
    (x, labels) = batches(run.clip, 1)[0]
    monkeypatch.setattr(torch.autograd.graph, "increment_version", lambda weights: increased.append(list(weights)))
    for _ in range(graphed.WARMUP + 1):
        run.step(x, labels)
    held = {id(p) for p in run.clip.trainable_parameters()}
    assert fake_cuda() == 1 and {id(p) for p in increased[-1]} == held


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def sync_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("cast", [False, True], ids=["whole", "autocast"])
@pytest.mark.parametrize("kind", ["in_backward", "in_step", "stochastic"])
def test_replays_equal_eager_steps(kind, cast):
    """Ten replays and ten eager steps: weights, draws, learning rates through a schedule, rounding, kept casts."""
    runs = Run(kind, by_graph=True), Run(kind, by_graph=False)
    step = runs[0].step
    if cast:
        for run in runs:
            run.step = torch.autocast("cuda", torch.bfloat16)(run.step)  # once for each step
    found = []
    some = [(x.cuda(), labels.cuda()) for x, labels in batches(runs[0].clip, graphed.WARMUP + 11)]
    short = [(x.cuda(), labels.cuda()) for x, labels in batches(runs[0].clip, 1, batch=3)]
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


@pytest.mark.gpu
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

    for change in (lambda run: None, _load, new_classes, smooth, _without_momentum):
        for run in (ours, theirs):
            change(run)
        assert ours.train(some) == theirs.train(some)
        assert ours.step.is_captured
    assert ours.train(large) == theirs.train(large)
    assert ours.train(some) == theirs.train(some) and held[0].loss.equal(held[1].loss)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_replays_of_other_optimizers(kind):
    losses = []
    for by_graph in (True, False):
        clip = skip_clip().cuda()
        groups = clip.parameter_groups(text_lr=0.02, image_lr=0.01)
        optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(groups, momentum=0.9, fused=True)
            if kind == "sgd"
            else torch.optim.AdamW(groups, capturable=True)
        )
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        step = sk.graphed(clip, optimizer, batch_size=4)
        if not by_graph:
            step._batch_size = -1  # nothing is captured
        found = []
        for x, labels in batches(skip_clip(), 10):
            found.append(step(x.cuda(), labels.cuda()).loss.item())
            schedule.step()
        losses.append(found)
    assert losses[0] == losses[1]
