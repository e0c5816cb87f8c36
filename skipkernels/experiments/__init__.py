"""Experiments of the paper: glyphs, baselines, studies and sensitivity analysis. Importing it registers them."""

from ..data import register_source


def _open_glyphs(name, root, templates, download):
    from .glyphs import open_glyphs  # on demand, as it imports matplotlib

    return open_glyphs(name, templates)


register_source("glyphs", _open_glyphs, usage="glyphs, glyphs:BLOCK such as glyphs:greek")
