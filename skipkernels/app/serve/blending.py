"""Blending of a tuned model with its zero-shot model in weight space (WiSE-FT)."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ..config import CONFIG, TuneConfig
from ..data import InputError
from ..data.files import expanded
from ..data.registry import is_in_python
from ..data.tasks import VALIDATION
from ..results.class_metrics import BALANCED
from ..results.files import existing_run, read_metrics
from ..results.notes import result_notes
from ..train import weights
from ..train.description import write_open_clip_config
from ..train.evaluation import Evaluator, Trained
from ..train.interpolation import Interpolation
from ..train.metrics import metrics_of
from ..train.reading import read_model
from ..train.setup import build_run
from ..train.writing import RunFolder

ALPHAS = tuple(n / 10 for n in range(11))
"""Weights of the tuned model in the curve."""
# Entries of metrics.json about the training, which a blend does not repeat.
_OF_TRAINING = ("candidates", "chosen_because", "epochs", "best_epoch", "steps", "kept_classes")


def blend(
    run: str | Path,
    alpha: float | Literal["auto"] = "auto",
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    device: str | None = None,
    trust: bool = False,
) -> dict[str, Any]:
    """Blend the weights of a run with those before tuning, and write the result as another run folder.

        θ = (1 − alpha) · θ_zero-shot + alpha · θ_tuned

    Tuning raises the accuracy on the trained classes and may lower that on others; a blend keeps most of both. The
    accuracy on all tests of the run is measured for alpha, and for 0, 0.1, …, 1. The head of the run, if it has one, is
    fitted again to each blend. `Classifier.load`, `export` and `skipkernels eval` read the new folder.

    Args:
        run: Folder of a run that tunes the weights of the model itself, such as by skip or full.
        alpha: Weight of the tuned model, from 0 to 1. "auto": the best in the curve on the validation images, of equal
            ones the smallest, by the accuracy that chooses the epoch; 0.5 for a run without them, such as one that
            trained on all images after a choice between candidates: the tests are not used to choose.
        out: New run folder. Default: the folder of the run with "-blend" after its name.
        overwrite: Replace an earlier run in that folder.
        device: Device. Default: that of the run.
        trust: See `evaluate_run`.

    Returns:
        Contents of the new metrics.json; "blend" has the curve: "alphas", "accuracy" by test, and "chosen".

    Raises:
        InputError: If the run or its data can't be read, its method has no blend, or an argument can't be used.

    Source: Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022, arXiv 2109.01903.

    Example:
        >>> import logging, tempfile; logging.disable()
        >>> import skipkernels as sk
        >>> folder, short = Path(tempfile.mkdtemp(), "run"), {"shots": 1, "max_classes": 4, "epochs": 1}
        >>> tuned = sk.tune(data="pictograms:food", method="skip", **short, device="cpu", out=folder)
        >>> blended = sk.blend(folder, 0.3)
        >>> blended["blend"]["chosen"], blended["blend"]["accuracy"]["base"][10] == tuned["tuned"]["base"]
        (0.3, True)
    """
    if alpha != "auto" and (isinstance(alpha, (bool, str)) or not 0 <= alpha <= 1):
        raise InputError(f'must be from 0 to 1, or "auto"; got {alpha!r}.', "alpha", "blend")
    folder, target = _folders(run, out)
    config = _config_of_run(folder, device, trust=trust)
    written = replace(config, out=target, overwrite=overwrite).resolved()
    new_folder = RunFolder(written)  # refuses a folder that can't be written
    of_run, (_, weights_file) = read_metrics(folder), read_model(folder)
    blends = _Blends(replace(config, trust=trust, refresh="never", workers=0).resolved(), weights_file, of_run["l2"])
    curve = blends.curve(sorted({*ALPHAS, *([] if alpha == "auto" else [float(alpha)])}))
    chosen = _best(curve["accuracy"]) if alpha == "auto" else float(alpha)
    trained = blends.trained(chosen, written)
    command = f"{of_run['command']}\n{_command(folder, chosen, out)}"
    metrics = metrics_of(trained, command, of_run["cost"]) | {name: of_run[name] for name in _OF_TRAINING}
    metrics["classifier"] = f"{of_run['classifier']}, blended at {chosen:g}"
    metrics |= {"blend": curve | {"chosen": chosen, "run": str(folder.resolve())}, "alpha": chosen}
    metrics["notes"] = result_notes(written, metrics)
    with new_folder.lock(written):
        write_open_clip_config(new_folder.path, trained.setup.model, trained.setup.tokenizer)
        new_folder.write_results(trained, metrics)
    return metrics


def _folders(run: str | Path, out: str | Path | None) -> tuple[Path, Path]:
    """Return the folder of the run, and that of its blend."""
    folder = existing_run(run, "blend")
    target = blended_folder(folder) if out is None else expanded(out)
    if target.resolve() == folder.resolve():
        raise InputError(f"must not be the folder of the run; got {target}. Choose another.", "out", "blend")
    return folder, target


def blended_folder(run: Path) -> Path:
    """Return the default folder of a blended run, beside that of the run."""
    return run.with_name(f"{run.resolve().name}-blend")


def _config_of_run(folder: Path, device: str | None, *, trust: bool) -> TuneConfig:
    """Return the configuration of a run that can be blended, without a cache that is not there any more."""
    config = TuneConfig.from_yaml(folder / CONFIG, trust=trust)
    if not config.method_class().trains_model:
        raise InputError(
            f"must be of a method that tunes the weights of the model, skip or full; got {config.method}.",
            "run",
            "blend",
        )
    if not config.epochs:
        raise InputError(
            "must have tuned the weights of the model; it kept the pretrained ones, as with --epochs 0, or "
            "by the choice of a head on them. Tune it with --method skip.",
            "run",
            "blend",
        )
    if is_in_python(config.data):
        raise InputError(f"{config.data} was passed to tune in Python. Tune it with `blend=0.5`.", function="blend")
    cache = config.cache if config.cache is not None and config.cache.is_dir() else None
    return replace(config, cache=cache, device=device or config.device)


class _Blends:
    """Blends of a run: its method with weights between zero-shot and tuned, and its head fitted to each."""

    def __init__(self, config: TuneConfig, weights_file: Path, l2: float):
        self._setup = build_run(config)
        self._l2 = l2
        self._evaluator = Evaluator(self._setup, self._setup.test_features(), self._setup.validation_features())
        self._zero_shot = self._evaluator.evaluate(self._setup.method)
        self._features = None if config.head == "none" else self._setup.train_features()
        self._weights = Interpolation(self._setup.method.state_dict().values())
        weights.load_into(self._setup.method, weights_file)
        self._weights.end()

    def _set(self, alpha: float) -> None:
        """Set the weights to a blend, and fit the head to it."""
        self._weights.set(alpha)
        if self._features is not None:
            self._setup.fit_head(self._features, self._l2)

    def curve(self, alphas: Sequence[float]) -> dict[str, Any]:
        """Return the accuracies of blends in per cent, by test; also on validation images, and their mean by class."""
        accuracy: dict[str, list[float]] = {}
        for alpha in alphas:
            self._set(alpha)
            found = self._evaluator.evaluate(self._setup.method)
            held_out = {VALIDATION: found.validation, BALANCED: self._evaluator.balanced(found)}
            for name, value in (found.accuracies | held_out).items():
                if value is not None:  # None without images
                    accuracy.setdefault(name, []).append(value)
        return {"alphas": list(alphas), "accuracy": accuracy}

    def trained(self, alpha: float, config: TuneConfig) -> Trained:
        """Return a blend with its results, as those of a run; calibrates the probabilities."""
        self._set(alpha)
        return Trained.measured(replace(self._setup, config=config), self._evaluator, self._zero_shot, l2=self._l2)


def _best(accuracy: Mapping[str, list[float]]) -> float:
    """Return the alpha with the best accuracy on validation images, of those of `ALPHAS`; 0.5 without such images.

    >>> _best({VALIDATION: [50, 60, 60, 55, 0, 0, 0, 0, 0, 0, 0]}), _best({})
    (0.1, 0.5)
    """
    validation = accuracy.get(BALANCED, accuracy.get(VALIDATION))
    return ALPHAS[validation.index(max(validation))] if validation else 0.5


def _command(run: Path, alpha: float, out: str | Path | None) -> str:
    """Command that makes a blend."""
    words = ["skipkernels", "blend", str(run), "--alpha", str(alpha)]
    return shlex.join([*words, *([] if out is None else ["--out", str(expanded(out))])])
