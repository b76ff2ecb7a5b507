"""Train a small language model on local text, so that a model that was never quantized can be quantized offline.

    python experiments/train_small.py dense --text data/valid.txt python_docs --out results/models/small_qwen3
    python experiments/train_small.py moe --text data/valid.txt python_docs --out results/models/small_qwen3_moe

dense: a Qwen3 of 13 million parameters. moe: a Qwen3-MoE of 15 million, with 16 experts, 2 for each token. A byte-level
BPE tokenizer of 8192 tokens is trained on the same text. The folder has the hub's layout (bfloat16), so that
`model=small_qwen3` reads it, and training.json, which says what it was made from. Weights are not committed.

The loop is plain PyTorch: AdamW, warm-up and a cosine, gradients clipped at 1, bfloat16 autocast on a GPU. The last 5 %
of each text judge the model while it trains; the best step is kept, since a text of a few MB is learnt by heart. The
same seed gives the same model on the same machine; a GPU's sums may differ in their last bits.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Python puts a script's folder first on the path, where `config` or `files` would shadow other packages' modules.
    sys.path.pop(0)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from experiments import provenance
from experiments.config import CacheConfig, DataConfig, DataSource
from experiments.files import SourceError, check_writable, write_atomically
from experiments.sources.texts import Text, load_text

END = "<|endoftext|>"
HELD_OUT = 0.05  # share of each text that judges the training
JUDGED_SEQUENCES = 64
ORIGIN = "Trained here, by experiments/train_small.py."


@dataclass(frozen=True)
class Size:
    """experts: 0 for a dense model. intermediate: of the MLP, or of one expert."""

    vocabulary: int = 8192
    hidden: int = 384
    intermediate: int = 1024
    layers: int = 6
    heads: int = 6
    kv_heads: int = 3
    head_dim: int = 64
    experts: int = 0
    experts_per_token: int = 2


@dataclass(frozen=True)
class Training:
    steps: int = 600
    batch: int = 32  # sequences
    seq_len: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    warmup: int = 40  # steps
    judged_every: int = 25  # steps
    seed: int = 0


DENSE = Size()
MOE = Size(hidden=256, intermediate=160, heads=4, kv_heads=2, experts=16)
SIZES = {"dense": DENSE, "moe": MOE}
# For tests: everything, within seconds.
SMOKE = {
    kind: replace(size, vocabulary=300, hidden=32, intermediate=32, layers=2, heads=2, kv_heads=1, head_dim=16)
    for kind, size in (("dense", DENSE), ("moe", replace(MOE, experts=4)))
}
SMOKE_TRAINING = Training(steps=12, batch=4, seq_len=32, warmup=2, judged_every=4)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    size = (SMOKE if arguments.smoke else SIZES)[arguments.kind]
    training = replace(SMOKE_TRAINING if arguments.smoke else Training(), seed=arguments.seed)
    if arguments.steps is not None:
        training = replace(training, steps=arguments.steps)
    try:
        texts = [read_text(name) for name in arguments.text]
        check_writable(arguments.out)
        train(size, training, texts, arguments.out, provenance.resolve_device(arguments.device))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small language model on local text.")
    parser.add_argument("kind", choices=sorted(SIZES))
    add_arguments(parser)
    parser.add_argument("--steps", type=int, help="default: 600")
    parser.add_argument("--smoke", action="store_true", help="a model of a few thousand parameters, in seconds")
    return parser.parse_args(argv)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of a script that makes a model from a text: --text, --out, --seed and --device."""
    parser.add_argument("--text", nargs="+", required=True, metavar="PATH", help="files or folders, or python_docs")
    parser.add_argument("--out", type=Path, required=True, help="the model's folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda; default: auto")


def read_text(name: str) -> Text:
    """python_docs, a text file, or a folder, as data.path takes them. Raises SourceError."""
    if name == "python_docs":
        data = DataConfig(name, DataSource.python_docs)
    else:
        data = DataConfig(Path(name).stem, DataSource.hub, path=name)
    return load_text(data, CacheConfig().folder)


