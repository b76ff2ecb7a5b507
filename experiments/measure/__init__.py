"""The measurements of a run and of the benchmark: errors, times, statistics of the blocks."""
