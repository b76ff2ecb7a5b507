"""Tiny checkpoints for tests, in the layouts of real ones, and configurations that read them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from experiments import config as c

NUM_LAYERS = 4
WIDTH, INNER = 32, 64
SEVEN = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
SENTENCE = "the quick brown fox jumps over the lazy dog while seven boxing wizards pack five dozen liquor jugs"
WORDS = SENTENCE.split()


def text(sentences: int, start: int = 0) -> str:
    return "".join(
        " ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 9)) + ".\n" for i in range(start, start + sentences)
    )


def train_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    tokenizer.train_from_iterator([text(40)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)


def train_sentencepiece(folder: Path, style: str = "prepend") -> None:
    """A tokenizer as SentencePiece trains one: BPE that falls back to bytes, in which every two tokens that make a
    third are a merge. style: prepend and bare are tokenizer.json with a space in front of text and without; llama is
    transformers' class; few has one merge a token, as tokenizers' own trainer makes them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast
    from transformers.tokenization_utils_base import generate_merges

    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    special = ["<unk>", "<s>", "</s>"]
    special_and_bytes = special + [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=350, special_tokens=special_and_bytes, show_progress=False)
    trained.train_from_iterator([text(40), "▁▁ naïve (x) 12, 345\tYes"], trainer)
    vocab = trained.get_vocab()
    vocab |= {token: len(vocab) + place for place, token in enumerate(("▁▁", "▁▁▁", "▁▁▁▁"))}
    scores = {token: -number for token, number in vocab.items()}
    merges = generate_merges(vocab, scores, skip_tokens=set(special))
    if style == "few":
        merges = list({left + right: (left, right) for left, right in reversed(merges)}.values())[::-1]
    if style == "llama":
        made: Any = LlamaTokenizer(vocab=vocab, merges=merges)
    else:
        backend = Tokenizer(
            models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        )
        steps = [] if style == "bare" else [normalizers.Prepend("▁")]
        backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        made = PreTrainedTokenizerFast(tokenizer_object=backend, **roles)
    made.add_tokens([AddedToken("<|tool|>", special=False, normalized=False)])
    made.add_special_tokens({"additional_special_tokens": ["[INST]"]})
    made.save_pretrained(folder)


def qwen3(folder: Path, sharded: bool = True) -> Any:
    """Writes a tiny Qwen3 in the hub's layout, one shard for the embedding and one per layer. Returns the model."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=300,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config).eval()
    for parameter in model.parameters():  # the default initialisation is too small to tell errors apart
        torch.nn.init.normal_(parameter, std=0.3)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    train_tokenizer(folder)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if not sharded:
        save_file(tensors, folder / "model.safetensors")
        return model
    weight_map = {name: shard_of(name) for name in tensors}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == shard}, folder / shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return model


def shard_of(name: str) -> str:
    part = int(name.split(".")[2]) + 2 if ".layers." in name else 1 if "embed_tokens" in name else NUM_LAYERS + 2
    return f"model-{part:05d}-of-{NUM_LAYERS + 2:05d}.safetensors"


def write_text(folder: Path) -> None:
    """train.txt: about 180 sequences of 32 tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.txt").write_text(text(400))


def configuration(folder: Path | None = None, texts: Path | None = None, **changes: Any) -> c.Config:
    """A run on the model in `folder` and the text in `texts`. changes: `data__samples=8` and the like."""
    result = c.Config(
        format=c.FormatConfig("nvfp4"),
        method=c.MethodConfig("naive"),
        backend=c.BackendConfig("reference"),
        model=c.ModelConfig(
            "qwen3_4b", c.ModelSource.hub, path=None if folder is None else str(folder), dtype="float32"
        ),
        layer=c.LayerConfig(),
        data=c.DataConfig(
            "words", c.DataSource.hub, path=None if texts is None else str(texts), seq_len=32, samples=16, heldout=0.25
        ),
        cache=c.CacheConfig(shard_mib=1),
        record=c.RecordConfig(),
        tracking=c.TrackingConfig("none"),
        timing=c.TimingConfig(enabled=False),
        device="cpu",
    )
    return change(result, **changes)


def change(config: c.Config, **changes: Any) -> c.Config:
    for key, value in changes.items():
        group, _, name = key.partition("__")
        if name:
            value = dataclasses.replace(getattr(config, group), **{name: value})
        config = dataclasses.replace(config, **{group: value})
    return config
