"""Glyphs, baselines, studies and sensitivity analysis: what the paper's experiments need, not the library."""
