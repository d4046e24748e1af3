"""Whatever the topology, wherever a run stops and goes on: the same samples, the same pixels, each once."""

import io
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from itertools import count

import numpy as np
import pytest
import webdataset
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.balance import Balance, class_table
from data_pipeline.draws import hash64
from data_pipeline.index import DatasetIndex, Shard, Split, index_path, read_dataset, write_dataset
from data_pipeline.plan import Plan, evaluation_work, training_work
from data_pipeline.shard_index import make_shard_index, read_shard_index, write_shard_index
from data_pipeline.store import Folder
from data_pipeline.stream import Recipe, stream
from data_pipeline.tars import tar_members

CLASSES = ("often", "seldom", "once", "never")
# The classes of the samples, shard by shard: empty shards, shards of one, of seven, of twelve.
SHARDS = {
    "odd": ["0001010", "", "0", "000", "", "000100000120", "1", "00000", ""],
    "few": ["0", "", "01"],
}
# Numbers of samples that are no pictures: two neighbours, and the last one of a shard.
BROKEN = {"odd": {5, 6, 22}, "few": set()}
OPTIONS = {
    "odd": {"global_batch": 6, "lanes": 2, "shuffle_block": 5},
    "few": {"global_batch": 3, "lanes": 1, "shuffle_block": 2},
}
LAST = 14  # steps: beyond the third epoch of one, the thirteenth of the other
AUGMENTED = (("random_resized_crop", {"size": 8, "scale": (0.3, 1.0)}), ("horizontal_flip", {}))
SEED = 11


@dataclass(frozen=True)
class Case:
    """What is learned from: all that may decide about batches."""

    name: str
    strength: float | None = None
    mixup: float = 0.0
    cutmix: float = 0.0


CASES = [
    Case("odd"),
    Case("odd", strength=1.0),
    Case("odd", mixup=0.4),
    Case("odd", strength=0.6, cutmix=1.0),
    Case("odd", strength=0.0, mixup=0.4, cutmix=1.0),
    Case("few"),
    Case("few", strength=1.0, mixup=0.4),
]


@dataclass(frozen=True)
class Topology:
    """Who reads: nothing of this may decide about batches."""

    processes: int = 1
    workers: int = 0
    kind: str = "threads"
    micro_batch: int = 64
    prefetch: int = 1


def topologies(*kinds):
    return st.builds(
        Topology,
        processes=st.integers(1, 5),
        workers=st.sampled_from([0, 1, 3]),
        kind=st.sampled_from(kinds),
        micro_batch=st.integers(1, 7),
        prefetch=st.integers(1, 3),
    )


def picture(number):
    """A PNG with its number in every pixel, which no crop takes away, and a pattern that crops move."""
    rows, columns = np.mgrid[:8, :8]
    pixels = np.stack([np.full((8, 8), number), 8 * rows + columns, 31 * rows * columns % 256], axis=-1)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "png")
    return file.getvalue()


def key_of(number):
    return f"folder/{number:03d}"


