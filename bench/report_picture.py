"""Picture of the report of the demo: `skipkernels tune` without arguments, then a screenshot by a headless Chromium.

    python -m bench.report_picture                                       # writes docs/pictures/report.png
    python -m bench.report_picture --run runs/photos --out report.png

It shows the first screen of the report, to the lower end of the chart of the demo.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

TARGET = Path(__file__).parents[1] / "docs" / "pictures" / "report.png"
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1000, 1110  # pixels
COLOURS = 64  # of the picture


def headless_browser(folder: Path) -> list[str] | None:
    """Command of a Chromium without a window, with its profile in this folder; None if there is none."""
    found = next(filter(None, map(shutil.which, _BROWSERS)), None)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'browser'}"]
    return [found, *flags] if found else None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, help="a run; default: train the demo")
    parser.add_argument("--out", type=Path, default=TARGET)
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        browser = headless_browser(Path(folder))
        if browser is None:
            raise SystemExit(f"bench.report_picture: needs one of {', '.join(_BROWSERS)}; got none. Install one.")
        run = args.run or Path(folder, "run")
        if args.run is None:
            subprocess.run([sys.executable, "-m", "skipkernels", "tune", "--out", str(run)], check=True)
        shot = Path(folder, "report.png")
        command = [*browser, "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={shot}"]
        page = (run / "report.html").resolve().as_uri()
        subprocess.run([*command, page], check=True, capture_output=True, timeout=60)
        Image.open(shot).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(args.out, optimize=True)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
