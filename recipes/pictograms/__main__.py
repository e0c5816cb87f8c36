import argparse
from pathlib import Path

from . import draw, pool
from .table import FOLDER


def main() -> None:
    parser = argparse.ArgumentParser(description="Download the icons, draw them, and choose those to pre-train on.")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for all files")
    parser.add_argument("--jobs", type=int, default=2, help="processes that draw")
    parser.add_argument("--all-words", action="store_true", help="do not hold out the 175 words")
    args = parser.parse_args()
    draw.build(args.folder, args.jobs)
    chosen = pool.build(args.folder, hold_out_words=not args.all_words)
    pool.save(args.folder / ("pool-all-words.npz" if args.all_words else "pool.npz"), chosen)
    print(f"{len(chosen.label):,} images of {len(chosen.names):,} names, {chosen.narrow:,} of them narrow")


if __name__ == "__main__":
    main()
