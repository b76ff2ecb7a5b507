"""The methods as fused Triton kernels: one pass reads the weight and writes packed codes and scale bytes.

Each module mirrors the one of the same name in ``quantkit.reference``; device.py holds what they share, launch.py
starts them. Importing this package needs Triton.
"""
