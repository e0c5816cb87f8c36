"""Packaged model of the demo, with nothing to download."""
