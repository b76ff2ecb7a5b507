"""What a run measures: errors, times, statistics of the blocks."""
