"""Files of parameters: whole or not at all, and refused when altered anywhere."""

from __future__ import annotations

import errno
import json
import os

import pytest
import safetensors.torch
import torch
from expecting import refused

from metarl.running import checkpoints
from metarl.running.checkpoints import CheckpointError

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.5])}


@pytest.fixture
def path(tmp_path):
    checkpoints.save(tmp_path / "x.safetensors", TENSORS, {"iteration": 3, "text": "ü"})
    return tmp_path / "x.safetensors"


def test_saved_tensors_and_metadata_are_loaded_unchanged(path):
    tensors, metadata = checkpoints.load(path)
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert metadata == {"iteration": 3, "text": "ü", "format": checkpoints.FORMAT}
    assert [p.name for p in path.parent.iterdir()] == ["x.safetensors"]


def test_a_file_with_any_flipped_byte_is_refused(path):
    data = path.read_bytes()
    for i in range(len(data)):
        for bit in (1, 128):
            spoiled = bytearray(data)
            spoiled[i] ^= bit
            path.write_bytes(bytes(spoiled))
            with refused(path, error=CheckpointError):
                checkpoints.load(path)


def test_a_file_cut_short_anywhere_is_refused(path):
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with refused(path, error=CheckpointError):
            checkpoints.load(path)


def test_other_files_are_refused_and_never_run(path, tmp_path):
    torch.save({"a": 1}, tmp_path / "pickle.pt")
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    for name in ("pickle.pt", "plain.safetensors"):
        with refused(tmp_path / name, error=CheckpointError):
            checkpoints.load(tmp_path / name)
    with refused(tmp_path / "missing", os.strerror(errno.ENOENT), error=CheckpointError):
        checkpoints.load(tmp_path / "missing")


def test_a_file_of_a_later_format_asks_for_an_update(path, monkeypatch):
    monkeypatch.setattr(checkpoints, "FORMAT", 99)
    checkpoints.save(path, TENSORS, {})
    monkeypatch.undo()
    with refused(path, "format", 99, checkpoints.FORMAT, error=CheckpointError):
        checkpoints.load(path)


def test_a_failed_write_leaves_the_old_file(path, monkeypatch):
    before = path.read_bytes()

    full_disk = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full(*_):
        raise full_disk

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError) as caught:  # noqa: PT011
        checkpoints.save(path, {"a": torch.zeros(9)}, {})
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["x.safetensors"]


def test_loading_into_another_network_names_the_shapes(path):
    with refused(path, "a", "(2, 3)", "(4, 3)", error=CheckpointError):
        checkpoints.in_shapes(path, TENSORS, {"a": (4, 3), "b": (1,)})
    assert list(checkpoints.in_shapes(path, TENSORS, {"b": (1,), "a": (2, 3)})) == ["b", "a"]


def test_recorded_versions_and_machine_are_json():
    found = json.loads(json.dumps([checkpoints.versions(), checkpoints.machine()]))
    assert found[0]["torch"].startswith(torch.__version__.split("+")[0])
    assert found[1]["cores"] >= 1
