"""A resolved run: its sources, device, backend and names. Made once per run and passed down.

No code below the scripts resolves `auto` or hashes a configuration again. Imports no torch unless the device may be a
GPU, so that a sweep of finished runs is quick.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments import provenance
from experiments.config import Config, LayerConfig, config_hash, on_device, result_config, run_id
from experiments.files import SourceError, sha256_json
from experiments.sources.identity import Identity, folder_in_cache, source_identity
from experiments.sources.models import ModelIdentity, model_identity
from experiments.sources.twins import choose_sources, refuse_idle_paths, refuse_loss_without_model


@dataclass(frozen=True)
class Resolved:
    """All that a run resolves to.

    config: with the sources that are really used.
    substituted: an offline twin replaces the configured model or text. The run's identity does not depend on this: it
        equals that of a run that names the twin.
    device, backend: those that `auto` resolved to.
    model, identity: names and key of the model; the values that the layer's inputs depend on. None if `error` is set.
    settings: the values that determine the result, as plain JSON values; run_id names the run by them.
    config_hash: hash of the settings and the identity.
    error: why the sources are not available, or None.
    """

    config: Config
    substituted: bool
    device: str
    backend: str
    model: ModelIdentity | None
    identity: Identity | None
    settings: dict[str, Any]
    run_id: str
    config_hash: str
    error: Exception | None = None

    @property
    def run_dir(self) -> Path:
        return Path(self.config.output_dir) / self.run_id

    @property
    def sources(self) -> Identity:
        """The identity. Raises `error` if the sources are not available."""
        if self.error is not None:
            raise self.error
        assert self.identity is not None
        return self.identity

    @property
    def sources_hash(self) -> str:
        return sha256_json(self.sources)

    def check_unchanged(self) -> None:
        """Raises SourceError if the sources have changed since `identity` was computed."""
        if source_identity(self.config, model_identity(self.config.model, self.config.cache.folder)) != self.sources:
            raise SourceError(f"{self.config.model.label} or its text changed while it was read. Run again.")

    def layer_folder(self, layer: LayerConfig | None = None) -> Path:
        """The cache folder of the configured layer, or of another layer of the same model and text."""
        return folder_in_cache(self.config, self.sources, layer or self.config.layer)


def resolve(config: Config) -> Resolved:
    """Resolve a run. If the sources are not available, the result has `error`, because such a run leaves a record.

    Raises ValueError for a device or backend that does not exist, for a path that nothing reads, and for loss weights
    without a model.
    """
    device = provenance.resolve_device(config.device)
    backend = provenance.resolve_backend_name(
        config.backend, device, config.method.name, config.block_size, config.format.name
    )
    config = replace(config, hessian=on_device(config.hessian, device))
    refuse_idle_paths(config)
    refuse_loss_without_model(config)
    substituted, model, identity, error = False, None, None, None
    try:
        choice = choose_sources(config)
        config, substituted = choice.config, choice.substituted
        model = model_identity(config.model, config.cache.folder)
        identity = source_identity(config, model)
    except Exception as failure:
        error = failure
    settings = result_config(config, device, backend)
    return Resolved(
        config=config,
        substituted=substituted,
        device=device,
        backend=backend,
        model=model,
        identity=identity,
        settings=settings,
        run_id=run_id(config, device, backend),
        config_hash=config_hash([settings, identity]),
        error=error,
    )
