"""Whole models quantized to NVFP4, weights only, by other tools: each tool's released code, and its own checkpoint.

    llmcompressor_rtn    round to nearest, scales from amax               llm-compressor, compressed-tensors folder
    llmcompressor_gptq   GPTQ, column order by activation, its default
    modelopt_max         scales from amax                                 NVIDIA ModelOpt, its unified folder
    modelopt_mse         each block's scale of least squared error
    modelopt_local_hessian  each block's scale of least r H rᵀ, H of the block
    modelopt_gptq        GPTQ, scales from amax, layer by layer, by its fused kernel
    autoround            learned rounding, 200 steps a block, its default  AutoRound, compressed-tensors folder

The settings are each tool's defaults for NVFP4 weights with block size 16. Where a tool has only a preset for quantized
activations, its input quantizers are off. All take the same float32 model and the same token sequences. lm_head and
the embedding stay as they are. The packages are imported where they are used; ModelOpt's mse, local_hessian and gptq
need a GPU.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.evaluation_record import PEER_LABELS
from experiments.files import SourceError, one_line

BATCH = 8  # sequences in a pass


@dataclass
class PeerTask:
    """model: folder of the float checkpoint. ids: calibration tokens ``[sequences, seq_len]``. out: folder to write.

    begun: when the tool got the loaded model, by time.perf_counter.
    """

    model: Path
    ids: Tensor
    out: Path
    device: str
    begun: float | None = field(default=None, init=False)

    def network(self) -> Any:
        from transformers import AutoModelForCausalLM

        network = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).to(self.device).eval()
        network.config.architectures = network.config.architectures or [type(network).__name__]  # ModelOpt reads it
        self.begun = time.perf_counter()
        return network

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model)


@dataclass(frozen=True)
class Peer:
    """packages: their versions go on the record; the first one is the tool. calibrated: whether it sees tokens."""

    packages: tuple[str, ...]
    run: Callable[[PeerTask], None]
    calibrated: bool = True


def _llmcompressor(modifier: str) -> Callable[[PeerTask], None]:
    def run(task: PeerTask) -> None:
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.modifiers.gptq import GPTQModifier
        from llmcompressor.modifiers.quantization import QuantizationModifier

        network, tokenizer = task.network(), task.tokenizer()
        kind = {"gptq": GPTQModifier, "rtn": QuantizationModifier}[modifier]
        calibration: dict[str, Any] = {}
        if modifier == "gptq":
            rows = {"input_ids": task.ids.tolist(), "attention_mask": torch.ones_like(task.ids).tolist()}
            calibration = {
                "dataset": Dataset.from_dict(rows),
                "max_seq_length": task.ids.shape[1],
                "num_calibration_samples": len(task.ids),
            }
        oneshot(model=network, recipe=kind(targets="Linear", scheme="NVFP4A16", ignore=["lm_head"]), **calibration)
        network.save_pretrained(task.out, save_compressed=True)
        tokenizer.save_pretrained(task.out)

    return run


def modelopt_config(method: str) -> dict[str, Any]:
    """ModelOpt's configuration for NVFP4 weights by a method of its presets, with the input quantizers off."""
    import modelopt.torch.quantization as mtq

    presets = {
        "max": mtq.W4A16_NVFP4_CFG,
        "mse": mtq.NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG,
        "local_hessian": mtq.NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG,
    }
    config: dict[str, Any] = copy.deepcopy(presets.get(method, mtq.NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG))
    if method == "gptq":
        config["algorithm"] = {"method": "gptq", "fused": True, "layerwise": {"enable": True}}
    config["quant_cfg"].append({"quantizer_name": "*input_quantizer", "enable": False})
    return config


def _modelopt(method: str) -> Callable[[PeerTask], None]:
    def run(task: PeerTask) -> None:
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export import export_hf_checkpoint

        def passes(network: Any) -> None:
            for batch in task.ids.split(BATCH):
                network(batch.to(task.device))

        with torch.no_grad():
            calibrate = passes if method in ("local_hessian", "gptq") else None
            network = mtq.quantize(task.network(), modelopt_config(method), calibrate)
            export_hf_checkpoint(network, export_dir=task.out)
        task.tokenizer().save_pretrained(task.out)

    return run


def _autoround(task: PeerTask) -> None:
    from auto_round import AutoRound
    from auto_round.schemes import QuantizationScheme

    weights_only = {"bits": 4, "group_size": 16, "data_type": "nv_fp", "sym": True, "act_bits": 16}
    rows = [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])} for ids in task.ids]
    tool = AutoRound(
        task.network(),
        task.tokenizer(),
        scheme=QuantizationScheme.from_dict(weights_only),
        nsamples=len(rows),
        seqlen=task.ids.shape[1],
        dataset=rows,
        device_map=task.device,
        enable_torch_compile=False,  # it compiles for longer than it tunes a small model
    )
    tool.quantize_and_save(str(task.out), format="llm_compressor")
    for folder in [path for path in task.out.iterdir() if path.is_dir()]:  # it writes a folder of its own naming
        for path in folder.iterdir():
            path.rename(task.out / path.name)
        folder.rmdir()


LLM_COMPRESSOR, MODELOPT = ("llmcompressor", "compressed-tensors"), ("nvidia-modelopt",)
PEERS = {
    "llmcompressor_rtn": Peer(LLM_COMPRESSOR, _llmcompressor("rtn"), calibrated=False),
    "llmcompressor_gptq": Peer(LLM_COMPRESSOR, _llmcompressor("gptq")),
    "modelopt_max": Peer(MODELOPT, _modelopt("max"), calibrated=False),
    "modelopt_mse": Peer(MODELOPT, _modelopt("mse"), calibrated=False),
    "modelopt_local_hessian": Peer(MODELOPT, _modelopt("local_hessian")),
    "modelopt_gptq": Peer(MODELOPT, _modelopt("gptq")),
    "autoround": Peer(("auto-round",), _autoround),
}
assert PEERS.keys() == PEER_LABELS.keys()


def get_peer(name: str) -> Peer:
    """Raises SourceError for an unknown tool."""
    if name not in PEERS:
        raise SourceError(f"tool={name}: known tools: {', '.join(PEERS)}.")
    return PEERS[name]


def run_peer(name: str, task: PeerTask) -> float:
    """Writes the tool's checkpoint into task.out. Returns seconds, from the loaded model to the written checkpoint.

    Raises SourceError where the tool is missing or fails.
    """
    started = time.perf_counter()
    try:
        get_peer(name).run(task)
    except ImportError as error:
        raise SourceError(
            f"tool={name} cannot be imported: {one_line(error)}. pip install {get_peer(name).packages[0]}"
        ) from None
    except Exception as error:  # other tools raise whatever they like
        raise SourceError(f"tool={name} failed: {type(error).__name__}: {one_line(error)[:500]}") from error
    return time.perf_counter() - (task.begun or started)
