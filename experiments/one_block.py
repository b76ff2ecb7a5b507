"""The error of one block of a real layer at every scale of its format, with the proven windows: the data of a figure.

    python experiments/one_block.py [HYDRA OVERRIDES]      writes results/records/one_block.json

Overrides are those of run.py; the default is `model=smollm2_135m data=python_docs format=nvfp4 block_size=16`. The
block shows why each objective needs its own window: its naive scale is not optimal, and its Hessian optimum lies
outside the window of the squared error. Of the first 500 such blocks, it has the Hessian window of median width.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Python puts a script's folder first on the path, where `config` or `files` would shadow other packages' modules.
    sys.path.pop(0)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from experiments.files import write_atomically
from quantkit import QuantizedTensor, bounds, quantize
from quantkit.calibration import block_hessians, factorize

OUTPUT = Path(__file__).resolve().parent.parent / "results" / "records" / "one_block.json"
CONSIDERED = 500  # blocks
DEFAULTS = ("model=smollm2_135m", "data=python_docs", "format=nvfp4", "block_size=16")


def main(overrides: list[str], output: Path = OUTPUT) -> None:
    from experiments import provenance
    from experiments.capture.load import load_layer_inputs
    from experiments.config import compose
    from experiments.sources.resolved import resolve

    resolved = resolve(compose([*DEFAULTS, *overrides]))
    config, inputs = resolved.config, load_layer_inputs(resolved)
    hessian = block_hessians(inputs.gram_calibration, config.block_size)
    found = survey(inputs.weight.float(), hessian, config.format.name, config.block_size)
    used = inputs.provenance
    source = {
        "model": used.model,
        "model_origin": used.model_origin,
        "data": used.data,
        "layer_index": config.layer.index,
        "layer_module": config.layer.module,
        "commit": provenance.git_state()[0],
    }
    write_atomically(output, as_json(source | found))
    print(f"{output.name}: row {found['row']}, block {found['block']}, windows {found['windows']}")


def survey(weight: Tensor, hessian: Tensor, format: str, block_size: int) -> dict[str, Any]:
    """Errors over all scales of one block of ``weight [out_features, in_features]``; ``hessian [num_blocks, b, b]``.

    Raises ValueError where no block fits the module's description.
    """
    chosen = {
        method: quantize(weight, format=format, block_size=block_size, method=method,
                         hessian=hessian if method == "hessian" else None)
        for method in ("naive", "sse", "hessian")
    }  # fmt: skip
    candidates = [
        survey_block(weight, hessian[block], chosen, row, block) for row, block in blocks_that_differ(weight, chosen)
    ]
    if not candidates:
        raise ValueError("no block of this layer has a Hessian optimum outside the squared error's window")
    candidates.sort(key=lambda found: found["windows"]["hessian"][1] - found["windows"]["hessian"][0])
    return candidates[len(candidates) // 2]


def blocks_that_differ(weight: Tensor, chosen: dict[str, QuantizedTensor]) -> list[tuple[int, int]]:
    """(row, block) of at most CONSIDERED blocks that fit the module's description, in the order of rows."""
    naive, sse, hessian = (chosen[name].scales.int() for name in ("naive", "sse", "hessian"))
    q = chosen["sse"]
    amax = weight.unflatten(-1, (-1, q.block_size)).abs().amax(-1)
    first, last = bounds.sse_window(amax, q.format.element, q.format.scale, q.global_scale, q.block_size)
    outside = (hessian < first) | (hessian > last)
    found = ((naive != sse) & outside).nonzero()[:CONSIDERED]
    return [(row, block) for row, block in found.tolist()]


def survey_block(
    weight: Tensor, hessian: Tensor, chosen: dict[str, QuantizedTensor], row: int, block: int
) -> dict[str, Any]:
    """One block's errors at every scale and its two windows; ``hessian [block_size, block_size]`` belongs to it."""
    q = chosen["sse"]
    grid, element = q.format.scale, q.format.element
    x = weight[row].unflatten(-1, (-1, q.block_size))[block]
    codes = torch.arange(grid.min_code, grid.max_code + 1, dtype=torch.long, device=weight.device)
    scales = grid.decode(codes) * q.global_scale
    levels = element.round(x.abs() / scales.unsqueeze(-1)).copysign(x)
    residual = x.double() - levels.double() * scales.double().unsqueeze(-1)
    hessian_error = ((residual @ hessian.double()) * residual).sum(-1)

    amax, magnitudes = x.abs().amax(), x.abs().double()
    first, last = (int(bound) for bound in bounds.sse_window(amax, element, grid, q.global_scale, q.block_size))
    # The search's incumbent: the best Hessian error inside the window of the squared error.
    incumbent = hessian_error[(codes >= first) & (codes <= last)].min()
    diagonal = factorize(hessian.unsqueeze(0)).inverse_diagonal[0] / hessian.double().diagonal().mean()
    window = bounds.hessian_window(magnitudes, incumbent, diagonal, element, grid, q.global_scale)
    return {
        "format": q.format.name,
        "block_size": q.block_size,
        "row": row,
        "block": block,
        "global_scale": float(q.global_scale),
        "chosen": {method: int(result.scales[row, block]) for method, result in chosen.items()},
        "windows": {"sse": [first, last], "hessian": [int(bound) for bound in window]},
        "weights": x.tolist(),
        "code": codes.tolist(),
        "squared_error": residual.square().sum(-1).tolist(),
        "hessian_error": hessian_error.tolist(),
    }


def as_json(values: dict[str, Any]) -> str:
    """JSON with one line per entry, so that diffs are short. Numbers keep ten digits."""

    def plain(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.10g}")
        return [plain(item) for item in value] if isinstance(value, list) else value

    lines = (f'  "{name}": {json.dumps(plain(value), allow_nan=False)}' for name, value in values.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    main(sys.argv[1:])
