"""Pre-train `pictogram-tiny` on icons and their names.

    python -m recipes.pictograms.pretrain --out runs/pictogram-tiny

Three phases. `names`: images are classified among the names that four families or more draw, by a table of word
vectors in place of the text tower, which learns to reproduce the table. `pairs`: both towers contrastively, with the
same names. `wide`: the same with all names. The learning rate is constant except for warm-ups and the last steps.
Measured and exported is a running average of the weights.

A run that is interrupted anywhere continues from its last checkpoint, and gives the weights that it would have given:
the random numbers of a step depend on its index.
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.fusion import fuse_conv_bn_eval

from skipkernels.app.data.pictograms import TEMPLATE
from skipkernels.app.demo.pictogram_tiny import NAME, register
from skipkernels.app.demo.vit_pictogram import Stem
from skipkernels.folders import replace_tensors, replaced_file

from . import pool as pools
from .augment import augment, normalize, on_white
from .batches import Captions, Images
from .table import FOLDER

COLUMNS = ("step", "phase", "pairs", "loss", "narrow", "wide", "unknown", "seconds")


@dataclass
class Options:
    """Options of a run."""

    pool: Path = FOLDER / "pool.npz"
    out: Path = Path("runs") / NAME  # of the checkpoint, the rows and the weights
    names_steps: int = 3500  # of the phases
    pairs_steps: int = 2500
    wide_steps: int = 2500
    batch: int = 256  # images of a step, each with another name
    texts: int = 512  # names of a contrastive step
    lr: float = 1.5e-3  # of AdamW
    table_lr: float = 1.5e-2  # of the class table: a row is in few batches
    decay: int = 1000  # steps of the final decay of the learning rate
    weight_decay: float = 0.05
    average: float = 0.998  # factor of the running average of the weights
    every: int = 500  # steps between two measurements
    save_seconds: float = 120  # least time between two checkpoints
    threads: int = 1
    device: str = "cpu"
    dtype: str = "bfloat16"  # of the products; "float32" is faster on a CPU without bf16 instructions
    init: Path | None = None  # checkpoint of a run with other words, of which this run takes the step and the model
    model: str = NAME  # a configuration of open_clip

    @property
    def steps(self) -> int:
        """Number of steps of all phases."""
        return self.names_steps + self.pairs_steps + self.wide_steps

    def phase(self, step: int) -> tuple[str, int]:
        """Phase of a step, and its first step."""
        if step < self.names_steps:
            return "names", 0
        if step < self.names_steps + self.pairs_steps:
            return "pairs", self.names_steps
        return "wide", self.names_steps + self.pairs_steps


def encode_text(model: open_clip.CLIP, tokens: torch.Tensor) -> torch.Tensor:
    """Encode texts without the padding after the longest, which the causal mask hides from all pooled tokens."""
    ends = tokens.argmax(dim=-1)
    length = int(ends.max()) + 1
    hidden = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]
    hidden = model.transformer(hidden, attn_mask=model.attn_mask[:length, :length])
    pooled = hidden[torch.arange(len(tokens), device=tokens.device), ends]
    return F.normalize((model.ln_final(pooled) @ model.text_projection).float(), dim=-1)


def encode_image(model: open_clip.CLIP, images: torch.Tensor) -> torch.Tensor:
    """Encode images, [B, D], of unit norm."""
    return F.normalize(model.encode_image(images).float(), dim=-1)


class NameTable(nn.Module):
    """Class embeddings: the mean of the vectors of a name's words, and a vector of its own.

    Names share words, so that a word is learned from more images than a name has.
    """

    def __init__(self, names: Iterable[str], width: int):
        super().__init__()
        split = [name.split() for name in names]
        place = {word: i for i, word in enumerate(sorted({word for words in split for word in words}))}
        self.words = nn.EmbeddingBag(len(place), width, mode="mean")
        nn.init.normal_(self.words.weight, std=width**-0.5)
        self.own = nn.Parameter(torch.zeros(len(split), width))
        self.register_buffer("indices", torch.tensor([place[word] for words in split for word in words]))
        self.register_buffer("offsets", torch.tensor([0, *np.cumsum([len(words) for words in split])[:-1]]))

    def forward(self) -> Tensor:
        """Embeddings of unit norm, [names, D]."""
        return F.normalize(self.words(self.indices, self.offsets) + self.own, dim=-1)


def convolution_with_norm(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    """Make a convolution and its batch norm."""
    return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)]


def without_norms(stem: Stem) -> Stem:
    """Copy a stem with the batch norms in the convolutions. Sets them to evaluation mode."""
    fused = Stem()
    convolutions = [module for module in stem.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in stem.modules() if isinstance(module, nn.BatchNorm2d)]
    copies = [module for module in fused.modules() if isinstance(module, nn.Conv2d)]
    for copied, convolution, norm in zip(copies, convolutions, norms, strict=True):
        copied.load_state_dict(fuse_conv_bn_eval(convolution.eval(), norm.eval()).state_dict())
    return fused


class Run:
    """A pre-training run: model, class table, optimizer, running average and rows."""

    def __init__(self, options: Options, pool: pools.Pool):
        torch.manual_seed(0)
        register()
        self.options, self.pool, self.device = options, pool, torch.device(options.device)
        self.images = Images(pool, self.device)
        self.captions = Captions(options.model, pool.names, pool.style)
        self.model = open_clip.create_model(options.model)
        self.model.visual.trunk.patch_embed.backbone = Stem(convolution_with_norm)
        self.model.to(self.device, memory_format=torch.channels_last)
        self.table = NameTable(pool.names[: pool.narrow], self.model.text_projection.shape[1]).to(self.device)
        with torch.no_grad():
            self.model.logit_scale.fill_(np.log(16.0))
        self.optimizer = self.make_optimizer()
        self.parameters = [*self.model.parameters(), *self.table.parameters()]
        self.size = self.model.visual.image_size[0]
        self.whiten()
        statistics = [buffer for buffer in self.model.buffers() if buffer.is_floating_point() and buffer.ndim == 1]
        self.tensors = [*self.parameters, *statistics]
        self.averaged = [tensor.detach().clone() for tensor in self.tensors]
        self.step, self.seconds, self.rows, self.losses = 0, 0.0, [], []  # type: ignore[var-annotated]
        if (options.out / "checkpoint.pt").exists():
            self.load()
        elif options.init:
            state = torch.load(options.init, map_location=self.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.step = state["step"]
            self.averaged = [tensor.detach().clone() for tensor in self.tensors]

    def make_optimizer(self) -> torch.optim.Optimizer:
        """AdamW with weight decay of matrices only, except positions and the class token."""
        named = list(self.model.named_parameters())
        undecayed = {"positional_embedding", "visual.trunk.pos_embed", "visual.trunk.cls_token"}
        decayed = [p for name, p in named if p.ndim > 1 and name not in undecayed]
        others = [p for name, p in named if p.ndim <= 1 or name in undecayed]
        groups = [
            {"params": decayed, "weight_decay": self.options.weight_decay, "rate": self.options.lr},
            {"params": others, "weight_decay": 0.0, "rate": self.options.lr},
            {"params": list(self.table.parameters()), "weight_decay": 0.0, "rate": self.options.table_lr},
        ]
        return torch.optim.AdamW(groups, betas=(0.9, 0.98), foreach=True)

    # ---- checkpoints

    def save(self) -> None:
        """Write the checkpoint, the rows and the weights, each file at once."""
        self.options.out.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "table": self.table.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "averaged": self.averaged,
            "step": self.step,
            "seconds": self.seconds,
            "rows": self.rows,
            "losses": self.losses,
        }
        with replaced_file(self.options.out / "checkpoint.pt") as checkpoint:
            torch.save(state, checkpoint)
        with replaced_file(self.options.out / "rows.csv") as rows, rows.open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *self.rows])

    def load(self) -> None:
        """Continue from the checkpoint."""
        state = torch.load(self.options.out / "checkpoint.pt", map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.table.load_state_dict(state["table"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.averaged = state["averaged"]
        self.step, self.seconds, self.rows = state["step"], state["seconds"], state["rows"]
        self.losses = state["losses"]

    def export(self) -> None:
        """Write the averaged weights in fp16, as open_clip reads them: without the batch norms of pre-training."""
        with self.average():
            model = copy.deepcopy(self.model)
        embed = model.visual.trunk.patch_embed
        embed.backbone = without_norms(embed.backbone)
        state = {name: tensor.half().cpu() for name, tensor in model.state_dict().items()}
        replace_tensors(self.options.out / f"{NAME}.safetensors", state)

    # ---- steps

    def autocast(self) -> torch.autocast:
        """Context in which products are in `dtype`."""
        dtype = getattr(torch, self.options.dtype)
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def schedule(self) -> float:
        """Factor of the learning rates at the step."""
        _, first = self.options.phase(self.step)
        warm_up = (self.step - first + 1) / 100
        return min(1.0, warm_up, (self.options.steps - self.step) / max(1, self.options.decay))

    def views(self, classes: np.ndarray, indices: np.ndarray) -> Tensor:
        """Random views of images, [B, 3, S, S]."""
        rgba, mono = self.images.read(indices)
        mirrored = torch.from_numpy(self.images.mirrored[classes]).to(self.device)
        return augment(rgba, mono, mirrored, self.size).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def whiten(self) -> None:
        """Choose the projection so that the embeddings of a batch are white: random weights give nearly equal ones."""
        rng = np.random.default_rng(0)
        classes = self.images.draw_classes(self.pool.narrow, 1024, rng)
        embedding = self.model.encode_image(self.views(classes, self.images.draw(classes, rng)))  # [B, D]
        mean = embedding.mean(0)
        values, vectors = torch.linalg.eigh((embedding - mean).T @ (embedding - mean) / len(embedding))
        whitening = vectors * (values + 0.01 * values.mean()).rsqrt() @ vectors.T  # [D, D]
        projection = self.model.visual.head.proj
        projection.bias.copy_(whitening @ (projection.bias - mean))
        projection.weight.copy_(whitening @ projection.weight)

    def train_step(self) -> float:
        """One step; its loss."""
        options, pool = self.options, self.pool
        phase, _ = options.phase(self.step)
        torch.manual_seed(self.step)
        rng = np.random.default_rng([0, self.step])
        among = len(pool.names) if phase == "wide" else pool.narrow
        drawn = self.images.draw_classes(among, max(options.batch, options.texts), rng)
        own = drawn[: options.batch]
        named = drawn[: options.batch // 4] if phase == "names" else drawn  # a few suffice to follow the table
        indices = self.images.draw(drawn, rng)
        views = self.views(own, indices[: options.batch])
        tokens = self.captions.draw(named, pool.style[indices[: len(named)]], rng).to(self.device)

        self.model.train()
        # On a CPU, the fused attention is slower for sequences this short, by a third of a step.
        with self.autocast(), sdpa_kernel(SDPBackend.MATH):
            image, text = encode_image(self.model, views), encode_text(self.model, tokens)
        scale = self.model.logit_scale.exp()
        if phase == "names":
            # A constant scale: while images are not told apart yet, a learned one falls, and gradients with it.
            scale, table = scale.detach(), self.table()
            labels = torch.from_numpy(drawn).to(self.device)
            loss = F.cross_entropy(scale * image @ table.T, labels[: len(own)], label_smoothing=0.1)
            loss = loss + F.cross_entropy(scale * text @ table.detach().T, labels[: len(named)])
        else:
            logits, labels = scale * image @ text.T, torch.arange(len(own), device=self.device)  # [B, texts]
            loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
            loss = (loss + F.cross_entropy(logits[:, : len(own)].T, labels)) / 2

        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * self.schedule()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=np.log(100.0))
            # The average starts short, and forgets the first steps.
            weight = 1 - min(self.options.average, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self.averaged, self.tensors, weight)
        self.step += 1
        return loss.item()

    # ---- measurement

    @contextmanager
    def average(self) -> Iterator[None]:
        """Context in which the model has the averaged weights."""
        current = [tensor.data for tensor in self.tensors]
        for tensor, averaged in zip(self.tensors, self.averaged, strict=True):
            tensor.data = averaged
        yield
        for tensor, data in zip(self.tensors, current, strict=True):
            tensor.data = data

    @torch.no_grad()
    def accuracy(self) -> dict[str, float]:
        """Top-1 among the names of a task, in percent: the mean over tasks and test sets, for each group of names."""
        pool = self.pool
        self.model.eval()
        found: dict[str, list[float]] = {"narrow": [], "wide": [], "unknown": []}
        with self.average():
            image = self.embed_test_images()
            for group, cells in found.items():
                for task in np.unique(pool.test_task):
                    rows = np.flatnonzero((pool.test_task == task) & (pool.test_group == group))
                    classes, labels = np.unique(pool.test_name[rows], return_inverse=True)
                    if len(classes) < 2:
                        continue
                    tokens = self.captions.tokenizer([TEMPLATE.format(name) for name in classes])
                    with self.autocast():
                        text = encode_text(self.model, tokens.to(self.device)).cpu()
                    hit = (image[rows] @ text.T).argmax(-1).numpy() == labels
                    cells += [100 * hit[pool.test_set[rows] == prefix].mean() for prefix in pools.TEST_SETS]
        return {group: float(np.mean(cells)) if cells else float("nan") for group, cells in found.items()}

    def embed_test_images(self) -> Tensor:
        """Embeddings of the test images, [T, D]."""
        embedded = []
        for images in torch.from_numpy(self.pool.test_images).split(256):
            views = normalize(on_white(images.to(self.device).permute(0, 3, 1, 2).float() / 255, self.size))
            with self.autocast():
                embedded.append(encode_image(self.model, views).cpu())
        return torch.cat(embedded)

    # ---- the whole run

    def train(self) -> None:
        """Run the remaining steps."""
        saved, started = time.perf_counter(), time.process_time() - self.seconds
        while self.step < self.options.steps:
            self.losses.append(self.train_step())
            self.seconds = time.process_time() - started  # of this process: other load does not count
            if self.step % self.options.every == 0 or self.step == self.options.steps:
                self.measure()
                self.save()
                self.export()
                saved = time.perf_counter()
            elif time.perf_counter() - saved > self.options.save_seconds:
                self.save()
                print(f"step {self.step}, {self.seconds:.0f} s, loss {np.mean(self.losses):.3f}", flush=True)
                saved = time.perf_counter()

    def measure(self) -> None:
        """Add a row."""
        accuracy = self.accuracy()
        phase, _ = self.options.phase(self.step - 1)
        loss, pairs = float(np.mean(self.losses)), self.step * self.options.batch
        row = [self.step, phase, pairs, round(loss, 4), *(round(a, 2) for a in accuracy.values()), round(self.seconds)]
        self.losses.clear()
        self.rows.append(row)
        print(", ".join(f"{column} {value}" for column, value in zip(COLUMNS, row, strict=True)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for field in fields(Options):
        kind = type(field.default) if field.default is not None else Path
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    options = Options(**vars(parser.parse_args()))
    torch.set_num_threads(options.threads)
    run = Run(options, pools.load(options.pool))
    print(
        f"{len(run.pool.names)} names, {run.pool.narrow} narrow, {len(run.pool.label)} images, step {run.step}",
        flush=True,
    )
    run.train()


if __name__ == "__main__":
    main()
