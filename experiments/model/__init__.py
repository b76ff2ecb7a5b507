"""Whole models: quantized layer by layer, written, read, and judged by what they lost."""
