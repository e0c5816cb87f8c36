"""Settings of a run, with defaults, bounds and help texts.

`TuneConfig` checks them, and they are the options of tune and compare. Imports neither torch nor pydantic, for a quick
--help.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..options import (
    CacheDtype,
    ClassWeight,
    HeadChoice,
    Memory,
    OptimizerName,
    Precision,
    Preset,
    Prior,
    Protocol,
    Refresh,
    SamplerKind,
    Shots,
    Tail,
    Test,
    Validation,
)
from .methods.registry import AUTO, METHOD_HELP


def option(default: Any, *, results: bool = True, help: str | None = None, **schema: Any) -> Any:
    """Field of `Settings`.

    Args:
        default: Default value.
        results: False if it changes the results by rounding at most, so that a resumed run may have another value.
        help: Help text; by default the text below the field.
        schema: Arguments of `pydantic.Field`: bounds of a number (ge, gt, le, lt); and strict, where False also takes a
            text as a path, or a list as a tuple.
    """
    return dataclasses.field(default=default, metadata={"results": results, "help": help, **schema})


_NO_EFFECT = {"resume", "overwrite", "trust"}  # on what is computed


@dataclass(frozen=True)
class Settings:
    """All settings of a run."""

    # Images and prompts

    data: str = "pictograms"
    """Dataset: imagefolder:PATH, csv:PATH, hf:PATH or hf:NAME of Hugging Face, coop:NAME of CoOp's benchmarks (with
    --root), or pictograms and pictograms:TASK, such as pictograms:animals."""
    root: Path | None = option(None, results=False, strict=False)
    """Folder that contains the datasets of coop:, or the images of csv:."""
    template: tuple[str, ...] | None = option(None, strict=False)
    """Prompts such as "a photo of a {}.", or paper or coop for the prompts of these papers. Training uses the first;
    for evaluation the embeddings of all are averaged. By default paper."""
    shots: Shots | None = None
    """Training images per class, or all. By default 16; all for pictograms, of which there are two."""
    validation: Validation = "auto"
    """Images that choose the best epoch, which is the one that is kept. split: the val split of the dataset. A share
    such as 0.2: that share of the training images of each class is held out, if possible of images that don't train.
    none: the last epoch is kept. auto: for own data split if there is one, else 0.2; none for other data. Own data
    without splits: images that neither validate nor test train."""
    train_on_validation: bool = False
    """Also train on the validation images, which then choose nothing. The config.yaml of a run with --method auto has
    it: held-out images train in the end."""
    test: Test = "split"
    """Test images. split: the test split, which is 30 % of each class of own data without splits. none: all images that
    don't validate train, and accuracies are those on the validation images, if there are any."""
    unreadable: Literal["error", "skip"] = "error"
    """Images that can't be read. error: list them and stop. skip: leave them out; all images are then read twice."""
    max_classes: int | None = option(None, ge=1)
    """Largest number of classes, base and new together. By default all."""

    # Classes that train and are tested

    protocol: Protocol | None = None
    """few-shot: train and test on all classes. base-to-new: train on the first half of the classes, test on both
    halves. cross-dataset and domain-generalization: as few-shot, with the paper's rates for tests on other datasets, by
    `skipkernels eval RUN --data …`. By default few-shot for own data, such as imagefolder:, else base-to-new."""

    # Model and weights

    model: str = "pictogram-tiny"
    """Name of an open_clip model, such as ViT-B-16-quickgelu; or a model with its weights: hf-hub:ORG/NAME, or
    local-dir:DIR, a folder of open_clip, such as a run folder, or of transformers (CLIP, MetaCLIP 2, SigLIP, SigLIP 2).
    """
    pretrained: str | None = None
    """Weights: a tag of open_clip, a file, or "random". pictogram-tiny has its own; other models need one."""
    trust: bool = option(False, results=False)
    """Also load models, weights and data of the hub or of other folders that a file names, such as the config.yaml of a
    run or the configuration of a model. Code in a folder never runs."""

    # Method of adaptation

    method: str = option(
        AUTO,
        help=f"One of {METHOD_HELP}; or auto, the default: for own data and pictograms a choice by held-out images "
        "of heads on the pretrained model and Skip Tuning with three learning rates; else skip.",
    )
    preset: Preset = "default"
    """reference: settings of the published code, such as --tail fixed; its crops of training images need --refresh
    epoch. --decay is 0.3 in each protocol, as in its configuration; the memory that the paper reports for ImageNet
    follows from 0.1."""
    tail: Tail | None = None
    """Each step compares its images with the classes most similar to them and, at random, a few of the others, the
    tail. resample: draw other ranks of the tail in every step, the default. fixed: draw them once, as published."""

    # Classifier of the embeddings, fitted to the training images after training

    head: HeadChoice | None = None
    """none: the texts of the classes. anchored: a logistic regression that is drawn to the texts. gaussian: a Gaussian
    for each class, and the texts. probe: a logistic regression without texts, for trained classes alone. auto: one of
    these, by held-out images. By default auto for --method auto, else none."""
    prior: Prior = "images"
    """Frequencies of the classes that a head expects. images: those of the training images. balanced: equal ones, which
    raises the accuracy on rare classes."""
    blend: float = option(1.0, gt=0, le=1)
    """Weight of the tuned model in the mean of the weights before and after training, before a head is fitted."""

    # Settings of Skip Tuning

    skip_layers: int | float = 0.5
    """Blocks that each tower skips (LSkip): a number, or a fraction of its blocks such as 0.5."""
    keep_ratio: float = 0.5
    """Most similar classes that each step compares its images with (CSkip): a share of all if below 1, all classes if
    1, a number of classes if above 1."""
    max_keep: int = 50
    """Upper limit of the number of classes kept in every step; it does not apply to --keep-ratio 1."""
    decay: float = 0.3
    """Decay of the probability that a less similar class, of the tail, is drawn in a step: larger values draw more.
    With 0.3 they are about 57 of 1,000 classes, beside 50 similar ones."""
    max_tail: int | None = option(None, ge=0)
    """Upper limit of the expected number of classes of the tail, for very many classes. By default none, as published:
    the tail then grows with the number of classes."""
    train_text: bool = True
    """Also train the text tower. False: the embeddings of classes are constant, and every step compares all classes."""

    # Schedule and optimizer, by default those of the method

    epochs: int | None = None
    """Passes over the training images. For skip 20, with few-shot 40; for pictogram-tiny 8. 0: only fit a --head."""
    batch_size: int | None = option(None, ge=1)
    """Images per step. For skip 4; for pictogram-tiny 16."""
    sampler: SamplerKind | None = None
    """class_pure: batches of a single class if it has enough images. random: mixed batches. balanced: images drawn with
    replacement, each class equally often. sequential: in order."""
    class_weight: ClassWeight | None = None
    """Images of rare classes weigh more in the loss: by n to the power of minus this number, for n training images of
    their class. balanced is 1, all classes the same in total; 0.5 is halfway. By default every image weighs the same.
    Batches are then random."""
    optimizer: OptimizerName | None = None
    """sgd: fused SGD with momentum. adamw: that of PyTorch. By default sgd for skip; adamw for pictogram-tiny."""
    text_lr: float | None = option(None, ge=0)
    """Learning rate of the text tower. For skip 2e-5 with base-to-new, else 1e-5; for pictogram-tiny 3e-4."""
    image_lr: float | None = option(None, ge=0)
    """Learning rate of the image tower. For skip 5e-6 with base-to-new, 1e-5 with few-shot, else 1e-6; for
    pictogram-tiny 3e-4."""
    warmup_epochs: int | None = option(None, ge=0)
    """Epochs at the warm-up rate, before the cosine schedule."""
    warmup_lr: float | None = option(None, ge=0)
    """Learning rate of the warm-up."""
    momentum: float | None = option(None, ge=0, lt=1)
    """Momentum of sgd."""
    weight_decay: float | None = option(None, ge=0)
    """Weight decay."""

    # Arithmetic and memory

    precision: Precision = "auto"
    """bf16: bf16 arithmetic, fp32 weights. fp16: the same in fp16, with a gradient scaler. auto: bf16 on a GPU that
    supports it, else fp32."""
    memory: Memory = option("auto", results=False)
    """Memory of a training step. fast: each block saves what its backward pass needs. min: it saves its input alone and
    computes the rest again, with less memory and more time. auto: fast if it fits in memory."""
    graph: bool = option(True, results=False)
    """Run each step of skip as one CUDA graph on a GPU. Not with fp16 or adamw."""

    # Feature cache

    cache: Path | None = option(None, results=False, strict=False)
    """Folder that stores features at the cut, also for later runs. By default features are kept in memory."""
    cache_dtype: CacheDtype = "bf16"
    """Type of the stored features. int8 is lossy."""
    refresh: Refresh = "never"
    """epoch: a new random crop of each training image for each epoch, computed when it begins, in memory.
    It depends on the epoch and the image alone: resumed runs, and runs with other --workers, see the same crops."""

    # Device and seed

    device: str = option("auto", results=False)
    """cpu, cuda, cuda:1, mps, …. auto: cuda or mps if available."""
    workers: int = option(0, ge=0, results=False)
    """Processes that load images."""
    seed: int = option(0, ge=0, lt=2**31)
    """Seed of the choice of training images, their order, and the classes drawn."""

    # Run folder

    out: Path | None = option(None, results=False, strict=False)
    """Folder of the results. By default runs/DATA-METHOD."""
    overwrite: bool = option(False, results=False)
    """Replace an earlier run in the folder."""
    resume: Path | None = option(None, results=False, strict=False)
    """Folder of a run to continue after its last complete epoch, with its settings; bit-exactly with the same number of
    threads."""

    def command(self, name: str, *, left_out: Collection[str] = ()) -> str:
        """Return the command of `skipkernels` with the settings that differ from their default.

        `left_out` names settings that the reader of the command chooses.

        Example:
            >>> Settings(data="imagefolder:my photos", graph=False, template=("a {}.", "the {}.")).command("tune")
            "skipkernels tune --data 'imagefolder:my photos' --template 'a {}.' 'the {}.' --no-graph"
        """
        words = ["skipkernels", name]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value in (field.default, None) or field.name in _NO_EFFECT or field.name in left_out:
                continue
            flag = field.name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                values = value if isinstance(value, (tuple, list)) else [value]
                words += [f"--{flag}", *(shlex.quote(str(one)) for one in values)]
        return " ".join(words)
