"""The configuration: every option composes, every mistake is caught, and identities depend on the right values."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import ConfigCompositionException, MissingConfigException

from experiments.config import (
    CONF_DIR,
    REPO_ROOT,
    CacheConfig,
    Offline,
    ScaleRule,
    compose,
    compose_as,
    result_config,
    run_id,
    to_config,
)
from experiments.model.evaluate_settings import EvaluationConfig
from experiments.model.settings import QuantizeConfig, method_fields, result_settings

SMALL = ("model=synthetic", "data=synthetic")
OPTIONS = sorted(f"{path.parent.name}={path.stem}" for path in CONF_DIR.glob("*/*.yaml"))


def compose_model(overrides: Sequence[str] = ()) -> QuantizeConfig:
    return compose_as("quantize_model", QuantizeConfig, overrides)


def compose_evaluate(overrides: Sequence[str] = ()) -> EvaluationConfig:
    return compose_as("evaluate", EvaluationConfig, overrides)


# Groups that run.py lacks.
SCRIPTS: dict[str, Any] = {"calibrate": compose_model, "recipe": compose_model, "evaluate": compose_evaluate}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_every_group_composes(option: str) -> None:
    group, _, name = option.partition("=")
    config: Any = SCRIPTS.get(group, compose)([option])
    chosen = getattr(config, group, None)
    if hasattr(chosen, "name"):
        assert chosen.name == name


def test_defaults_are_the_main_job() -> None:
    config = compose()
    assert (config.model.name, config.data.name, config.layer.index) == ("qwen3_4b", "wikitext2", 0)
    assert config.layer.module == "mlp.down_proj"
    assert (config.data.seq_len, config.data.samples) == (512, 2048)
    assert config.offline == "auto" and config.tracking.name == "wandb"


def test_defaults_of_a_whole_model() -> None:
    config = compose_model()
    assert (config.model.name, config.data.name, config.format.name) == ("qwen3_4b", "wikitext2", "nvfp4")
    assert (config.calibrate.mode, config.hessian.weighting) == ("sequential", "loss")
    assert (config.calibrate.alpha, config.calibrate.residual_alpha) == (0.5, 0.5)
    assert (config.calibrate.damping, config.calibrate.weight_exponent) == (None, 1.0)
    parallel = compose_model(["calibrate=parallel"]).calibrate
    assert (parallel.mode, parallel.alpha, parallel.residual_alpha) == ("parallel", 0, 0)


def test_the_paper_never_takes_a_twin() -> None:
    assert compose(["experiment=paper"]).offline == "never"


def test_settings_of_outputs_leave_other_identities_alone() -> None:
    """These are the settings of which the hash was made before there were outputs."""
    config = compose_model(["method=descent", "hessian=loss"])
    settings = result_settings(config, "cpu", "reference")
    assert settings["hessian"] == {"weighting": "loss", "groups": 1, "samples": 1}
    assert settings["method"] == {
        "name": "descent", "scale": "joint", "order": "descending", "damping": 0.01, "sweeps": 4
    }  # fmt: skip
    assert not {"hessian_outputs", "rows", "output_damping"} & method_fields(config).keys()
    both = result_settings(compose_model(["hessian=kronecker", "method.rows=64"]), "cpu", "reference")
    assert both["hessian"]["outputs"] is True and both["method"]["rows"] == 64


@pytest.mark.parametrize("overrides", [["hessian=kronecker"], ["hessian=kronecker", "method.rows=4"]])
def test_one_layer_has_no_outputs(overrides: list[str]) -> None:
    with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):
        composed = hydra_compose("config", overrides=["method=gptq", *overrides])
    with pytest.raises(ValueError, match=r"run\.py has no gradients .* Use experiments/quantize_model\.py, or hessian"):
        to_config(composed)


def test_an_exponent_needs_loss_weights() -> None:
    with pytest.raises(ValueError, match=r"calibrate\.weight_exponent=0\.7: .*Use hessian=loss, or .*exponent=1\."):
        compose_model(["hessian=output", "calibrate.weight_exponent=0.7"])
    assert compose_model(["hessian=loss", "calibrate.weight_exponent=0.7"]).calibrate.weight_exponent == 0.7


@pytest.mark.parametrize("value", ["damping=0", "damping=1.5", "weight_exponent=-0.1", "weight_exponent=2"])
def test_options_of_targets_and_weights_have_a_range(value: str) -> None:
    with pytest.raises(Exception, match=rf"calibrate\.{value}"):
        compose_model([f"calibrate.{value}"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("formt=nvfp4", "formt"),
        ("format.nam=x", "nam"),
        ("block_size=sixteen", "block_size"),
        ("block_size=16.5", "block_size"),
        ("data.samples=many", "data.samples"),
        ("data.heldout=half", "data.heldout"),
        ("force=perhaps", "force"),
        ("timing.rep_ms=long", "timing.rep_ms"),
        ("offline=sometimes", "auto, never, always"),
        ("model.source=disk", "hub, pypi_gguf, synthetic, bundle"),
        ("format.scale_rule=up", "nearest, floor, ceil, even, rceil"),
    ],
)
def test_a_typo_or_a_wrong_type_fails_at_composition(override: str, message: str) -> None:
    with pytest.raises(ConfigCompositionException) as caught:
        compose([*SMALL, override])
    assert message in f"{caught.value} {caught.value.__cause__}"


def test_an_unknown_choice_lists_the_known_ones() -> None:
    with pytest.raises((ConfigCompositionException, MissingConfigException), match=r"(?s)nvfp5.*mxfp4.*nvfp4"):
        compose(["format=nvfp5"])


@pytest.mark.parametrize(
    "override",
    [
        "block_size=0",
        "seed=-1",
        "data.heldout=1",
        "data.heldout=-0.1",
        "data.samples=0",
        "data.seq_len=0",
        "layer.index=-1",
        "layer.module=''",
        "model.std=0",
        "model.dtype=int8",
        "cache.shard_mib=0",
        "timing.min_run_s=0",
        "timing.warmup_ms=inf",
        "format.global_scale=always",
        "format.global_scale=-1",
        "format.global_scale=nan",
        "tracking.name=paper",
        "+model.trust=1",
        "+colour=1",
    ],
)
def test_a_value_out_of_range_is_named(override: str) -> None:
    with pytest.raises(ValueError) as caught:
        compose([*SMALL, override])
    key = override.partition("=")[0].lstrip("+")
    assert key in str(caught.value) and "\n" not in str(caught.value)


def test_a_global_scale_may_be_a_word_or_any_number() -> None:
    def scale(value: str) -> object:
        return compose([*SMALL, f"format.global_scale={value}"]).format.global_scale

    words = ("none", "amax", "headroom", "search", "2", "0.5", "null")
    assert [scale(v) for v in words] == [*words[:4], 2.0, 0.5, None]


def test_row_groups_search_no_global_scale() -> None:
    with pytest.raises(ValueError, match=r"format.global_scale=search, hessian.groups=2: .* Use amax"):
        compose([*SMALL, "format.global_scale=search", "hessian=loss", "hessian.groups=2"])


def test_choices_read_and_print_as_their_words() -> None:
    config = compose([*SMALL, "offline=never", "format.scale_rule=even"])
    assert config.offline == "never" and config.offline is Offline.never and f"{config.offline}" == "never"
    assert config.format.scale_rule is ScaleRule.even and config.format.rule == "even"


def test_every_sweep_has_an_id_of_its_own() -> None:
    assert len({compose(SMALL).sweep for _ in range(3)}) == 3


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTKIT_CACHE", "/elsewhere")
    assert str(CacheConfig().folder) == "/elsewhere"
    assert str(CacheConfig(dir="/here").folder) == "/here"
    monkeypatch.delenv("QUANTKIT_CACHE")
    assert CacheConfig().folder.parts[-2:] == (".cache", "quantkit")


# Identity


def identity(*overrides: str, device: str = "cpu", backend: str = "reference") -> str:
    return run_id(compose([*SMALL, *overrides]), device, backend)


def test_identity_is_readable_and_a_good_file_name() -> None:
    name = identity("format=nvfp4", "method=hessian", "layer.index=3")
    assert name.startswith("nvfp4-b16-hessian-reference-synthetic-l3-mlp.down_proj-synthetic-")
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", name)
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", identity("layer.module='a/b:c?" + "x" * 200 + "'"))


@pytest.mark.parametrize(
    "override",
    [
        "force=true",
        "offline=never",
        "output_dir=/elsewhere",
        "tracking=none",
        "cache.dir=/elsewhere",
        "cache.shard_mib=1",
        "sweep=another",
        "backend=reference",  # what auto came to
        "device=cpu",
    ],
)
def test_identity_ignores_what_changes_no_result(override: str) -> None:
    assert identity() == identity(override)


@pytest.mark.parametrize(
    "override",
    [
        "format=mxfp4",
        "format.global_scale=none",
        "format.scale_rule=even",
        "block_size=32",
        "method=sse",
        "model.std=0.1",
        "layer.index=1",
        "layer.module=mlp.up_proj",
        "data.samples=7",
        "data.seq_len=7",
        "data.heldout=0",
        "seed=1",
        "timing=none",
        "timing.rep_ms=1",
    ],
)
def test_identity_changes_with_what_changes_a_result(override: str) -> None:
    assert identity() != identity(override)


def test_identity_depends_on_what_auto_came_to() -> None:
    assert identity() != identity(backend="triton")
    assert identity() != identity(device="cuda")
    assert identity(device="cuda:1") == identity(device="cuda")


def test_identity_is_that_of_the_twin() -> None:
    """After the switch, a run has the twin's identity, whatever was configured."""
    asked, twin = compose(["data=synthetic"]), compose([*SMALL])
    switched = dataclasses.replace(asked, model=twin.model)
    assert run_id(switched, "cpu", "reference") == run_id(twin, "cpu", "reference")


