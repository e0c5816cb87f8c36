"""SkipCLIP inside other trainers, one module for each. Nothing else in the package imports them.

`dassl_settings` is a part of `dassl`, `caption_index` of `open_clip`.
"""
