"""Skip Tuning in a training loop with accelerate, of pictogram-tiny on pictograms, from features in memory.

pip install "skipkernels[cli]" accelerate
accelerate launch --cpu examples/trainer_accelerate.py
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch.utils.data import DataLoader

import skipkernels as sk
from skipkernels.app.data import TaskOptions, load_task
from skipkernels.app.data.images import Images
from skipkernels.app.demo import pictogram_tiny


def tune(epochs: int = 3, max_classes: int = 100) -> tuple[float, float]:
    """Return the accuracy before and after."""
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    model, preprocess, tokenizer = pictogram_tiny.load()
    options = TaskOptions(protocol="few-shot", shots=2, max_classes=max_classes)
    task = load_task("pictograms:food", options, transform=preprocess)
    tokens = tokenizer(task.tests[0].prompts[0])

    clip = sk.SkipCLIP(model.to(accelerator.device), tokens, skip_layers=0.5)
    optimizer = torch.optim.SGD(clip.parameter_groups(text_lr=4e-3, image_lr=2e-3), momentum=0.9, weight_decay=5e-4)

    def features(images: Images) -> sk.FeatureCache:
        return sk.FeatureCache.in_memory(images, lambda x: clip.encode_lower(x.to(accelerator.device)))

    train = DataLoader(features(task.train), batch_size=8, shuffle=True)
    test = DataLoader(features(task.tests[0].images), batch_size=100)
    step, optimizer, train, test = accelerator.prepare(clip, optimizer, train, test)

    def accuracy() -> float:
        correct = [accelerator.gather_for_metrics(clip.predict(x).argmax(dim=1) == labels) for x, labels in test]
        return torch.cat(correct).float().mean().item()

    before = accuracy()
    for _ in range(epochs):
        for x, labels in train:
            accelerator.backward(step(x, labels).loss)
            optimizer.step()
            optimizer.zero_grad()
    return before, accuracy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=3)
    print("accuracy {:.1%}, tuned {:.1%}".format(*tune(parser.parse_args().epochs)))


if __name__ == "__main__":
    main()
