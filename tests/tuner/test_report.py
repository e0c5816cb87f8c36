"""report.html: valid, self-contained, deterministic, with dashes for missing values; and its images."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import matplotlib
import pytest
import torch
from PIL import Image, ImageChops

from skipkernels.tuner import plots
from skipkernels.tuner.config import TuneConfig
from skipkernels.tuner.mistakes import ChangedImage, Confusion, changed_images, confusions, thumbnail
from skipkernels.tuner.report import report_html

VOID = {"meta", "br", "img"}
NASTY = """</b><script>alert("1")</script> & 'quotes' {braces} {0} %s $x$ é 字"""


@pytest.fixture(autouse=True)
def short_runs():
    """Plots are drawn here."""


def metrics(**changes) -> dict:
    accuracy = {"base": 81.5, "new": 40.25, "harmonic": 53.89}
    cost = {"device": "cpu", "seconds_total": 1234.5, "seconds_per_epoch": 1.25, "milliseconds_per_step": 25.125}
    cost |= {"baseline_memory_mib": 500.0, "peak_memory_mib": 735.4}
    return {
        "status": "complete",
        "method": "skip",
        "protocol": "base-to-new",
        "classes": {"base": 20, "new": 19},
        "zero_shot": {"base": 57.5, "new": 47.92, "harmonic": 52.27},
        "tuned": accuracy,
        "epochs": 2,
        "steps": 40,
        "kept_classes": 11.5,
        "parameters": {"trained": 847616, "all": 6427201},
        "cost": cost,
    } | changes


def row(epoch: int, **changes) -> dict:
    return {
        "epoch": epoch,
        "loss": 1 / epoch,
        "accuracy": {"base": 60.0 + epoch, "new": 40.0, "harmonic": 48.0},
        "kept_histogram": {"11": 10, "12": 10},
        "stage_seconds": {"forward": 1.0, "backward": 2.0, "evaluation": 1.0},
    } | changes


def image(size=(32, 32), mode="RGB", value=0) -> Image.Image:
    return Image.linear_gradient("L").resize(size).convert(mode).point(lambda grey: (grey + value) % 256)


def page(changes=None, rows=None, config=None, label="alpha") -> str:
    rows = [row(1), row(2)] if rows is None else rows
    changed = [
        ChangedImage("new", image(), label, "beta", label),
        ChangedImage("base", image((400, 300)), "gamma", "gamma", label),
    ]
    confused = [
        Confusion("base", image(), label, "beta", image(value=9), 7, 12),
        Confusion("new", image(), "delta", "epsilon", None, 1, 2),
    ]
    return report_html(config or TuneConfig(), metrics(**(changes or {})), rows, changed, confused)


class Page(HTMLParser):
    """Parser for elements, text and table rows; unbalanced tags are an error."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.elements, self.text, self.rows = [], [], "", []
        self.feed(text)
        self.close()
        assert not self.open, "all tags are closed"

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(set(names)) == len(names)
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def named(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def svgs(text: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", text, re.DOTALL)


def test_report_contents():
    found = Page(page({"checkpoint": {"mib": 24.5}}))
    assert "glyph-tiny on glyphs, skip, 16 shots" in found.text and "base-to-new" in found.text
    for cells in (
        ["accuracy, %", "classes", "zero-shot", "tuned", "change"],
        ["base, trained on", "20", "57.50", "81.50", "+24.00"],
        ["new", "19", "47.92", "40.25", "-7.67"],
        ["harmonic mean", "", "52.27", "53.89", "+1.62"],
        ["forward", "2.00 s", "25.0 %"],
        ["backward", "4.00 s", "50.0 %"],
        ["evaluation", "2.00 s", "25.0 %"],
        ["run", "1,234.5 s"],
        ["step", "25.12 ms"],
        ["peak memory", "735 MiB"],
        ["kept classes per step", "11.5 of 20"],
        ["trained parameters", "847,616 of 6,427,201"],
        ["checkpoint", "24.5 MiB"],
        ["device", "cpu, auto"],
    ):
        assert cells in found.rows, cells
    bar = [
        float(re.match(r"flex:([\d.]+)", a["style"])[1]) for a in found.named("span") if "flex" in a.get("style", "")
    ]
    assert bar == [25.0, 50.0, 25.0]
    assert "7 of 12 as beta" in found.text and "zero-shot: beta" in found.text
    assert "shots: 16" in found.text, "the settings"
    better = {a.get("class") for a in found.named("td")}
    assert {"better", "worse"} <= better


def test_report_is_self_contained():
    found = Page(page(label=NASTY))
    for tag, attributes in found.elements:
        assert tag not in ("script", "link", "iframe", "object", "base")
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/")), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    text = page()
    assert "@import" not in text and set(re.findall(r"url\((.)", text)) <= {"#"}


def test_report_escapes_names():
    parts = {"stage_seconds": {NASTY: 1.0}, "accuracy": {NASTY: 60.0}}
    accuracy = {"zero_shot": {NASTY: 57.5}, "tuned": {NASTY: 60.0}, "classes": {NASTY: 20}, "protocol": NASTY}
    text = report_html(
        TuneConfig(data=NASTY),
        metrics(**accuracy),
        [row(1, **parts)],
        [ChangedImage(NASTY, image(), NASTY, NASTY, NASTY)],
        [Confusion(NASTY, image(), NASTY, NASTY, image(), 7, 12)],
    )
    found = Page(text)
    assert not found.named("script")
    assert {a["alt"] for a in found.named("img")} == {NASTY}
    shown = found.text.count(NASTY)
    # title twice, protocol, accuracy, legend, stage, two headings; a confusion; a changed image. The YAML is escaped.
    assert shown == 8 + 2 + 3


def test_report_replaces_surrogates():
    text = page(label="caf\udce9")  # from a folder name that is not UTF-8
    assert "caf?" in Page(text.encode().decode()).text


def test_report_plots_are_xml_with_unique_ids():
    text = page()
    plots_found = [ElementTree.fromstring(svg) for svg in svgs(text)]
    assert [svg.get("aria-label") for svg in plots_found] == [
        "training loss over the epochs",
        "test accuracy over the epochs, in per cent",
        "steps by the number of kept classes",
    ]
    names = re.findall(r' id="([^"]*)"', text)
    assert names and len(set(names)) == len(names)
    assert set(names) == set(re.findall(r"""(?:url\(|href=")#([\w.-]+)""", text)), "each id is used"


def test_report_is_deterministic():
    before, settings = page(), dict(matplotlib.rcParams)
    with matplotlib.rc_context({"lines.linewidth": 9, "axes.facecolor": "red", "text.usetex": True, "font.size": 30}):
        assert page() == before
        assert matplotlib.rcParams["font.size"] == 30
    assert dict(matplotlib.rcParams) == settings
    assert "<dc:date>" not in before and "<!-- Created" not in before


def test_colours_have_contrast():
    def luminance(colour: str) -> float:
        channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    assert len(set(plots.COLOURS)) == 12
    style = re.findall(r"color: (#\w{6});", page())
    for colour in (*plots.COLOURS, plots.LOSS, plots.GREY, *style):
        for ground in ("#ffffff", "#121212"):
            light, dark = sorted((luminance(colour) + 0.05, luminance(ground) + 0.05), reverse=True)
            assert light / dark >= 3, (colour, ground)
    assert "color-scheme: light dark" in page()


def test_report_cross_dataset():
    names = ["source", *(f"target {place}" for place in range(13))]
    zero_shot = {name: 40.0 + place for place, name in enumerate(names)} | {"targets": 47.0}
    tuned = {name: value + 1 for name, value in zero_shot.items()}
    rows = [row(1, accuracy=tuned)]
    found = Page(page({"zero_shot": zero_shot, "tuned": tuned, "classes": dict.fromkeys(names, 9)}, rows))
    assert [cells[0] for cells in found.rows[1:16]] == ["source, trained on", *names[1:], "mean of the targets"]
    assert ["mean of the targets", "", "47.00", "48.00", "+1.00"] in found.rows


def test_report_opens_images_of_two_tests():
    names = ["third", "first", "second"]
    shown = [ChangedImage(name, image(), "a", "b", "a") for name in sorted(names)]
    found = Page(report_html(TuneConfig(), metrics(classes=dict.fromkeys(names, 9)), [], shown, []))
    assert ["open" in attributes for attributes in found.named("details")] == [True, True, False, False]
    assert re.findall("third|first|second", found.text.partition("changed by tuning")[2]) == names


@pytest.mark.parametrize("status", ["interrupted", "diverged"])
def test_report_status(status):
    assert f" – {status} after 1 epoch\n" in Page(page({"status": status, "epochs": 1})).text


def complete(text: str) -> None:
    """Check that no nan or None is shown."""
    shown = Page(text).text.partition("Settings")[0] + "".join(svgs(text))
    assert not re.search("nan|None|inf", shown)


def test_report_method_without_epochs():
    cost = metrics()["cost"] | {"seconds_per_epoch": None, "milliseconds_per_step": None}
    tuned = {"base": 60.0, "new": None}
    text = page({"tuned": tuned, "epochs": 0, "kept_classes": None, "cost": cost}, rows=[])
    found = Page(text)
    assert not svgs(text) and "all epochs" not in found.text
    assert ["new", "19", "47.92", "–", "–"] in found.rows and ["harmonic mean", "", "52.27", "–", "–"] in found.rows
    assert not [cells for cells in found.rows if cells[0].startswith(("epoch", "kept classes"))]
    complete(text)


def test_report_before_first_epoch():
    text = page({"tuned": None, "epochs": 0, "status": "diverged", "kept_classes": None}, rows=[])
    assert ["base, trained on", "20", "57.50", "–", "–"] in Page(text).rows
    complete(text)


def test_report_incomplete_rows():
    bare = {"epoch": 1, "loss": float("nan"), "accuracy": {"base": 60.0, "new": None, "harmonic": float("nan")}}
    tuned = bare["accuracy"] | {"base": float("nan")}
    text = page(
        {"tuned": tuned}, [bare, bare | {"epoch": 2, "loss": None, "stage_seconds": None, "kept_histogram": {}}]
    )
    assert len(svgs(text)) == 1, "only accuracy"
    complete(text)


def test_report_without_images():
    text = report_html(TuneConfig(), metrics(), [row(1)], [], [])
    assert not Page(text).named("img") and "confusions" not in text and "changed by tuning" not in text


def test_report_forward_time():
    cost = metrics()["cost"] | {"forward_milliseconds": {"image tower": 3.0, "text tower": 1.0}}
    assert ["image tower", "3.00 ms", "75.0 %"] in Page(page({"cost": cost})).rows


def test_report_constant_kept_classes():
    rows = [row(1, kept_histogram={"11": 20})]
    text = page({"kept_classes": 11.0}, rows)
    assert len(svgs(text)) == 2
    assert ["kept classes per step", "11 of 20"] in Page(text).rows


# ---- plots -------------------------------------------------------------------------------------------------------


def drawn(svg: str, colour: str) -> int:
    """Number of shapes filled with a colour."""
    return len(re.findall(rf"fill: {colour}", svg))


def test_kept_svg_number_of_bars():
    few = plots.kept_svg({5: 1, 7: 3})
    assert drawn(few, plots.COLOURS[0]) == 3, "6 has a bar of height 0"
    many = plots.kept_svg({classes: 1 for classes in range(10, 1010)})
    assert 50 < drawn(many, plots.COLOURS[0]) <= 60


def test_kept_svg_counts_every_step(monkeypatch):
    heights = []
    monkeypatch.setattr(plots, "figure_svg", lambda name, label, draw, over: draw(Recorder(heights)) or "")
    histogram = {classes: classes % 7 for classes in range(3, 500)}
    plots.kept_svg(histogram)
    assert sum(heights) == sum(histogram.values())


class Recorder:
    """Stands in for axes."""

    def __init__(self, heights: list):
        self.heights, self.yaxis = heights, self

    def bar(self, x, height, **how):
        self.heights.extend(height)

    def set_major_locator(self, locator):
        pass

    def set_ylabel(self, label):
        pass


def test_accuracy_svg_colours_and_zero_shot():
    colours = {"base": "#3b7dd8", "new": "#cf7a1f"}
    svg = plots.accuracy_svg([row(1)], {"base": 50.0, "new": None}, colours)
    assert svg.count("stroke-dasharray") == 1, "only base has a zero-shot accuracy"
    assert all(colour in svg for colour in colours.values())


# ---- images ----------------------------------------------------------------------------------------------------


def embedded(text: str) -> list[tuple[dict, Image.Image]]:
    found = []
    for attributes in Page(text).named("img"):
        data = base64.b64decode(attributes["src"].partition(",")[2])
        found.append((attributes, Image.open(io.BytesIO(data))))
    return found


def page_with(shown: Image.Image) -> tuple[dict, Image.Image]:
    (found,) = embedded(report_html(TuneConfig(), metrics(), [], [ChangedImage("new", shown, "a", "b", "a")], []))
    return found


def test_report_small_image_is_lossless():
    attributes, shown = page_with(image((32, 24)))
    assert shown.format == "PNG" and attributes["class"] == "pixels"
    assert not ImageChops.difference(shown, image((32, 24))).getbbox()


def test_report_photo_is_reduced():
    attributes, shown = page_with(image((3000, 4000)))
    assert shown.format == "JPEG" and shown.size == (96, 128) and "class" not in attributes
    assert len(attributes["src"]) < 20_000


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "LA"])
@pytest.mark.parametrize("side", [16, 300])
def test_report_image_modes(mode, side):
    assert page_with(Image.new("L", (side, side), 77).convert(mode))[1].mode == "RGB"


