"""A tiny model, and the same with its linear layers quantized, as folders that transformers loads."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from experiments.config import CacheConfig, DataConfig, DataSource, ModelConfig, ModelSource, TrackingConfig
from experiments.model.evaluate_settings import EvaluateConfig, EvaluationConfig
from quantkit import quantize
from tests.experiments.tiny_models import change


def write_quantized(tiny: SimpleNamespace, folder: Path, method: Callable[[str], str] = lambda name: "naive") -> Any:
    """The tiny model with every linear layer of its decoder quantized, by the method of its name. Returns the model."""
    model = copy.deepcopy(tiny.model)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            module.weight.data = quantize(module.weight.data, format="nvfp4", method=method(name)).dequantize()
    model.save_pretrained(folder)
    for file in tiny.folder.glob("tokenizer*"):
        shutil.copy(file, folder)
    return model


@pytest.fixture(scope="module")
def pair(tiny: SimpleNamespace, one_thread: None) -> SimpleNamespace:
    tiny.quantized = tiny.folder.parent / "naive"
    tiny.other = write_quantized(tiny, tiny.quantized)
    return tiny


def evaluation(pair: SimpleNamespace, folder: Path, **changes: Any) -> EvaluationConfig:
    """An evaluation of the quantized model against the other. changes: `data__samples=8` and the like."""
    config = EvaluationConfig(
        model=ModelConfig("qwen3_4b", ModelSource.hub, path=str(pair.quantized)),
        data=DataConfig("words", DataSource.hub, path=str(pair.texts), seq_len=32, samples=12),
        evaluate=EvaluateConfig(resamples=2000),
        cache=CacheConfig(dir=str(folder / "cache")),
        tracking=TrackingConfig("none"),
        reference=str(pair.folder),
        device="cpu",
        output_dir=str(folder / "runs"),
    )
    return change(config, **changes)
