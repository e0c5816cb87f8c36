"""Skip Tuning in `transformers.Trainer`, of pictogram-tiny on pictograms.

pip install "skipkernels[cli,hugging-face]"
python examples/trainer_hugging_face.py --output runs/trainer
"""

from __future__ import annotations

import argparse

from transformers import Trainer, TrainingArguments

import skipkernels as sk
from skipkernels.app.data import TaskOptions, load_task
from skipkernels.app.demo import pictogram_tiny
from skipkernels.integrations.hugging_face import trainer_arguments


def tune(output: str, epochs: int = 3, max_classes: int = 100) -> tuple[float, float]:
    """Return the accuracy before and after."""
    model, preprocess, tokenizer = pictogram_tiny.load()
    options = TaskOptions(protocol="few-shot", shots=2, max_classes=max_classes)
    task = load_task("pictograms:food", options, transform=preprocess)
    tokens = tokenizer(task.tests[0].prompts[0])

    clip = sk.SkipCLIP(model, tokens, skip_layers=0.5)
    args = TrainingArguments(
        output,
        num_train_epochs=epochs,
        per_device_train_batch_size=8,
        lr_scheduler_type="cosine",
        weight_decay=5e-4,
        save_strategy="epoch",
        ddp_broadcast_buffers=False,
        report_to="none",
    )
    ours = trainer_arguments(args, text_lr=4e-3, image_lr=2e-3, momentum=0.9)
    trainer = Trainer(clip, train_dataset=task.train, eval_dataset=task.tests[0].images, **ours)
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()  # trainer.train(resume_from_checkpoint=True) continues an interrupted run
    return before, trainer.evaluate()["eval_accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default="runs/trainer", help="folder of the checkpoints")
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    print("accuracy {:.1%}, tuned {:.1%}".format(*tune(args.output, args.epochs)))


if __name__ == "__main__":
    main()
