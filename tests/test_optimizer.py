"""FusedSGD against `torch.optim.SGD`; its memory and checkpoints."""

from __future__ import annotations

import copy
import gc
import importlib
import warnings
import weakref

import pytest
import torch
from torch import nn

import skipkernels as sk
from skipkernels import functional
from skipkernels import optimizer as optimizer_module
from skipkernels.ops import launching
from skipkernels.testing import gradient_bytes
from tests.allocations import allocated_bytes
from tests.models import tiny_batch, tiny_clip, tiny_tokens

HYPER = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
# Largest difference of a weight of size 1 after a few steps: the two round at different places, and the next gradient
# depends on it. fp64 and fp32: some units in the last place. bf16: one or two units of 2⁻⁸ per step.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.05}

in_backward_or_step = pytest.mark.parametrize("in_backward", [True, False], ids=["in_backward", "in_step"])


class Net(nn.Module):
    """Four weights: one is not contiguous, one is used twice, and one is in no loss."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype))

        self.first, self.twice, self.scale, self.unused = weight(5, 7), weight(7, 7), weight(1), weight(3)
        self.first.data = self.first.data.T.contiguous().T

    def loss(self, seed: int) -> torch.Tensor:
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        hidden = (inputs.to(self.first.dtype) @ self.first).tanh() @ self.twice
        return (self.scale * (hidden.tanh() @ self.twice)).square().mean()

    def groups(self) -> list[dict]:
        return [{"params": [self.first, self.unused]}, {"params": [self.twice, self.scale], "lr": 0.03}]


def train(net: Net, optimizer: torch.optim.Optimizer, steps: range = range(4), schedule=None) -> Net:
    for step in steps:
        net.loss(step).backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
    return net


def trained_by_torch(dtype: torch.dtype = torch.float64, **options) -> Net:
    net = Net(dtype)
    return train(net, torch.optim.SGD(net.groups(), **{**HYPER, **options}))


def equal(ours: nn.Module, theirs: nn.Module) -> bool:
    return all(a.equal(b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def assert_close(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, weight), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (weight - expected).abs().max() <= TOLERANCE[weight.dtype], name


@in_backward_or_step
@pytest.mark.parametrize("options", [{}, {"momentum": 0.0}, {"weight_decay": 0.0}], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
def test_fused_sgd_equals_torch(dtype, options, in_backward):
    net = Net(dtype)
    train(net, sk.FusedSGD(net.groups(), **{**HYPER, **options}, in_backward=in_backward))
    assert_close(net, trained_by_torch(dtype, **options))
    assert not torch.allclose(net.first, Net(dtype).first, atol=2 * TOLERANCE[dtype]), "they moved"


@pytest.mark.parametrize(("memory", "skip"), [("min", 0), ("fast", 1)])
def test_fused_sgd_step_of_skipclip_with_layer_scale(skip, memory):
    """A layer scale is multiplied into weights that are updated before other nodes run."""
    scaled = {"ls_init_value": 0.3}
    models = [tiny_clip(vision=scaled, text=scaled) for _ in range(2)]
    before, tokens = copy.deepcopy(models[0]), tiny_tokens(9)
    for model, sgd in zip(models, (sk.FusedSGD, torch.optim.SGD), strict=True):
        clip = sk.SkipCLIP(model, tokens, skip_layers=skip, memory=memory, train_logit_scale=True)
        optimizer = sgd(clip.parameter_groups(text_lr=0.1, image_lr=0.03), momentum=0.9, weight_decay=0.01)
        for step in range(3):
            clip(*tiny_batch(4, 9, seed=step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    ours, theirs = models
    for name, weight in ours.named_parameters():
        expected, start = theirs.get_parameter(name), before.get_parameter(name)
        # Rounding in fp64, amplified by three steps of random blocks.
        assert (weight - expected).norm() <= 1e-10 * expected.norm(), name
        assert weight.requires_grad != weight.equal(start), name


def test_gradients_in_memory_are_those_of_a_block():
    model, (images, labels) = tiny_clip(), tiny_batch(4, 9)
    clip = sk.SkipCLIP(model, tiny_tokens(9), skip_layers=1)
    weights = clip.trainable_parameters()
    assert gradient_bytes(clip(images, labels).loss) == sum(p.nbytes for p in weights), "without the optimizer"
    model.zero_grad()
    largest = max(sum(p.nbytes for p in block.parameters()) for block in model.visual.transformer.resblocks)
    optimizer = sk.FusedSGD(weights)
    assert gradient_bytes(clip(images, labels).loss) == largest
    assert all(isinstance(p.grad, optimizer_module._ConsumedGradient) for p in weights)
    optimizer.close()


@pytest.fixture(params=[False, True], ids=["at_once", "gathered"])
def gathers(request, monkeypatch) -> bool:
    """Update each weight in backward, or gather gradients as on a GPU."""
    monkeypatch.setattr(launching, "runs_beside_host", lambda device: request.param)
    return request.param


@pytest.fixture
def updates(monkeypatch) -> list[int]:
    """Numbers of weights of each update, of gradients that are gathered up to 200 bytes."""
    calls, update = [], functional.sgd_momentum_
    monkeypatch.setattr(launching, "runs_beside_host", lambda device: True)
    monkeypatch.setattr(optimizer_module, "_GATHERED_BYTES", 200)

    def counted(weights, *rest, **more):
        calls.append(len(weights))
        return update(weights, *rest, **more)

    monkeypatch.setattr(functional, "sgd_momentum_", counted)
    return calls


@pytest.mark.parametrize("stochastic", [True, False], ids=["stochastic", "nearest"])
def test_gathered_updates_are_those_of_step(updates, stochastic):
    """To the bit: random bits do not depend on the list that a weight is updated in."""
    nets = Net(torch.bfloat16), Net(torch.bfloat16)
    for net, in_backward in zip(nets, (True, False), strict=True):
        groups = [{**group, "stochastic_rounding": stochastic} for group in net.groups()]
        train(net, sk.FusedSGD(groups, **HYPER, in_backward=in_backward))
    assert equal(*nets) and not equal(nets[0], Net(torch.bfloat16))


def test_gathered_updates_are_few_and_bounded(updates):
    net = Net()  # 280, 392 and 8 bytes in fp64
    optimizer = sk.FusedSGD(net.groups(), **HYPER)
    net.loss(0).backward()
    assert sum(updates) == 3
    assert not any(type(p.grad) is torch.Tensor for p in net.parameters())
    updates.clear()
    weights = [nn.Parameter(torch.ones(5)) for _ in range(30)]  # 20 bytes each
    _other = sk.FusedSGD(weights, momentum=0.9)
    sum(weight.sum() for weight in weights).backward()
    assert updates == [10, 10, 10]
    optimizer.close()


def test_backward_after_a_failed_one(gathers):
    """After `zero_grad`, as in a training loop that skips the batch; gradients that were gathered are dropped."""
    first, second = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = sk.FusedSGD([first, second], lr=0.5)
    node = 1 * first
    node.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        (second.sum() + node.sum()).backward()
    before = 1.0 if gathers else 0.5
    optimizer.zero_grad()
    assert second.tolist() == [before] * 2
    (first.sum() + second.sum()).backward()
    assert first.tolist() == [0.5, 0.5] and second.tolist() == [before - 0.5] * 2


def test_closure_computes_gradients_under_no_grad():
    weight = nn.Parameter(torch.ones(2))
    optimizer = sk.FusedSGD([weight], lr=0.5)

    def closure() -> torch.Tensor:
        loss = weight.sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 2.0
    assert weight.tolist() == [0.5, 0.5]


@pytest.mark.gpu
def test_backward_on_gpu_bounds_memory_without_host_sync():
    layers = nn.Sequential(*(nn.Linear(1024, 1024, bias=False, device="cuda") for _ in range(24)))  # 96 MiB
    inputs = torch.randn(4, 1024, device="cuda")
    optimizer = sk.FusedSGD(layers.parameters(), lr=torch.tensor(1e-3, device="cuda"), momentum=0.9)
    layers(inputs).sum().backward()  # compiles the kernel and creates the buffers
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layers(inputs).sum().backward()
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    bound = optimizer_module._GATHERED_BYTES + 3 * layers[0].weight.nbytes  # 44 MiB
    assert torch.cuda.max_memory_allocated() - held < bound


# ---- training loop --------------------------------------------------------------------------------------------------


@in_backward_or_step
def test_scheduler_of_rate_and_momentum_equals_torch(in_backward):
    nets = Net(), Net()
    ours = sk.FusedSGD(nets[0].groups(), **HYPER, in_backward=in_backward)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for net, optimizer in zip(nets, (ours, torch.optim.SGD(nets[1].groups(), **HYPER)), strict=True):
            train(net, optimizer, schedule=torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=4))
    assert_close(*nets)
    assert not torch.allclose(nets[0].first, trained_by_torch().first)


@in_backward_or_step
def test_weight_unfrozen_after_construction(in_backward):
    def trained_by(kind: type[torch.optim.Optimizer], **options: bool) -> Net:
        net = Net()
        net.twice.requires_grad_(False)
        optimizer = kind(net.groups(), **HYPER, **options)
        train(net, optimizer, range(1))
        assert net.twice.equal(Net().twice)
        net.twice.requires_grad_(True)
        return train(net, optimizer, range(1, 4))

    assert_close(trained_by(sk.FusedSGD, in_backward=in_backward), trained_by(torch.optim.SGD))


def test_backward_with_two_optimizers(gathers):
    weight = nn.Parameter(torch.ones(2))
    first, second = sk.FusedSGD([weight]), sk.FusedSGD([weight])
    with pytest.raises(RuntimeError, match=r"FusedSGD: the gradient of a weight was consumed .* Call close\(\)"):
        weight.sum().backward()
    first.close()
    second.zero_grad()
    second.step()
    weight.sum().backward()


# ---- hooks ----------------------------------------------------------------------------------------------------------


def test_close_leaves_gradients_to_step():
    net = Net()
    optimizer = sk.FusedSGD(net.groups()[:1], **HYPER)
    optimizer.close()
    optimizer.add_param_group(net.groups()[1])
    net.loss(0).backward()
    assert net.first.grad is not None and net.twice.grad is not None and equal(net, Net())
    optimizer.zero_grad()
    assert_close(train(net, optimizer), trained_by_torch())


def test_replaced_weights_train_and_the_old_ones_are_freed():
    """Accelerate replaces them before it shards a model."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = sk.FusedSGD([weight], lr=0.5, in_backward=False)
    weight.sum().backward()
    optimizer.step()
    replaced = nn.Parameter(weight.detach().clone())
    optimizer.param_groups[0]["params"] = [replaced]
    replaced.sum().backward()
    optimizer.step()
    assert weight.tolist() == [0.5] * 3 and replaced.tolist() == [0.0] * 3
    optimizer.state.clear()
    freed = weakref.ref(weight)
    del weight
    assert freed() is None


