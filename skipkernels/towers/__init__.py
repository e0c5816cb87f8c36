"""Image and text towers of a CLIP model, cut below block `skip`; one file per model family in `families/`."""
