"""Sources of weights and texts, and the choice among them for a run."""
