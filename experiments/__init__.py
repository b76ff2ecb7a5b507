"""The pipeline around quantkit: one stage a module, run as scripts (`python experiments/run.py`)."""
