"""Records other packages' results on a few weights, for test_conformance.py: NVFP4 naive, and MXFP4's scale rules.

Run where torchao, compressed-tensors and nvidia-modelopt are installed (their CPU paths suffice):

    python tests/conformance/record.py

The file's metadata has their versions. They are not a dependency of this project, because torchao and ModelOpt make
every import of transformers slow and noisy.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

VECTORS = Path(__file__).with_name("vectors.safetensors")
MX_RULES = ("floor", "ceil", "even", "rceil")


def weights() -> dict[str, Tensor]:
    """Float32 ``[32, 128]``: a layer-like Gaussian, heavy tails, and block maxima over twelve orders of magnitude."""
    generator = torch.Generator().manual_seed(2024)
    gaussian = torch.randn(32, 128, generator=generator) * 0.02
    heavy = torch.randn(32, 128, generator=generator) ** 3
    # Every amax is well within the range of one tensor's scales, because the packages treat underflow differently.
    spread = torch.randn(32, 128, generator=generator) * torch.logspace(0, 2, 32)[:, None]
    return {"gaussian": gaussian, "heavy": heavy, "spread": spread}


def torchao_nvfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    q = NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=per_tensor_amax_to_scale(weight.abs().max()))
    return q.scale.view(torch.uint8), q.qdata


def modelopt_nvfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    q, scales, _ = NVFP4QTensor.quantize(weight, 16)
    return scales.view(torch.uint8), q._quantized_data


def compressed_tensors_nvfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.quant_scheme import NVFP4A16
    from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam

    args = NVFP4A16["weights"]
    global_encode_scale = generate_gparam(weight.min(), weight.max())
    blocks = weight.unflatten(-1, (-1, 16))
    scales, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, global_encode_scale)
    values = quantize(weight, scale=scales, zero_point=None, args=args, global_scale=global_encode_scale)
    return scales.to(torch.float8_e4m3fn).view(torch.uint8), pack_fp4_to_uint8(values)


def torchao_mxfp4(weight: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    scales, codes = to_mx(weight, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode(rule))
    return scales.view(torch.uint8), codes.view(torch.uint8)


def main() -> None:
    """Writes vectors.safetensors."""
    tensors: dict[str, Tensor] = {}
    for name, weight in weights().items():
        tensors[f"{name}/weight"] = weight
        for package, record in (
            ("torchao", torchao_nvfp4),
            ("nvidia-modelopt", modelopt_nvfp4),
            ("compressed-tensors", compressed_tensors_nvfp4),
        ):
            scales, codes = record(weight)
            tensors[f"{name}/nvfp4/{package}/scales"] = scales.reshape(32, -1).contiguous()
            tensors[f"{name}/nvfp4/{package}/codes"] = codes.reshape(32, -1).contiguous()
        for rule in MX_RULES:
            scales, codes = torchao_mxfp4(weight, rule)
            tensors[f"{name}/mxfp4/torchao-{rule}/scales"] = scales.reshape(32, -1).contiguous()
            tensors[f"{name}/mxfp4/torchao-{rule}/codes"] = codes.reshape(32, -1).contiguous()
    versions = {package: version(package) for package in ("torch", "torchao", "compressed-tensors", "nvidia-modelopt")}
    save_file(tensors, VECTORS, {"versions": json.dumps(versions)})
    print(f"{len(tensors)} tensors, {versions}")


if __name__ == "__main__":
    main()
