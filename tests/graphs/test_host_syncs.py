"""Nothing in a step depends on the host.

On the meta device the code takes the paths of a GPU, and whatever needs a value on the host raises.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import skipkernels as sk
from bench.meta_device import meta_as_gpu
from tests.graphs.graph_runs import CLASSES, batches, groups_of, skip_clip
from tests.models import tiny_tokens

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


def persistent_tensors(clip: sk.SkipCLIP, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Tensors that exist between steps and are read by the kernels of a step."""
    found = dict(clip.model.named_parameters()) | dict(clip.model.named_buffers())
    found |= {f"of texts {number}": x for number, x in enumerate(clip.texts.step_tensors())}
    for number, state in enumerate(optimizer.state.values()):
        found |= {f"{name} {number}": x for name, x in state.items() if isinstance(x, Tensor)}
    if isinstance(optimizer, sk.FusedSGD):
        found |= {f"option {key}": copy for key, (copy, _) in optimizer._numbers._copies.items()}
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
    rows = clip.texts.features.table().features
    clip.to("meta")
    prompts, head = clip.texts.templates[0].tensors().values(), clip.images.tower.head
    for tensor in (clip.prototypes, clip.texts.features.table().features, *prompts, *head[1].parameters(), head[2]):
        assert tensor.device.type == "meta"
    assert clip.texts.features.table().shape == rows.shape[1:] and not clip.images.below.is_stale()
