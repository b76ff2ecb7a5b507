"""How engines store quantized weights: maps between QuantizedTensor and named tensors with their configuration.

Pure: nothing here reads or writes a file. Codes and scales are stored as they were chosen, never rounded again. What a
layout cannot express is refused with a ValueError that names the alternative. A new layout is a file with one Layout
and a line in LAYOUTS.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from quantkit.layouts.common import FUSED, Layout, check_fused, expert_matrices, fused_groups
from quantkit.layouts.compressed_tensors import COMPRESSED_TENSORS, exact_global_scale
from quantkit.layouts.gguf import GGUF
from quantkit.layouts.gpt_oss import GPT_OSS
from quantkit.layouts.modelopt import MODELOPT

__all__ = [
    "FUSED",
    "LAYOUTS",
    "Layout",
    "check_fused",
    "exact_global_scale",
    "expert_matrices",
    "fused_groups",
    "get_layout",
    "layout_of",
]

LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {layout.name: layout for layout in (COMPRESSED_TENSORS, MODELOPT, GPT_OSS, GGUF)}
)


def get_layout(name: str) -> Layout:
    """The layout called ``name``. Raises ValueError with the known names."""
    if name not in LAYOUTS:
        raise ValueError(f"unknown layout {name!r}; known layouts: {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def layout_of(quantization_config: Mapping[str, Any]) -> Layout | None:
    """The layout of a checkpoint whose config.json has this ``quantization_config``; None if it is none of these."""
    method = str(quantization_config.get("quant_method", "")).replace("_", "-")
    return next((layout for layout in LAYOUTS.values() if method and method == layout.quant_method), None)
