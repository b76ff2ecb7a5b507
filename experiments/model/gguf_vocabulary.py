"""The tokenizer of a GGUF file, written from the one in the model's folder.

    gpt2     byte-level BPE: tokens, merges, and llama.cpp's name of the pre-tokenizer, which splits text before BPE
    llama    SentencePiece's BPE, as of Llama 2 and Mistral: tokens, scores, and whether text gets a space in front

llama.cpp joins the two neighbours whose token has the highest score, where a tokenizer.json joins the pair that comes
first in its merges. So a token's score is minus the rank of the first merge that makes it. Both join the same pairs if
every pair of tokens that makes a third is a merge. That holds in each vocabulary that SentencePiece has trained;
`differences` tells where it does not. The gguf package finds special tokens, and reads tokenizer.model with its scores;
its reader of tokenizer.json (LlamaHfVocab) makes no scores. A file of the kind llama also holds tokenizer.json itself,
from which sources/gguf_tokenizer.py makes the same ids again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from experiments.files import SourceError, named, parse_json
from experiments.sources.checkpoints import PRE_TOKENIZER
from experiments.sources.gguf_tokenizer import SPACE

# The regular expression of a pre-tokenizer → its name in llama.cpp.
_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_WORDS = "|".join(
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}{first}{_LOWER}{second}%s" for first, second in (("*", "+"), ("+", "*"))
)
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    _SPLIT % r"\p{N}{1,3}": "llama-bpe",
    _SPLIT % r"\p{N}": "qwen2",
    "|".join((_WORDS % (_SHORT, _SHORT), r"\p{N}{1,3}", _REST)): "gpt-4o",
    "|".join((_WORDS % ("", ""), r"\p{N}", _REST)): "tekken",
}
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
UNUSED_SCORE = -10000.0  # of a row of the embedding without a token, as llama.cpp's converter has it
SAMPLE = " two  spaces,\n    four (4) and words"
INSTEAD = "export compressed_tensors instead"


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer that llama.cpp knows. kind: gpt2 or llama. parsed: the content of tokenizer.json.

    The others are of the kind llama alone. tokenizer: transformers'. prefix: whether text gets a space in front.
    own: gguf's SentencePieceVocab, where the folder has tokenizer.model and no tokenizer.json.
    """

    kind: str
    parsed: dict[str, Any]
    tokenizer: Any = None
    prefix: bool = False
    own: Any = None

    @property
    def merges(self) -> list[tuple[str, str]]:
        """The pairs that are joined, the first ones first."""
        return [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in self.parsed["model"]["merges"]]


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """None for a folder with neither tokenizer.json nor tokenizer.model. Raises SourceError for a tokenizer that
    llama.cpp does not know."""
    path = folder / "tokenizer.json"
    if path.is_file():
        with named(f"{path} cannot be read"):
            parsed = parse_json(path.read_bytes())
            if _is_byte_level(parsed):
                return Vocabulary("gpt2", parsed)
            if parsed["model"].get("type") != "BPE":
                raise SourceError(
                    f"export=gguf writes tokenizers of byte-level BPE and of SentencePiece's BPE, and the model's is "
                    f"{parsed['model'].get('type')}; {INSTEAD}"
                )
    elif not (folder / "tokenizer.model").is_file():
        return None
    elif find_spec("sentencepiece") is None:
        raise SourceError(
            "export=gguf: the model has tokenizer.model and no tokenizer.json; put its tokenizer.json beside it, or "
            "install the package sentencepiece"
        )
    return _sentencepiece(folder)


def _is_byte_level(parsed: dict[str, Any]) -> bool:
    steps = [*_steps(parsed.get("pre_tokenizer"), "pretokenizers"), *_steps(parsed.get("decoder"), "decoders")]
    byte_level = any(step.get("type") == "ByteLevel" for step in steps)
    return parsed["model"].get("type") == "BPE" and not parsed["model"].get("byte_fallback") and byte_level