def write_shard(path, samples, broken):
    """A tar of these (number, class) and its index."""
    with webdataset.TarWriter(str(path), mtime=0) as tar:
        for number, label in samples:
            image = b"this is no picture" if number in broken else picture(number)
            tar.write({"__key__": key_of(number), "png": image, "cls": str(label)})
    labels = np.array([label for _, label in samples], np.int32)
    index_sha256 = write_shard_index(index_path(path), make_shard_index(tar_members(path), labels))
    content = path.read_bytes()
    return Shard(path.name, len(samples), len(content), sha256(content).hexdigest(), index_sha256)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The folder of each data set by name."""
    roots = {}
    for name, shards in SHARDS.items():
        root, numbers = tmp_path_factory.mktemp(name), count()
        written = [
            write_shard(
                root / f"train-{at:06d}.tar", [(next(numbers), int(one)) for one in labels], BROKEN[name]
            )
            for at, labels in enumerate(shards)
        ]
        split = Split(tuple(written), tuple(np.bincount(labels_of(name), minlength=4).tolist()), "0" * 16)
        write_dataset(
            root, DatasetIndex("multiclass", CLASSES, "RGB", (0.5,) * 3, (0.2,) * 3, {"train": split})
        )
        roots[name] = root
    return roots


def labels_of(name):
    return np.array([int(label) for label in "".join(SHARDS[name])])


def plan_for(root, case):
    """A plan of its own for each start, from what lies on the disk."""
    folder, split = Folder(root), read_dataset(root).split("train")

    def labels(position):
        shard = split.shards[position]
        return read_shard_index(folder.index_path(shard), shard).labels

    balance = None
    if case.strength is not None:
        table = class_table(map(labels, range(len(split.shards))), len(CLASSES))
        balance = Balance(case.strength, table, labels)
    return Plan(split.shard_samples, seed=SEED, **OPTIONS[case.name], balance=balance)


def recipe_for(root, case, transforms=AUGMENTED):
    dataset = read_dataset(root)
    options = {"pinned": False, "mixup": case.mixup, "cutmix": case.cutmix}
    return Recipe(Folder(root), dataset, "train", transforms, SEED, **options)


def batches_of(root, case, topology, steps, *, process=0):
    """The batches of one process, which is stopped while more is being read; each is there until the next."""
    work = partial(
        training_work,
        plan_for(root, case),
        steps=range(steps.start, steps.stop + 3),
        process=process,
        processes=topology.processes,
        micro_batch=topology.micro_batch,
        mixing=bool(case.mixup or case.cutmix),
    )
    options = {"workers": topology.workers, "kind": topology.kind, "prefetch": topology.prefetch}
    batches = stream(recipe_for(root, case), work, **options)
    try:
        for batch in batches:
            if batch.work.step >= steps.stop:
                break
            yield batch
    finally:
        batches.close()


def sample_digest(batch, row):
    """Everything about a sample that reaches the model."""
    parts = [
        batch.keys[row].encode(),
        batch.images[row].numpy().tobytes(),
        batch.targets[row].numpy().tobytes(),
    ]
    if batch.mixed is not None:
        parts += [batch.mixed.targets[row].numpy().tobytes(), batch.mixed.share[row].numpy().tobytes()]
    return hash64(*parts)


def digests(root, case, topology, steps):
    """Samples and order-free digest of every global batch, from what all its processes read."""
    found = {step: [0, 0] for step in steps}
    for process in range(topology.processes):
        for batch in batches_of(root, case, topology, steps, process=process):
            for row in range(len(batch.keys)):
                if batch.valid[row]:
                    found[batch.work.step][0] += 1
                    found[batch.work.step][1] += sample_digest(batch, row)
    return [(samples, digest % 2**64) for samples, digest in found.values()]


@cache
def expected(root, case):
    """The digests of a run by one process that never stops and reads by itself."""
    return digests(root, case, Topology(), range(LAST))


def check_legs(data, case, legs, seams):
    """A run stopped at the seams, each leg on a topology of its own, against the one that never stops."""
    root, found = data[case.name], []
    for topology, (start, stop) in zip(legs, zip([0, *seams], [*seams, LAST], strict=True), strict=True):
        found += digests(root, case, topology, range(start, stop))
    assert found == expected(root, case)


@st.composite
def runs(draw, *kinds, legs=3):
    seams = sorted(draw(st.sets(st.integers(1, LAST - 1), max_size=legs - 1)))
    return draw(st.lists(topologies(*kinds), min_size=len(seams) + 1, max_size=len(seams) + 1)), seams


def sweep(examples):
    return settings(max_examples=examples, deadline=None)


@pytest.mark.parametrize("case", CASES, ids=str)
@sweep(10)
@given(run=runs("threads"))
def test_the_digests_never_change_with_threads(data, case, run):
    check_legs(data, case, *run)


@pytest.mark.parametrize("case", CASES[2:4], ids=str)
@sweep(2)
@given(run=runs("processes", legs=2))
@example(run=([Topology(2, 3, "processes", 2), Topology(3, 1, "processes", 5, prefetch=2)], [5]))
def test_the_digests_never_change_with_processes(data, case, run):
    check_legs(data, case, *run)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
@sweep(15)
@given(run=runs("threads", "processes", legs=4))
def test_the_digests_never_change(data, case, run):
    check_legs(data, case, *run)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_the_digests_are_made_of_is_what_the_plan_says(data, case):
    """Without this, streams that are wrong in the same way would do."""
    root, plan = data[case.name], plan_for(data[case.name], case)
    labels, broken = labels_of(case.name), BROKEN[case.name]
    for batch in batches_of(root, case, Topology(), range(LAST)):
        numbers = plan.batch(batch.work.step).tolist()
        # The next sample that is whole is put in the place of a broken one.
        whole = [next(one for one in count(number) if one not in broken) for number in numbers]
        assert batch.keys == [key_of(number) for number in whole]
        assert batch.targets.tolist() == labels[whole].tolist()
        assert [one.key for one in batch.bad] == [key_of(number) for number in numbers if number in broken]
        if batch.mixed is None:
            assert (batch.images[..., 0].numpy() == np.array(whole)[:, None, None]).all()
        else:
            others = [whole[place ^ 1] if place ^ 1 < len(whole) else own for place, own in enumerate(whole)]
            assert batch.mixed.targets.tolist() == labels[others].tolist()
        assert (batch.mixed is None) == (not case.mixup and not case.cutmix)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_batches_differ_from_step_to_step_so_that_the_digests_can_tell(data, case):
    found = expected(data[case.name], case)
    assert len(set(found)) == LAST
    assert {samples for samples, _ in found} == {OPTIONS[case.name]["global_batch"]}


def test_what_changes_the_pixels_changes_the_digests(data):
    plain, balanced, mixed = (expected(data["odd"], case) for case in CASES[:3])
    assert not set(plain) & set(balanced)
    assert not set(plain) & set(mixed)


def test_copies_of_a_sample_in_one_epoch_look_different(data):
    case = Case("odd", strength=1.0)
    plan, looks = plan_for(data["odd"], case), {}
    for batch in batches_of(data["odd"], case, Topology(), range(plan.steps_per_epoch)):
        for row, number in enumerate(batch.work.numbers.tolist()):
            if number not in BROKEN["odd"]:
                looks.setdefault(number, []).append(batch.images[row].numpy().tobytes())
    assert max(map(len, looks.values())) >= 5
    for number, own in looks.items():
        # Two crops of eight pixels may fall together, many do not.
        assert len(set(own)) > len(own) / 2, number


@pytest.mark.parametrize("name", SHARDS)
@sweep(10)
@given(topology=topologies("threads"), batch=st.integers(1, 8))
def test_an_evaluation_reads_every_sample_once_and_the_same_on_any_topology(data, name, topology, batch):
    """Of the data set of three samples most processes have none."""
    center = (("center_crop", {"size": 8}),)
    recipe, samples = recipe_for(data[name], Case(name), center), len(labels_of(name))
    found = []
    for process in range(topology.processes):
        work = partial(evaluation_work, samples, batch=batch, process=process, processes=topology.processes)
        options = {"workers": topology.workers, "kind": topology.kind, "prefetch": topology.prefetch}
        for one in stream(recipe, work, **options):
            assert one.valid.all()
            found += [
                (number, one.images[row].tolist()) for row, number in enumerate(one.work.numbers.tolist())
            ]
    assert [number for number, _ in found] == list(range(samples))
    for number, image in found:
        if number not in BROKEN[name]:
            assert (np.array(image)[..., 0] == number).all()
