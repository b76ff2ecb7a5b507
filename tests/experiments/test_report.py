from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import report
from experiments.record import RunRecord, read_records

ROOT = Path(__file__).resolve().parents[2]
README = """# Title

<!-- BEGIN GENERATED: main -->
old
<!-- END GENERATED: main -->

Text between.

<!-- BEGIN GENERATED: published -->
<!-- END GENERATED: published -->
The end.
"""


def make(method: str, **changes: object) -> RunRecord:
    values: dict[str, object] = {
        "run_id": f"nvfp4-b16-{method}-reference",
        "sweep": "s",
        "status": "ok",
        "reason": None,
        "format": "nvfp4",
        "block_size": 16,
        "method": method,
        "backend": "reference",
        "requested_backend": "auto",
        "device": "cpu",
        "device_name": "Some CPU",
        "model": "tiny",
        "data": "text",
        "layer_index": 0,
        "layer_module": "mlp.down_proj",
        "weight_error": 0.1234,
    }
    return RunRecord(**(values | changes))  # type: ignore[arg-type]


def write_runs(folder: Path, *records: RunRecord) -> Path:
    for record in records:
        record.write(folder / record.run_id)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with two runs, collected but not yet reported."""
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    published = tmp_path / "results" / "published"
    published.mkdir(parents=True)
    (published / "q.csv").write_bytes((ROOT / "results" / "published" / "qwen3_4b.csv").read_bytes())
    write_runs(tmp_path / "results" / "runs", make("sse"), make("naive"))
    assert report.main(["--collect", "main"], tmp_path) == 0
    return tmp_path


def test_rebuild_fills_the_blocks_and_nothing_else(root: Path, capsys: pytest.CaptureFixture[str]):
    capsys.readouterr()
    assert report.main([], root) == 0
    assert capsys.readouterr().out.split() == ["wrote", "results/main.csv", "wrote", "README.md"]
    text = (root / "README.md").read_text(encoding="utf-8")
    assert "| 12.34 % |" in " ".join(text.split())
    assert "Published, not measured here" in text
    assert "old" not in text.split()
    assert text.startswith("# Title\n\n<!-- BEGIN GENERATED: main -->\n\n**tiny, layer 0")
    assert "\n<!-- END GENERATED: main -->\n\nText between.\n\n" in text
    assert text.endswith("\n<!-- END GENERATED: published -->\nThe end.\n")
    assert (root / "results" / "main.csv").read_text().count("\n") == 3
    assert report.main([], root) == 0
    assert capsys.readouterr().out.startswith("Nothing to change")


def test_check_shows_the_difference_and_changes_nothing(root: Path, capsys: pytest.CaptureFixture[str]):
    before = (root / "README.md").read_bytes()
    assert report.main(["--check"], root) == 1
    shown = capsys.readouterr()
    assert "-old" in shown.out
    assert "2 files differ from the records" in shown.err
    assert (root / "README.md").read_bytes() == before
    assert not (root / "results" / "main.csv").exists()

    report.main([], root)
    assert report.main(["--check"], root) == 0

    readme = (root / "README.md").read_text(encoding="utf-8").replace("12.34 %", "12.35 %", 1)
    (root / "README.md").write_text(readme, encoding="utf-8")
    capsys.readouterr()
    assert report.main(["--check"], root) == 1
    assert "12.35 %" in capsys.readouterr().out


@pytest.fixture
def pages(root: Path) -> Path:
    """The same repository, with results on a page of their own."""
    docs = root / "docs"
    docs.mkdir()
    (docs / "results.md").write_text(block("main") + block("figure:output_error"), encoding="utf-8")
    (root / "README.md").write_text("# Title\n" + block("summary"), encoding="utf-8")
    runs = write_runs(
        root / "new", *(make(m, output_error=0.1, output_error_heldout=0.11) for m in ("naive", "sse", "hessian"))
    )
    assert report.main(["--collect", "main", "--from", str(runs)], root) == 0
    assert report.main([], root) == 0
    return root


def block(name: str) -> str:
    return f"<!-- BEGIN GENERATED: {name} -->\n<!-- END GENERATED: {name} -->\n"


def test_each_page_has_its_own_blocks(pages: Path):
    readme, results = ((pages / name).read_text(encoding="utf-8") for name in ("README.md", "docs/results.md"))
    assert "![Output error by format and method](../results/figures/output_error.png)" in results
    assert "**tiny, layer 0 mlp.down_proj (None × None), block size 16**" in results
    assert '<img src="results/figures/output_error.png" alt="Output error by format and method" width=' in readme
    rows = [line.split("|")[1:-1] for line in readme.splitlines() if line.startswith("| NVFP4")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["NVFP4", method, "12.34 %", "10.00 %", "11.00 %"] for method in ("Naive", "SSE", "Hessian")
    ]


@pytest.mark.parametrize(("page", "number"), [("README.md", "11.00 %"), ("docs/results.md", "12.34 %")])
def test_check_fails_where_a_block_of_any_page_is_edited(page: str, number: str, pages: Path):
    assert report.main(["--check"], pages) == 0
    path = pages / page
    path.write_text(path.read_text(encoding="utf-8").replace(number, "0.01 %", 1), encoding="utf-8")
    assert report.main(["--check"], pages) == 1
    assert report.main([], pages) == report.main(["--check"], pages) == 0


def test_the_summary_has_one_block_size_and_one_model(pages: Path):
    others = [make("sse", run_id=f"r{n}", block_size=32, output_error=0.1, output_error_heldout=0.1) for n in range(2)]
    others.append(make("sse", run_id="other", model="other", output_error=0.2, output_error_heldout=0.2))
    before = [line for line in (pages / "README.md").read_text(encoding="utf-8").splitlines() if "|" in line]
    runs = write_runs(pages / "others", *others)
    assert report.main(["--collect", "main", "--from", str(runs), "--model", "all"], pages) == 0
    assert report.main([], pages) == 0
    after = (pages / "README.md").read_text(encoding="utf-8")
    assert [line for line in after.splitlines() if "|" in line] == before and "other" not in after
    assert "other, layer 0" in (pages / "docs" / "results.md").read_text(encoding="utf-8")


def test_records_of_a_new_name_say_where_they_went_and_how_a_page_gets_them(
    pages: Path, capsys: pytest.CaptureFixture[str]
):
    runs = write_runs(pages / "mine", make("sse", model="other"))
    readme = (pages / "README.md").read_bytes()
    capsys.readouterr()
    assert report.main(["--collect", "mine", "--from", str(runs)], pages) == 0
    assert (
        "Next: python experiments/report.py; it writes these records to results/mine.csv\n" in capsys.readouterr().out
    )
    assert report.main([], pages) == 0
    out = capsys.readouterr().out
    assert "wrote results/mine.csv" in out and "No page shows the records mine." in out
    assert (pages / "README.md").read_bytes() == readme

    results = pages / "docs" / "results.md"
    results.write_text(results.read_text(encoding="utf-8") + "\n".join(out.splitlines()[-2:]) + "\n", encoding="utf-8")
    assert report.main([], pages) == 0
    assert "No page shows" not in capsys.readouterr().out
    assert "**other, layer 0" in results.read_text(encoding="utf-8")
    assert report.main(["--collect", "mine", "--from", str(runs)], pages) == 0
    assert "results/mine.csv, and their table to docs/results.md" in capsys.readouterr().out


def test_records_of_a_figure_need_no_block(pages: Path, capsys: pytest.CaptureFixture[str]):
    runs = write_runs(pages / "layers", make("naive", output_error=0.1, output_error_heldout=0.1))
    assert report.main(["--collect", "layers", "--from", str(runs)], pages) == 0
    capsys.readouterr()
    assert report.main([], pages) == 0
    assert "No page shows" not in capsys.readouterr().out


def test_every_committed_record_is_shown_by_a_page_or_a_figure():
    assert report.unshown(ROOT, report.read_groups(ROOT)) == []


def test_collect_names_what_it_takes_and_leaves_other_models_out(root: Path, capsys: pytest.CaptureFixture[str]):
    path = root / "results" / "records" / "main.jsonl"
    more = write_runs(root / "more", make("hessian"), make("sse", run_id="x", model="other"))
    capsys.readouterr()
    assert report.main(["--collect", "main", "--from", str(more)], root) == 0
    out = capsys.readouterr().out
    assert "taken: tiny on text: 1 run, NVFP4 × Hessian × block size 16 × reference" in out
    assert "left out: other (1 run); to take them: --model MODEL, or --model all" in out
    assert {record.model for record in read_records(path.parent)} == {"tiny"}

    assert report.main(["--collect", "main", "--from", str(more), "--model", "other"], root) == 0
    assert "left out: tiny (1 run)" in capsys.readouterr().out
    assert {record.model for record in read_records(path.parent)} == {"tiny", "other"}

    assert report.main(["--collect", "main", "--from", str(more), "--model", "third"], root) == 1
    said = capsys.readouterr().err
    assert "has no runs of third, only of " in said and "other (1 run)" in said and "tiny (1 run)" in said


def test_collect_of_a_new_name_takes_the_model_of_the_newest_run(root: Path, capsys: pytest.CaptureFixture[str]):
    old, new = "2026-01-01T00:00:00+00:00", "2026-02-01T00:00:00+00:00"
    runs = write_runs(
        root / "two", make("sse", run_id="a", model="old", started_at=old), make("sse", run_id="b", started_at=new)
    )
    assert report.main(["--collect", "mine", "--from", str(runs)], root) == 0
    assert "left out: old (1 run)" in capsys.readouterr().out
    assert report.main(["--collect", "all-of-them", "--from", str(runs), "--model", "all"], root) == 0
    records = root / "results" / "records"
    assert [(records / f"{name}.jsonl").read_text().count("\n") for name in ("mine", "all-of-them")] == [1, 2]


def test_a_changed_record_is_found_by_check(root: Path):
    report.main([], root)
    path = root / "results" / "records" / "main.jsonl"
    path.write_text(path.read_text().replace("0.1234", "0.2234", 1))
    assert report.main(["--check"], root) == 1


def test_collect_merges_replaces_and_keeps_one_order(root: Path, capsys: pytest.CaptureFixture[str]):
    path = root / "results" / "records" / "main.jsonl"
    assert [r.method for r in read_records(path.parent)] == ["naive", "sse"]
    first = path.read_bytes()
    assert report.main(["--collect", "main"], root) == 0
    assert path.read_bytes() == first

    more = write_runs(root / "more", make("hessian"), make("naive", weight_error=0.5))
    capsys.readouterr()
    assert report.main(["--collect", "main", "--from", str(more)], root) == 0
    assert "3 records, 1 new, 1 replaced" in capsys.readouterr().out
    records = read_records(path.parent)
    assert [(r.method, r.weight_error) for r in records] == [("naive", 0.5), ("sse", 0.1234), ("hessian", 0.1234)]

    other = write_runs(root / "other", make("sse", device_name="Another CPU"))
    assert report.main(["--collect", "main", "--from", str(other)], root) == 0
    assert len(read_records(path.parent)) == 4


def test_collect_keeps_a_result_that_a_later_run_lacks(root: Path, capsys: pytest.CaptureFixture[str]):
    path = root / "results" / "records" / "main.jsonl"
    before = path.read_bytes()
    more = write_runs(root / "more", make("naive", status="failed", reason="the model is gone"))
    capsys.readouterr()
    assert report.main(["--collect", "main", "--from", str(more)], root) == 0
    assert path.read_bytes() == before
    assert "1 run without a result, kept out: the earlier record has one" in capsys.readouterr().out
    both = write_runs(root / "both", make("hessian"))
    failed = make("hessian", status="failed", reason="the model is gone")
    (both / "z.jsonl").write_text(f"{failed.to_json()}\n")
    capsys.readouterr()
    assert report.main(["--collect", "main", "--from", str(both)], root) == 0
    assert "3 records, 1 new, 0 replaced" in capsys.readouterr().out
    assert [r.status for r in read_records(path.parent)] == ["ok"] * 3


def test_runs_shows_what_verify_found(root: Path, capsys: pytest.CaptureFixture[str]):
    verified = make("sse", verified_blocks=1000, verified_violations=0, verified_worst_excess=0.0)
    runs = write_runs(root / "verified", verified)
    capsys.readouterr()
    assert report.main(["--runs", str(runs)], root) == 0
    out = capsys.readouterr().out
    assert "every scale against all representable ones" in out and "In all 1,000 blocks of the searches, 0" in out


def test_a_table_without_records_goes(root: Path, capsys: pytest.CaptureFixture[str]):
    results = root / "results"
    assert report.main([], root) == 0
    (results / "mine.csv").write_text((results / "main.csv").read_text())
    (results / "notes.csv").write_bytes("run_id,of,another,kind,ä\n".encode("latin-1"))
    capsys.readouterr()
    assert report.main(["--check"], root) == 1
    assert "results/mine.csv follows from no record" in capsys.readouterr().out
    assert report.main([], root) == report.main(["--check"], root) == 0
    assert not (results / "mine.csv").exists() and (results / "notes.csv").exists()


def test_collect_says_what_is_not_fit_to_show(root: Path, capsys: pytest.CaptureFixture[str]):
    runs = write_runs(root / "more", make("hessian", status="failed", reason="broken", dirty=True))
    capsys.readouterr()
    assert report.main(["--collect", "other", "--from", str(runs)], root) == 0
    out = capsys.readouterr().out
    assert "1 run without a result" in out
    assert "1 run from uncommitted code" in out


def test_runs_prints_tables_and_writes_beside_the_runs(root: Path, capsys: pytest.CaptureFixture[str]):
    folder = write_runs(root / "results" / "runs", make("hessian", status="failed", reason="K is 100."))
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert report.main(["--runs"], root) == 0
    out = capsys.readouterr().out
    assert "tiny, layer 0 mlp.down_proj" in out
    assert "12.34 %" in out
    assert "failed: NVFP4 Hessian b16 reference on tiny: K is 100." in out
    assert {p for p in root.rglob("*") if p.is_file()} - before.keys() == {folder / "table.csv", folder / "table.md"}
    assert all(p.read_bytes() == content for p, content in before.items())
    assert "12.34 %" in (folder / "table.md").read_text(encoding="utf-8")
    assert report.main(["--runs", str(folder)], root) == 0


def test_runs_takes_the_folder_of_one_run(root: Path, capsys: pytest.CaptureFixture[str]):
    run = root / "results" / "runs" / make("sse").run_id
    capsys.readouterr()
    assert report.main(["--runs", str(run)], root) == 0
    out = capsys.readouterr().out
    assert "SSE" in out and "Naive" not in out
    assert {path.name for path in run.iterdir()} == {"record.json", "table.csv", "table.md"}


def test_runs_shows_shifts_and_candidates_where_blocks_were_counted(root: Path, capsys: pytest.CaptureFixture[str]):
    counted = {"scales_moved": 0.25, "candidates_mean": 9.25, "candidates_max": 10}
    histograms = {"scale_shifts": {"-2": 5, "0": 75, "1": 20}, "candidate_counts": {"9": 75, "10": 25}}
    runs = write_runs(root / "counted", make("sse", **counted, **histograms), make("naive"))
    capsys.readouterr()
    assert report.main(["--runs", str(runs)], root) == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(line for line in lines if "Scales moved" in line)
    assert re.split(r"  +", header)[-4:] == ["Scales moved", "Shift from naive", "Candidates, mean", "Candidates, most"]
    assert next(line for line in lines if "SSE" in line).split()[-7:] == ["25.00", "%", "−2", "to", "+1", "9.2", "10"]
    assert report.main(["--runs"], root) == 0
    assert "Scales moved" not in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--check"], ["--runs"], ["--collect", "main"]])
def test_without_records_one_line_says_what_to_run(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert report.main(arguments, tmp_path) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert "make run" in shown.err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- BEGIN GENERATED: main -->\n", "README.md:1"),
        ("\n<!-- END GENERATED: main -->\n", "README.md:2"),
        ("<!-- BEGIN GENERATED: main -->\n<!-- END GENERATED: published -->\n", "README.md:1"),
        ("<!-- BEGIN GENERATED: other -->\n<!-- END GENERATED: other -->\n", "results/records/other.jsonl"),
    ],
)
def test_a_broken_block_is_an_error(text: str, said: str, root: Path, capsys: pytest.CaptureFixture[str]):
    (root / "README.md").write_text(text, encoding="utf-8")
    assert report.main([], root) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../main", "Main", "published", "summary"])
def test_collect_refuses_a_name_that_is_none(name: str, root: Path):
    assert report.main(["--collect", name], root) == 1


def test_a_damaged_record_is_named(root: Path, capsys: pytest.CaptureFixture[str]):
    path = root / "results" / "records" / "main.jsonl"
    path.write_text("{\n")
    assert report.main(["--check"], root) == 1
    assert "main.jsonl:1" in capsys.readouterr().err


def test_torch_is_not_imported(root: Path):
    code = (
        "import sys; from pathlib import Path; from experiments import report; "
        f"root = Path({str(root)!r}); "
        "status = [report.main(a, root) for a in ([], ['--check'], ['--runs'])]; "
        "heavy = {'torch', 'triton', 'transformers', 'datasets', 'wandb', 'hydra'} & sys.modules.keys(); "
        "assert status == [0, 0, 0] and not heavy, (status, heavy); "
        "assert report.main(['--track'], root) == 0; "
        "heavy = {'torch', 'triton', 'transformers', 'datasets', 'quantkit'} & sys.modules.keys(); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


def test_it_runs_as_a_script_from_anywhere(tmp_path: Path):
    command = [sys.executable, str(ROOT / "experiments" / "report.py"), "--runs", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 1
    assert "has no runs" in done.stderr


DAMAGED = {
    "empty": b"",
    "cut short": b'{"run_id": "a", "sw',
    "binary": bytes(range(128, 256)),
    "a list": b"[]",
    "a field of another type": make("sse", weight_error="much").to_json().encode(),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_record_stops_no_other(kind: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """One line names it, and the tables show the other records."""
    folder = write_runs(tmp_path / "raw", make("naive"), make("sse"))
    assert report.main(["--runs", str(folder)], root) == 0
    whole = capsys.readouterr().out
    (folder / "damaged").mkdir()
    (folder / "damaged" / "record.json").write_bytes(DAMAGED[kind])
    assert report.main(["--runs", str(folder)], root) == 0
    shown = capsys.readouterr()
    assert shown.out == whole
    assert shown.err.startswith("left out: ") and "damaged/record.json" in shown.err and shown.err.count("\n") == 1

    assert report.main(["--collect", "other", "--from", str(folder), "--model", "all"], root) == 0
    assert "damaged/record.json" in capsys.readouterr().out


def test_damaged_records_alone_are_an_error(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "raw" / "damaged").mkdir(parents=True)
    (tmp_path / "raw" / "damaged" / "record.json").write_text("")
    for arguments in (["--runs"], ["--collect", "other", "--from"]):
        assert report.main([*arguments, str(tmp_path / "raw")], root) == 1
        assert "no record that can be read" in capsys.readouterr().err
