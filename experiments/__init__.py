"""The pipeline around quantkit: scripts (`python experiments/run.py`) at the top, their parts in the packages below."""
