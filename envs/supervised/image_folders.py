"""Data sets of few-shot classification in a user's folders: Omniglot, miniImageNet."""

from __future__ import annotations

import csv
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from metarl.envs.errors import UserError
from metarl.envs.registry import register_data
from metarl.envs.supervised.few_shot import TRAINING, FewShotFamily

_IMAGENET = {"train": "train", "validation": "val", "test": "test"}
_SUFFIXES = (".png", ".jpg", ".jpeg")


@register_data(TRAINING)
def omniglot(
    folder: str = "",
    ways: int | tuple[int, int] = 5,
    shots: int = 1,
    queries: int = 5,
    test_queries: int = 15,
    size: int = 28,
    rotations: bool = True,
) -> FewShotFamily:
    """Omniglot (Lake et al. 2015) from a folder with images_background and images_evaluation.

    Each of them contains ALPHABET/CHARACTER/*.png. Characters of images_background are for
    training, except every eighth, which is for validation. Characters of images_evaluation are for
    test tasks. With `rotations`, a character turned by 90, 180 or 270 degrees is another class
    (Santoro et al. 2016). Strokes are 1, paper is 0.
    """
    root = _folder("omniglot", folder)
    images: list[NDArray[Any]] = []
    labels: list[str] = []
    parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for place in ("images_background", "images_evaluation"):
        characters = sorted(path for path in (root / place).glob("*/*") if path.is_dir())
        if not characters:
            raise UserError(f"omniglot: {root / place} has no ALPHABET/CHARACTER folders")
        for i, character in enumerate(characters):
            part = "test" if place == "images_evaluation" else "train" if i % 8 else "validation"
            drawn = [255 - _read(path, size, "L") for path in _images(character)]
            for turn in range(4 if rotations else 1):
                label = f"{place}/{character.parent.name}/{character.name}/{90 * turn}"
                parts[part].append(label)
                images += [np.rot90(image, turn) for image in drawn]
                labels += [label] * len(drawn)
    return _family("omniglot", images, labels, parts, ways, shots, queries, test_queries)


@register_data({**TRAINING, "tasks": 4, "inner.step_sizes": (0.01,), "inner.steps": 5})
def mini_imagenet(
    folder: str = "",
    ways: int | tuple[int, int] = 5,
    shots: int = 1,
    queries: int = 15,
    test_queries: int = 15,
    size: int = 84,
) -> FewShotFamily:
    """miniImageNet (Vinyals et al. 2016; split of Ravi & Larochelle 2017) from a folder.

    The folder contains either train, val and test, each with a folder of images for each class, or
    images, and train.csv, val.csv and test.csv with the columns filename and label.
    """
    root = _folder("mini-imagenet", folder)
    images: list[NDArray[Any]] = []
    labels: list[str] = []
    parts: dict[str, list[str]] = {}
    for part, place in _IMAGENET.items():
        files = _classes(root, place)
        parts[part] = sorted(files)
        for label, paths in sorted(files.items()):
            images += [_read(path, size, "RGB") for path in paths]
            labels += [label] * len(paths)
    return _family("mini-imagenet", images, labels, parts, ways, shots, queries, test_queries)


def _classes(root: Path, place: str) -> dict[str, list[Path]]:
    """Return the image files of each class of a part."""
    table = root / f"{place}.csv"
    if table.exists():
        files: dict[str, list[Path]] = {}
        with open(table, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if not row.get("filename") or not row.get("label"):
                    raise UserError(f"mini-imagenet: {table} must have columns filename and label")
                files.setdefault(row["label"], []).append(root / "images" / row["filename"])
        return files
    folders = sorted(path for path in (root / place).glob("*") if path.is_dir())
    if not folders:
        raise UserError(
            f"mini-imagenet: {root} has neither {place}.csv nor a folder {place} with a folder for"
            " each class"
        )
    return {path.name: _images(path) for path in folders}


def _family(
    name: str,
    images: list[NDArray[Any]],
    labels: list[str],
    parts: Mapping[str, list[str]],
    ways: int | tuple[int, int],
    shots: int,
    queries: int,
    test_queries: int,
) -> FewShotFamily:
    pixels = np.stack(images)
    pixels.flags.writeable = False  # the family then makes no copy
    return FewShotFamily(
        pixels, labels, ways, shots, queries=queries, test_queries=test_queries,
        name=name, description=f"few-shot classification on {name}",
        train=parts["train"], validation=parts["validation"], test=parts["test"],
    )  # fmt: skip


def _folder(name: str, folder: str) -> Path:
    if not folder or not Path(folder).is_dir():
        raise UserError(
            f"{name} needs its folder, such as --family-options folder=data/{name}; {folder!r}"
            " does not exist"
        )
    return Path(folder)


def _images(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    if not found:
        raise UserError(f"{folder} has no images ({', '.join(_SUFFIXES)})")
    return found


@functools.lru_cache(maxsize=200_000)
def _read(path: Path, size: int, mode: str) -> NDArray[np.uint8]:
    """Return an image [size, size] or [size, size, 3]."""
    try:
        with Image.open(path) as image:
            picture = image.convert(mode).resize((size, size), Image.Resampling.BOX)
    except OSError as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from error
    return np.asarray(picture, np.uint8)
