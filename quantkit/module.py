"""A QuantizedTensor as a part of a torch.nn.Module: in its state_dict, and moved with it."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from torch import Tensor, nn

from quantkit.tensor import QuantizedTensor

__all__ = ["QuantizedWeight"]


class QuantizedWeight(nn.Module):
    """Holds a QuantizedTensor; calling it dequantizes.

    All that its state_dict has is tensors: codes, scales, global_scale, and as bytes of JSON what they mean. candidates
    are not held. A change of the module's dtype changes none of them.
    """

    codes: Tensor
    scales: Tensor
    global_scale: Tensor

    def __init__(self, tensor: QuantizedTensor) -> None:
        super().__init__()
        self.format, self.block_size = tensor.format, tensor.block_size
        self.method, self.nearest_codes = tensor.method, tensor.nearest_codes
        for name in ("codes", "scales", "global_scale"):
            self.register_buffer(name, getattr(tensor, name))

    @property
    def tensor(self) -> QuantizedTensor:
        return QuantizedTensor(
            self.codes,
            self.scales,
            self.global_scale,
            self.format,
            self.block_size,
            method=self.method,
            nearest_codes=self.nearest_codes,
        )

    def forward(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight ``[..., K]`` in ``dtype``."""
        return self.tensor.dequantize(dtype)

    def get_extra_state(self) -> Tensor:
        """uint8: the format's name, the block size, the method and whether codes are nearest, in JSON."""
        meaning = [self.format.name, self.block_size, self.method, self.nearest_codes]
        return torch.tensor(list(json.dumps(meaning).encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Raises ValueError for codes of another format or block size than the module's."""
        name, block_size, self.method, self.nearest_codes = json.loads(bytes(state.tolist()))
        if (name, block_size) != (self.format.name, self.block_size):
            raise ValueError(
                f"the state holds {name} of block size {block_size}, the module {self.format.name} of "
                f"{self.block_size}; make the module from a tensor of that format"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedWeight:
        scale = self.global_scale
        super()._apply(fn, recurse)
        if self.global_scale.dtype != scale.dtype:  # half() and the like are for values
            self.global_scale = scale.to(self.global_scale.device)
        return self
