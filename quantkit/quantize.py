"""quantize(): checks its arguments and runs the method of methods.py."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, SupportsFloat

import torch
from torch import Tensor

from quantkit import calibration, experts, kernels
from quantkit.formats import FLOAT32_SMALLEST_NORMAL, BlockFormat, get_format
from quantkit.global_scale import HEADROOM, SEARCH, solve_jointly
from quantkit.layer.common import LayerOptions
from quantkit.methods import METHODS, Method, Problem, get_method
from quantkit.reference.amax import global_scale_of
from quantkit.search import BACKENDS, BackendUnavailableError, choose_backend, without_kernel
from quantkit.tensor import QuantizedTensor

__all__ = ["BACKENDS", "BackendUnavailableError", "quantize", "resolve_backend"]


def quantize(
    weight: Tensor,
    format: str | BlockFormat = "nvfp4",
    block_size: int = 16,
    method: str = "sse",
    *,
    activations: Tensor | Sequence[Tensor] | None = None,
    gram: Tensor | None = None,
    hessian: Tensor | None = None,
    backend: str = "auto",
    global_scale: str | float | Tensor | None = None,
    scale_rule: str | None = None,
    check_finite: bool = True,
    count_candidates: bool = False,
    init: QuantizedTensor | None = None,
    output_gram: Tensor | None = None,
    **options: Any,
) -> QuantizedTensor:
    """Quantizes ``weight [..., K]``, float16, bfloat16, float32 or float64, along its last dimension.

    format: a name in FORMATS, or a BlockFormat.
    method: "naive" (scale from amax), "sse" (least squared error, the default), "hessian" (scale of least r H rᵀ),
        "joint" (scale and codes of least r H rᵀ), "gptq" and "descent" (the whole layer; docs/layer.md).
    activations ``[tokens, K]`` (or ``[batch, tokens, K]``, as hooks give them), gram ``[K, K]`` or hessian
        ``[K/block_size, block_size, block_size]``: exactly one for "hessian" and "joint", activations or gram for
        "gptq" and "descent", none for "naive" and "sse".
    backend: "reference" (PyTorch), "triton" (fused kernels), or "auto": triton where the weight is on a GPU and a
        kernel supports method, block size and format.
    global_scale: decode multiplier of a two-level format: "amax" (amax(weight)/(6·448), the default for NVFP4),
        "headroom" (amax(weight)/(6·256)), "search" (the best of 16 in the octave from amax on, see global_scale.py; 16
        times the work), "none" (1), a positive number, or a float32 scalar on the weight's device, which is used
        unchanged (fused layers share one). A single-level format has none.
    scale_rule: rounding of the naive scale, one of the format's ``scale_rules``; the first is the default. Other
        methods ignore it.
    check_finite: raise for NaN and Inf in weight. Without the check, such input gives undefined codes.
    count_candidates: also return, for each block, how many scales were evaluated.
    init: for "descent", a quantized weight of the same shape, format and block size, such as another tool's, whose
        codes, scales and global scale the sweeps begin with. The error is nowhere above its.
    output_gram: for "gptq" and "descent" of a weight [N, K], the Gram matrix ``[N, N]`` of the loss's gradients at the
        layer's outputs, Σ g gᵀ over tokens. Rows then make up for each other's errors (docs/layer.md).
    options: of "gptq" and "descent": scale="joint" (or "naive", "sse", "hessian": how a block's scale is chosen),
        order="descending" (block columns by the mean diagonal of their Hessian, or "natural"), damping=0.01 (share of
        the mean diagonal that is added to the Gram matrix), sweeps=4 of "descent", and, with an output_gram, rows=32
        (rows solved together) and output_damping=0.3 (as damping, of output_gram).

    The experts of a weight ``[E, N, K]`` share what is given, or have their own: activations as a sequence of E
    tensors, gram ``[E, K, K]``, hessian ``[E, K/block_size, block_size, block_size]``, global_scale "amax_per_expert"
    or float32 ``[E, 1, 1]``, which then is the shape of the result's. Codes and scales are those of each expert alone.

    Returns a QuantizedTensor whose scales satisfy the optimality contract of docs/theory.md for "sse" and "hessian".
    Raises TypeError for an argument that must be a tensor and is not, BackendUnavailableError for a backend that cannot
    run, and ValueError for everything else. The message names the value and the remedy.
    """
    fmt, chosen = get_format(format), get_method(method)
    rule = _check_options(weight, fmt, block_size, scale_rule)
    settings = _layer_options(chosen, options)
    if init is not None:
        global_scale = _check_init(init, weight, fmt, block_size, chosen, global_scale)
    use_triton = choose_backend(backend, weight.device.type, _without_kernel(chosen, block_size, fmt)) == "triton"
    calibration.check_given(method, chosen.needs, activations=activations, gram=gram, hessian=hessian)
    outputs = None if output_gram is None else _output_gram(output_gram, weight, chosen, init)
    if weight.ndim == 3 and experts.has_own(weight, activations, gram, hessian, global_scale):
        global_scale = _of_all_experts(weight, fmt, global_scale, check_finite)
        each = partial(
            quantize,
            format=fmt,
            block_size=block_size,
            method=method,
            backend=backend,
            scale_rule=scale_rule,
            check_finite=check_finite,
            count_candidates=count_candidates,
            **options,
        )
        return experts.quantize_each(each, weight, activations, gram, hessian, global_scale, init)
    hessians = whole = None
    if chosen.needs == "hessian":
        hessians = _hessians(weight, block_size, chosen, activations, gram, hessian, use_triton)
    elif chosen.needs == "gram":
        whole = _gram(weight, chosen, activations, gram)
    source = "hessian" if gram is None else "gram, in its diagonal blocks,"

    leading = weight.shape[:-1]
    matrix = _detached(weight)
    matrix = matrix if len(leading) == 1 else matrix.reshape(math.prod(leading), weight.shape[-1])
    if matrix.dtype == torch.float64:
        matrix = matrix.float()
    use_kernels = use_triton and matrix.numel() > 0
    jointly = isinstance(global_scale, str) and global_scale == SEARCH
    if check_finite and (jointly or not use_kernels):
        _check_finite(weight, matrix)
    problem = Problem(
        matrix=matrix,
        fmt=fmt,
        block_size=block_size,
        global_scale=_global_scale(matrix, fmt, global_scale),
        rule=rule,
        hessians=hessians,
        gram=whole,
        backend="triton" if use_kernels else "reference",
        count_candidates=count_candidates,
        check_finite=check_finite,
        name=source,
        options=settings,
        start=None if init is None else (init.codes.reshape(len(matrix), -1), init.scales.reshape(len(matrix), -1)),
        output_gram=outputs,
    )
    found = solve_jointly(chosen, problem) if jointly else chosen.solve(problem)
    if check_finite and found.flags is not None and any(found.flags.tolist()):
        _check_finite(weight, matrix)
        if hessians is not None:
            calibration.factorize(hessians, source)  # raises, and says why
    codes, scales, candidates = found.codes, found.scales, found.candidates
    if len(leading) != 1:
        codes = codes.reshape(*leading, codes.shape[-1])
        scales = scales.reshape(*leading, scales.shape[-1])
        candidates = None if candidates is None else candidates.reshape(scales.shape)
    return QuantizedTensor(
        codes,
        scales,
        found.global_scale,
        fmt,
        block_size,
        candidates,
        method,
        chosen.nearest_codes,
        found.objective,
    )


def resolve_backend(
    backend: str,
    device: torch.device | str,
    method: str | None = None,
    block_size: int | None = None,
    format: str | BlockFormat | None = None,
) -> str:
    """The backend, "reference" or "triton", that quantize() uses for a weight on ``device``.

    Method, block size and format are considered where they are given. Raises BackendUnavailableError where triton was
    requested and cannot run on the device, or has no kernel for them.
    """
    lacking = _without_kernel(
        None if method is None else get_method(method), block_size, None if format is None else get_format(format)
    )
    return choose_backend(backend, torch.device(device).type, lacking)


def _without_kernel(method: Method | None, block_size: int | None, fmt: BlockFormat | None) -> str | None:
    """Names the first given argument that the kernels do not support; None if they support all that are given."""
    if method is not None and not method.has_kernel:
        return f"method {method.name!r}"
    return without_kernel(None if method is None else method.objective, block_size, fmt)


def _check_options(weight: Tensor, fmt: BlockFormat, block_size: int, scale_rule: str | None) -> str:
    """The scale rule. Raises TypeError or ValueError for a weight or an option that no backend supports."""
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"weight must be a torch.Tensor, got {type(weight).__name__}; pass layer.weight of a layer, "
            "torch.from_numpy(array) of an array"
        )
    if block_size not in fmt.block_sizes or isinstance(block_size, float):
        offered = ", ".join(map(str, fmt.block_sizes))
        raise ValueError(f"{fmt.name} has no block size {block_size!r}; it offers {offered}")
    if scale_rule is not None and scale_rule not in fmt.scale_rules:
        raise ValueError(f"{fmt.name} has no scale rule {scale_rule!r}; it offers {', '.join(fmt.scale_rules)}")
    calibration.check_float(weight, "weight")
    if weight.ndim == 0:
        raise ValueError("weight must have at least one dimension, got a scalar")
    if weight.shape[-1] % block_size:
        raise ValueError(
            f"the last dimension of the weight, K = {weight.shape[-1]}, is not divisible by block size {block_size}; "
            "pad it with zeros or choose another block size"
        )
    return scale_rule or fmt.scale_rules[0]


def _layer_options(method: Method, given: dict[str, Any]) -> LayerOptions:
    """Raises TypeError for an unknown argument, and ValueError for a setting that the method does not take."""
    known = {field.name for field in dataclasses.fields(LayerOptions)}
    for name in given:
        if name not in known:
            raise TypeError(
                f"quantize() got an unexpected keyword argument {name!r}; settings: {', '.join(sorted(known))}"
            )
        if name not in method.options:
            takers = [other.name for other in METHODS.values() if name in other.options]
            do = "do" if len(takers) > 1 else "does"
            raise ValueError(f"method {method.name!r} takes no {name}; {' and '.join(takers)} {do}")
    return LayerOptions(**given)


def _check_init(
    init: QuantizedTensor, weight: Tensor, fmt: BlockFormat, block_size: int, method: Method, global_scale: object
) -> Tensor | None:
    """The global scale to use: that of ``init``; None for a single-level format. Raises ValueError, or TypeError, for
    an ``init`` that is none of this weight."""
    if not isinstance(init, QuantizedTensor):
        raise TypeError(f"init must be a QuantizedTensor, got {type(init).__name__}; quantize() returns one")
    if not method.takes_init:
        takers = [other.name for other in METHODS.values() if other.takes_init]
        raise ValueError(f"method {method.name!r} takes no init; {' and '.join(takers)} does")
    if (init.format, init.block_size) != (fmt, block_size):
        raise ValueError(
            f"init is {init.format.name} with block size {init.block_size}, not {fmt.name} with {block_size}; ask for "
            "its format and block size"
        )
    if init.shape != weight.shape or init.device != weight.device:
        raise ValueError(
            f"init is {list(init.shape)} on {init.device}, the weight {list(weight.shape)} on {weight.device}; give "
            "the same weight's"
        )
    own = init.global_scale
    same = isinstance(global_scale, Tensor) and global_scale.shape.numel() == 1 and bool((global_scale == own).all())
    if global_scale is not None and not same:
        raise ValueError(f"init has a global scale of its own, so global_scale={global_scale!r} cannot be used")
    return own if fmt.two_level else None


def _check_finite(weight: Tensor, matrix: Tensor) -> None:
    """Raises ValueError for NaN and Inf in ``weight``, and for a float64 weight whose float32 ``matrix`` overflowed."""
    calibration.check_finite(weight, "weight")
    if weight.dtype == torch.float64 and not bool(matrix.isfinite().all()):
        largest = float(weight.detach().abs().max())
        raise ValueError(f"weight holds {largest:.3g}, beyond float32, in which it is quantized; scale it down")


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.requires_grad else tensor  # detach() takes 0.3 µs


def _hessians(
    weight: Tensor,
    block_size: int,
    method: Method,
    activations: Tensor | Sequence[Tensor] | None,
    gram: Tensor | None,
    hessian: Tensor | None,
    use_triton: bool,
) -> Tensor:
    """Block Hessians on the weight's device, from activations, gram or hessian, whichever was given."""
    columns = weight.shape[-1]
    if activations is not None:
        tokens = _tokens(activations, columns, method)
        if use_triton and tokens.is_cuda and tokens.dtype != torch.float64:
            result = _hessians_from_activations(tokens, columns, block_size)
        else:
            calibration.check_activations(tokens, columns)
            result = calibration.hessians_from_activations(tokens, block_size)
            calibration.check_squares(result)
    elif gram is not None:
        calibration.check_tensor(gram, "gram")
        calibration.check_gram(gram, columns)
        result = calibration.block_hessians(gram, block_size)
    else:
        assert hessian is not None
        calibration.check_tensor(hessian, "hessian")
        calibration.check_hessian(hessian, columns, block_size)
        result = hessian
    return _detached(result).to(weight.device)


def _tokens(activations: Tensor | Sequence[Tensor], in_features: int, method: Method) -> Tensor:
    """``[tokens, in_features]``, at least one token."""
    calibration.check_tensor(activations, "activations")
    assert isinstance(activations, Tensor)
    tokens = calibration.as_tokens(activations)
    calibration.check_tokens(tokens, in_features, method.name)
    return tokens


def _hessians_from_activations(activations: Tensor, in_features: int, block_size: int) -> Tensor:
    """Block Hessians by the kernel. It checks the result, because NaN and Inf in the activations show there, and so do
    squares that are too small for float32."""
    calibration.check_activations(activations[:0], in_features)
    result = kernels.launcher().block_hessians(activations, block_size)
    squares = result.diagonal(dim1=1, dim2=2)
    if not squares.numel():
        return result
    least, largest = torch.stack(torch.aminmax(squares)).tolist()  # no element of a Hessian exceeds its diagonal's
    if not math.isfinite(largest):
        calibration.check_finite(activations, "activations")
        calibration.check_squares(result)
    if least < calibration.SMALL**2 and calibration.loses_squares(activations, squares.flatten()):
        result = calibration.hessians_from_activations(activations, block_size)
    return result


def _gram(weight: Tensor, method: Method, activations: Tensor | Sequence[Tensor] | None, gram: Tensor | None) -> Tensor:
    """Gram matrix on the weight's device, float32 or float64, from activations or gram, whichever was given."""
    columns = weight.shape[-1]
    if activations is not None:
        tokens = _tokens(activations, columns, method)
        calibration.check_activations(tokens, columns)
        result = calibration.gram_matrix(tokens)
        calibration.check_squares(result)
    else:
        assert gram is not None
        calibration.check_tensor(gram, "gram")
        calibration.check_gram(gram, columns)
        calibration.check_finite(gram, "gram")
        result = gram.to(torch.promote_types(gram.dtype, torch.float32))
    return _detached(result).to(weight.device)


def _output_gram(output_gram: Tensor, weight: Tensor, method: Method, init: QuantizedTensor | None) -> Tensor:
    """The output Gram matrix on the weight's device, float32 or float64."""
    if not method.takes_output_gram:
        takers = [other.name for other in METHODS.values() if other.takes_output_gram]
        raise ValueError(f"method {method.name!r} takes no output_gram; {' and '.join(takers)} do")
    if init is not None:
        raise ValueError("output_gram cannot be used with init, whose error it could raise; leave one of them out")
    calibration.check_tensor(output_gram, "output_gram")
    if weight.ndim != 2 or output_gram.shape != (len(weight), len(weight)):
        raise ValueError(
            f"output_gram has shape {list(output_gram.shape)} and the weight {list(weight.shape)}; a weight [N, K] "
            "needs [N, N]"
        )
    calibration.check_finite(output_gram, "output_gram")
    result = output_gram.to(torch.promote_types(output_gram.dtype, torch.float32))
    return _detached(result).to(weight.device)


def _of_all_experts(
    weight: Tensor, fmt: BlockFormat, requested: str | float | Tensor | None, finite: bool
) -> str | float | Tensor | None:
    """The global scale that experts with statistics of their own share, where it follows from all of them."""
    if not fmt.two_level or not (requested is None or isinstance(requested, str)):
        return requested
    if requested == SEARCH:
        raise ValueError(
            f"global_scale={requested!r} is for one weight, and each expert has activations, gram or hessian of its "
            "own; quantize the experts one by one, or use 'amax'"
        )
    if requested in (None, "amax", HEADROOM):
        return experts.shared_global_scale(weight, fmt, finite, requested == HEADROOM)
    return requested


def _global_scale(matrix: Tensor, fmt: BlockFormat, requested: str | float | Tensor | None) -> Tensor | None:
    """Float32 scalar, the decode multiplier. None for the default (amax, or 1 for a single-level format), which the
    search of the block scales computes to save a kernel launch, and for "search"."""
    requested = fmt.default_global_scale if requested is None else requested
    if not fmt.two_level and (isinstance(requested, Tensor) or requested != "none"):
        raise ValueError(f"{fmt.name} has no global scale; got global_scale={requested!r}, use 'none' or leave it out")
    if isinstance(requested, Tensor):
        if requested.numel() != 1 or requested.dtype != torch.float32 or requested.device != matrix.device:
            raise ValueError(
                f"a global_scale tensor must be one float32 on {matrix.device}, or [E, 1, 1] for a weight [E, N, K], "
                f"got {requested.dtype} {list(requested.shape)} on {requested.device}; convert it, or pass a number"
            )
        requested = _detached(requested if requested.ndim == 0 else requested.reshape(()))
        if requested.device.type == "cpu" and not _is_multiplier(float(requested), fmt):  # float() waits for a GPU
            raise ValueError(f"global_scale must be a positive number within float32's normal range, got {requested!r}")
        return requested
    if requested in (("amax", SEARCH) if fmt.two_level else ("none",)):
        return None
    if requested == HEADROOM:
        return global_scale_of(matrix, fmt, headroom=True)
    if requested == "none":
        return torch.ones((), dtype=torch.float32, device=matrix.device)
    if requested == experts.AMAX_PER_EXPERT:
        raise ValueError(f"global_scale={requested!r} is for a weight [E, N, K], of two dimensions use 'amax'")
    if isinstance(requested, bool) or not isinstance(requested, SupportsFloat):
        raise ValueError(
            f"unknown global_scale {requested!r}; use 'amax', 'headroom', 'search', 'none' or a positive number"
        )
    value = float(requested)
    if not _is_multiplier(value, fmt):
        raise ValueError(f"global_scale must be a positive number within float32's normal range, got {requested!r}")
    return torch.full((), value, dtype=torch.float32, device=matrix.device)  # without a copy from the host


def _is_multiplier(value: float, fmt: BlockFormat) -> bool:
    """Whether value is a normal number whose products with the largest scale and the largest element are finite."""
    largest = max(fmt.scale.max_value, fmt.element.max_value)
    return FLOAT32_SMALLEST_NORMAL <= value <= torch.finfo(torch.float32).max / largest
