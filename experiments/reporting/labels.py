"""Labels of formats, methods and backends, and numbers as table cells. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

CONF_DIR = Path(__file__).resolve().parents[2] / "conf"  # the same in experiments.config, which imports hydra
NONE = "–"


def read_formats(folder: Path = CONF_DIR) -> tuple[dict[str, str], dict[str, str]]:
    """(name → label, name → default global scale) of the files in ``folder/format``, in the order of table rows.

    A label is the name in capitals. Formats with a global scale come first; within each group the order is by name.
    """
    scales: dict[str, str] = {}
    for path in sorted((folder / "format").glob("*.yaml")):
        values = OmegaConf.load(path)
        scales[str(OmegaConf.select(values, "name"))] = str(OmegaConf.select(values, "global_scale"))
    order = sorted(scales, key=lambda name: (scales[name] == "none", name))
    return {name: name.replace("_", " ").upper() for name in order}, scales


# The main tables use the default global scales. Figures that compare global scales show the others, too.
FORMATS, GLOBAL_SCALES = read_formats()
# Format → (elements, block scales).
GRIDS = {
    "nvfp4": ("E2M1", "E4M3"),
    "fp4_ue5m3": ("E2M1", "UE5M3"),
    "fp4_ue4m4": ("E2M1", "UE4M4"),
    "mxfp4": ("E2M1", "UE8M0"),
    "nvint4": ("INT4", "E4M3"),
    "int4_ue5m3": ("INT4", "UE5M3"),
    "int4_ue4m4": ("INT4", "UE4M4"),
    "mxint4": ("INT4", "UE8M0"),
}
DEFAULT_RULES = ("nearest", "floor")  # the default naive rules of fractional scales and of powers of two
METHODS = {
    "naive": "Naive",
    "sse": "SSE",
    "hessian": "Hessian",
    "joint": "Joint",
    "gptq": "GPTQ",
    "descent": "Descent",
}
OPTIMAL = ("sse", "hessian")  # methods that promise the least error
BACKENDS = {"reference": "reference", "triton": "Triton"}


def rank(order: dict[str, str], name: str) -> tuple[int, str]:
    return (list(order).index(name) if name in order else len(order), name)


def as_percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.2f} %"


def as_factor(factor: float | None) -> str:
    return NONE if factor is None else f"{factor:.1f}×"


def as_number(value: float | None) -> str:
    return NONE if value is None else f"{value:g}"
