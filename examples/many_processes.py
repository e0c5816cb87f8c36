"""Skip Tuning of pictogram-tiny in several processes: the number of processes does not change the result.

pip install "skipkernels[cli]"
torchrun --nproc-per-node 2 examples/many_processes.py
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import skipkernels as sk
from skipkernels.app.data import TaskOptions, load_task
from skipkernels.app.demo import pictogram_tiny

BATCH = 8  # images of all processes


def tune(device: torch.device, epochs: int = 3, max_classes: int = 100) -> tuple[float, float]:
    """Return the loss of the last step and the accuracy after it."""
    model, preprocess, tokenizer = pictogram_tiny.load()
    options = TaskOptions(protocol="few-shot", shots=2, max_classes=max_classes)
    task = load_task("pictograms:food", options, transform=preprocess)
    tokens = tokenizer(task.tests[0].prompts[0])

    rank, size = dist.get_rank(), dist.get_world_size()
    clip = sk.parallel.ShardedSkipCLIP(model.to(device), tokens, skip_layers=0.5, process_group=dist.group.WORLD)
    step = DistributedDataParallel(clip, broadcast_buffers=False)
    optimizer = torch.optim.SGD(clip.parameter_groups(text_lr=4e-3, image_lr=2e-3), momentum=0.9, weight_decay=5e-4)
    features = sk.FeatureCache.in_memory(task.train, lambda x: clip.encode_lower(x.to(device)))
    for _ in range(epochs):
        for x, labels in features.loader(BATCH // size, "random", rank=rank, world_size=size):
            loss = step(x.to(device), labels.to(device)).loss  # the mean over the images of all processes
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    # `predict` gathers the class embeddings once: every process calls it.
    test = torch.utils.data.DataLoader(task.tests[0].images, batch_size=100)
    correct = [clip.predict(x.to(device)).argmax(dim=1).cpu() == labels for x, labels in test]
    return loss.item(), torch.cat(correct).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--max-classes", type=int, default=100)
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    loss, accuracy = tune(device, options.epochs, options.max_classes)
    if dist.get_rank() == 0:
        print(f"loss {loss:.4f}, accuracy {accuracy:.1%}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
