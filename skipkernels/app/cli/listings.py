"""`skipkernels models` and `skipkernels datasets`: what can be named."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from skipkernels.app.console import Terminal


@dataclasses.dataclass(frozen=True)
class ModelsCommand:
    """List the models for --model and their weights for --pretrained. Downloads nothing."""

    filter: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="FILTER")]] = ""
    """Part of the name of a model or of its weights, in any case of letters."""
    json: bool = False
    """Print JSON instead of a table."""

    def execute(self, out: Terminal, err: Terminal) -> int:
        """Print the models. Returns 0, or 1 if there are none."""
        from rich.table import Column, Table

        from skipkernels.app.train.model import known_models

        wanted = self.filter.lower()
        models = known_models().items()
        found = {name: model for name, model in models if wanted in " ".join([name, *model["weights"]]).lower()}
        if self.json:
            out.print_json(data=found)
        elif found:
            heads = (Column("model", no_wrap=True), "image tower", "text tower", "activation")
            table = Table(*heads, Column("weights", no_wrap=True))
            for name, model in found.items():
                weights = "\n".join(model["weights"]) or "–"
                table.add_row(name, model["image"], model["text"], model["activation"], weights)
            out.print(table)
            err.print(
                "The blocks of a ViT and of a transformer are fused; others run their own forward. Other weights: "
                "--pretrained FILE or random; --model hf-hub:ORG/NAME or local-dir:DIR has its own weights.",
                soft_wrap=True,
            )
        else:
            err.print(f"no model or weights with {self.filter!r} in the name")
        return 0 if found else 1


@dataclasses.dataclass(frozen=True)
class DatasetsCommand:
    """List the kinds of datasets for --data, with an example of each."""

    def execute(self, out: Terminal, err: Terminal) -> int:
        """Print the kinds. Returns 0."""
        from skipkernels.app.data.registry import KINDS

        for kind in KINDS.values():
            out.print(kind.usage.replace("`root`", "--root"), style="bold", soft_wrap=True)
            for line in (kind.about, f"skipkernels tune {kind.example}"):
                out.print(f"    {line}", soft_wrap=True)
        return 0
