"""Skip Tuning in Lightning, of pictogram-tiny on pictograms.

pip install "skipkernels[cli,lightning]"
python examples/trainer_lightning.py --output runs/lightning
"""

from __future__ import annotations

import argparse

from lightning.pytorch import Trainer
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

import skipkernels as sk
from skipkernels.app.data import TaskOptions, load_task
from skipkernels.app.demo import pictogram_tiny
from skipkernels.integrations.lightning import SkipModule


def tune(output: str, epochs: int = 3, max_classes: int = 100) -> tuple[float, float]:
    """Return the accuracy before and after."""
    model, preprocess, tokenizer = pictogram_tiny.load()
    options = TaskOptions(protocol="few-shot", shots=2, max_classes=max_classes)
    task = load_task("pictograms:food", options, transform=preprocess)
    tokens = tokenizer(task.tests[0].prompts[0])
    train, tests = DataLoader(task.train, batch_size=8, shuffle=True), DataLoader(task.tests[0].images, batch_size=100)

    module = SkipModule(
        sk.SkipCLIP(model, tokens, skip_layers=0.5),
        text_lr=4e-3,
        image_lr=2e-3,
        schedule=lambda optimizer: CosineAnnealingLR(optimizer, epochs),
        momentum=0.9,
        weight_decay=5e-4,
    )
    trainer = Trainer(max_epochs=epochs, default_root_dir=output, logger=False)
    [before] = trainer.validate(module, tests, verbose=False)
    trainer.fit(module, train, tests)  # fit(..., ckpt_path="last") continues an interrupted run
    return before["val_accuracy"], trainer.callback_metrics["val_accuracy"].item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default="runs/lightning", help="folder of the checkpoints")
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    print("accuracy {:.1%}, tuned {:.1%}".format(*tune(args.output, args.epochs)))


if __name__ == "__main__":
    main()
