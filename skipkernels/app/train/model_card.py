"""README.md of a run: a model card, with the front matter that the Hugging Face Hub reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...formatting import escaped
from ..config import TuneConfig
from ..methods.registry import PACKAGED
from ..report.summary import accuracy_table, headline
from ..report.words import shots_text
from ..results.notes import demonstration_note
from .description import NOT_CALIBRATED, Description

_SHOWN = 20  # classes named in the card
_TOWER = "import skipkernels.app.demo.vit_pictogram  # registers the image tower in timm\n"
_CLASSES_IN = {"hugging-face": "`classes.json`", "onnx": "the metadata of `model.onnx`"}


def model_card(
    config: TuneConfig,
    described: Description,
    metrics: Mapping[str, Any],
    *,
    use: str = "open-clip",
    head_code: str = "",
) -> str:
    """Return the text of a model card, from the description of the tuned model and the contents of metrics.json.

    `use` is what can load the folder: "open-clip" (and skipkernels), "skipkernels", "hugging-face" or "onnx".
    `head_code` applies head.safetensors, for another library, if the model does not have all that classifies.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("skipkernels.app.train")
    environment = Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters["escaped"] = escaped
    alpha = metrics.get("alpha")
    command = config.command("tune", left_out=("out", "device"))
    command += "" if alpha is None else f"\nskipkernels blend RUN --alpha {alpha}"
    text = environment.get_template("card.md.j2").render(
        use=use,
        head_code=head_code,
        config=config,
        described=described,
        metrics=metrics,
        alpha=alpha,
        base=f"`{config.model}`" + (f", weights `{config.pretrained}`" if config.pretrained else ""),
        packaged=config.model == PACKAGED,
        tower=_TOWER if config.model == PACKAGED else "",
        resize=described.preprocessing.get("resize_mode"),
        demonstration=demonstration_note(config.model),
        headline=headline(metrics),
        accuracies=accuracy_table(metrics),
        shots=f", {shots_text(config)}" if config.shots != "all" else "",
        shown=_SHOWN,
        classes_in="`classes.json`" if head_code else _CLASSES_IN.get(use, "`classifier.json`"),
        not_calibrated=NOT_CALIBRATED,
        command=command if metrics["command"] else "",
    )
    return text + "\n"
