"""Make a model of a known one's shapes with random weights, to measure time and memory where no hub is.

    python experiments/random_model.py qwen3_4b --text data/ --out results/models/random_4b
    python experiments/random_model.py qwen3_4b --layers 4 --text data/ --out results/models/random_4_layers

The folder has the hub's layout, bfloat16, a shard for each decoder layer, and a small byte-level BPE tokenizer that is
trained on the text. So `model.path=FOLDER` reads it. Its outputs mean nothing, but shapes, memory and the number of
operations are those of the known model. So is the size of the vocabulary; the text uses its first TOKENS ids.

Weights are normal with the standard deviation with which such models are initialised; those that write to the residual
stream are divided by √(2 · layers), so that it grows as in a trained model. The same seed gives the same bytes on the
same kind of device.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Python puts a script's folder first on the path, where `config` or `files` would shadow other packages' modules.
    sys.path.pop(0)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from experiments import provenance
from experiments.files import check_writable, write_atomically
from experiments.train_small import END, add_arguments, read_text, train_tokenizer

# Size of the tokenizer's vocabulary. A small one makes many tokens of a text. A first layer's inputs are embeddings, so
# it exceeds their width: else their Gram matrix would be singular.
TOKENS = 4096
STD = 0.02  # of weights
RESIDUAL = ("o_proj.weight", "down_proj.weight")
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_4b": {
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": True,
    },
    "tiny": {  # for tests
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    shapes = dict(SHAPES[arguments.shapes])
    if arguments.layers is not None:
        shapes["num_hidden_layers"] = arguments.layers
    try:
        texts = [read_text(name).read() for name in arguments.text]
        check_writable(arguments.out)
        started = time.perf_counter()
        tokens = write_tokenizer(texts, arguments.out, min(TOKENS, shapes["vocab_size"]))
        device = provenance.resolve_device(arguments.device)
        size = write_model(shapes, arguments.out, arguments.seed, device)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{arguments.out}: {size:,} parameters, {shapes['num_hidden_layers']} layers; {tokens:,} tokens of text; "
        f"{time.perf_counter() - started:.0f} s"
    )
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shapes", choices=sorted(SHAPES))
    add_arguments(parser)
    parser.add_argument("--layers", type=int, help="default: as many as the known model has")
    arguments = parser.parse_args(argv)
    if arguments.layers is not None and arguments.layers < 1:
        parser.error(f"--layers {arguments.layers}: at least 1")
    return arguments


def write_tokenizer(texts: Sequence[str], out: Path, tokens: int) -> int:
    """Train a tokenizer on the texts and write it. Returns their number of tokens."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = train_tokenizer(texts, tokens)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(out)
    return sum(len(tokenizer.encode(text).ids) for text in texts)


def write_model(shapes: dict[str, Any], out: Path, seed: int = 0, device: str = "cpu") -> int:
    """Write config.json and the weights of a Qwen3, shard by shard. Returns its number of parameters."""
    from safetensors.torch import save_file
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**shapes, dtype="bfloat16", bos_token_id=None, eos_token_id=0)
    config.architectures = ["Qwen3ForCausalLM"]
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    config.save_pretrained(out)
    generator = torch.Generator(device).manual_seed(seed)
    weight_map: dict[str, str] = {}
    size = 0
    for shard, names in _shards(model, config.num_hidden_layers):
        tensors = {name: _random(name, model.get_parameter(name).shape, config, generator) for name in names}
        save_file(tensors, out / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, shard)
        size += sum(tensor.numel() for tensor in tensors.values())
    index = {"metadata": {"total_size": 2 * size}, "weight_map": weight_map}
    write_atomically(out / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")
    return size


def _shards(model: Any, layers: int) -> Iterator[tuple[str, list[str]]]:
    """(file, names of its parameters): one for each decoder layer, and the last for the rest; tied ones once."""
    names = [name for name, _ in model.named_parameters()]
    groups = [[name for name in names if name.startswith(f"model.layers.{index}.")] for index in range(layers)]
    groups.append([name for name in names if ".layers." not in name])
    for number, group in enumerate(groups, start=1):
        yield f"model-{number:05d}-of-{len(groups):05d}.safetensors", group


def _random(name: str, shape: torch.Size, config: Any, generator: torch.Generator) -> Tensor:
    """bfloat16, on the CPU. A norm's weight is near 1."""
    x = torch.randn(shape, generator=generator, dtype=torch.float32, device=generator.device)
    if len(shape) == 1:
        x.mul_(0.1).add_(1)
    else:
        x.mul_(STD / (2 * config.num_hidden_layers) ** 0.5 if name.endswith(RESIDUAL) else STD)
    return x.to(torch.bfloat16).cpu()


if __name__ == "__main__":
    sys.exit(main())