@in_backward_or_step
def test_weights_follow_their_groups(in_backward):
    """They change their group, a group is removed, and a weight that was taken out of its group stays."""
    first, second, third = weights = [nn.Parameter(torch.zeros(3)) for _ in range(3)]
    groups = [{"params": [x], "lr": rate} for x, rate in zip(weights, (1.0, 0.1, 0.01), strict=True)]
    optimizer = sk.FusedSGD(groups, lr=1.0, momentum=0.0, in_backward=in_backward)

    def step() -> list[float]:
        sum(weights).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return [x[0].item() for x in weights]

    assert step() == pytest.approx([-1.0, -0.1, -0.01])
    optimizer.param_groups[0]["params"], optimizer.param_groups[1]["params"] = [second], [first]
    assert step() == pytest.approx([-1.1, -1.1, -0.02])
    optimizer.param_groups.pop(0)
    assert step() == pytest.approx([-1.2, -1.1, -0.03])
    optimizer.param_groups[0]["params"] = []
    assert step() == pytest.approx([-1.2, -1.1, -0.04])


def test_hooks_do_not_keep_the_optimizer_alive():
    weight = nn.Parameter(torch.ones(2))
    optimizer = sk.FusedSGD([weight], lr=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    gc.disable()  # a cycle would keep the buffers until the next collection
    try:
        del optimizer, schedule
        weight.sum().backward()
    finally:
        gc.enable()
    assert weight.tolist() == [1.0, 1.0] and weight.grad is not None


# ---- uses that need all gradients before the update -----------------------------------------------------------------


USES = {
    "backward": lambda net, optimizer, scaler: net.loss(1).backward(),
    "clip_norm": lambda net, optimizer, scaler: nn.utils.clip_grad_norm_(net.parameters(), 1.0),
    "unscale": lambda net, optimizer, scaler: scaler.unscale_(optimizer),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_use_of_consumed_gradients_is_an_error(use, gathers):
    net = Net()
    optimizer, scaler = sk.FusedSGD(net.groups(), **HYPER), torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(net.loss(0)).backward()
    with pytest.raises(RuntimeError, match=r"^FusedSGD: aten.* consumed.*Use in_backward=False"):
        use(net, optimizer, scaler)
    optimizer.step()  # the loop without that use
    train(net, optimizer, range(1, 4))
    assert_close(net, trained_by_torch())


def test_step_without_momentum_allocates_one_weight():
    weights = [nn.Parameter(torch.ones(1000)) for _ in range(5)]
    optimizer = sk.FusedSGD(weights, lr=0.5, in_backward=False)
    sum(weight.sum() for weight in weights).backward()
    assert allocated_bytes(optimizer.step) <= 4000 + 3 * 8, "and the options"
    assert not optimizer.state and all(weight.eq(0.5).all() for weight in weights)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@in_backward_or_step
@pytest.mark.parametrize("stochastic", [True, False], ids=["stochastic", "nearest"])
def test_load_state_dict_continues_bit_for_bit(stochastic, in_backward):
    def start(net: Net) -> sk.FusedSGD:
        return sk.FusedSGD(net.groups(), **HYPER, in_backward=in_backward, stochastic_rounding=stochastic, seed=5)

    net = Net(torch.bfloat16)
    optimizer = start(net)
    train(net, optimizer, range(2))
    resumed, state = copy.deepcopy(net), copy.deepcopy(optimizer.state_dict())
    train(net, optimizer, range(2, 4))
    again = start(resumed)
    forgetful = copy.deepcopy(resumed)
    again.load_state_dict(state)
    assert equal(train(resumed, again, range(2, 4)), net)
    assert not equal(train(forgetful, start(forgetful), range(2, 4)), net)


@pytest.mark.parametrize("kinds", [(torch.optim.SGD, sk.FusedSGD), (sk.FusedSGD, torch.optim.SGD)], ids=["of", "into"])
def test_load_state_dict_of_or_into_torch_sgd(kinds):
    net = Net()
    first = kinds[0](net.groups(), **HYPER)
    train(net, first, range(2))
    state = first.state_dict()
    if isinstance(first, sk.FusedSGD):
        first.close()
    second = kinds[1](net.groups(), lr=1.0)
    second.load_state_dict(state)
    assert_close(train(net, second, range(2, 4)), trained_by_torch())


def test_a_refused_state_changes_nothing():
    net = Net()
    optimizer = sk.FusedSGD(net.groups(), **HYPER)
    train(net, optimizer, range(1))
    before, state = copy.deepcopy(optimizer.state_dict()), optimizer.state_dict()
    state["state"], state["param_groups"][1]["lr"] = {}, -1.0
    with pytest.raises(ValueError, match=r"FusedSGD: lr must be at least 0; got -1"):
        optimizer.load_state_dict(state)
    assert str(optimizer.state_dict()) == str(before)


@pytest.fixture
def two_members():
    """Return a function that begins a process group of two members for the test; the other does nothing."""
    fake = importlib.import_module("torch.testing._internal.distributed.fake_pg")
    yield lambda: torch.distributed.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=2)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_backward_in_several_processes(two_members):
    net = Net()
    early = sk.FusedSGD(net.groups(), **HYPER)
    two_members()
    message = r"FusedSGD: in_backward must be False in a process group of several ranks; got True in one of 2\."
    with pytest.raises(RuntimeError, match=message):
        net.loss(0).backward()
    early.close()
    with pytest.raises(RuntimeError, match=message):
        sk.FusedSGD(net.groups(), **HYPER)
    net = Net()
    train(net, sk.FusedSGD(net.groups(), **HYPER, in_backward=False))
    assert_close(net, trained_by_torch())


# ---- stochastic rounding --------------------------------------------------------------------------------------------


@in_backward_or_step
def test_stochastic_rounding_bits_differ_by_weight_step_and_seed(in_backward):
    """A step of a third of a unit keeps a weight at 1 or takes it one unit down, depending on the bits."""
    unit = 2**-8  # of bf16 below 1

    def rounded(seed: int) -> tuple[tuple[bool, ...], ...]:
        weights = [nn.Parameter(torch.ones(64, dtype=torch.bfloat16)) for _ in range(4)]
        groups = [{"params": weights[:2]}, {"params": weights[2:]}]
        options = {"in_backward": in_backward, "stochastic_rounding": True, "seed": seed}
        optimizer = sk.FusedSGD(groups, lr=unit / 3, **options)
        found = []
        for _ in range(2):
            for weight in weights:
                weight.data.fill_(1.0)
            sum(weight.sum() for weight in weights).backward()
            optimizer.step()
            optimizer.zero_grad()
            found += [tuple((weight < 1).tolist()) for weight in weights]
        return tuple(found)

    bits = rounded(0)
    assert bits == rounded(0)
    assert len({*bits, *rounded(1)}) == 16, "four weights, two steps, two seeds"
    share = torch.tensor(bits).double().mean().item()
    assert abs(share - 1 / 3) < 5 * (2 / 9 / (8 * 64)) ** 0.5  # five standard deviations of the mean of 512 draws
