"""quantkit: the best 4-bit representation of a weight matrix in block-scaled formats, and the proof that it is."""

from quantkit.blockwise import *  # noqa: F403
from quantkit.blockwise import __all__ as _blockwise_names
from quantkit.formats import E2M1, E4M3, FORMATS, MXFP4, NVFP4, UE8M0, BlockFormat, get_format
from quantkit.methods import METHODS, Method, get_method
from quantkit.metrics import compute_metrics
from quantkit.module import QuantizedWeight
from quantkit.quantize import BACKENDS, BackendUnavailableError, quantize, resolve_backend
from quantkit.tensor import QuantizedTensor
from quantkit.verify import Verification, verify

__version__ = "0.2.0"

__all__ = [
    "BACKENDS",
    "E2M1",
    "E4M3",
    "FORMATS",
    "METHODS",
    "MXFP4",
    "NVFP4",
    "UE8M0",
    "BackendUnavailableError",
    "BlockFormat",
    "Method",
    "QuantizedTensor",
    "QuantizedWeight",
    "Verification",
    "compute_metrics",
    "get_format",
    "get_method",
    "quantize",
    "resolve_backend",
    "verify",
    *_blockwise_names,
]
