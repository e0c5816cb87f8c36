"""Results of a run or a comparison, from which reports are made: predictions, metrics by class, notes, and files."""
