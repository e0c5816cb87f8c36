"""Recipes of data and models that the package contains; each is run by `python -m recipes.NAME`."""
