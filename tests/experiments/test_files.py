"""Atomic writes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from experiments.files import link, remove_orphans, replacing, write_atomically


def test_a_file_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    write_atomically(path, "old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.parent.parent == path.parent
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with pytest.raises(error), replacing(path) as temporary:
        temporary.write_text("ne")
        raise error
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_share_a_temporary_name(tmp_path: Path) -> None:
    with replacing(tmp_path / "file") as first, replacing(tmp_path / "file") as second:
        first.write_text("a")
        second.write_text("b")
    assert (tmp_path / "file").read_text() == "a"  # the one that ended last


def write_and_wait(path: Path, tell: Connection) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half")
        (temporary.parent / ".tmpAbCdEf").write_text("a library's own")
        tell.send(None)
        signal.pause()


def test_the_temporary_files_of_a_killed_process_are_removed_and_no_others(tmp_path: Path) -> None:
    """The next write in the folder removes them, but not those of a process that still writes."""
    start = multiprocessing.get_context("fork")
    writers = []
    for name in ("killed", "writing"):
        here, there = start.Pipe()
        writers.append(start.Process(target=write_and_wait, args=(tmp_path / name, there)))
        writers[-1].start()
        here.recv()
    killed, writing = writers
    killed.kill()
    killed.join()
    (tmp_path / ".empty.0123456789abcdef.tmp").mkdir()  # killed before it had its lock
    (tmp_path / ".mine.tmp").mkdir()
    try:
        write_atomically(tmp_path / "other", "whole")
        left = sorted(entry.name for entry in tmp_path.iterdir())
        assert len(left) == 3 and left[0] == ".mine.tmp" and left[1].startswith(".writing.") and left[2] == "other"
    finally:
        writing.kill()
        writing.join()
    remove_orphans(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".mine.tmp", "other"]


def test_every_file_has_the_modes_of_the_umask(tmp_path: Path) -> None:
    """So that a cache can be shared: safetensors makes files that only their owner can read."""
    (tmp_path / "usual").touch()
    with replacing(tmp_path / "tensors") as temporary:
        save_file({"x": torch.zeros(3)}, temporary)
    write_atomically(tmp_path / "text", "text")
    assert len({os.stat(tmp_path / name).st_mode for name in ("usual", "tensors", "text")}) == 1


def test_a_link_is_one_file_with_two_names(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").samefile(tmp_path / "b")
