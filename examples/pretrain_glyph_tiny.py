"""Pre-train `glyph-tiny`, the small CLIP that ships with skipkernels.

    python examples/pretrain_glyph_tiny.py --steps 4500 --out glyph-tiny.safetensors
    python examples/pretrain_glyph_tiny.py --init glyph-tiny.safetensors --lr 7.5e-4 --out longer.safetensors

Contrastive pre-training on all blocks of `skipkernels.app.demo.glyphs` but the held-out ones, in all fonts but the
held-out family. A step draws 128 characters, each in a random font and pose, and compares them with their names and 384
other names. The classes of a step are runs of neighbours in the Unicode standard, which have similar shapes and names.
Weights are stored in half precision, without the embeddings of tokens that no name has: these are untrained.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from rich.progress import Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from skipkernels.app.demo import glyph_tiny, glyphs

NEIGHBOURS = 16  # characters in a run of consecutive ones
IMAGES, TEXTS = 128, 512


def pretraining_pairs() -> tuple[list[int], list[list[str]]]:
    """Return the characters to pre-train on, and the fonts of each."""
    blocks = [block for block in glyphs.BLOCKS if block not in glyphs.HELD_OUT_BLOCKS]
    candidates = [c for block in blocks for c in range(glyphs.BLOCKS[block][0], glyphs.BLOCKS[block][1] + 1)]
    fonts_of: dict[int, list[str]] = {}
    for font in glyphs.FONTS:
        if font not in glyphs.HELD_OUT_FONTS:
            for codepoint in glyphs.distinct_characters(candidates, font):
                fonts_of.setdefault(codepoint, []).append(font)
    codepoints = sorted(fonts_of)
    return codepoints, [fonts_of[codepoint] for codepoint in codepoints]


def draw_classes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw TEXTS distinct class ids, in shuffled runs of neighbours."""
    starts = rng.permutation(np.arange(rng.integers(NEIGHBOURS), count, NEIGHBOURS))[: TEXTS // NEIGHBOURS + 1]
    runs = (starts[:, None] + np.arange(NEIGHBOURS)).ravel()
    return runs[runs < count][:TEXTS]


def encode_text(model: open_clip.CLIP, tokens: torch.Tensor) -> torch.Tensor:
    """Encode texts without the padding after the longest, which the causal mask hides from all pooled tokens."""
    ends = tokens.argmax(dim=-1)
    length = int(ends.max()) + 1
    hidden = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]
    hidden = model.transformer(hidden, attn_mask=model.attn_mask[:length, :length])
    pooled = hidden[torch.arange(len(tokens)), ends]
    return F.normalize(model.ln_final(pooled) @ model.text_projection, dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--init", type=Path, help="weights to start from; default: random ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("glyph-tiny.safetensors"))
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    glyph_tiny.register()
    model, _, preprocess = open_clip.create_model_and_transforms("glyph-tiny")
    if args.init:
        model.load_state_dict(glyph_tiny.state_dict(args.init))
    codepoints, fonts_of = pretraining_pairs()
    tokenizer = open_clip.get_tokenizer("glyph-tiny")
    tokens = tokenizer([glyphs.TEMPLATE.format(glyphs.character_name(c)) for c in codepoints])
    print(f"{len(codepoints)} characters, {sum(map(len, fonts_of))} character and font pairs, {args.steps} steps")

    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.98),
    )
    warm_up = max(1, min(200, args.steps // 10))
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm_up, total_iters=warm_up),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps - warm_up),
        ],
        milestones=[warm_up],
    )

    rows, start = [], time.perf_counter()
    columns = (
        *Progress.get_default_columns()[:3],
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("pre-training", total=args.steps, state="")
        for step in range(args.steps):
            classes = draw_classes(rng, len(codepoints))
            labels = torch.from_numpy(rng.permutation(len(classes))[:IMAGES])
            images = torch.stack(
                [
                    preprocess(glyphs.draw_glyph(codepoints[c], str(rng.choice(fonts_of[c])), rng))
                    for c in classes[labels.numpy()]
                ]
            )
            with torch.autocast("cpu", torch.bfloat16):
                image = model.encode_image(images, normalize=True)
                text = encode_text(model, tokens[classes])
            logits = model.logit_scale.exp() * image.float() @ text.float().T
            own = logits[:, labels]
            loss = (F.cross_entropy(logits, labels) + F.cross_entropy(own.T, torch.arange(len(labels)))) / 2
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=np.log(100.0))
            if (step + 1) % 25 == 0 or step + 1 == args.steps:
                accuracy = (logits.argmax(-1) == labels).float().mean()
                rows.append(
                    (step + 1, round(loss.item(), 4), round(accuracy.item(), 4), round(time.perf_counter() - start))
                )
                progress.update(
                    task, completed=step + 1, state=f"loss {loss:.3f}  accuracy {accuracy:.1%} of {len(classes)}"
                )
            if (step + 1) % 500 == 0 or step + 1 == args.steps:
                glyph_tiny.save(model, args.out)
                with args.out.with_suffix(".csv").open("w", newline="") as file:
                    csv.writer(file).writerows([("step", "loss", "accuracy", "seconds"), *rows])


if __name__ == "__main__":
    main()
