"""A run, settled: its sources, its device, its backend and its names. Made once per run and handed down.

Nothing below the scripts asks again what `auto` means, or hashes a configuration. Imports no torch, unless the device
may be a GPU, so that a sweep with nothing left to do stays quick.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import provenance
from experiments.config import Config, LayerConfig, config_hash, result_config, run_id
from experiments.files import SourceError, sha256_json
from experiments.sources.identity import Identity, folder_in_cache, source_identity
from experiments.sources.models import ModelIdentity, model_identity
from experiments.sources.twins import choose_sources, refuse_idle_paths, refuse_loss_without_model


@dataclass(frozen=True)
class Resolved:
    """config: with the sources that are really used. device, backend: what `auto` came to.

    substituted: an offline twin takes the place of the model or text asked for. It is no part of the run's identity:
    the run is the same as one that named the twin.
    model: its names and what pins its bytes. identity: what the layer's inputs depend on. None where `error` is set.
    settings: what determines the result, as plain JSON values; run_id names the run by them.
    config_hash: of the settings and the identity.
    error: why the sources cannot be had.
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
        """The identity. Raises the error where the sources cannot be had."""
        if self.error is not None:
            raise self.error
        assert self.identity is not None
        return self.identity

    @property
    def sources_hash(self) -> str:
        return sha256_json(self.sources)

    def check_unchanged(self) -> None:
        """Raises SourceError where the sources are no longer those that the identity was taken of."""
        if source_identity(self.config, model_identity(self.config.model, self.config.cache.folder)) != self.sources:
            raise SourceError(f"{self.config.model.label} or its text changed while it was read. Run again.")

    def layer_folder(self, layer: LayerConfig | None = None) -> Path:
        """Where the cache keeps the configured layer, or another one of the same model and text."""
        return folder_in_cache(self.config, self.sources, layer or self.config.layer)


def resolve(config: Config) -> Resolved:
    """Settle a run. Sources that cannot be had are told by `error`, since such a run leaves a record.

    Raises ValueError for a device or backend that is not there, and for a path that nothing reads, or loss weights
    without a model.
    """
    device = provenance.resolve_device(config.device)
    backend = provenance.resolve_backend_name(
        config.backend, device, config.method.name, config.block_size, config.format.name
    )
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
