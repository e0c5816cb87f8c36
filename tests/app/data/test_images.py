"""Reading image files, subsets of images, and labels of any dataset."""

from __future__ import annotations

import io
import struct
import threading
import time
import warnings
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, ExifTags, Image
from torch.utils.data import Subset, TensorDataset

from skipkernels.app.data import map_style
from skipkernels.app.data.images import Images, read_ahead
from skipkernels.app.data.map_style import read_labels
from skipkernels.app.data.reading import PIXELS, decode, read_image, to_rgb
from tests.app.data.pictures import Listed, class_of, draw_image, encoded, raises_input_error


def one(path: Path) -> Image.Image:
    return Images.of_files(path.parent, [path.name], [0])[0][0]


# ---- valid files -----------------------------------------------------------------------------------------------------


COLOUR = (200, 10, 30)
PALETTE = Image.new("RGB", (3, 2), COLOUR).quantize(4)
TWO = [Image.new("RGB", (3, 2), colour) for colour in ("red", "blue")]
DEEP = Image.fromarray(np.full((3, 4), 40_000, dtype=np.uint16))
TURNED = Image.Exif()
TURNED[ExifTags.Base.Orientation] = 6  # the camera was turned: the left edge of the stored pixels is the top
STORED = Image.new("RGB", (64, 32), "blue")
STORED.paste("red", (0, 0, 32, 32))
FORMATS = ("png", "jpeg", "webp", "tiff", "bmp", "ppm", "gif", "avif")
# Image, format and options of its file; the colour that is seen at the top. Extensions are wrong, as in data sets:
# Oxford-IIIT Pet has PNGs and GIFs with the extension .jpg, ImageNet a PNG with .JPEG.
VALID: dict[str, tuple[Image.Image, str, dict, tuple[int, int, int]]] = {
    "1": (Image.new("1", (3, 2), 1), "png", {}, (255, 255, 255)),
    "L": (Image.new("L", (3, 2), 77), "png", {}, (77, 77, 77)),
    "LA": (Image.new("LA", (3, 2), (77, 0)), "png", {}, (77, 77, 77)),
    "RGBA": (Image.new("RGBA", (3, 2), (*COLOUR, 0)), "png", {}, COLOUR),
    "P": (PALETTE, "png", {}, COLOUR),
    "P with transparency": (PALETTE, "png", {"transparency": bytes([9, 200])}, COLOUR),
    "CMYK": (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "jpeg", {"quality": 95}, (255, 0, 0)),
    # 40,000 / 256; Pillow would clip these values, to white.
    **{f"16 bits of {kind}": (DEEP, kind, {}, (156, 156, 156)) for kind in ("png", "tiff", "ppm")},
    **{f"turned {kind}": (STORED, kind, {"exif": TURNED}, (255, 0, 0)) for kind in ("png", "jpeg")},
    "EXIF that is none": (Image.new("RGB", (8, 4)), "jpeg", {"exif": b"Exif\x00\x00garbage"}, (0, 0, 0)),
    **{kind: (Image.new("RGB", (3, 2), (0, 0, 200)), kind, {}, (0, 0, 200)) for kind in FORMATS},
    **{
        f"first frame of {kind}": (TWO[0], kind, {"save_all": True, "append_images": TWO[1:], "lossless": True},
                                   (255, 0, 0))
        for kind in ("gif", "webp")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", VALID)
def test_read_image(tmp_path, name):
    """From a file, and of an image that is opened already; both are upright RGB."""
    image, kind, options, seen = VALID[name]
    path = tmp_path / "a.heic"
    image.save(path, kind, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's, of palettes with transparency
        with Image.open(path) as opened:
            own = Images([(opened, 0)])[0][0]
            found = [one(path), own, to_rgb(opened, "a"), to_rgb(own, "again")]
    most = 15 if kind in ("jpeg", "webp", "avif") else 0  # these lose
    for each in found:
        assert each.mode == "RGB" and each.size == (image.size[::-1] if "turned" in name else image.size)
        assert all(abs(value - right) <= most for value, right in zip(each.getpixel((1, 1)), seen, strict=True))


def test_images_of_arrays_are_rgb():
    image, label = Images([(np.full((2, 3), 77, np.uint8), 4)])[0]
    assert image.mode == "RGB" and image.getpixel((2, 1)) == (77, 77, 77) and label == 4


def test_read_image_heif(tmp_path):
    """An orientation of the EXIF data is applied by the plugin already."""
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(STORED).save(tmp_path / "a.heic", exif=TURNED.tobytes())
    image = one(tmp_path / "a.heic")
    assert image.size == (32, 64) and image.getpixel((16, 12))[0] > 200 > 50 > image.getpixel((16, 52))[0]


# ---- invalid files ---------------------------------------------------------------------------------------------------


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8))


def test_read_image_invalid_files(tmp_path):
    path = tmp_path / "ünïcode.png"
    for content in (b"", b"<html>404 Not Found</html>", encoded(NOISE, "jpeg")[:300], encoded(NOISE)[:300]):
        path.write_bytes(content)
        with raises_input_error(path, "can't be read as an image", "remove"):
            one(path)
    path.unlink()
    with raises_input_error(path, "no such file. Was it removed, or is it a broken link?"):
        one(path)
    path.mkdir()
    with raises_input_error(path, "can't be read"):
        one(path)


def test_read_image_does_not_run_ghostscript(tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript"))
    Image.new("RGB", (3, 2)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with raises_input_error("a.png: can't be read as an image"):
        read_image(tmp_path / "a.png")


def tiff_in_a_tile(side: int) -> bytes:
    """Header of a TIFF of 64 x 64 pixels in a larger tile."""
    tags = {256: 64, 257: 64, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 8, 325: 1}
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + fields + bytes(4)


def test_limit_of_pixels_is_that_of_the_header():
    """Decoding the tile takes 2.3 GiB."""
    six = encoded(Image.new("RGB", (3, 2)))
    assert decode(io.BytesIO(six), "a", max_pixels=6).size == (3, 2)
    for content, most in ((six, 5), (tiff_in_a_tile(46_000), PIXELS)):
        with raises_input_error(f"a: must have at most {most:,} pixels. Make it smaller."):
            decode(io.BytesIO(content), "a", max_pixels=most)


def test_each_reads_a_dataset_of_the_user_in_one_thread():
    """It need not be safe in several."""
    threads = []
    images = Images(Listed(range(20), lambda label: time.sleep(1e-3)))
    assert len(list(images.each(lambda image: threads.append(threading.get_ident())))) == 20
    assert len(set(threads)) == 1


def test_read_ahead_ends_with_its_consumer():
    """Images of which the reading has not begun are not read."""
    done, closed, before = [], threading.Event(), set(threading.enumerate())

    def read(index: int) -> int:
        if index > 1:
            closed.wait()
        done.append(index)
        return index

    found = read_ahead(read, 100, workers=2)
    assert [next(found), next(found)] == [0, 1]
    workers = set(threading.enumerate()) - before
    found.close()
    closed.set()
    for worker in workers:
        worker.join(timeout=60)
        assert not worker.is_alive()
    assert set(done) <= {0, 1, 2, 3}


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_read_image_refuses_32_bits_per_channel(tmp_path, dtype):
    Image.fromarray(np.ones((2, 3), dtype)).save(tmp_path / "a.tiff")
    with raises_input_error("a.tiff: has 32 bits per channel", "Convert it to 8 or 16 bits"):
        read_image(tmp_path / "a.tiff")


def test_read_image_extreme_ratio(tmp_path):
    """With its shorter side resized to 224, it would have 200 million pixels."""
    for size in ((8000, 2), (2, 8000)):
        Image.new("L", size).save(tmp_path / "a.png")
        with raises_input_error("a.png: a side must be at most 500 times the other", "got {:,} × {:,}".format(*size)):
            one(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tiff"])
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=30)
def test_read_image_fuzzed_files(tmp_path_factory, kind, data):
    content = bytearray(encoded(NOISE, kind))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, min(len(content), 400) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / f"damaged.{kind}"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns when it repairs a file
        try:
            assert read_image(path).mode == "RGB"
        except ValueError:
            with raises_input_error(path):
                read_image(path)


# ---- parts of a dataset ----------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path):
    """Six images of classes 0, 1, 2, 0, 1, 2."""
    labels, paths = [0, 1, 2, 0, 1, 2], [f"inner/{index}.png" for index in range(6)]
    for path, label in zip(paths, labels, strict=True):
        draw_image(tmp_path / path, label)
    return Images.of_files(tmp_path, paths, labels)


def test_subsets_have_the_images_labels_and_names_of_their_items(images):
    """In a given order, and with labels in the order of the classes; also parts of parts."""
    parts = {
        "images": (images, [(0, 0), (1, 1), (2, 2), (0, 0), (1, 1), (2, 2)], "012345"),
        "subset": (images.subset([5, 0]), [(2, 2), (0, 0)], "50"),
        "classes": (images.subset_classes([2, 0]), [(0, 1), (2, 0), (0, 1), (2, 0)], "0235"),
        "both": (images.subset_classes([2, 0]).subset_classes([0]).subset([1]), [(2, 0)], "5"),
        "none": (images.subset_classes([]), [], ""),
    }
    for name, (part, found, numbers) in parts.items():
        assert (part.labels, part.names) == ([label for _, label in found], [f"inner/{n}.png" for n in numbers]), name
        assert [part.with_transform(class_of)[index] for index in range(len(part))] == found, name
        assert all(isinstance(part[index][0], Image.Image) for index in range(len(part))), name


def test_images_need_a_label_and_a_name_for_each_item():
    for given_labels, names in (([0], None), (None, ["a"])):
        with pytest.raises(ValueError, match="one item per item of the dataset, 2"):
            Images([("x", 0), ("y", 1)], labels=given_labels, names=names)


def test_images_transform_no_tensors():
    images = Images([(torch.ones(3, 2, 2), 0), ("text", 1)], transform=lambda image: "changed")
    assert isinstance(images[0][0], torch.Tensor) and images[1][0] == "changed"


# ---- labels of any dataset -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["labels", "targets", "_labels"])
def test_read_labels_from_attribute(name):
    for values in ((1, 0, 2), np.array([1, 0, 2]), torch.tensor([1, 0, 2]), [np.int64(1), torch.tensor(0), 2]):
        dataset = Listed([1, 0, 2], **{name: values})
        found = read_labels(dataset)
        assert found == [1, 0, 2] and {type(label) for label in found} == {int} and not dataset.loaded


def test_read_labels_from_items():
    dataset = Listed([1, 0, 2])
    assert read_labels(dataset) == [1, 0, 2] and dataset.loaded == [0, 1, 2]
    assert read_labels(Subset(dataset, [2, 0])) == [2, 1]
    assert read_labels(TensorDataset(torch.ones(2, 3), torch.tensor([4, 5]))) == [4, 5]


class Rows(list):
    """Stand-in for a dataset of Hugging Face: items are dictionaries, and columns are read by name."""

    column_names = ("image", "label")

    def __getitem__(self, index):
        return [row[index] for row in self] if isinstance(index, str) else super().__getitem__(index)


def test_read_labels_of_dictionaries():
    rows = [{"image": Image.new("L", (3, 2)), "label": label} for label in (1, 0)]
    for dataset in (rows, Rows(rows)):
        images = Images(dataset)
        assert images.labels == [1, 0] and images[1][0].mode == "RGB" and images[1][1] == 0


def test_read_labels_of_a_column_loads_no_item(monkeypatch):
    monkeypatch.setattr(map_style, "image_and_label", lambda *_: pytest.fail("an item is loaded"))
    assert read_labels(Rows([{"image": "a", "label": 3}])) == [3]


def test_images_take_labels_of_the_dataset_or_of_the_caller():
    images = Images(Listed([0, 1, 2], labels=[0, 2, 2]))
    assert images[0] == (None, 0) and images.subset_classes([2])[1] == (None, 0)
    assert Images(Listed([0, 1]), labels=[5, 6])[1] == (None, 6), "labels of the caller replace those of items"
