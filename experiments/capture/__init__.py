"""A layer's inputs and Gram matrices: captured once and cached on disk."""
