"""Features at the LSkip cut, computed once and kept; and how files are written."""

from .atomic import replace_file
from .memory import collect

__all__ = ["collect", "replace_file"]