def test_the_entry_imports_nothing_heavy() -> None:
    heavy = ("torch", "triton", "transformers", "datasets", "wandb", "pandas", "quantkit")
    code = f"import sys, experiments.run; found = set({heavy}) & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO_ROOT, timeout=60)


EXPERIMENTS = sorted(path.stem for path in (CONF_DIR / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_says_what_it_feeds_and_composes(name: str) -> None:
    text = (CONF_DIR / "experiment" / f"{name}.yaml").read_text()
    assert text.startswith("# @package _global_\n# Feeds ") and f"-m experiment={name}\n" in text
    assert "smollm2" not in text and "python_docs" not in text
    config = compose([f"experiment={name}"])
    assert config.output_dir == f"results/runs/{name}" and config.model.name in ("qwen3_4b", "synthetic")


def test_settings_that_change_no_result_leave_the_identity_alone() -> None:
    plain = run_id(compose(), "cpu", "reference")
    assert run_id(compose(["record.blocks=true", "data.calibration_tokens=null"]), "cpu", "reference") == plain
    assert run_id(compose(["data.calibration_tokens=128"]), "cpu", "reference") != plain
    with pytest.raises(ValueError, match="calibration_tokens=0"):
        compose(["data.calibration_tokens=0"])


def test_weighting_by_loss_is_part_of_the_identity_and_the_default_is_not() -> None:
    def settings(*overrides: str) -> dict[str, object]:
        return result_config(compose(overrides), "cpu", "reference")

    assert "hessian" not in settings() and settings("hessian=output") == settings()
    assert settings("hessian=loss")["hessian"] == {"weighting": "loss", "groups": 1, "samples": 1}
    assert settings("hessian=loss", "hessian.groups=4") != settings("hessian=loss", "hessian.samples=4")
    kronecker = {"weighting": "loss", "groups": 1, "samples": 2, "outputs": True}
    assert settings("hessian=kronecker")["hessian"] == kronecker
    tf32 = {"weighting": "loss", "groups": 1, "samples": 1, "matmul": "tf32"}
    assert settings("hessian=loss", "hessian.matmul=tf32")["hessian"] == tf32
    for wrong, message in (
        (["hessian=loss", "hessian.groups=0"], r"hessian\.groups=0: must be positive"),
        (["hessian.groups=4"], r"hessian\.groups=4: only loss weights have groups\. Add hessian=loss"),
        (["hessian.samples=2"], r"hessian\.samples=2: only loss weights have samples"),
        (
            ["hessian.outputs=true"],
            r"hessian\.outputs=true: only loss weights come with .*\. Use hessian=kronecker, or",
        ),
        (["hessian.matmul=tf32"], r"hessian\.matmul=tf32: only loss weights take a backward pass\. Add hessian=loss"),
    ):
        with pytest.raises(ValueError, match=message):
            compose(wrong)


def test_the_two_sided_methods_are_those_of_the_library() -> None:
    from experiments.config import TWO_SIDED
    from quantkit.methods import METHODS

    assert set(TWO_SIDED) == {method.name for method in METHODS.values() if method.takes_output_gram}
