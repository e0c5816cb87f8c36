"""A dataset is the same in another process and in another place, and another one as soon as something of it changes."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import linecache
import operator
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from caches import CLASSES, Drawn, build, images, pictures, skip_clip
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset
from torchvision import transforms as v1
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import skipkernels as sk
from skipkernels.experiments import glyph_tiny
from skipkernels.experiments.glyphs import GlyphDataset
from skipkernels.features.builder import identity_of
from skipkernels.features.dataset_key import Unidentifiable, identify
from skipkernels.store import StoreError, digest_json

LONG_AGO = 1_000_000_000_000_000_000  # ns: so that a file that is touched now has another time
WARM = {"red", "orange", "yellow", "brown"}


class Images(Dataset):
    """As people write them: public attributes for what it is, private ones for what it has loaded."""

    def __init__(self, data: Any, transform: Callable | None = None, **rest: Any):
        self.data, self.transform = data, transform
        self._loaded: dict[int, Any] = {}
        vars(self).update(rest)

    def __len__(self) -> int:
        return len(self.data)


@dataclasses.dataclass(frozen=True)
class Config:
    size: tuple[int, int] = (224, 224)
    mean: float = 0.5
    names: frozenset[str] = frozenset(WARM)


def darker(image: Any, by: float = 0.5) -> Any:
    return image * by


def warm_or_cold(name: str) -> str:
    return "warm" if name in {"red", "orange", "yellow", "brown"} else "cold"


def scale(factor: float) -> Callable:
    return lambda image: image * factor


def folder(root: Path, transform: Callable | None = None) -> ImageFolder:
    return ImageFolder(str(root), transform)


def numbers(count: int = 4) -> torch.Tensor:
    return torch.arange(float(count * 12)).view(count, 3, 2, 2)


def picture(value: int = 0) -> Image.Image:
    return Image.fromarray(np.full((4, 4, 3), value, dtype=np.uint8))


def as_v1() -> v1.Compose:
    return v1.Compose(
        [
            v1.RandomResizedCrop(6, scale=(0.5, 1.0)),
            v1.Resize(6, interpolation=v1.InterpolationMode.BICUBIC),
            v1.RandomApply([v1.GaussianBlur(3)]),
            v1.ToTensor(),
            v1.Lambda(darker),
            v1.Normalize([0.5, 0.5, 0.5], [0.2, 0.3, 0.4]),
        ]
    )


def as_v2() -> v2.Compose:
    return v2.Compose(
        [
            v2.ToImage(),
            v2.RandomResizedCrop(6, scale=(0.5, 1.0), antialias=True),
            v2.Resize(6, interpolation=v2.InterpolationMode.BICUBIC),
            v2.ToDtype(torch.float32, scale=True),
            v2.Lambda(darker),
            v2.Normalize([0.5, 0.5, 0.5], [0.2, 0.3, 0.4]),
        ]
    )


def open_clips(training: bool) -> Callable:
    glyph_tiny.register()
    return open_clip.create_model_and_transforms("glyph-tiny")[1 if training else 2]


def cifar(targets: Any = (3, 1, 2, 1), change: int = 0) -> Images:
    data = np.arange(4 * 12, dtype=np.uint8).reshape(4, 2, 2, 3)
    data[1, 1, 1, 1] += change
    return Images(data, v1.ToTensor(), targets=list(targets), class_to_idx={"cat": 1, "dog": 2, "frog": 3})


CASES: dict[str, Callable[[Path], Any]] = {
    "folder": folder,
    "v1": lambda root: folder(root, as_v1()),
    "v2": lambda root: folder(root, as_v2()),
    "open_clip train": lambda root: folder(root, open_clips(True)),
    "open_clip": lambda root: folder(root, open_clips(False)),
    "subset": lambda root: Subset(folder(root), [2, 0]),
    "concatenated": lambda root: ConcatDataset([folder(root), folder(root / "..", v1.ToTensor())]),
    "tensors": lambda root: TensorDataset(numbers(), torch.arange(4)),
    "glyphs": lambda root: GlyphDataset([97, 98], ["sans", "mono"], per_class=2, seed=1, transform=as_v1()),
    "list": lambda root: list(zip(numbers(), [0, 1, 2, 3], strict=True)),
    "cifar": lambda root: cifar(),
    "partial": lambda root: Images(numbers(), functools.partial(darker, by=0.25)),
    "method": lambda root: Images(numbers(), Config().__eq__),
    "closure": lambda root: Images(numbers(), scale(2.0)),
    "set in the code": lambda root: Images(numbers(), warm_or_cold),
    "set": lambda root: Images(numbers(), WARM.copy(), names=frozenset(WARM)),
    "dataclass": lambda root: Images(numbers(), config=Config(), device=torch.device("cpu"), dtype=torch.float16),
    "pictures": lambda root: Images([(picture(1), 0), (picture(2), 1)], v1.ToTensor()),
    "numpy numbers": lambda root: Images(np.array(["a", "bc"]), mean=np.float32(0.1), count=np.int64(3)),
    "module": lambda root: Images(numbers(), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.ReLU())),
}


def identities(root: Path) -> dict[str, Any]:
    return {name: list(identify(make(root))) for name, make in CASES.items()}


@pytest.fixture
def root(tmp_path) -> Path:
    """Two classes of two images each, of long ago."""
    for name, value in (("cat/a", 1), ("cat/b", 2), ("dog/a", 3), ("dog/b", 4)):
        path = tmp_path / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(value).save(path)
        os.utime(path, ns=(LONG_AGO, LONG_AGO))
    return tmp_path / "images"


def test_another_process_in_another_folder_says_the_same(root, tmp_path):
    code = f"import json, pathlib, test_dataset_key as t; print(json.dumps(t.identities(pathlib.Path({str(root)!r}))))"
    here = [str(path) for path in (Path(__file__).parent, Path(__file__).parents[1], Path(__file__).parents[2])]
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(here)}
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(other.stdout.splitlines()[-1]) == identities(root)


def test_all_of_them_differ(root):
    found = [tuple(identity) for identity in identities(root).values()]
    assert len(set(found)) == len(found)


# ---- what is seen ------------------------------------------------------------------------------------------------


def compiled(text: str) -> Callable:
    """A function of the same name, from other text."""
    space: dict[str, Any] = {"__name__": "transforms"}
    exec(text, space)
    return space["f"]


PAIRS: dict[str, tuple[Any, Any]] = {
    "size": (v1.Resize(6), v1.Resize(7)),
    "size, v2": (v2.Resize(6), v2.Resize(7)),
    "interpolation": (v1.Resize(6), v1.Resize(6, v1.InterpolationMode.NEAREST)),
    "mean": (v1.Normalize([0.5], [0.2]), v1.Normalize([0.4], [0.2])),
    "mean, v2": (v2.Normalize([0.5], [0.2]), v2.Normalize([0.4], [0.2])),
    "scale": (v1.RandomResizedCrop(6), v1.RandomResizedCrop(6, scale=(0.9, 1.0))),
    "order": (v1.Compose([v1.Resize(6), v1.CenterCrop(4)]), v1.Compose([v1.CenterCrop(4), v1.Resize(6)])),
    "one more": (as_v1(), v1.Compose([*as_v1().transforms, v1.Grayscale(3)])),
    "inside a module": (v1.RandomApply([v1.GaussianBlur(3)]), v1.RandomApply([v1.GaussianBlur(5)])),
    "training or not": (open_clips(True), open_clips(False)),
    "function": (v1.Lambda(darker), v1.Lambda(warm_or_cold)),
    "constant": (compiled("def f(x): return x * 2"), compiled("def f(x): return x * 3")),
    "constant in a set": (compiled("def f(x): return x in {1, 2}"), compiled("def f(x): return x in {1, 3}")),
    "inner constant": (compiled("def f(x): return (lambda: 1)()"), compiled("def f(x): return (lambda: 2)()")),
    "name it calls": (compiled("def f(x): return sin(x)"), compiled("def f(x): return cos(x)")),
    "default": (compiled("def f(x, y=2): return x"), compiled("def f(x, y=3): return x")),
    "keyword default": (compiled("def f(x, *, y=2): return x"), compiled("def f(x, *, y=3): return x")),
    "captured": (scale(1.0), scale(2.0)),
    "partial": (functools.partial(darker, by=0.25), functools.partial(darker, by=0.75)),
    "method of another object": (Config(mean=0.1).__eq__, Config(mean=0.2).__eq__),
    "method of another mapping": ({0: 1}.get, {0: 2}.get),
    "weight": (torch.nn.Conv2d(3, 3, 1), torch.nn.Conv2d(3, 3, 1)),
    "none": (None, v1.ToTensor()),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_another_transform_is_seen(pair):
    first, second = (identify(Images(numbers(), transform)) for transform in pair)
    assert first.transform != second.transform
    assert (first.dataset, first.files) == (second.dataset, second.files)


def test_functions_made_by_exec_differ_where_their_file_name_has_text(monkeypatch):
    """As in Python 3.13.0 with `-c`, in which pytest-xdist runs."""
    lines = ["import sys\n"]
    monkeypatch.setitem(linecache.cache, "<string>", (len(lines[0]), None, lines, "<string>"))
    first, second = (compiled(f"def f(x): return x * {factor}") for factor in (2, 3))
    assert inspect.getsource(first) == inspect.getsource(second) == lines[0]
    assert identify(Images([1], first)) != identify(Images([1], second))


def test_the_second_of_two_closures_is_seen():
    """The values that they capture are in short-lived lists, which may be in one place."""

    def identity(factor):
        return identify(Images(numbers(), v1.Compose([scale(1.0), scale(3.0), scale(factor)])))

    assert len({identity(factor) for factor in (1.0, 2.0, 3.0, 4.0)}) == 4


def test_which_part_has_which_transform_is_seen():
    first, second = as_v1(), v1.ToTensor()
    identities = {
        identify(ConcatDataset([Images(numbers(), one), Images(numbers(), other)]))
        for one, other in ((first, second), (second, first), (None, first), (first, None))
    }
    assert len(identities) == 4


def moved(items: list, first: int, second: int) -> list:
    items[first], items[second] = items[second], items[first]
    return items


@pytest.mark.parametrize(
    "pair",
    [
        (cifar(), cifar(targets=(3, 1, 2, 2))),
        (cifar(), cifar(change=1)),
        (TensorDataset(numbers(), torch.arange(4)), TensorDataset(numbers(), torch.tensor([0, 1, 3, 2]))),
        (TensorDataset(numbers()), TensorDataset(numbers().half())),
        (TensorDataset(numbers()), TensorDataset(numbers() + 1e-3)),
        (Subset(cifar(), [0, 1]), Subset(cifar(), [1, 0])),
        (ConcatDataset([cifar(), Subset(cifar(), [1])]), ConcatDataset([Subset(cifar(), [1]), cifar()])),
        (Images([1, 2], classes=["cat", "dog"]), Images([1, 2], classes=["dog", "cat"])),
        (Images([1, 2], classes={"cat": 0, "dog": 1}), Images([1, 2], classes={"cat": 1, "dog": 0})),
        (Images([1]), Images([1.0])),
        (Images(numbers(), config=Config()), Images(numbers(), config=Config(mean=0.25))),
        (Images(numbers(), config=Config()), Images(numbers(), config=SimpleNamespace(**vars(Config())))),
        (Images([(picture(1), 0), (picture(2), 1)]), Images([(picture(1), 0), (picture(3), 1)])),
        (Images(b"abc"), Images(b"abd")),
        (Images(np.array(["a", "bc"])), Images(np.array(["a", "bd"]))),
        (Images(np.array(["a", None])), Images(np.array([None, "a"]))),
        (Images(3, _fingerprint="12", _data=object()), Images(3, _fingerprint="13", _data=object())),
        (GlyphDataset([97], ["sans"], per_class=2, seed=1), GlyphDataset([97], ["sans"], per_class=2, seed=2)),
        ([(numbers()[0], 0), (numbers()[1], 1)], [(numbers()[0], 0), (numbers()[1], 2)]),
    ],
    ids=["label", "pixel", "labels", "dtype", "value", "subset", "concatenated", "classes", "class numbers", "type",
         "config", "type of the config", "picture", "bytes", "text", "objects", "fingerprint", "seed", "list"],
)  # fmt: skip
def test_other_images_or_labels_are_seen(pair):
    first, second = map(identify, pair)
    assert first.dataset != second.dataset


def renamed(root: Path) -> None:
    (root / "cat" / "b.png").rename(root / "cat" / "c.png")


def grown(root: Path) -> None:
    with (root / "dog" / "b.png").open("ab") as file:
        file.write(b"more")
    os.utime(root / "dog" / "b.png", ns=(LONG_AGO, LONG_AGO))


def removed(root: Path) -> None:
    (root / "dog" / "b.png").unlink()


def touched(root: Path) -> None:
    os.utime(root / "dog" / "b.png")


def written(root: Path) -> None:
    """Other contents, as many, at the same time."""
    path = root / "dog" / "b.png"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    os.utime(path, ns=(LONG_AGO, LONG_AGO))


@pytest.mark.parametrize(
    ("change", "files", "seen"),
    [
        (renamed, "times", {"dataset"}),
        (grown, "times", {"dataset"}),
        (removed, "times", {"dataset", "files"}),
        (touched, "times", {"files"}),
        (touched, "contents", set()),
        (written, "times", set()),
        (written, "contents", {"files"}),
    ],
    ids=lambda value: getattr(value, "__name__", " ".join(sorted(value)) if isinstance(value, set) else value),
)
def test_what_is_seen_of_files(root, change, files, seen):
    before = identify(folder(root, as_v1()), files)
    change(root)
    after = identify(folder(root, as_v1()), files)
    assert {name for name in before._fields if getattr(before, name) != getattr(after, name)} == seen


# ---- what is not seen --------------------------------------------------------------------------------------------


def test_where_the_folder_is_does_not_matter(root, tmp_path):
    before = identify(folder(root, as_v1()))
    shutil.copytree(root, tmp_path / "elsewhere" / "pictures")  # keeps the times
    assert identify(folder(tmp_path / "elsewhere" / "pictures", as_v1())) == before


@pytest.mark.parametrize("form", [str, Path], ids=["text", "path"])
@pytest.mark.parametrize("relative", ["images", "./images", "images/../images"])
def test_how_the_folder_is_named_does_not_matter(root, monkeypatch, relative, form):
    before = identify(ImageFolder(form(root)))
    monkeypatch.chdir(root.parent)
    assert identify(ImageFolder(form(relative))) == before
    monkeypatch.chdir(root)
    assert identify(ImageFolder(form(root))) == before, "nor the working folder"


def test_a_class_that_is_called_as_a_folder_stays_a_class(root, monkeypatch):
    before = identify(Images([1, 2], classes=["cat", "dog"]))
    monkeypatch.chdir(root)
    assert identify(Images([1, 2], classes=["cat", "dog"])) == before


def test_what_a_dataset_has_loaded_does_not_matter():
    dataset = Images(numbers())
    before = identify(dataset)
    dataset._loaded[0] = object()
    assert identify(dataset) == before


def test_the_mode_of_a_transform_does_not_matter():
    dataset = Images(numbers(), v1.RandomApply([v1.GaussianBlur(3)]))
    before = identify(dataset)
    dataset.transform.eval()
    assert identify(dataset) == before


def test_a_transform_that_is_used_twice_counts_as_itself(root):
    shared = as_v1()
    assert identify(ConcatDataset([Images([1], shared), Images([2], shared)])) == identify(
        ConcatDataset([Images([1], as_v1()), Images([2], as_v1())])
    )


# ---- what can't be told ------------------------------------------------------------------------------------------


class Nothing:
    """Where its images come from is nowhere to be seen."""

    def __len__(self) -> int:
        return 3


class Secretive(Nothing):
    def __init__(self):
        self._images = None
        del self._images
        self._seed = 3


def around_itself() -> Images:
    dataset = Images(1)
    dataset.parent = dataset
    return dataset


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Nothing(), r"dataset is a test_dataset_key\.Nothing, which has no attributes"),
        (Secretive(), r"dataset is a test_dataset_key\.Secretive, whose attributes are all private"),
        (Images(Secretive()), r"dataset\.data is a test_dataset_key\.Secretive, whose attributes are all private"),
        (Images([1, iter([2])]), r"dataset\.data\[1\] is a builtins\.list_iterator, which has no attributes"),
        (Images({"a": object()}), r"dataset\.data\['a'\] is a builtins\.object, which has no attributes"),
        (Images(1, operator.itemgetter(0)), r"dataset\.transform is a operator\.itemgetter, which has no attributes"),
        (around_itself(), r"dataset(\.parent){12}\.data goes deeper than 12 levels"),
    ],
    ids=["nothing", "private", "private inside", "iterator", "object", "C function", "cycle"],
)
def test_what_cannot_be_told_is_named_with_a_remedy(dataset, message):
    with pytest.raises(Unidentifiable, match=f"^{message}"):
        identify(dataset)
    with pytest.raises(StoreError, match=rf"{message}.*\. Pass identity="):
        identity_of(dataset, "times", None)
    assert identity_of(dataset, "times", "mine") == identity_of(object(), "times", "mine")
    assert identity_of(dataset, "times", "mine") != identity_of(dataset, "times", "other")


def test_files_that_go_away_while_one_looks_are_an_error_of_the_dataset(root, monkeypatch):
    dataset, stat = folder(root), Path.stat

    def gone(path, **arguments):
        if path.name == "b.png" and not sys._getframe(1).f_code.co_name == "is_file":
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return stat(path, **arguments)

    monkeypatch.setattr(Path, "stat", gone)
    with pytest.raises(StoreError, match="can't be told from another: .*b.png"):
        identity_of(dataset, "times", None)


def test_files_are_told_by_times_or_contents(tmp_path):
    dataset = images(4)
    for call in (identify, lambda dataset, files: build(tmp_path, dataset, files=files)):
        with pytest.raises(ValueError, match='files must be "times" or "contents"; got \'content\''):
            call(dataset, "content")
    build(tmp_path, dataset)
    with pytest.raises(ValueError, match='files must be "times" or "contents"; got \'content\''):
        sk.FeatureCache.open(tmp_path, dataset=dataset, files="content")


# ---- what only the images tell -----------------------------------------------------------------------------------

COUNT = 9  # images, of which 0, 4 and 8 are looked at
BRIGHTER = 0.0  # a global that a transform reads


class Numbered(Dataset):
    """Images by number through a transform."""

    def __init__(self, transform: Callable | None = None):
        self.pictures, self.transform = pictures(COUNT), transform

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, item: int) -> tuple[Any, int]:
        image = self.pictures[item]
        return image if self.transform is None else self.transform(image), item % CLASSES


class Named(Numbered):
    """Files by their bare names in a folder."""

    def __init__(self, root: Path):
        super().__init__()
        self.root, self.names = str(root), [f"{item}.png" for item in range(COUNT)]

    def __getitem__(self, item: int) -> tuple[Any, int]:
        return v1.functional.to_tensor(Image.open(os.path.join(self.root, self.names[item]))), item % CLASSES


class Private(Numbered):
    def __init__(self, lighter: float):
        super().__init__()
        self._lighter = lighter

    def __getitem__(self, item: int) -> tuple[Any, int]:
        image, label = super().__getitem__(item)
        return image + self._lighter, label


class ListOf(list):
    """Of images, with something beside them."""

    def __init__(self, lighter: float):
        super().__init__([(image, item % CLASSES) for item, image in enumerate(pictures(COUNT))])
        self.lighter = lighter

    def __getitem__(self, item: int) -> tuple[Any, int]:
        image, label = super().__getitem__(item)
        return image + self.lighter, label


class Shuffled(Numbered):
    def __init__(self, seed: int):
        super().__init__()
        self.random = random.Random(seed)
        self._order = self.random.sample(range(COUNT), COUNT)

    def __getitem__(self, item: int) -> tuple[Any, int]:
        return super().__getitem__(self._order[item])


def written_anew(root: Path, change: bool) -> Path:
    for item in range(COUNT):
        path = root / f"{item}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), 20 * item + 5 * change, np.uint8)).save(path)
    return root


def of_code(root: Path, change: bool) -> Dataset:
    class Coded(Numbered):
        def __getitem__(self, item: int) -> tuple[Any, int]:
            image, label = super().__getitem__(item)
            return (image.flip(-1) if change else image), label

    return Coded()


def of_a_class_attribute(root: Path, change: bool) -> Dataset:
    class Scaled:
        factor = 1.1 if change else 1.0

        def __init__(self):
            self.name = "scaled"

        def __call__(self, image: torch.Tensor) -> torch.Tensor:
            return image * self.factor

    return Numbered(Scaled())


def brighter(image: torch.Tensor) -> torch.Tensor:
    return image + BRIGHTER


def of_a_global(root: Path, change: bool) -> Dataset:
    globals()["BRIGHTER"] = 0.5 * change
    return Numbered(brighter)


LAMBDAS = (lambda image: image, lambda image: image.flip(-1))


def of_a_label(root: Path, change: bool) -> Dataset:
    class Labelled(Numbered):
        def __getitem__(self, item: int) -> tuple[Any, int]:
            return self.pictures[item], item % CLASSES + change

    return Labelled()


class Streamed(IterableDataset):
    def __init__(self, lighter: float):
        self.count, self._lighter = COUNT, lighter

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        torch.rand(1)  # as for an order
        return iter([Private(self._lighter)[item] for item in range(COUNT)])


UNTOLD: dict[str, Callable[[Path, bool], Any]] = {  # datasets without and with a change that attributes don't tell
    "files by name": lambda root, change: Named(written_anew(root, change)),
    "private attribute": lambda root, change: Private(0.5 * change),
    "code": of_code,
    "class attribute": of_a_class_attribute,
    "global": of_a_global,
    "lambda": lambda root, change: Numbered(LAMBDAS[change]),
    "lambda of torchvision": lambda root, change: Numbered(v1.Lambda(LAMBDAS[change])),
    "attribute of a list": lambda root, change: ListOf(0.5 * change),
    "random.Random": lambda root, change: Shuffled(int(change)),
    "label": of_a_label,
    "iterable": lambda root, change: Streamed(0.5 * change),
}


@pytest.mark.parametrize(("name", "files"), [*((name, "times") for name in UNTOLD), ("files by name", "contents")])
def test_what_attributes_do_not_tell_the_images_do(tmp_path, name, files):
    make, root, clip = UNTOLD[name], tmp_path / "images", skip_clip()
    before = make(root, False)
    identity = identify(before, files)
    build(tmp_path / "store", before, clip, files=files)
    sk.FeatureCache.open(tmp_path / "store", clip, make(root, False), files=files)
    build(tmp_path / "store", make(root, False), clip, files=files, resume=True)
    after = make(root, True)
    assert identify(after, files) == identity, "else this is no case of these"
    message = r"item \d of the dataset has another image or label than when this was built.* overwrite=True"
    with pytest.raises(StoreError, match=message):
        sk.FeatureCache.open(tmp_path / "store", clip, after, files=files)
    with pytest.raises(StoreError, match=message):
        build(tmp_path / "store", after, clip, files=files, resume=True)
    build(tmp_path / "store", after, clip, files=files, overwrite=True)


class Moved(Numbered):
    """Of which some images are off by something."""

    def __init__(self, off: torch.Tensor | float = 0.0, items: tuple[int, ...] = (0, 4, 8)):
        super().__init__()
        self._off, self._items = off, items

    def __getitem__(self, item: int) -> tuple[Any, int]:
        image, label = super().__getitem__(item)
        return (image + self._off if item in self._items else image), label


@pytest.mark.parametrize("item", [0, 4, 8])
def test_the_first_the_middle_and_the_last_image_are_looked_at(tmp_path, item):
    build(tmp_path, Moved())
    with pytest.raises(StoreError, match=f"^{tmp_path}: item {item} of the dataset has another image or label"):
        sk.FeatureCache.open(tmp_path, dataset=Moved(0.5, (item,)))


def test_the_others_are_not(tmp_path):
    """As docs/cache.md says."""
    build(tmp_path, Moved())
    sk.FeatureCache.open(tmp_path, dataset=Moved(0.5, (1, 2, 3, 5, 6, 7)))


def test_images_may_be_decoded_a_little_otherwise(tmp_path):
    build(tmp_path, Moved())
    unit = (torch.randint(-1, 2, (3, 16, 16), generator=torch.Generator().manual_seed(0))) / 255
    sk.FeatureCache.open(tmp_path, dataset=Moved(unit))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("dataset", [Drawn(8), Streamed(0.5)], ids=["drawn", "streamed"])
def test_random_transforms_are_drawn_as_they_were(tmp_path, dataset, workers):
    build(tmp_path, dataset, views=2, seed=3, workers=workers)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    for _ in range(2):
        sk.FeatureCache.open(tmp_path, dataset=dataset)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert before[0].equal(after[0]) and before[1:] == after[1:]


class Restless(Numbered):
    """Which draws from a generator of its own."""

    def __init__(self):
        super().__init__()
        self._random = random.Random(0)

    def __getitem__(self, item: int) -> tuple[Any, int]:
        image, label = super().__getitem__(item)
        return image + self._random.random(), label


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_are_others_each_time_need_a_name(tmp_path, workers):
    with pytest.raises(StoreError, match="item 0 of the dataset is another one each time .* pass identity="):
        build(tmp_path, Restless(), workers=workers)
    assert not list(tmp_path.iterdir())
    build(tmp_path, Restless(), workers=workers, identity="restless")
    sk.FeatureCache.open(tmp_path, dataset=Restless(), identity="restless")


def test_an_iterable_that_is_gone_once_it_is_read_is_kept_whole(tmp_path):
    class Once:
        def __init__(self):
            self.count, self._items = COUNT, iter(Numbered())

        def __len__(self) -> int:
            return self.count

        def __iter__(self):
            return self._items

    cache = build(tmp_path, Once())
    assert len(cache) == COUNT
    sk.FeatureCache.open(tmp_path, dataset=Once())


def test_processes_that_load_get_the_dataset_as_it_was(tmp_path):
    """One that opens a file when it is first asked must do that in each of them."""

    class Opened(Numbered):
        def __init__(self):
            super().__init__()
            self._process: int | None = None

        def __getitem__(self, item: int) -> tuple[Any, int]:
            self._process = self._process or os.getpid()
            assert self._process == os.getpid(), "opened elsewhere"
            return super().__getitem__(item)

    dataset = Opened()
    build(tmp_path, dataset, workers=1)
    assert dataset._process is None


def test_a_store_without_samples_is_built_again(tmp_path):
    build(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for samples in (None, [], [{}, {}, {}], {"item": 0}):
        manifest["layout"]["notes"]["samples"] = samples
        del manifest["xxh3"]
        manifest["xxh3"] = digest_json(manifest)
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        sk.FeatureCache.open(tmp_path, skip_clip())
        with pytest.raises(StoreError, match="its manifest has no samples of such a dataset. Build another one"):
            sk.FeatureCache.open(tmp_path, dataset=images())


def test_what_differs_is_said_in_words(tmp_path):
    build(tmp_path, images(9))
    for dataset, message in (
        (images(8), r"made with another number of images \(9 there, 8 here\), so"),
        (images(9, seed=1), r"made with another images, so .*a public attribute.* build and open with identity="),
    ):
        with pytest.raises(StoreError, match=message) as caught:
            sk.FeatureCache.open(tmp_path, dataset=dataset)
        assert len(max(str(caught.value).replace(str(tmp_path), "").split(), key=len)) < 32, "no digests"
