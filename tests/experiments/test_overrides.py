"""Mistakes on the command line: each is answered in one line, with the override to type."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from experiments import run as entry
from experiments import sweep
from experiments.config import CONF_DIR, REPO_ROOT, Config, check_sweep, compose
from experiments.model.evaluate_settings import EvaluationConfig
from experiments.model.settings import QuantizeConfig
from experiments.overrides import (
    SEVERAL_AT_ONCE,
    _choices,
    _keys,
    _settings,
    misplaced,
    mistake,
    unreadable,
)
from experiments.sweep import SweepPlan

MEANT = {
    "layer=3": "layer.index=3",
    "layer=0,3": "layer.index=0,3",
    "layer=mlp.up_proj": "layer.module=mlp.up_proj",
    "blocksize=32": "block_size=32",
    "+blocksize=32": "block_size=32",
    "block-size=16,32": "block_size=16,32",
    "--block-size=32": "block_size=32",
    "--force": "force=",
    "index=3": "layer.index=3",
    "seq_len=128": "data.seq_len=128",
    "layer.idx=2": "layer.index=2",
    "data.sample=8": "data.samples=8",
    "formt=nvfp4": "format=nvfp4",
    "format=nvfp5": "mxint4, nvfp4",
    "timing=off": "default, none",
    "model=Qwen/Qwen3-8B": "model.repo=Qwen/Qwen3-8B",
    f"model={CONF_DIR}": f"model.path={CONF_DIR}",
    f"data={CONF_DIR}": f"data.path={CONF_DIR}",
    "hessian": "method=hessian",
    "model.trust=1": "num_layers",
    "colour=red": "--help",
}


@pytest.mark.parametrize("argument", MEANT)
def test_a_mistake_is_one_line_with_what_was_meant(argument: str) -> None:
    said = mistake(["-m", argument, "seed=1"])
    assert said is not None and MEANT[argument] in said and "\n" not in said
    assert said.startswith(argument.lstrip("+").partition("=")[0])


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "format=nvfp4,mxfp4", "method=glob(*)", "block_size=16,32", "hydra.job_logging=none"],
        ["experiment=main", "layer.index=${all_layers:}", "model.path=/a=b", "~timing", "experiment=null"],
        ["--config-dir", "elsewhere", "model=mine"],
        ["--help"],
        ["method=choice(naive,sse)", "seed=range(3)", "hydra/launcher=joblib"],
    ],
)
def test_what_hydra_understands_is_left_to_it(arguments: list[str]) -> None:
    assert mistake(arguments) is None


SCHEMAS = (Config, QuantizeConfig, EvaluationConfig)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_setting_and_choice_is_known(schema: type) -> None:
    for key in _keys(schema):
        assert "no such setting" not in str(mistake([f"{key}=1", f"++{key}=1"], schema))
        assert mistake([f"+{key}=1"], schema) == f"+{key}=1: {key} is there without a +; type {key}=1"
    for group in set(_settings(schema)) - {""}:
        assert mistake([f"{group}={','.join(_choices(group))}"], schema) is None


@pytest.mark.parametrize("schema", [Config, QuantizeConfig])
@pytest.mark.parametrize(
    "argument",
    [
        "model.dtype=float32",
        "model.path=/a/b",
        "method.sweeps=2",
        "data.heldout=0",
        "data.samples=8,16",
        "block_size=32",
    ],
)
def test_a_right_value_in_a_group_is_no_mistake(argument: str, schema: type) -> None:
    """The groups of a schema have no value before Hydra composes them."""
    assert mistake([argument], schema) is None


@pytest.mark.parametrize("argument", ["method.sweeps=x", "data.samples=x", "data.heldout=x"])
def test_a_wrong_value_in_a_group_is_told(argument: str) -> None:
    assert f"{argument}: Value 'x' of type 'str' could not be converted" in str(mistake([argument]))


@pytest.mark.parametrize(
    ("argument", "remedy"),
    [
        ("method.sweeps=x", "use a whole number"),
        ("seed=1,x", "use a whole number"),
        ("export=modelopt,awq", "expected one of [compressed_tensors, modelopt, gpt_oss, gguf]"),
        ("data.heldout=x", "use a number"),
        ("force=maybe", "use true or false"),
        ("model.include=*.mlp.*", "use a list, such as 'model.include=[\"*.mlp.*\"]'"),
        ("fused=[q_proj]", "use a list of lists, such as 'fused=[[q_proj,k_proj,v_proj],[gate_proj,up_proj]]'"),
    ],
)
def test_a_value_of_another_type_is_told_with_the_right_one(argument: str, remedy: str) -> None:
    said = str(mistake([argument], QuantizeConfig))
    assert said.startswith(f"{argument}: ") and said.endswith(remedy) and "\n" not in said


def test_an_empty_choice_is_told() -> None:
    assert (
        mistake(["calibrate="], QuantizeConfig)
        == "calibrate=: it is empty; use parallel, sequential, or leave calibrate out"
    )
    assert mistake(["recipe=null"], QuantizeConfig, "quantize_model.py") is None


def test_experiments_are_those_of_run() -> None:
    assert mistake(["experiment=main"]) is None
    for schema, script in ((QuantizeConfig, "quantize_model.py"), (EvaluationConfig, "evaluate.py")):
        assert "experiment=main: no such setting" in str(mistake(["experiment=main"], schema, script))


def test_recipes_are_those_of_quantize_model() -> None:
    assert mistake(["recipe=best"], QuantizeConfig, "quantize_model.py") is None
    said = mistake(["recipe=bets"], QuantizeConfig, "quantize_model.py")
    assert said == "recipe=bets: no such choice of recipe; did you mean recipe=best? Choices: best, fast"
    for schema, script in ((Config, "run.py"), (EvaluationConfig, "evaluate.py")):
        assert "recipe=best: no such setting" in str(mistake(["recipe=best"], schema, script))


@pytest.mark.parametrize("argument", ["method=naive,sse", "data.samples=8,16", "seed=range(3)", "method=glob(*)"])
def test_several_values_need_m(argument: str) -> None:
    """Hydra would answer in six lines."""
    assert (
        misplaced([argument], "x.py")
        == f"{argument}: several values; type python experiments/x.py -m ... to run each of them"
    )
    for flag in ("-m", "--multirun", "hydra.mode=MULTIRUN"):
        assert misplaced([flag, argument], "x.py") is None
        assert misplaced([argument, flag], "x.py") is None


def test_settings_stand_on_one_side_of_a_flag() -> None:
    """Hydra's parser would take those behind it for unknown arguments."""
    for flag, rest in (("-m", []), ("--cfg", ["job"])):
        said = f"{flag}: settings stand on both sides of it; type python experiments/x.py {flag} ..."
        assert misplaced(["seed=1", flag, *rest, "method=naive,sse"], "x.py") == said
    assert misplaced(["seed=1", "method=sse", "--cfg", "job"], "x.py") is None
    assert misplaced(["--help", "-m", "method=naive,sse"], "x.py") is None


