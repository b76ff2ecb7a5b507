"""The objectives in plain PyTorch, for any device. The kernels are checked against them.

naive, sse and hessian each have ``choose_scales(blocks, …) -> ScaleChoice`` for float32 blocks
``[rows, num_blocks, block_size]``.
"""
