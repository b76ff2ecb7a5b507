"""The methods in plain PyTorch, for any device: what the kernels are checked against.

Each module has ``choose_scales(blocks, …) -> ScaleChoice`` for blocks ``[rows, num_blocks, block_size]`` in float32.
"""
