"""SkipCLIP and a plain module with the same signature in the trainers of other libraries, one module per trainer."""
