"""Print the results of bench/gpu.sh in ten lines, with the goals beside them.

    python -m bench.summary [FOLDER]     the folder of bench/gpu.sh, by default gpu-results

A stage without a result is "not run" or "cut off", or its output says why. The module imports neither torch nor the
package, so that it also works where they cannot be imported.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

EAGER, GRAPHED = "skipkernels", "skipkernels, graphed"
PUBLISHED, COMPILED = "published", "published, compiled"
STAGES = {"bf16": "step", "fp32": "step_fp32"}
GOALS = {4: 3, 32: 2}  # times as fast as the compiled published step, by batch
NOT_RUN = "not run"
_NAMED = 3  # failures
_FAILED = re.compile(r"^(?:\[gw\d+\] \[ *\d+%\] )?(?:FAILED|ERROR) (\S+)", re.MULTILINE)
_SANITIZERS = ("memcheck", "racecheck")


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "gpu-results")
    print(*lines_of(folder), sep="\n")


def lines_of(folder: Path) -> Iterator[str]:
    """The ten lines."""
    facts = read_facts(folder)
    each = partial(_each, folder, facts)
    yield f"machine: {_machine(facts) or _without_result(folder, 'machine')}"
    yield f"tests: {_tests(folder)}"
    yield f"gradients: {_gradients(folder)}"
    yield f"replays and eager steps: {each(_bits)}"
    yield f"launches: {each(_launches)}"
    yield f"step: {each(_time)}"
    yield f"against the floor: {each(_floor)}"
    yield f"against the published step: {each(_faster)}"
    yield f"operators: {_operators(folder)}"
    yield f"sanitizer and profiler: {_tools(folder)}"


def read_facts(folder: Path) -> dict[str, Any]:
    path = folder / "facts.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Add facts to those in the folder."""
    (folder / "facts.json").write_text(json.dumps(read_facts(folder) | facts, indent=1) + "\n")


def _output(folder: Path, stage: str) -> str:
    path = folder / f"{stage}.txt"
    return path.read_text(errors="replace") if path.exists() else ""


def _was_cut_off(folder: Path, stage: str) -> bool:
    """True if the last run of a stage had no time left: the exit status of `timeout` is 124, or 137 after a kill."""
    log = folder / "log.txt"
    statuses = re.findall(rf"^{stage}: exit status (\d+)", log.read_text() if log.exists() else "", re.MULTILINE)
    return statuses[-1:] in (["124"], ["137"])


def _without_result(folder: Path, stage: str) -> str:
    if not (folder / f"{stage}.txt").exists():
        return NOT_RUN
    return "cut off" if _was_cut_off(folder, stage) else f"no result, see {stage}.txt"


def _each(folder: Path, facts: dict[str, Any], text_of: Callable[[str, dict[str, Any]], str]) -> str:
    """The text of each precision."""
    texts = []
    for precision, stage in STAGES.items():
        text = text_of(precision, facts.get(f"step {precision}", {})) or _without_result(folder, stage)
        texts.append(f"{precision} {text}")
    return "; ".join(texts)


def _machine(facts: dict[str, Any]) -> str:
    if not (found := facts.get("machine")):
        return ""
    absent = facts.get("absent_peers", [])
    peers = f"; peers that cannot run: {', '.join(absent)}" if absent else "; all peers"
    return f"{found['device']}, torch {found['torch']}, Triton {found['triton']}, commit {found['commit']}{peers}"


def _tests(folder: Path) -> str:
    if not (text := _output(folder, "tests")):
        return NOT_RUN
    names = list(dict.fromkeys(_FAILED.findall(text)))
    passed = re.findall(r"\b(\d+) passed\b", text)
    counted = f"{passed[-1]} passed" if passed else "cut off" if _was_cut_off(folder, "tests") else "no test ran"
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{counted}, {len(names)} failed{': ' if names else ''}{', '.join(names[:_NAMED])}{more} (goal: 0)"


def _gradients(folder: Path) -> str:
    texts = [_output(folder, stage) for stage in STAGES.values()]
    found = [match for text in texts for match in re.findall(r"^worst gradient in (.+)$", text, re.MULTILINE)]
    found += [line for text in texts for line in text.splitlines() if line.endswith(": no timing")]
    return "; ".join(found) or NOT_RUN


def _bits(precision: str, step: dict[str, Any]) -> str:
    if "difference" not in step:
        return ""
    if not step["captured"]:
        return "no graph was captured"
    if (off := step["difference"]) == float("inf"):
        return "keep other classes (goal: equal bits)"
    return "equal in all bits" if off == 0 else f"differ: a weight by {off:.1e} of its norm (goal: equal bits)"


def _launches(precision: str, step: dict[str, Any]) -> str:
    if not (launches := step.get("launches")):
        return ""
    return f"{launches['kernels']} kernels and {launches['copies']} copies or fills"


def _time(precision: str, step: dict[str, Any]) -> str:
    if not (times := step.get("ms")):
        return ""
    graphed = f"{times[GRAPHED]} ms as a graph" if GRAPHED in times else "no graph"
    theirs = [f"{times[name]} ms {name}" for name in (PUBLISHED, COMPILED) if name in times]
    return ", ".join([graphed, f"{times[EAGER]} ms eager", *theirs])


def _floor(precision: str, step: dict[str, Any]) -> str:
    if not (times := step.get("ms")):
        return ""
    fastest = min(times[name] for name in (EAGER, GRAPHED) if name in times)
    return f"{fastest / step['floor_ms']:.2f} times {step['floor_ms']} ms"


def _faster(precision: str, step: dict[str, Any]) -> str:
    if not (faster := step.get("faster")):
        return ""
    texts = [f"{ratio:.2f} times as fast as {name}" for name, ratio in faster.items()]
    goal = f" (goal: at least {GOALS[step['B']]})" if COMPILED in faster and step["B"] in GOALS else ""
    return ", ".join(texts) + goal


def _operators(folder: Path) -> str:
    path = folder / "operators.json"
    if not path.exists() or not (text := path.read_text()):
        return _without_result(folder, "operators")
    times: dict[str, dict[str, float]] = {}
    for row in json.loads(text)["benchmarks"]:
        times.setdefault(row["group"], {})[row["params"]["implementation"]] = row["stats"]["median"]
    compared = {group: of for group, of in times.items() if EAGER in of and len(of) > 1}
    slower = [group for group, of in compared.items() if of[EAGER] > min(of.values())]
    listed = f": {', '.join(slower[:_NAMED])}{', …' if len(slower) > _NAMED else ''}" if slower else ""
    return f"{len(compared)} cases compared, another implementation is faster in {len(slower)}{listed} (goal: 0)"


def _tools(folder: Path) -> str:
    found = []
    for tool in _SANITIZERS:
        errors = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", _output(folder, tool))
        found.append(f"{tool} {errors[-1] if errors else _without_result(folder, tool)}")
    profiled = len(re.findall(r"^==PROF== Profiling ", _output(folder, "ncu"), re.MULTILINE))
    found.append(f"ncu {f'{profiled} kernels profiled' if profiled else _without_result(folder, 'ncu')}")
    return "; ".join(found)


if __name__ == "__main__":
    main()
