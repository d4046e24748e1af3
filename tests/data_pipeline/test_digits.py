import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from sklearn.datasets import load_digits

from data_pipeline.decode import decode
from data_pipeline.digits import ensure_digits, write_digits
from data_pipeline.disk import file_sha256
from data_pipeline.fault import UserError
from data_pipeline.index import read_dataset
from data_pipeline.read import ShardReader
from data_pipeline.store import Folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "digits"
    assert ensure_digits(root)
    return root


def test_all_digits_are_packed_and_a_fifth_of_each_class_is_held_out(digits):
    dataset = read_dataset(digits)
    train, val = dataset.split("train"), dataset.split("val")
    assert (train.samples, val.samples) == (1438, 359)
    assert (dataset.image_mode, dataset.classes) == ("L", tuple("0123456789"))
    assert len(train.shards) > 4
    expected = Counter(load_digits().target.tolist())
    for number, counts in enumerate(zip(train.class_counts, val.class_counts, strict=True)):
        assert sum(counts) == expected[number]
        assert counts[1] == round(0.2 * expected[number])


def test_the_pixels_and_labels_are_those_of_scikit_learn(digits):
    bundled = load_digits()
    dataset = read_dataset(digits)
    reader = ShardReader(Folder(digits), dataset, "val")
    for sample in reader.read_many(np.arange(0, dataset.split("val").samples, 30)):
        source = int(sample.key.split("/")[1])
        assert sample.label == bundled.target[source]
        image = decode(sample.image, mode="L")
        assert image.shape == (32, 32, 1)
        small = image[:, :, 0].reshape(8, 4, 8, 4).mean(axis=(1, 3)) / 255 * 16
        assert np.corrcoef(small.ravel(), bundled.images[source].ravel())[0, 1] > 0.97
    reader.close()


def test_the_digits_that_are_held_out_stay_the_same(digits):
    """Of any version: figures that were reached on them can be compared."""
    assert read_dataset(digits).split("val").keys_digest == "36034ab057a44b0c"


def test_a_second_call_finds_the_first_ones_work(digits):
    before = {path.name: path.stat().st_mtime_ns for path in digits.iterdir()}
    assert not ensure_digits(digits)
    assert {path.name: path.stat().st_mtime_ns for path in digits.iterdir()} == before


def test_two_processes_at_once_end_with_one_good_data_set(digits, tmp_path):
    root = tmp_path / "new" / "digits"
    code = "import sys, pathlib, data_pipeline.digits as d; print(d.ensure_digits(pathlib.Path(sys.argv[1])))"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, root], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = sorted(process.communicate(timeout=100)[0].strip() for process in processes)
    assert said == ["False", "True"]
    assert {path.name: file_sha256(path) for path in root.iterdir()} == {
        path.name: file_sha256(path) for path in digits.iterdir()
    }
    assert [path.name for path in root.parent.iterdir() if not path.name.endswith(".lock")] == ["digits"]


def test_an_empty_folder_is_filled_and_a_strangers_is_left_alone(tmp_path):
    (tmp_path / "empty").mkdir()
    assert ensure_digits(tmp_path / "empty")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(UserError, match="holds files, but no data set"):
        ensure_digits(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_the_pictures_are_written_as_a_user_would_have_them(tmp_path):
    write_digits(tmp_path / "pictures")
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == list("0123456789")
    assert len(list((tmp_path / "pictures").glob("*/*.png"))) == 1797
