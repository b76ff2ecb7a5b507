"""Methods of a whole weight: they solve its blocks in turn, and each block compensates the errors of others.

gptq.py and descent.py build on search.py, which solves one block column. common.py has their shared parts.
"""