@pytest.mark.parametrize(
    ("argument", "remedy"),
    [
        ("nonsense", "settings are typed NAME=VALUE; python experiments/x.py --help lists them"),
        ("=3", "settings are typed NAME=VALUE; python experiments/x.py --help lists them"),
        ("data.path=a(b", "Hydra cannot read this value; type 'data.path=\"a(b\"'"),
        ("model.include=[a=b,c", 'Hydra cannot read this value; type \'model.include=["a=b","c"]\''),
    ],
)
def test_what_hydra_cannot_read_is_one_line(argument: str, remedy: str) -> None:
    for before in ([], ["-m"], ["seed=1"]):
        assert unreadable([*before, argument], "x.py") == f"{argument}: {remedy}"
    if "Hydra cannot read" in remedy:
        assert unreadable([remedy.rpartition("type ")[2].strip("'")], "x.py") is None


@pytest.mark.parametrize("argument", ["model.path=", "data.path=''", "output_dir=", "init= ", "reference=", "paired="])
def test_an_empty_path_is_not_the_current_folder(argument: str) -> None:
    """As a variable of the shell that is not set leaves it."""
    said = f"{argument}: it is empty; name a file or folder, or leave {argument.partition('=')[0]} out"
    assert unreadable([argument], "x.py") == said
    assert unreadable(["evaluate.label=", "model.path=null"], "x.py") is None


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("name", ["config", "quantize_model", "evaluate"])
def test_a_folder_that_cannot_be_made_is_told_before_hydra_makes_it(name: str, many: bool, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("", encoding="utf-8")

    def start(folder: Path) -> None:
        """What Hydra calls before it makes a folder."""
        overrides = [f"output_dir={folder}", f"hydra.mode={'MULTIRUN' if many else 'RUN'}"]
        with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):
            config = hydra_compose(name, overrides, return_hydra_config=True)
            plan = instantiate(config.hydra.callbacks.plan)
            (plan.on_multirun_start if many else plan.on_run_start)(config)

    for folder, why in ((file, "File exists"), (file / "runs", "Not a directory")):
        with pytest.raises(SystemExit) as ended:
            start(folder)
        said = str(ended.value)
        assert said.startswith(f"error: output_dir={folder} cannot be written: {why} ({folder}")
        assert said.endswith("; free some space or choose another.") and "\n" not in said
    start(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["new"]


def test_flags_that_only_show_something_make_no_folder(tmp_path: Path) -> None:
    for flags in (["--help"], ["--cfg", "job"]):
        command = [sys.executable, "experiments/run.py", *flags, f"output_dir={tmp_path / 'other'}"]
        assert subprocess.run(command, cwd=REPO_ROOT, capture_output=True).returncode == 0
    assert not list(tmp_path.iterdir())


def test_every_folder_of_choices_belongs_to_a_script() -> None:
    groups = {path.name for path in CONF_DIR.iterdir() if path.is_dir()} - {"hydra", *sum(SEVERAL_AT_ONCE.values(), ())}
    assert groups == set().union(*(_settings(schema) for schema in SCHEMAS)) - {""}


@pytest.mark.parametrize(
    ("name", "schema", "script"),
    [
        ("quantkit", Config, "run.py"),
        ("quantkit_model", QuantizeConfig, "quantize_model.py"),
        ("quantkit_evaluate", EvaluationConfig, "evaluate.py"),
    ],
)
def test_help_lists_what_the_script_takes(name: str, schema: type, script: str) -> None:
    """Hydra's own list has the groups of all scripts. Whole models are neither bundles of a layer nor synthetic."""
    help_text = OmegaConf.load(CONF_DIR / "hydra" / "help" / f"{name}.yaml")
    text = OmegaConf.create({"hydra": {"help": help_text}}).hydra.help.template
    listed = text.partition("Choose with group=option.")[2].partition("== Configuration ==")[0]
    own = sorted(group for group in (*_settings(schema), *SEVERAL_AT_ONCE.get(script, ())) if group)
    refused = () if schema is Config else ("bundle", "synthetic")
    assert [line for line in listed.splitlines() if line] == [
        f"{group}: {', '.join(choice for choice in _choices(group) if choice not in refused)}" for group in own
    ]


def test_settings_of_one_script_are_unknown_to_the_other() -> None:
    assert mistake(["calibrate=parallel"], QuantizeConfig) is None
    assert "no such setting" in str(mistake(["calibrate.alpha=1"]))
    assert "quantize_model.py --help" in str(mistake(["something.else=1"], QuantizeConfig, "quantize_model.py"))


def test_the_command_stops_before_anything_is_composed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["experiments/run.py", "-m", "layer=3"])
    monkeypatch.setattr(entry, "main", lambda: pytest.fail("composed"))
    assert entry.cli() == 1
    error = capsys.readouterr().err
    assert error.startswith("error: layer=3: ") and error.count("\n") == 1


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "two words", "x" * 129, "é"])
def test_a_sweep_has_a_plain_name(name: str) -> None:
    with pytest.raises(ValueError, match=r"sweep=.*at most 128 letters") as caught:
        check_sweep(name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
    with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"), pytest.raises(SystemExit, match="sweep="):
        SweepPlan().on_multirun_start(planned([], name))
    with pytest.raises(ValueError, match="sweep="):
        compose([f"sweep='{name}'"])


def test_a_plain_name_of_128_characters_is_a_sweeps() -> None:
    assert compose([f"sweep={'x' * 128}"]).sweep == "x" * 128
    check_sweep("2026-01-31_main.2")


def planned(overrides: list[str], name: str = "main") -> DictConfig:
    sweeper = {"_target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper", "params": {"seed": "1,2"}}
    hydra = {"sweeper": sweeper, "overrides": {"task": overrides}}
    return OmegaConf.create({"output_dir": ".", "sweep": name, "hydra": hydra})


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("method=glob(*)", ["descent", "gptq", "hessian", "joint", "naive", "sse"]),
        ("method=glob([*s*],exclude=[h*,d*])", ["sse"]),
        ("method=choice(naive,sse)", ["naive", "sse"]),
        ("layer.index=range(0,3)", ["0", "1", "2"]),
    ],
)
def test_a_sweep_over_a_pattern_keeps_its_plan(
    override: str, values: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "_plan", [])
    with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):
        SweepPlan().on_multirun_start(planned([override]))
    key = override.partition("=")[0]
    assert sweep._plan == [[f"seed={seed}", f"{key}={value}"] for seed in (1, 2) for value in values]


