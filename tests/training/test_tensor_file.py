"""Our own safetensors files: byte for byte those of the library, and their checksum without reading them."""

from __future__ import annotations

from hashlib import sha256

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from data_pipeline.disk import activity
from training.checkpoints.tensor_file import KINDS, write_tensors


def assert_the_same_bytes(folder, tensors):
    save_file(tensors, folder / "theirs")
    listed = write_tensors(folder, {"ours": tensors})["ours"]
    content = (folder / "ours").read_bytes()
    assert content == (folder / "theirs").read_bytes()
    assert listed == (len(content), sha256(content).hexdigest())


def test_a_file_with_every_kind_of_number_and_strange_names_is_the_librarys(tmp_path):
    tensors = {}
    for number, kind in enumerate(KINDS):
        tensors[f"b {number}"] = torch.arange(6).reshape(2, 3).to(kind)
        tensors[f"a {number}"] = torch.ones(()).to(kind)
        tensors[f'größe\n\x1f\x7f"\\/ {number}'] = torch.empty(0, 3, dtype=kind)
    assert_the_same_bytes(tmp_path, tensors)


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=6).filter(lambda name: "__m" not in name)
SHAPES = st.lists(st.integers(0, 5), max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(NAMES, st.tuples(SHAPES, st.sampled_from(list(KINDS))), max_size=5))
def test_any_file_is_the_librarys(tmp_path_factory, described):
    tensors = {name: torch.ones(shape).to(kind) for name, (shape, kind) in described.items()}
    assert_the_same_bytes(tmp_path_factory.mktemp("files"), tensors)


def test_files_larger_than_a_block_come_back_and_who_waits_sees_that_it_goes_on(tmp_path):
    draws = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(1500, 2000, generator=draws) for name in ("one", "two")}
    before = activity.done
    listed = write_tensors(tmp_path, {"a": tensors, "b": {}})
    assert activity.done >= before + 6
    read = load_file(tmp_path / "a")
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert listed["a"].sha256 == sha256((tmp_path / "a").read_bytes()).hexdigest()
    assert listed["b"].size == 8 + 8


def test_numbers_that_the_format_does_not_know_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"'wave' is of torch\.complex128"):
        write_tensors(tmp_path, {"file": {"wave": torch.zeros(2, dtype=torch.complex128)}})
    assert list(tmp_path.iterdir()) == []
