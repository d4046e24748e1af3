"""The embedded data set: 1,797 real handwritten digits, a folder per class, packed like a user's own.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits (UCI, 1998), as scikit-learn
bundles it: 8 x 8 pixels of 0..16, here enlarged to 32 x 32 grey PNGs.
"""

from __future__ import annotations

import fcntl
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image as PillowImage

from data_pipeline.fault import UserError
from data_pipeline.index import DATASET_FILE
from data_pipeline.pack import pack
from data_pipeline.sources import SourceOptions, find_source

SIDE = 32
SEED = 0
VAL_FRACTION = 0.2
SHARD_SAMPLES = 200  # several real shards, although one could hold it all


def write_digits(folder: Path) -> None:
    """Write FOLDER/<digit>/<number>.png for every sample."""
    from sklearn.datasets import load_digits  # two seconds of import, needed once in the life of a data set

    bundled = load_digits()
    for number, (image, label) in enumerate(zip(bundled.images, bundled.target, strict=True)):
        small = PillowImage.fromarray(np.round(image * (255 / 16)).astype(np.uint8))
        path = folder / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        small.resize((SIDE, SIDE), PillowImage.Resampling.BILINEAR).save(path)


def ensure_digits(root: Path) -> bool:
    """Pack the digits into `root` unless a data set is there; whether this call did it.

    Every process of a run may call this at once: one packs beside `root` and renames, the others wait for its
    lock.
    """
    if (root / DATASET_FILE).exists():
        return False
    root.parent.mkdir(parents=True, exist_ok=True)
    with (root.parent / f".{root.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (root / DATASET_FILE).exists():
            return False
        if root.is_dir() and any(root.iterdir()):
            raise UserError(
                f"'{root}' holds files, but no data set", mend="give an empty folder or a new one"
            )
        with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}.") as folder:
            pictures, packed = Path(folder) / "pictures", Path(folder) / "packed"
            write_digits(pictures)
            source = find_source(
                pictures, SourceOptions(kind="folders", val_fraction=VAL_FRACTION, seed=SEED)
            )
            pack(source, packed, workers=1, seed=SEED, shard_samples=SHARD_SAMPLES, shard_bytes=1 << 30)
            if root.is_dir():
                root.rmdir()
            try:
                packed.rename(root)
            except OSError:
                # Another machine on the same disk may have been faster.
                if not (root / DATASET_FILE).exists():
                    raise
            return True
