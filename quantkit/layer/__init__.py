"""Methods that treat a whole weight: its blocks in turn, each making up for the errors of the others.

gptq.py and descent.py stand on search.py, which solves one block column; common.py has what both need.
"""
