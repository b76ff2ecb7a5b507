"""A layer's inputs and Gram matrices: captured once, kept on the disk."""