def _steps(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The steps of a Sequence, whose list is named `inner`; else the one step."""
    return [] if step is None else list(step.get(inner, [step]))


def _sentencepiece(folder: Path) -> Vocabulary:
    """As transformers loads it, which need not be tokenizer.json as it is."""
    from gguf.vocab import SentencePieceVocab
    from transformers import AutoTokenizer

    with named(f"{folder}: its tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        parsed = json.loads(tokenizer.backend_tokenizer.to_str())
        own = None if (folder / "tokenizer.json").is_file() else SentencePieceVocab(folder)
    _check_model(parsed["model"])
    prefix = _has_prefix(parsed)
    if own is not None:
        prefix = own.sentencepiece_tokenizer.encode("a", out_type=str)[0].startswith(SPACE)
    return Vocabulary("llama", parsed, tokenizer, prefix, own)


def _check_model(model: dict[str, Any]) -> None:
    """Raises SourceError for a model of tokenizer.json that is not llama.cpp's. model: that part of the file."""
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise SourceError(
            f"export=gguf: the model's tokenizer is neither byte-level nor falls back to bytes; {INSTEAD}"
        )
    if missing := [token for token in map("<0x{:02X}>".format, range(256)) if token not in model["vocab"]]:
        raise SourceError(
            f"export=gguf: the model's tokenizer has no token {missing[0]}, which llama.cpp needs; {INSTEAD}"
        )
    others = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    if unknown := [f"{name}={model[name]}" for name in others if model.get(name)]:
        raise SourceError(f"export=gguf: llama.cpp does not know {unknown[0]} of the model's tokenizer; {INSTEAD}")


def _has_prefix(parsed: dict[str, Any]) -> bool:
    """Whether text gets a space in front. Raises SourceError for steps that llama.cpp has not."""
    prefix = escaped = False
    steps = [*_steps(parsed.get("normalizer"), "normalizers"), *_steps(parsed.get("pre_tokenizer"), "pretokenizers")]
    for step in steps:
        if step == {"type": "Prepend", "prepend": SPACE}:
            prefix = True
        elif step == {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}:
            escaped = True
        elif step.get("type") == "Metaspace" and step.get("replacement") == SPACE:
            prefix, escaped = prefix or step.get("prepend_scheme") != "never", True
        else:
            raise SourceError(
                f"export=gguf: llama.cpp does not know the step {step.get('type')} of the model's tokenizer; {INSTEAD}"
            )
    if not escaped:
        raise SourceError(f"export=gguf: the model's tokenizer does not write spaces as {SPACE}; {INSTEAD}")
    return prefix


# --- writing ----------------------------------------------------------------------------------------------------------


def write_vocabulary(writer: Any, folder: Path, vocabulary: Vocabulary, size: int) -> None:
    """Write the tokenizer's keys of a GGUF file. size: rows of the embedding; a row without a token gets one that no
    text gives."""
    from gguf import Keys, SpecialVocab

    tokens, scores, types = _listed(vocabulary, size)
    special = SpecialVocab(folder, load_merges=vocabulary.kind == "gpt2", n_vocab=size)
    writer.add_tokenizer_model(vocabulary.kind)
    if vocabulary.kind == "gpt2":
        if (name := kept_pre_tokenizer(folder) or pre_tokenizer_name(vocabulary.parsed)) is not None:
            writer.add_tokenizer_pre(name)
    else:
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(scores)
        writer.add_add_space_prefix(vocabulary.prefix)
        writer.add_string(Keys.Tokenizer.HF_JSON, vocabulary.tokenizer.backend_tokenizer.to_str())
        _add_special(special, vocabulary.tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special.add_to_gguf(writer, quiet=True)


def _listed(vocabulary: Vocabulary, size: int) -> tuple[list[str], list[float], list[int]]:
    """(tokens, scores, types) by number."""
    from gguf import TokenType

    tokens, scores = [f"[PAD{number}]" for number in range(size)], [UNUSED_SCORE] * size
    types = [int(TokenType.UNUSED)] * size
    known = list(_pieces(vocabulary))
    of = {token: score for _, token, score, _ in known}
    for added in vocabulary.parsed.get("added_tokens", []):
        token = added["content"]
        known.append((added["id"], token, of.get(token, 0.0), _added_type(vocabulary, added)))
    for number, token, score, kind in known:
        if number < size:  # the embedding has no row for others
            tokens[number], scores[number], types[number] = token, score, int(kind)
    return tokens, scores, types


def _pieces(vocabulary: Vocabulary) -> Iterator[tuple[int, str, float, Any]]:
    """(number, token, score, type) of the model of the tokenizer, without added tokens."""
    from gguf import TokenType

    if vocabulary.own is not None:
        for number, (text, score, kind) in enumerate(vocabulary.own.all_tokens()):
            yield number, text.decode("utf-8"), score, kind
        return
    ranks: dict[str, int] = {}  # of the first merge that makes a token
    for place, (left, right) in enumerate(vocabulary.merges if vocabulary.kind == "llama" else ()):
        ranks.setdefault(left + right, place)
    for token, number in vocabulary.parsed["model"]["vocab"].items():
        byte = vocabulary.kind == "llama" and BYTE.fullmatch(token)
        yield number, token, -float(ranks.get(token, 0)), TokenType.BYTE if byte else TokenType.NORMAL


def _added_type(vocabulary: Vocabulary, added: dict[str, Any]) -> Any:
    from gguf import TokenType

    if vocabulary.kind == "llama":
        if added["id"] == vocabulary.tokenizer.unk_token_id:
            return TokenType.UNKNOWN
        if BYTE.fullmatch(added["content"]):
            return TokenType.BYTE
    return TokenType.CONTROL if added.get("special") else TokenType.USER_DEFINED


def _add_special(special: Any, tokenizer: Any) -> None:
    """As transformers has them, whose classes add to what the folder's files say."""
    around = tokenizer("")["input_ids"]
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None and number < special.n_vocab:
            special.special_token_ids[name] = number
        if name in ("bos", "eos"):
            special.add_special_token.setdefault(name, number is not None and number in around)


def kept_pre_tokenizer(folder: Path) -> str | None:
    """llama.cpp's name of the pre-tokenizer, where the model came from a GGUF file that has it."""
    try:
        name = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get(PRE_TOKENIZER)
    except (OSError, ValueError, AttributeError):
        return None
    return None if name is None else str(name)


def pre_tokenizer_name(parsed: dict[str, Any]) -> str | None:
    """llama.cpp's name of the pre-tokenizer of a tokenizer.json; None where llama.cpp has no name for it."""
    steps = _steps(parsed.get("pre_tokenizer"), "pretokenizers")
    kinds = [step.get("type") for step in steps]
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    patterns = [str(step.get("pattern", {}).get("Regex", "")) for step in steps if step.get("type") == "Split"]
    if len(patterns) != 1:
        return None
    return SPLITS.get(patterns[0])


# --- what llama.cpp does otherwise ------------------------------------------------------------------------------------


def differences(vocabulary: Vocabulary) -> list[str]:
    """Sentences about texts of which llama.cpp makes other tokens than transformers; none of the kind gpt2."""
    if vocabulary.kind != "llama":
        return []
    found = []
    if vocabulary.own is not None:
        made = vocabulary.tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]
        if made != vocabulary.own.sentencepiece_tokenizer.encode(SAMPLE):
            found.append(
                "llama.cpp makes the tokens that tokenizer.model says, and transformers others; put the authors' "
                "tokenizer.json beside it"
            )
    elif (pair := next(_unlike(vocabulary), None)) is not None:
        found.append(
            f"llama.cpp joins every two tokens that make another, such as {pair[0]!r} and {pair[1]!r}; the merges of "
            "the model's tokenizer do not, so that words come apart otherwise"
        )
    spaces = _steps(vocabulary.parsed.get("pre_tokenizer"), "pretokenizers")
    if any(step.get("prepend_scheme") in ("first", "always") for step in spaces):
        found.append(
            "llama.cpp puts a space in front of text that begins with one, and behind every special token; the model's "
            "tokenizer, as transformers loads it, does not"
        )
    if any(added[flag] for added in vocabulary.parsed["added_tokens"] for flag in ("lstrip", "rstrip", "single_word")):
        found.append("llama.cpp keeps the spaces around special tokens, which the model's tokenizer takes away")
    return found


def _unlike(vocabulary: Vocabulary) -> Iterator[tuple[str, str]]:
    """Pairs that llama.cpp joins and no merge does. The order of merges is not compared: scores of SentencePiece may be
    equal, and a tokenizer.json then mixes the merges of several tokens."""
    tokens, merges = vocabulary.parsed["model"]["vocab"], set(vocabulary.merges)
    whole = {added["content"] for added in vocabulary.parsed["added_tokens"]}
    apart = any(step.get("split") for step in _steps(vocabulary.parsed.get("pre_tokenizer"), "pretokenizers"))
    for token in tokens:
        for place in range(1, 0 if token in whole else len(token)):
            pair = (token[:place], token[place:])
            if pair[0] in tokens and pair[1] in tokens and (pair not in merges or (apart and SPACE in pair[1])):
                yield pair