def test_thumbnail_of_tensor():
    levels = torch.tensor([-2.0, 0.0, 2.0]).expand(3, 1, 3)
    assert list(thumbnail(levels).convert("L").tobytes()) == [0, 127, 255]
    assert thumbnail(torch.full((3, 2, 2), 5.0)).getpixel((0, 0)) == (0, 0, 0)


class Counted:
    """Dataset that records which images were opened."""

    def __init__(self, labels):
        self.labels, self.opened = labels, []

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        self.opened.append(index)
        return Image.new("L", (4, 4), index), self.labels[index]


def grey(shown: Image.Image) -> int:
    """Index of an image of `Counted`."""
    return shown.getpixel((0, 0))[0]


def test_changed_images_one_per_class():
    labels = [0, 0, 0, 1, 1, 2]
    before, after = torch.tensor([0, 1, 1, 1, 1, 0]), torch.tensor([0, 0, 0, 0, 2, 1])
    data = Counted(labels)
    found = changed_images("new", data, ["a", "b", "c"], labels, before, after)
    assert [(each.label, each.zero_shot, each.tuned, grey(each.image)) for each in found] == [
        ("a", "b", "a", 1),
        ("b", "b", "a", 3),
    ]
    assert {each.test for each in found} == {"new"} and data.opened == [1, 3]


