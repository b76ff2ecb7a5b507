"""Tokenizers of SentencePiece in GGUF files: transformers' tokenizer of the model's folder is the oracle, and llama.cpp
and SentencePiece where their packages are installed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, TokenType

from experiments.config import ModelConfig, ModelSource
from experiments.files import SourceError
from experiments.model.checkpoint import load_dequantized
from experiments.model.export import export, read_verdict
from experiments.model.gguf_vocabulary import UNUSED_SCORE, differences, read_vocabulary
from experiments.sources.checkpoints import GgufCheckpoint, open_checkpoint
from experiments.sources.quantized import QuantizedCheckpoint
from tests.experiments.model.exported import build, quantize_source, quantized
from tests.experiments.model.test_export import LLAMA_CPP as PREDICTING
from tests.experiments.tiny_models import text, train_sentencepiece

pytestmark = pytest.mark.usefixtures("one_thread")
PLAIN = (
    "hello world",
    "a\n\nb  c",
    "tab\tx\r\n",
    "naïve 漢字 🙂 ß",
    "1234 5, (x)",
    "a     b",
    "the quick brown",
    "<0x0A>",
    "",
    text(6),
)
SPACED = (" hi", "   the", "▁", "     ", "<s>x</s> y", "<|tool|> z <|tool|>z", "[INST] the quick[/INST]", "x<unk>y")
LLAMA_CPP = """
import json, sys, urllib.request, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = sys.argv[1], 64, 1, False
server = xllamacpp.Server(params)
made = []
for text in json.loads(sys.argv[2]):
    asked = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
    request = urllib.request.Request(server.listening_address + "/tokenize", asked)
    request.add_header("Content-Type", "application/json")
    made.append(json.loads(urllib.request.urlopen(request).read())["tokens"])
print(json.dumps(made), flush=True)
"""


class Spoken:
    """Makes a model with each style of tokenizer once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.made: dict[str, QuantizedCheckpoint] = {}

    def source(self, style: str) -> QuantizedCheckpoint:
        if style not in self.made:
            self.made[style] = quantized(self.root / style, "mistral", "mxfp4", style=style)
            export(self.made[style], self.file(style).parent, "gguf")
        return self.made[style]

    def file(self, style: str) -> Path:
        return self.root / style / "out" / "model.gguf"

    def without_json(self, style: str) -> Path:
        """As llama.cpp's converter leaves it."""
        self.source(style)
        path = self.root / f"{style}.gguf"
        path.write_bytes(
            self.file(style).read_bytes().replace(b"tokenizer.huggingface.json", b"tokenizer.huggingface.none")
        )
        return path


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Spoken:
    return Spoken(tmp_path_factory.mktemp("spoken"))


def opened(path: Path, cache: Path) -> GgufCheckpoint:
    checkpoint = open_checkpoint(ModelConfig("read", ModelSource.hub, path=str(path)), cache)
    assert isinstance(checkpoint, GgufCheckpoint)
    return checkpoint


def ids_of(folder: Path) -> Callable[[str], list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])


def by_llama_cpp(path: Path, texts: tuple[str, ...]) -> list[list[int]]:
    pytest.importorskip("xllamacpp")
    command = [sys.executable, "-c", LLAMA_CPP, str(path), json.dumps(texts)]
    made: list[list[int]] = json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    )
    return made


@pytest.mark.parametrize("style", ["prepend", "bare", "llama", "few"])
def test_an_export_makes_the_ids_of_the_models_own_tokenizer(spoken: Spoken, tmp_path: Path, style: str) -> None:
    wanted = [ids_of(spoken.source(style).folder)(text) for text in PLAIN + SPACED]
    checkpoint = opened(spoken.file(style), tmp_path)
    for _ in range(2):  # made, and from the kept one
        tokenize = checkpoint.tokenizer()
        assert [tokenize(text) for text in PLAIN + SPACED] == wanted
    checkpoint.save_around(tmp_path, {})
    saved = ids_of(tmp_path)
    assert [saved(text) for text in PLAIN + SPACED] == wanted
    again, wanted_vocabulary = read_vocabulary(tmp_path), read_vocabulary(spoken.source(style).folder)
    assert (
        again is not None
        and wanted_vocabulary is not None
        and again.parsed["model"] == wanted_vocabulary.parsed["model"]
    )