def dry_run(*arguments: str) -> str:
    """What `make run` would do. It may begin with the set-up, which is not done."""
    command = ["make", "--dry-run", "run", *arguments]
    shown = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, check=True).stdout
    return shown.replace("\\\n", " ")


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("arguments", "runs"),
    [
        ([], "format=nvfp4,mxfp4 method=naive,sse,hessian"),
        (["block_size=32"], "format=nvfp4,mxfp4 method=naive,sse,hessian 'block_size=32'"),
        (["layer.index=0,3", "method=sse"], "format=nvfp4,mxfp4 'layer.index=0,3' 'method=sse'"),
        (["ARGS=format=mxfp4 seed=1", "seed=2"], "method=naive,sse,hessian 'seed=2' format=mxfp4 seed=1"),
        (["layer=3"], "format=nvfp4,mxfp4 method=naive,sse,hessian 'layer=3'"),
    ],
)
def test_settings_after_make_run_reach_the_sweep(arguments: list[str], runs: str) -> None:
    begun, _, rest = dry_run(*arguments).partition("experiments/run.py -m ")
    assert begun and " ".join(rest.partition("||")[0].split()) == runs


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_tables_are_those_of_the_folder_that_was_given() -> None:
    shown = dry_run("output_dir=elsewhere")
    assert "report.py --runs elsewhere ||" in shown and "'output_dir=elsewhere'" in shown


def test_a_paper_takes_settings_too() -> None:
    assert "-m experiment=$$name $(SETTINGS) $(ARGS)" in Path(REPO_ROOT / "Makefile").read_text()


def test_a_recipe_stands_for_the_settings_of_the_page() -> None:
    """And gives way to what is typed beside it."""
    page = (REPO_ROOT / "docs" / "whole_models.md").read_text()
    best = page.partition("stands for\n\n```\n")[2].partition("\n```")[0].split()
    fast = page.partition("`recipe=fast`: `")[2].partition("`")[0].split()
    with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):

        def composed(*overrides: str) -> dict[str, Any]:
            config = OmegaConf.to_container(hydra_compose("quantize_model", overrides=list(overrides)))
            assert isinstance(config, dict)
            return {str(key): value for key, value in config.items() if key != "sweep"}

        assert len(best) == 7 and len(fast) == 3
        assert composed("recipe=best") == composed(*best)
        assert composed("recipe=fast") == composed(*fast)
        beside = "hessian=loss", "method=gptq", "method.sweeps=null", "data.samples=64"
        assert composed("recipe=best", *beside) == composed(*best, *beside)
