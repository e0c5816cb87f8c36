"""Skip Tuning in open_clip's trainer, of pictogram-tiny on pictograms with a caption for each image.

pip install "skipkernels[cli]"
python examples/trainer_open_clip.py --output runs/open_clip
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from open_clip_train.scheduler import cosine_lr
from open_clip_train.train import train_one_epoch
from torch.utils.data import DataLoader

import skipkernels as sk
from skipkernels.app.data import TaskOptions, load_task
from skipkernels.app.demo import pictogram_tiny
from skipkernels.integrations.open_clip import ClassLoss, ClassModel, scaled_schedule


def tune(output: str, epochs: int = 3, max_classes: int = 100) -> tuple[float, float]:
    """Return the accuracy before and after."""
    model, preprocess, tokenizer = pictogram_tiny.load()
    options = TaskOptions(protocol="few-shot", shots=2, max_classes=max_classes)
    task = load_task("pictograms:food", options, transform=preprocess)
    tokens = tokenizer(task.tests[0].prompts[0])

    clip = sk.SkipCLIP(model, tokens, skip_layers=0.5)
    trained, loss = ClassModel(clip), ClassLoss()
    groups = trained.parameter_groups(text_lr=4e-3, image_lr=2e-3)
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=5e-4)
    data = captioned(task.train, tokens, batch_size=8)
    schedule = cosine_lr(optimizer, 4e-3, 0, epochs * data.dataloader.num_batches)
    schedule = scaled_schedule(schedule, optimizer)  # not needed in open_clip 4

    before = accuracy(clip, task.tests[0].images)
    file = Path(output, "epoch_latest.pt")
    for epoch in range(epochs):
        train_one_epoch(trained, {"train": data}, loss, epoch, optimizer, None, schedule, None, arguments())
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"state_dict": trained.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}, file)
    return before, accuracy(clip, task.tests[0].images)


def captioned(dataset: Any, tokens: torch.Tensor, batch_size: int) -> Any:
    """Images with the tokens of a caption. A file of images and captions is read by `open_clip_train.data.get_data`."""

    def collate(batch: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = torch.utils.data.default_collate(batch)
        return images, tokens[labels]

    loader: Any = DataLoader(dataset, batch_size, shuffle=True, collate_fn=collate)
    loader.num_samples, loader.num_batches = len(dataset), len(loader)
    return SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)


def arguments() -> SimpleNamespace:
    """Options of open_clip's command line."""
    off = dict.fromkeys(("distill", "horovod", "distributed", "wandb", "skip_scheduler"), False)
    run = {"device": "cpu", "precision": "fp32", "rank": 0, "world_size": 1}
    return SimpleNamespace(batch_size=8, accum_freq=1, grad_clip_norm=None, log_every_n_steps=10, **run, **off)


def accuracy(clip: sk.SkipCLIP, dataset: Any) -> float:
    hits = [clip.predict(images).argmax(dim=1) == labels for images, labels in DataLoader(dataset, batch_size=100)]
    return torch.cat(hits).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default="runs/open_clip", help="folder of the checkpoint")
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    print("accuracy {:.1%}, tuned {:.1%}".format(*tune(args.output, args.epochs)))


if __name__ == "__main__":
    main()
