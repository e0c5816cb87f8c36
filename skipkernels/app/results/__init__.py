"""Results of a run, which training writes and reports read: predictions, metrics by class, notes, and their files."""
