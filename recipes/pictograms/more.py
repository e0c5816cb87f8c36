"""Write the drawings and photographs of more tasks of `bench.when`, which are not packaged, to one file, more.npz.

    python -m recipes.pictograms.more

flags         flags of the countries that CoreUI draws: training images are those of Twemoji and CoreUI, test images
              those of OpenMoji
flagpack      the same with the drawings of Flagpack for the test, which lacks a country
game icons    names that game-icons and other families draw: up to two drawings of others for training, game-icons for
              the test
photos        packaged names (`pool.concrete_names`), of which Tux Paint's stamps have a photograph, cut out, for the
              test; training images are those of Noto and Twemoji
many classes  names that two families draw, one for training and another for the test. Pre-training has seen these
              families: for cost and class selection, not for zero-shot accuracy

The table of icons must exist (`python -m recipes.pictograms`). Tux Paint's stamps are downloaded with apt-get. They are
under GPL 2, and only measured on. The file has, for the splits of each task, TASK/SPLIT/images, uint8 [N, 64, 64, 3] on
white, and TASK/SPLIT/names and TASK/SPLIT/sets, both [N].
"""

from __future__ import annotations

import argparse
import io
import random
import re
import shutil
import string
import subprocess
import tarfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from . import count, draw, names, pool, sets
from .drawings import SIZE, on_white
from .table import FOLDER, Icon, read_rows

FILE = "more.npz"
TASKS = ("flags", "game icons", "photos", "many classes")
FLAGPACK = "flagpack"  # an own set of bench.when
STAMPS = "tuxpaint-stamps-default=2025.03.31-1"  # of Debian 13
_STAMPS_URL = "https://snapshot.debian.org/package/tuxpaint-stamps/2025.03.31-1/"
# Folders with drawings, and files that are drawings, or show another thing than their names say, such as a car.
_LEFT_OUT = {"cartoon", "clothes", "roadsigns", "seasonal", "symbols", "toys", "hedgehog.png", "pizza.png"}
_LEFT_OUT |= {"balloon360.png", "beetle.png", "rubberduck.png", "sea_lion.png", "walnutBoat.png"}
_LETTERS = {0x1F1E6 + i: letter for i, letter in enumerate(string.ascii_lowercase)}  # two of the keys are a flag

Split = Literal["train", "test"]


class Drawing(NamedTuple):
    """An icon of a set, and the name of its class."""

    name: str
    set: str
    raw: str


class Picture(NamedTuple):
    """An image on white, uint8 [S, S, 3], with its class and its set; None if it is blank."""

    name: str
    set: str
    image: np.ndarray | None


Drawn = dict[Split, list[Drawing]]


def by_family(rows: Iterable[Icon]) -> dict[str, dict[str, Drawing]]:
    """A drawing by name and family, of all families but those of flags and those that are only measured on."""
    found: dict[str, dict[str, Drawing]] = {}
    for row in rows:
        if row.family not in sets.FLAGS and row.set not in sets.TEST_ONLY and names.is_word_name(row.name):
            found.setdefault(row.name, {}).setdefault(row.family, Drawing(row.name, row.set, row.raw))
    return found


def pick(families: Mapping[str, Drawing], most: int) -> list[Drawing]:
    """At most some of the drawings of a name, at random; the name is the seed."""
    order = sorted(families)
    return [families[key] for key in random.Random(families[order[0]].name).sample(order, min(most, len(order)))]


def game_icons(found: Mapping[str, Mapping[str, Drawing]]) -> Drawn:
    """Drawings of the task "game icons"."""
    others = [dict(of) for of in found.values() if "game-icons" in of and len(of) > 1]
    test = [of.pop("game-icons") for of in others]
    return {"train": [each for of in others for each in pick(of, 2)], "test": test}


def many_classes(found: Mapping[str, Mapping[str, Drawing]]) -> Drawn:
    """Drawings of the task "many classes"."""
    seen = [{key: own for key, own in of.items() if key not in sets.HELD_OUT} for of in found.values()]
    pairs = [pick(of, 2) for of in seen if len(of) > 1]
    return {"train": [first for first, _ in pairs], "test": [second for _, second in pairs]}


def flags(data: Mapping[str, Mapping[str, Any]], tested: Literal["openmoji", "flagpack"]) -> Drawn:
    """Drawings of the task "flags", or with another set for the test; a country is named as in Twemoji."""
    found: Drawn = {"train": [], "test": []}
    twemoji, openmoji = (flag_codes(data[prefix]["chars"]) for prefix in ("twemoji", "openmoji"))
    flagpack = {code: code for code in data["flagpack"]["icons"]} | {"gb": "gb-ukm"}  # its gb is England
    of_test = openmoji if tested == "openmoji" else flagpack
    for code in sorted(data["cif"]["icons"].keys() & twemoji.keys() & openmoji.keys()):
        name = f"flag of {twemoji[code].removeprefix('flag-').replace('-', ' ')}"
        found["train"] += [Drawing(name, "twemoji", twemoji[code]), Drawing(name, "cif", code)]
        if code in of_test:
            found["test"].append(Drawing(name, tested, of_test[code]))
    return found


def flag_codes(characters: Mapping[str, str]) -> dict[str, str]:
    """Icon of each country by its code, from the icons by character.

    >>> flag_codes({"1f1eb-1f1f7": "flag-france", "1f431": "cat"})
    {'fr': 'flag-france'}
    """
    texts = {raw: "".join(chr(int(point, 16)) for point in points.split("-")) for points, raw in characters.items()}
    codes = {raw: text.translate(_LETTERS) for raw, text in texts.items()}
    return {code: raw for raw, code in codes.items() if re.fullmatch("[a-z]{2}", code)}


