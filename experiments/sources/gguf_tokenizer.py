"""transformers' tokenizer of a GGUF file.

transformers builds one from the file's tokens. For the kind llama (SentencePiece) it puts spaces where its class for
Llama does, and it accepts scores that are all equal. This module gives back the tokenizer.json that an export of
quantkit holds. For another file it puts spaces where llama.cpp and SentencePiece put them: in front of every text and
behind every special token, also where the text begins with a space.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.files import SourceError, named

MODEL = "tokenizer.ggml.model"
SPACE = "▁"  # SentencePiece's


def load_tokenizer(path: Path, fields: Mapping[str, Any], header: Mapping[str, Any]) -> Any:
    """fields: of gguf's reader. header: its small values. Raises SourceError for a tokenizer that cannot be made."""
    from gguf import Keys

    with named(f"{path}: its tokenizer cannot be loaded"):
        if header.get(MODEL) != "llama":
            return _of_transformers(path)
        if Keys.Tokenizer.HF_JSON in fields:
            from tokenizers import Tokenizer

            return _wrapped(Tokenizer.from_str(fields[Keys.Tokenizer.HF_JSON].contents()), header)
        _check_scores(path, fields)
        return _wrapped(_with_spaces(_of_transformers(path).backend_tokenizer, header), header)


def _of_transformers(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def _check_scores(path: Path, fields: Mapping[str, Any]) -> None:
    """Raises SourceError where no two tokens of text differ in their score."""
    tokens = fields["tokenizer.ggml.tokens"].contents()
    scores = fields["tokenizer.ggml.scores"].contents() if "tokenizer.ggml.scores" in fields else []
    types = (
        fields["tokenizer.ggml.token_type"].contents() if "tokenizer.ggml.token_type" in fields else [1] * len(tokens)
    )
    found = {score for token, score, kind in zip(tokens, scores, types, strict=False) if kind == 1 and len(token) > 1}
    if len(found) < 2:
        raise SourceError(
            f"{path.name}: all scores of its tokens are equal, so they do not say which tokens are joined first. "
            "Give the model that it was made from."
        )


def _with_spaces(backend: Any, header: Mapping[str, Any]) -> Any:
    from tokenizers import normalizers

    in_front = [normalizers.Prepend(SPACE)] if header.get("tokenizer.ggml.add_space_prefix", True) else []
    backend.normalizer = normalizers.Sequence([*in_front, normalizers.Replace(" ", SPACE)])
    backend.pre_tokenizer = None
    return backend


def _wrapped(backend: Any, header: Mapping[str, Any]) -> Any:
    """In transformers' class that keeps tokenizer.json as it is."""
    from transformers import PreTrainedTokenizerFast

    special = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = header.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None and (token := backend.id_to_token(int(number))) is not None:
            special[f"{name}_token"] = token
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    made.chat_template = header.get("tokenizer.chat_template")
    return made