def test_what_the_file_holds(spoken: Spoken) -> None:
    told = json.loads((spoken.source("prepend").folder / "tokenizer.json").read_text())
    fields = GGUFReader(spoken.file("prepend")).fields

    def value(key: str) -> Any:
        return fields[f"tokenizer.ggml.{key}"].contents()

    assert (value("model"), value("pre"), value("add_space_prefix")) == ("llama", "default", True)
    assert (value("bos_token_id"), value("eos_token_id"), value("unknown_token_id")) == (1, 2, 0)
    assert not value("add_bos_token") and not value("add_eos_token")  # the tokenizer adds none
    tokens, scores, types = value("tokens"), value("scores"), value("token_type")
    vocab = told["model"]["vocab"] | {"<|tool|>": 353, "[INST]": 354}
    assert tokens == [*sorted(vocab, key=vocab.__getitem__), *(f"[PAD{number}]" for number in range(355, 384))]
    known = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256
    known += [TokenType.NORMAL] * 94 + [TokenType.USER_DEFINED, TokenType.CONTROL] + [TokenType.UNUSED] * 29
    assert types == [int(kind) for kind in known]
    first: dict[str, int] = {}
    for rank, (left, right) in enumerate(told["model"]["merges"]):
        first.setdefault(left + right, rank)
    assert scores[:355] == [-float(first.get(token, 0)) for token in tokens[:355]]
    assert scores[355:] == [UNUSED_SCORE] * 29 and len(first) > 40
    assert not GGUFReader(spoken.file("bare")).fields["tokenizer.ggml.add_space_prefix"].contents()


@pytest.mark.parametrize("style", ["prepend", "bare", "llama"])
def test_an_export_of_an_export_holds_the_same(spoken: Spoken, tmp_path: Path, style: str) -> None:
    spoken.source(style)
    source = quantize_source(opened(spoken.file(style), tmp_path), tmp_path / "own", "mistral", "mxfp4")
    export(source, tmp_path / "out", "gguf")
    before, after = (GGUFReader(path).fields for path in (spoken.file(style), tmp_path / "out" / "model.gguf"))
    keys = [key for key in before if key.startswith("tokenizer.")]
    assert len(keys) > 10 and {key for key in after if key.startswith("tokenizer.")} == set(keys)
    assert {key: after[key].contents() for key in keys} == {key: before[key].contents() for key in keys}


@pytest.mark.parametrize("adds", [True, False])
def test_whether_the_first_token_is_added(tmp_path: Path, adds: bool) -> None:
    from tokenizers import Tokenizer, processors
    from transformers import AutoTokenizer

    folder = tmp_path / "llama-source"
    build("llama", 384).save_pretrained(folder)
    train_sentencepiece(folder)
    if adds:
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        backend.save(str(folder / "tokenizer.json"))
    assert (AutoTokenizer.from_pretrained(folder)("x")["input_ids"][0] == 1) == adds
    export(quantized(tmp_path, "llama", "mxfp4"), tmp_path / "out", "gguf")
    assert GGUFReader(tmp_path / "out" / "model.gguf").fields["tokenizer.ggml.add_bos_token"].contents() == adds


@pytest.mark.parametrize("style", ["prepend", "bare", "llama"])
def test_llama_cpp_makes_the_same_ids(spoken: Spoken, style: str) -> None:
    """Of transformers' class Llama, unless text begins with a space or follows a special token; see the warning."""
    wanted = ids_of(spoken.source(style).folder)
    texts = PLAIN if style == "llama" else PLAIN + SPACED
    assert by_llama_cpp(spoken.file(style), texts) == [wanted(text) for text in texts]
    if style == "llama":
        assert all(
            ids != wanted(text) for ids, text in zip(by_llama_cpp(spoken.file(style), SPACED), SPACED, strict=True)
        )


