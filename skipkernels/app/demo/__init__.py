"""Packaged model and data of the demo, with nothing to download."""
