"""What is done with the answers for a batch, by task: rows of classes, rows of labels, or masks.

Shapes: C classes or labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from data_pipeline.batch import Batch, Image, Size
from data_pipeline.decode import decode_sample
from data_pipeline.fault import UserError
from data_pipeline.overlay import class_colours
from data_pipeline.recipe import reader_of
from data_pipeline.unframing import check_undoable, way_back
from training.config import Config
from training.prediction.inputs import PredictionInputs, Predictor
from training.prediction.masks import Paper, mask_columns, mask_said, said_classes, write_mask
from training.prediction.output import Output
from training.prediction.rows import Column, Said, class_cells, class_columns, label_cells, label_columns
from training.prediction.views import Answers

DECIDED = 0.5  # the probability from which on a label is found where nobody chose another


class AnswerMaker(NamedTuple):
    """The columns between sample and error, and what fills them: cells for each row of a batch."""

    columns: list[Column]
    said: Callable[[Batch, Answers], list[Said]]
    close: Callable[[], None] = lambda: None


def check_asked(config: Config, saved: Predictor) -> None:
    """USAGE for what the task does not have, CONFIG for transforms that masks have no way back from."""
    asked, classes = config.predict, len(saved.classes)
    decides = saved.kind == "multilabel" or saved.task.outputs == 1
    if asked.top_k and saved.kind != "multiclass":
        raise _not_here(
            f"predict.top_k: {asked.top_k}, but '{saved.path}' is for {saved.kind}", "--predict.top-k"
        )
    if asked.top_k > classes:
        raise UserError(
            f"predict.top_k: {asked.top_k}, but '{saved.path}' knows {classes} classes",
            mend=f"set --predict.top-k to {classes} or less",
            code="USAGE",
        )
    if asked.threshold is not None and not decides:
        what = f"predict.threshold: {asked.threshold}, but '{saved.path}' gives the likeliest class"
        raise _not_here(what, "--predict.threshold")
    if saved.kind == "segmentation":
        check_undoable(saved.transforms)


def make_answers(
    config: Config, saved: Predictor, inputs: PredictionInputs, output: Output, *, process: int
) -> AnswerMaker:
    """What answers are made into for this task."""
    asked, classes = config.predict, saved.classes
    if saved.kind == "multiclass":
        return AnswerMaker(
            class_columns(classes, asked.top_k),
            lambda _batch, answers: class_cells(answers, classes, asked.top_k),
        )
    if saved.kind == "multilabel":
        limits = [asked.threshold] * len(classes) if asked.threshold is not None else saved.thresholds
        chosen = limits or [DECIDED] * len(classes)
        return AnswerMaker(label_columns(classes), lambda _batch, answers: label_cells(answers, chosen))
    masks = _Masks(config, saved, inputs, output, process=process)
    return AnswerMaker(mask_columns(classes), masks, masks.close)


class _Masks:
    """Writes the masks of a batch, and says where and how much of each class is on them."""

    def __init__(
        self, config: Config, saved: Predictor, inputs: PredictionInputs, output: Output, *, process: int
    ) -> None:
        assert output.folder is not None
        self._saved, self._inputs = saved, inputs
        self._overlay = config.predict.overlay
        limits = saved.thresholds if saved.task.outputs == 1 else None
        self._threshold = config.predict.threshold or (limits[0] if limits else None)
        self._reader = reader_of(inputs.recipe)
        self._paper = Paper(
            output.folder,
            saved.mask_values,
            class_colours(inputs.recipe.dataset),
            output.folder / f"{output.part(process).name}-mask",
        )

    def close(self) -> None:
        """Close what pictures are read again from."""
        self._reader.close()

    def __call__(self, batch: Batch, answers: Answers) -> list[Said]:
        return [self._said(batch, answers, row) for row in range(len(batch.keys))]

    def _said(self, batch: Batch, answers: Answers, row: int) -> Said:
        if row in batch.blank:
            return mask_said("", None, len(self._saved.classes))
        assert batch.sizes is not None
        number = int(batch.work.numbers[row])
        back = way_back(self._saved.transforms, Size(*batch.sizes[row].tolist()))
        classes = said_classes(answers, row, back, self._threshold)
        name = self._inputs.mask_name(number)
        if classes is not None:
            write_mask(name, classes, self._picture(number) if self._overlay else None, self._paper)
        return mask_said(name, classes, len(self._saved.classes))

    def _picture(self, number: int) -> Image:
        """Read again, as a whole and in colours: the network saw it scaled."""
        return decode_sample(self._reader.read(number), mode="RGB")


def _not_here(what: str, option: str) -> UserError:
    return UserError(what, mend=f"leave {option} out", code="USAGE")
