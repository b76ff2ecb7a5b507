"""Where weights and texts come from, and which of them a run uses."""