def test_llama_cpp_predicts_from_text_what_the_dequantized_model_does(spoken: Spoken) -> None:
    """Up to its 8-bit activations, as in test_export.py."""
    pytest.importorskip("xllamacpp")
    source, prompt = spoken.source("prepend"), "the quick brown fox\n  naïve 漢"
    ids = torch.tensor([ids_of(source.folder)(prompt)], dtype=torch.int64, device="cpu")
    with torch.no_grad():
        wanted = load_dequantized(source.folder, torch.float32)(ids).logits[0, -1].log_softmax(-1)
    command = [sys.executable, "-c", PREDICTING, str(spoken.file("prepend")), json.dumps(prompt)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    found = {entry["id"]: entry["logprob"] for entry in json.loads(told)}
    assert len(found) == 20 and next(iter(found)) == int(wanted.argmax())
    assert max(abs(float(wanted[token]) - logprob) for token, logprob in found.items()) < 0.05


@pytest.mark.parametrize("style", ["prepend", "bare", "llama"])
def test_a_file_without_tokenizer_json_is_read_as_llama_cpp_reads_it(
    spoken: Spoken, tmp_path: Path, style: str
) -> None:
    tokenize = opened(spoken.without_json(style), tmp_path).tokenizer()
    alike = "bare" if style == "bare" else "prepend"
    wanted = ids_of(spoken.source(alike).folder)
    assert [tokenize(text) for text in PLAIN + SPACED] == [wanted(text) for text in PLAIN + SPACED]
    assert "tokenizer.huggingface.json" not in GGUFReader(spoken.without_json(style)).fields


def test_scores_that_tell_nothing_are_refused(spoken: Spoken, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(spoken.without_json("prepend").read_bytes())
    scores = GGUFReader(path, "r+").fields["tokenizer.ggml.scores"]
    for place in scores.data:
        scores.parts[place][:] = -1000.0
    with pytest.raises(SourceError, match=r"all scores of its tokens are equal.* Give the model that it was made from"):
        opened(path, tmp_path).tokenizer()
    path.write_bytes(spoken.without_json("prepend").read_bytes().replace(b"ggml.scores", b"ggml.scorez"))
    with pytest.raises(SourceError, match="all scores of its tokens are equal"):
        opened(path, tmp_path).tokenizer()


@pytest.mark.parametrize(
    ("style", "parts"), [("prepend", []), ("llama", ["begins with one"]), ("few", ["words come apart otherwise"])]
)
def test_what_llama_cpp_splits_otherwise_is_a_warning(spoken: Spoken, style: str, parts: list[str]) -> None:
    spoken.source(style)
    verdict = read_verdict(spoken.file(style).parent)
    assert verdict is not None and verdict.ok and len(verdict.warnings) == len(parts)
    assert all(part in warning for part, warning in zip(parts, verdict.warnings, strict=True))


def changed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    train_sentencepiece(folder)
    path = folder / "tokenizer.json"
    told = json.loads(path.read_text())
    change(told)
    path.write_text(json.dumps(told))
    return folder


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}


def test_steps_that_llama_cpp_does_otherwise(tmp_path: Path) -> None:
    def told(change: Callable[[dict[str, Any]], Any]) -> list[str]:
        vocabulary = read_vocabulary(changed(tmp_path, change))
        assert vocabulary is not None
        return differences(vocabulary)

    (warning,) = told(lambda described: described["added_tokens"][-1].update(rstrip=True))
    assert "keeps the spaces around special tokens" in warning
    words, front = told(lambda described: described.update(normalizer=None, pre_tokenizer=METASPACE))
    assert "words come apart otherwise" in words and "begins with one" in front  # "▁▁" is never joined there
    assert told(lambda described: None) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}},
            r"and the model's is Unigram; export comp",
        ),
        ({"normalizer": {"type": "NFKC"}}, "does not know the step NFKC of the model's tokenizer; export compressed"),
        ({"normalizer": None}, "does not write spaces as ▁"),
        ({"model.byte_fallback": False}, "is neither byte-level nor falls back to bytes"),
        ({"model.ignore_merges": True}, "does not know ignore_merges=True"),
        ({"model.dropout": 0.5}, "does not know dropout=0.5"),
    ],
)
def test_tokenizers_that_llama_cpp_does_not_know_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    def apply(told: dict[str, Any]) -> None:
        for name, value in change.items():
            (told["model"] if "." in name else told)[name.rpartition(".")[2]] = value

    with pytest.raises(SourceError, match=message):
        read_vocabulary(changed(tmp_path, apply))


def test_a_missing_byte_is_refused(tmp_path: Path) -> None:
    def change(told: dict[str, Any]) -> None:
        told["model"]["vocab"]["<0xzz>"] = told["model"]["vocab"].pop("<0x41>")
        told["added_tokens"] = [added for added in told["added_tokens"] if added["content"] != "<0x41>"]

    with pytest.raises(SourceError, match=r"has no token <0x41>, which llama.cpp needs"):
        read_vocabulary(changed(tmp_path, change))


def test_folders_without_tokenizer_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_vocabulary(tmp_path) is None
    (tmp_path / "tokenizer.model").write_bytes(b"")
    monkeypatch.setattr("experiments.model.gguf_vocabulary.find_spec", lambda name: None)
    with pytest.raises(SourceError, match=r"put its tokenizer.json beside it, or install the package sentencepiece"):
        read_vocabulary(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(SourceError, match=r"tokenizer.json cannot be read"):
        read_vocabulary(tmp_path)


def test_tokenizer_model_alone_is_read_with_its_scores(tmp_path: Path) -> None:
    """pip install sentencepiece."""
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "lines.txt").write_text("".join(f"{line}  x\n" for line in text(60).splitlines()))
    trained = tmp_path / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "lines.txt"),
        model_prefix=str(trained),
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    folder = tmp_path / "mistral-source"
    folder.mkdir()
    build_with(folder, tmp_path / "tokenizer.model")
    source = quantized(tmp_path, "mistral", "mxfp4")
    warnings = export(source, tmp_path / "out", "gguf").warnings
    own = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    fields = GGUFReader(tmp_path / "out" / "model.gguf").fields
    scores = fields["tokenizer.ggml.scores"].contents()
    assert scores[3:340] == [own.get_score(number) for number in range(3, 340)]
    assert fields["tokenizer.ggml.add_space_prefix"].contents()
    # transformers 5.23 makes a Mistral's tokenizer of it without the space in front.
    assert len(warnings) == 1 and "put the authors' tokenizer.json beside it" in warnings[0]
    texts = (*PLAIN, " hi", "   the", "     ")
    assert by_llama_cpp(tmp_path / "out" / "model.gguf", texts) == [own.encode(text) for text in texts]


def build_with(folder: Path, model: Path) -> None:
    build("mistral", 384).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    told = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
