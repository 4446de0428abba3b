"""From the labels of a list to numbers of classes. What would shift classes without a word is refused, or said."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stts_lightning.data.list_formats import AnnotationError, Row, text_lines

log = logging.getLogger(__name__)

EMPTY = frozenset({"", "nan", "none", "null", "na", "n/a", "<na>"})
"""What programs write for an empty cell."""


def whole_number(label: str) -> int | None:
    """The number that a label says: `3`, and `3.0` as pandas writes it; None if it is none."""
    text = label.removesuffix(".0")
    return int(text) if text.isascii() and text.isdecimal() else None


def kinetics_names() -> tuple[str, ...]:
    """Names of the 400 classes of Kinetics-400, as published files number them (from torchvision)."""
    from torchvision.models.video import MViT_V1_B_Weights

    return tuple(MViT_V1_B_Weights.KINETICS400_V1.meta["categories"])


def read_class_names(file: Path) -> tuple[str, ...]:
    """Names of the classes by label: a name a line, or JSON that maps names to labels (Something-Something's labels.json).

    Raises:
        AnnotationError: if the file is missing, has blank lines between names, or says a name or a label twice.
    """
    if not file.is_file():
        raise AnnotationError(f"class names {file}: no such file")
    if file.suffix.lower() == ".json":
        names = _names_of_json(file)
    else:
        lines = [(number, line.strip()) for number, line in text_lines(file, "class names")]
        for expected, (number, _) in enumerate(lines, 1):
            if number != expected:
                raise AnnotationError(f"class names {file}, line {expected}: blank; every line names the class of its number")
        names = tuple(name for _, name in lines)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise AnnotationError(f"class names {file}: {twice!r} is there twice")
    if not names:
        raise AnnotationError(f"class names {file}: it names no classes")
    return names


def _names_of_json(file: Path) -> tuple[str, ...]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        if isinstance(content, list):
            return tuple(str(name) for name in content)
        labels = {int(label): str(name).replace("[", "").replace("]", "") for name, label in content.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise AnnotationError(f"class names {file}: neither a list of names nor a map from names to labels ({error})") from error
    if sorted(labels) != list(range(len(content))):
        raise AnnotationError(f"class names {file}: its labels are not 0 to {len(content) - 1}, each once")
    return tuple(labels[number] for number in range(len(labels)))


def names_of_labels(file: Path, rows: Iterable[Row]) -> tuple[str, ...]:
    """Names of the classes where nothing but a list's labels says them: numbers from 0 on, or the names in order.

    Raises:
        AnnotationError: if some labels are numbers and others are not, if a label is empty, or is too large for a list.
    """
    first: dict[str, int] = {}
    count = 0
    for row in rows:
        first.setdefault(row.label, row.line)
        count += 1
    for label, line in first.items():
        if label.lower() in EMPTY:
            raise AnnotationError(f"list file {file}, line {line}: label {label!r}; every video needs a label")
    numbers = {label: whole_number(label) for label in first}
    known = [number for number in numbers.values() if number is not None]
    if not known and not any(_looks_like_a_number(label) for label in first):
        return tuple(sorted(first))
    for label, number in numbers.items():
        if number is None:
            raise AnnotationError(
                f"list file {file}, line {first[label]}: label {label!r} is no whole number from 0 on, as others are; "
                "if labels are names, give their order in classes.txt beside the list, or by dataset.classes=FILE"
            )
    largest = max(known)
    if largest >= max(1000, 10 * count):
        line = next(first[label] for label, number in numbers.items() if number == largest)
        raise AnnotationError(f"list file {file}, line {line}: label {largest}; {count} videos do not make {largest + 1} classes")
    return tuple(map(str, range(largest + 1)))


def _looks_like_a_number(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True


def label_number(file: Path, row: Row, numbers: Mapping[str, int]) -> int:
    """Number of a row's class: its name's, or the number itself. Raises AnnotationError if it is neither."""
    if row.label in numbers:
        return numbers[row.label]
    number = whole_number(row.label)
    if number is not None and number < len(numbers):
        return number
    raise AnnotationError(
        f"list file {file}, line {row.line}: label {row.label!r} is neither in 0..{len(numbers) - 1} nor a class name"
    )


def report_classes(source: str, labels: NDArray[np.int64], classes: Sequence[str], complete: bool = True) -> None:
    """Say how many videos the classes have; warn of classes without any, and of labels that seem to count from 1.

    Args:
        source: the list or folder, in words.
        labels: of its videos.
        classes: names.
        complete: warn; otherwise the classes are those of another list, of which this one may hold a part.
    """
    counts = np.bincount(labels, minlength=len(classes))
    empty = [name for name, count in zip(classes, counts.tolist(), strict=True) if not count]
    log.info(
        "%s: videos: %d, classes: %d, videos a class: %d to %d",
        source, len(labels), len(classes), counts[counts > 0].min(), counts.max(),
    )  # fmt: skip
    if not empty or not complete:
        return
    if empty == [classes[0]] and classes[0] == "0" and len(classes) > 1:
        log.warning("%s: no video has label 0; labels count from 0, so subtract 1 from each if yours count from 1", source)
    else:
        shown = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        log.warning("%s: %d of %d classes have no video: %s", source, len(empty), len(classes), shown)