def train(size: Size, training: Training, texts: Sequence[Text], out: Path, device: str) -> dict[str, Any]:
    """Train a model and write its folder. Returns what training.json says. Raises SourceError for too short a text."""
    started = time.perf_counter()
    torch.manual_seed(training.seed)
    parts = [split_text(text.read()) for text in texts]
    tokenizer = train_tokenizer([part[0] for part in parts], size.vocabulary)
    learnt, held = (
        cut([i for part in parts for i in [*tokenizer.encode(part[which]).ids, tokenizer.token_to_id(END)]], training)
        for which in (0, 1)
    )
    network = build(size, training.seq_len).to(device)
    state, judged = fit(network, learnt, held[:JUDGED_SEQUENCES].to(device), training, device)
    network.load_state_dict(state)
    write_model(network, tokenizer, out)
    about = {
        "origin": ORIGIN,
        "kind": "moe" if size.experts else "dense",
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "size": asdict(size),
        "training": asdict(training),
        "texts": [{"name": text.name, "split": text.split, "sha256": text.sha256} for text in texts],
        "tokens": learnt.numel(),
        "heldout_tokens": held[:JUDGED_SEQUENCES].numel(),
        "heldout_loss": [[step, round(loss, 4)] for step, loss in judged],
        "device_name": provenance.device_name(device),
        "commit": provenance.git_state()[0],
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_atomically(out / "training.json", json.dumps(about, indent=1) + "\n")
    step, loss = min(judged, key=lambda entry: entry[1])
    print(
        f"{out}: {about['parameters']:,} parameters, {learnt.numel():,} tokens of text; held-out loss {loss:.3f} at "
        f"step {step}; {about['seconds']} s on {about['device_name']}"
    )
    return about


def split_text(text: str) -> tuple[str, str]:
    """(all but the last HELD_OUT, the rest), cut at a line."""
    cut_at = text.rfind("\n", 0, int(len(text) * (1 - HELD_OUT))) + 1
    return text[:cut_at], text[cut_at:]


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """Byte-level BPE of `vocabulary` tokens, END the first of them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END],
        show_progress=False,
    )
    lines = [line for text in texts for line in text.splitlines(keepends=True)]
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def cut(ids: list[int], training: Training) -> Tensor:
    """[sequences, seq_len + 1]: each with the token that follows it. Raises SourceError for too short a text."""
    length = training.seq_len + 1
    count = len(ids) // length
    if count == 0:
        raise SourceError(
            f"--text: {len(ids)} tokens, of which 5 % are held out; both parts need {length}. Give more text."
        )
    return torch.tensor(ids[: count * length], dtype=torch.long, device="cpu").view(count, length)


def build(size: Size, seq_len: int) -> Any:
    """transformers' Qwen3 or Qwen3-MoE, float32, initialised by torch's seed."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    common: dict[str, Any] = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "max_position_embeddings": max(2048, seq_len),
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        "use_cache": False,
    }
    if not size.experts:
        return Qwen3ForCausalLM(Qwen3Config(intermediate_size=size.intermediate, **common))
    config = Qwen3MoeConfig(
        num_experts=size.experts,
        num_experts_per_tok=size.experts_per_token,
        moe_intermediate_size=size.intermediate,
        intermediate_size=size.intermediate,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,  # keeps all experts in use
        output_router_logits=True,
        **common,
    )
    config._experts_implementation = "eager"
    return Qwen3MoeForCausalLM(config)


def fit(
    network: Any, learnt: Tensor, held: Tensor, training: Training, device: str
) -> tuple[dict[str, Tensor], list[tuple[int, float]]]:
    """(the weights of the best step, [(step, held-out loss)]). learnt, held: [sequences, seq_len + 1]."""
    from tqdm import tqdm

    matrices = [p for p in network.parameters() if p.ndim > 1]
    vectors = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=training.learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, training))
    best, state, judged = math.inf, network.state_dict(), []
    with tqdm(total=training.steps, desc="training", disable=None) as bar:
        for step, chosen in enumerate(batches(len(learnt), training), start=1):
            network.train()
            loss = loss_of(network, learnt[chosen].to(device), device)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update()
            if step % training.judged_every == 0 or step == training.steps:
                found = judge(network, held, training.batch, device)
                judged.append((step, found))
                bar.set_postfix_str(f"held-out loss {found:.3f}")
                if found < best:
                    best, state = found, copy.deepcopy(network.state_dict())
    if not math.isfinite(best):
        raise ValueError("the loss is not finite; use another --seed or fewer --steps")
    return state, judged


def rate(step: int, training: Training) -> float:
    """The share of the learning rate at a step: a linear warm-up, then a cosine to a tenth."""
    if step < training.warmup:
        return (step + 1) / training.warmup
    done = (step - training.warmup) / max(1, training.steps - training.warmup)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))


def batches(count: int, training: Training) -> Iterator[list[int]]:
    """The sequences of each step: all in a new random order, over and over."""
    shuffle = random.Random(training.seed)
    order: list[int] = []
    for _ in range(training.steps):
        while len(order) < training.batch:
            order += shuffle.sample(range(count), count)
        yield order[: training.batch]
        del order[: training.batch]


def loss_of(network: Any, ids: Tensor, device: str) -> Tensor:
    """Mean cross entropy of the next tokens; in training also the routers' balance. ids: [sequences, seq_len + 1]."""
    with torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=device.startswith("cuda")):
        output = network(input_ids=ids[:, :-1])
    loss = torch.nn.functional.cross_entropy(output.logits.float().flatten(0, 1), ids[:, 1:].flatten())
    balance = getattr(output, "aux_loss", None)
    if network.training and balance is not None:
        loss = loss + network.config.router_aux_loss_coef * balance.to(loss.device)
    return loss


@torch.no_grad()
def judge(network: Any, held: Tensor, batch: int, device: str) -> float:
    network.eval()
    losses = [float(loss_of(network, part, device)) * len(part) for part in held.split(batch)]
    return sum(losses) / len(held)


def write_model(network: Any, tokenizer: Any, out: Path) -> None:
    """Weights in bfloat16, config.json and the tokenizer, in the hub's layout."""
    from transformers import PreTrainedTokenizerFast

    network.config.output_router_logits = False
    network.config.use_cache = True
    network.to(torch.bfloat16).save_pretrained(out)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(out)


if __name__ == "__main__":
    sys.exit(main())
