"""Print the results of bench/gpu.sh with the goals beside them, and write all of them into FOLDER/results.json.

    python -m bench.gpu_summary [FOLDER]     the folder of bench/gpu.sh, by default gpu-results

A stage without a result is "not run" or "cut off", or its output says why. Goals of speed are those of an H100, and
printed for one alone. The module imports neither torch nor the package, so that it also works where they cannot be
imported.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EAGER, GRAPHED = "skipkernels", "skipkernels, graphed"
PUBLISHED = "published"
COMPILED = {"default": "published, compiled", "reduce-overhead": "published, compiled with CUDA graphs"}  # by mode
STAGES = {"bf16": "step", "fp32": "step_fp32"}
GOALS = {4: 3, 32: 2}  # on an H100, times as fast as the compiled published step, by batch
NOT_RUN = "not run"
_NAMED = 3  # failures
_FAILED = re.compile(r"^(?:\[gw\d+\] \[ *\d+%\] )?(?:FAILED|ERROR) (\S+)", re.MULTILINE)
_SANITIZERS = ("memcheck", "racecheck")


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "gpu-results")
    lines = list(lines_of(folder))
    print(*lines, sep="\n")
    if folder.exists():
        found = {"facts": read_facts(folder), "operators": _rows(folder), "summary": lines}
        (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n")


def lines_of(folder: Path) -> Iterator[str]:
    """The lines, one of them for each shape of a step."""
    facts = read_facts(folder)
    yield f"machine: {_machine(facts) or _without_result(folder, 'machine')}"
    yield f"tests: {_tests(folder)}"
    yield f"gradients: {_gradients(folder)}"
    for precision, stage in STAGES.items():
        steps = {name: step for name, step in facts.items() if name.startswith(f"step {precision} ")}
        if not steps:
            yield f"step {precision}: {_without_result(folder, stage)}"
        for name, step in steps.items():
            yield f"{name}: {'; '.join(_step(step, facts)) or _without_result(folder, stage)}"
    yield f"full training: {_full(facts) or _without_result(folder, 'full')}"
    yield f"operators: {_operators(folder)}"
    if found := facts.get("tune"):
        yield f"launch options: {found['timed']} entries timed, replaced of {', '.join(found['table']) or 'no kernel'}"
    yield f"sanitizer and profiler: {_tools(folder)}"


def name_of_step(precision: str, B: int, C: int) -> str:
    """Name of the facts of a step."""
    return f"step {precision} B{B} C{C}"


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


def _step(step: dict[str, Any], facts: dict[str, Any]) -> Iterator[str]:
    """Parts of the line of a step."""
    if "step" in step:
        yield step["step"]
    if times := step.get("ms"):
        names = {GRAPHED: "as a graph", EAGER: "eager"} | {name: name for name in (PUBLISHED, *COMPILED.values())}
        yield ", ".join(f"{times[name]} ms {text}" for name, text in names.items() if name in times)
        fastest = min(times[name] for name in (EAGER, GRAPHED) if name in times)
        yield f"{fastest / step['floor_ms']:.2f} times the floor of {step['floor_ms']} ms"
    if not step.get("captured", True):
        yield "no graph was captured"
    elif launches := step.get("launches"):
        yield f"{launches['kernels']} kernels and {launches['copies']} copies or fills"
    if step.get("captured") and "difference" in step:
        yield _bits(step["eager_difference"], step["difference"])
    if faster := step.get("faster"):
        texts = [f"{ratio:.2f} times as fast as {name}" for name, ratio in faster.items()]
        compiled = set(COMPILED.values()) & set(faster)
        is_h100 = "H100" in facts.get("machine", {}).get("device", "")
        goal = f" (goal: at least {GOALS[step['B']]}, compiled)" if compiled and is_h100 and step["B"] in GOALS else ""
        yield ", ".join(texts) + goal
    if "compiled" in step:
        yield f"compiled: {step['compiled']}"


def _bits(eager: float, replayed: float) -> str:
    """Difference of replays from eager steps, and of these from each other, below which it cannot be."""
    if eager:
        return f"eager steps differ from each other by {eager:.1e}, replays from them by {replayed:.1e}"
    if replayed == float("inf"):
        return "replays keep other classes (goal: equal bits)"
    return f"replays differ by {replayed:.1e} (goal: equal bits)" if replayed else "replays equal in all bits"


def _full(facts: dict[str, Any]) -> str:
    if not (found := facts.get("full")):
        return ""
    times = ", ".join(f"{time} ms {name}" for name, time in found["ms"].items())
    return f"{found['B']} pairs: {times}"


def _rows(folder: Path) -> list[dict[str, Any]]:
    """Rows of the benchmarks of operators; the last one may be cut off."""
    path = folder / "operators.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _operators(folder: Path) -> str:
    if not (rows := _rows(folder)):
        return _without_result(folder, "operators")
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        times.setdefault(row["group"], {})[row["implementation"]] = row["p50_ms"]
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
