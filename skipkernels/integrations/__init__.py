"""SkipCLIP inside other trainers, one module for each. Nothing else in the package imports them."""
