"""CPU seconds that a command takes before its work, most of which are imports.

    python -m bench.startup
    python -m bench.startup --only check tune --repeats 5

User and system seconds of the whole process, the median of three; `tune` until it prints its first line. The work is as
small as it can be: six pictures of 64 × 64 pixels, and a run of two classes of the pictograms.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from skipkernels.app.cli.main import COMMANDS

Case = tuple[str, list[str], bool]
"""Name of the case, arguments of Python, and True if the process is ended at its first line."""


def cases(folder: Path) -> Iterator[Case]:
    """Yield the commands; makes the pictures and the run that they read in `folder`."""
    pictures, run = folder / "pictures", folder / "run"
    for number in range(6):
        (pictures / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (40 * number, 0, 0)).save(pictures / "ab"[number % 2] / f"{number}.png")
    tune = ["tune", "--data", "pictograms:food", "--max-classes", "2", "--epochs", "1", "--out"]
    skipkernels = ["-m", "skipkernels"]
    subprocess.run([sys.executable, *skipkernels, *tune, str(run)], check=True, capture_output=True)
    yield "import torch", ["-c", "import torch"], False
    yield "import skipkernels", ["-c", "import skipkernels"], False
    picture, wrong = str(pictures / "a" / "0.png"), ["--out", str(Path(__file__))]
    given = {
        **{f"{name} --help": [name, "--help"] for name in COMMANDS},
        "check, six pictures": ["check", f"imagefolder:{pictures}"],
        "predict, one picture": ["predict", str(run), picture],
        "datasets": ["datasets"],
        "models": ["models"],
        "report": ["report", str(run)],
        "check, refused --out": ["check", f"imagefolder:{pictures}", *wrong],
        "predict, refused --out": ["predict", str(run), picture, *wrong],
        "rank, refused --out": ["rank", str(run), picture, *wrong],
        "export, refused --out": ["export", str(run), "--to", "onnx", *wrong],
        "blend, refused --out": ["blend", str(run), *wrong],
        "protocol, refused --out": ["protocol", "few-shot", *wrong],
        "compare, refused --out": ["compare", *wrong],
        "tune, refused --out": ["tune", *wrong],
    }
    for title, arguments in given.items():
        yield title, [*skipkernels, *arguments], False
    yield "tune, first line", [*skipkernels, *tune, str(folder / "another")], True


def seconds(arguments: list[str], first_line: bool) -> float:
    """CPU seconds of a process of Python, to its end or to its first line."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    process.stdout.readline() if first_line else process.stdout.read()
    if first_line:
        process.kill()
    _, process.returncode, used = os.wait4(process.pid, 0)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="WORD", default=[""], help="commands that begin with one of these")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print("| command | CPU seconds |\n|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for title, arguments, first_line in cases(Path(folder)):
            if title.startswith(tuple(options.only)):
                found = [seconds(arguments, first_line) for _ in range(options.repeats)]
                print(f"| {title} | {statistics.median(found):.2f} |", flush=True)


if __name__ == "__main__":
    main()
