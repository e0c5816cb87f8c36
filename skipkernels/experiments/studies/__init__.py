"""Many runs: the paper's protocols over seeds, and Skip Tuning against other methods and settings."""

from .compare import Ablated, ablate, compare
from .plots import picture
from .protocol import SHOTS, run_protocol
from .study import Study

__all__ = ["SHOTS", "Ablated", "Study", "ablate", "compare", "picture", "run_protocol"]