def download_stamps(folder: Path) -> Path:
    """Return Debian's package of stamps in a folder, after downloading it if it is missing."""
    archive = folder / f"{STAMPS.replace('=', '_')}_all.deb"
    if not archive.exists():
        partial = folder / "partial"
        partial.mkdir(parents=True, exist_ok=True)
        apt = shutil.which("apt-get")
        if apt is None or subprocess.run([apt, "download", "--quiet", STAMPS], cwd=partial).returncode:
            raise SystemExit(f"apt-get can't download {STAMPS}. Put {archive.name}, of {_STAMPS_URL}, into {folder}.")
        (partial / archive.name).replace(archive)
    return archive


def stamp_names(path: PurePosixPath, caption: str) -> list[str]:
    """Names that a stamp may have: the words of a short caption, without the first ones as well, and its file's name.

    >>> stamp_names(PurePosixPath("stamps/animals/toad-1.png"), "A green toad.")
    ['green toad', 'toad', 'toad']
    """
    words = re.sub(r"^(an?|the|some) ", "", caption.strip().lower()).rstrip(".!").split()
    ends = [" ".join(words[first:]) for first in range(len(words))] if len(words) <= 4 else []
    return [*ends, re.sub(r"[^a-z]+", " ", path.stem.lower()).strip()]


def stamps(files: tarfile.TarFile, known: Collection[str]) -> Iterator[Picture]:
    """The photographs with a known name: PNG files, without drawings, of which some are SVG files as well."""
    members = {PurePosixPath(member.name): member for member in files if member.isfile()}

    def read(path: PurePosixPath) -> bytes:
        return files.extractfile(members[path]).read()  # type: ignore[union-attr]

    for path in sorted(members):
        text = path.with_suffix(".txt")
        is_drawn = path.with_suffix(".svg") in members or _LEFT_OUT & set(path.parts)
        if path.suffix != ".png" or text not in members or is_drawn:
            continue
        caption = read(text).decode("utf-8").split("\n", 1)[0]
        name = next((name for name in stamp_names(path, caption) if name in known), None)
        if name is not None:
            yield Picture(name, "tuxpaint-stamps", cut_out(read(path)))


def cut_out(png: bytes) -> np.ndarray:
    """A file with transparency, cropped to its content and resized to a square on white."""
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    canvas = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.asarray(ImageOps.pad(canvas, (SIZE, SIZE), color="white"))


def pictures(data: Mapping[str, dict[str, Any]], drawings: Iterable[Drawing]) -> list[Picture]:
    """The drawings on white."""
    images = ((own, draw.draw(draw.svg(data[own.set], own.raw), SIZE)) for own in drawings)
    return [Picture(own.name, own.set, None if image is None else on_white(image)) for own, image in images]


def arrays(task: str, splits: Mapping[Split, Sequence[Picture]]) -> dict[str, np.ndarray]:
    """The arrays of a task. A name with a blank image, or an image that is twice in the task, is left out."""
    every = [picture for of in splits.values() for picture in of]
    digests = Counter(draw.digest(picture.image) for picture in every)
    unusable = {p.name for p in every if p.image is None or digests[draw.digest(p.image)] > 1}
    found = {}
    for split, of in splits.items():
        kept = [picture for picture in of if picture.name not in unusable]
        found[f"{task}/{split}/images"] = np.array([picture.image for picture in kept])
        found[f"{task}/{split}/names"] = np.array([picture.name for picture in kept])
        found[f"{task}/{split}/sets"] = np.array([picture.set for picture in kept])
    return found


def class_names(path: Path, task: str) -> list[str]:
    """Names of a task in the file, sorted."""
    with np.load(path) as file:
        return sorted(set(file[f"{task}/test/names"].tolist()))


def read(path: Path, task: str, split: Split, classes: Sequence[str]) -> list[tuple[Image.Image, int]]:
    """Images of some classes in a split of a task, with their labels."""
    place = {name: label for label, name in enumerate(classes)}
    with np.load(path) as file:
        found = zip(file[f"{task}/{split}/images"], file[f"{task}/{split}/names"].tolist(), strict=True)
        return [(Image.fromarray(image), place[name]) for image, name in found if name in place]


def build(folder: Path) -> dict[str, np.ndarray]:
    """All arrays of the file."""
    package = subprocess.run(["dpkg-deb", "--fsys-tarfile", download_stamps(folder)], capture_output=True, check=True)
    rows = read_rows(folder)
    with tarfile.open(fileobj=io.BytesIO(package.stdout)) as files:
        photos = list(stamps(files, pool.concrete_names(rows)))
    data, found = draw.read_sets(draw.download(folder)), by_family(rows)
    tasks = {"flags": flags(data, "openmoji"), FLAGPACK: flags(data, "flagpack")}
    tasks |= {"game icons": game_icons(found), "many classes": many_classes(found)}
    splits = {task: {split: pictures(data, of) for split, of in each.items()} for task, each in tasks.items()}
    of_photos = [found[name][family] for name in sorted({p.name for p in photos}) for family in ("noto", "twemoji")]
    splits["photos"] = {"train": pictures(data, of_photos), "test": photos}
    return {key: array for task, each in splits.items() for key, array in arrays(task, each).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=FOLDER)
    path = parser.parse_args().folder / FILE
    found = build(path.parent)
    partial = path.with_suffix(".partial.npz")
    np.savez_compressed(partial, **found)  # type: ignore[arg-type]
    partial.replace(path)
    of = {task: [found[f"{task}/{split}/names"] for split in ("train", "test")] for task in (*TASKS, FLAGPACK)}
    lines = [(task, len(set(test.tolist())), len(train), len(test)) for task, (train, test) in of.items()]
    print(count.markdown(("task", "names", "training images", "test images"), lines))
    print(f"wrote {path}: {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