def test_changed_images_limit_spreads_over_classes():
    labels = torch.arange(100)
    names = [str(label) for label in range(101)]
    found = changed_images("new", Counted(labels.tolist()), names, labels, labels + 1, labels, limit=4)
    assert [each.label for each in found] == ["0", "25", "50", "75"]


def test_changed_images_and_confusions_empty():
    labels = torch.tensor([0, 1])
    assert changed_images("new", Counted([0, 1]), ["a", "b"], labels, labels, labels) == []
    assert confusions("new", Counted([0, 1]), ["a", "b"], labels, labels) == []


def test_confusions_by_number_of_errors():
    #         a a a  b b b b  c c c  d
    labels = [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3]
    said = torch.tensor([2, 0, 2, 2, 0, 3, 1, 0, 2, 0, 4])
    data = Counted(labels)
    found = confusions("base", data, ["a", "b", "c", "d", "e"], labels, said)
    assert [(each.label, each.predicted, each.count, each.total) for each in found] == [
        ("b", "a", 1, 4),  # three errors, one per other class: the first
        ("a", "c", 2, 3),  # two errors, like c
        ("c", "a", 2, 3),
        ("d", "e", 1, 1),
    ]
    assert [grey(each.image) for each in found] == [4, 0, 7, 10], "images predicted as the other class"
    assert [each.predicted_image and grey(each.predicted_image) for each in found] == [0, 7, 0, None]
    assert confusions("base", data, ["a", "b", "c", "d", "e"], labels, said, limit=2) == found[:2]


def test_confusions_open_only_selected_images():
    labels = [label for label in range(50) for _ in range(4)]
    data = Counted(labels)
    found = confusions("base", data, [str(c) for c in range(50)], labels, (torch.tensor(labels) + 1) % 50, limit=3)
    assert [each.label for each in found] == ["0", "1", "2"] and len(data.opened) == 6


def test_report_escapes_notes():
    assert f"<b>{NASTY}" not in page({"notes": [NASTY]}) and NASTY in Page(page({"notes": [NASTY]})).text
