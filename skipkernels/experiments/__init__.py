"""Glyphs, baselines, studies and sensitivity analysis: the paper's experiments. Importing it registers glyphs."""

from ..data import register_source
from .glyphs import open_glyphs

register_source(
    "glyphs",
    lambda name, root, templates, download: open_glyphs(name, templates),
    usage="glyphs, glyphs:BLOCK such as glyphs:greek",
)
