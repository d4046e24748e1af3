"""`run.py predict`: says what saved weights see in pictures, a row for each, in the order of the pictures.

Whole batches of a fixed cut are dealt to the processes, so every number is the same on any number of them.
No collective runs inside the pass. A broken picture is a row with its error.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from functools import partial
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from data_pipeline.batch import Batch
from data_pipeline.fault import UserError, first_line
from data_pipeline.items import utf8
from data_pipeline.plan import Work, evaluation_work
from data_pipeline.stream import stream
from training.command import Request
from training.config import Config
from training.config.transforms import TransformStep
from training.console import Console
from training.inputs import Normalizer
from training.prediction.answers import AnswerMaker, check_asked, make_answers
from training.prediction.inputs import PredictionInputs, open_inputs
from training.prediction.inputs import Predictor as Predictor
from training.prediction.output import Output, find_output, prepare_output
from training.prediction.rows import Cell, Column, Said, distinct
from training.prediction.views import Asked, ask
from training.process import agree
from training.vigil.place import Place
from training.weights import SavedWeights


class _Done(NamedTuple):
    """What one process has written."""

    rows: int
    broken: int


def predict(
    request: Request, accelerator: Accelerator, saved: Predictor, *, place: Place | None = None
) -> None:
    """Write the predictions of `saved` for `predict.source` to `predict.out`; every process comes here.

    `place` hears of each batch. UserError: USAGE and CONFIG for what was asked, DATA for a source without
    pictures. What was at `predict.out` before is replaced once the new file is complete.
    """
    began, config, place = time.monotonic(), request.config, place or Place()
    console = Console(active=accelerator.is_main_process and not request.flags.quiet, every_seconds=1)
    inputs, output = _agreed(request, accelerator, saved)
    console.say(f"weights   {saved.path}")
    console.say(f"pictures  {inputs.samples:,}: {inputs.words}")
    maker = make_answers(config, saved, inputs, output, process=accelerator.process_index)
    columns = _columns(maker.columns)
    try:
        done = _pass(_Pass(config, accelerator, saved, inputs, maker, console, place), output, columns)
        place.rest()
        found = gather_object([done])
    except BaseException:
        with suppress(OSError):
            output.part(accelerator.process_index).unlink(missing_ok=True)
        raise
    rows, broken = (sum(column) for column in zip(*found, strict=True))
    assert rows == inputs.samples, (rows, inputs.samples)
    parts = [output.part(process) for process in range(accelerator.num_processes)]
    agree(accelerator, partial(output.join, parts, columns))
    console.say(f"broken    {broken:,}" + (", each has its error in its row" if broken else ""))
    console.say(f"seconds   {time.monotonic() - began:.1f}")
    console.say(f"written   {output.words}")


def predictor_of(saved: SavedWeights) -> Predictor:
    """What prediction needs of saved weights; DATA where model.json is damaged."""
    about = saved.about
    try:
        return Predictor(
            path=saved.path,
            kind=about["task"],
            network=saved.network,
            task=saved.task,
            classes=saved.classes,
            image_mode=about["image"]["mode"],
            mean=tuple(about["image"]["mean"]),
            std=tuple(about["image"]["std"]),
            transforms=tuple(TransformStep.model_validate(one).call for one in about["transforms"]),
            mask_values=tuple(about["mask_values"]),
            thresholds=tuple(saved.thresholds) if saved.thresholds else None,
        )
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"--weights: the model.json of '{saved.path}' is damaged: {first_line(error)}",
            mend="copy it again from where the weights come from, or train again",
        ) from None


def _agreed(request: Request, accelerator: Accelerator, saved: Predictor) -> tuple[PredictionInputs, Output]:
    """The same on every process: process zero reports what is wrong."""
    config, pinned = request.config, accelerator.device.type == "cuda"
    found: list[PredictionInputs] = []

    def identity() -> str:
        check_asked(config, saved)
        output = find_output(config, saved, request.run_dir)
        found.append(open_inputs(config, saved, pinned=pinned))
        prepare_output(output, config, found[0])
        return found[0].identity

    expected = agree(accelerator, identity)
    inputs = found[0] if found else open_inputs(config, saved, pinned=pinned)
    if inputs.identity != expected:
        raise UserError(
            f"predict.source: '{config.predict.source}' differs between the processes",
            mend="name a place that all machines share, and wait until nothing is written there",
        )
    return inputs, find_output(config, saved, request.run_dir)


def _columns(of_task: list[Column]) -> list[Column]:
    """All columns, of different names: those of classes make way."""
    columns = [Column("sample", "text"), *of_task, Column("error", "text")]
    ordered = sorted(columns, key=lambda column: column.of_class)
    names = dict(zip(map(id, ordered), distinct(column.name for column in ordered), strict=True))
    return [column._replace(name=names[id(column)]) for column in columns]


class _Pass(NamedTuple):
    """What a process needs for its share of the pictures."""

    config: Config
    accelerator: Accelerator
    saved: Predictor
    inputs: PredictionInputs
    maker: AnswerMaker
    console: Console
    place: Place


def _pass(job: _Pass, output: Output, columns: list[Column]) -> _Done:
    """Write the rows of this process to its part."""
    config, accelerator = job.config, job.accelerator
    normalize = Normalizer(job.saved.mean, job.saved.std, accelerator.device)
    network = job.saved.network.to(accelerator.device).eval()
    asked = Asked(config.predict.tta, config.predict.scores)
    rows = broken = 0
    told = time.monotonic()
    part = output.format.part(output.part(accelerator.process_index), columns)
    with closing(part), closing(job.maker), closing(_batches(job)) as batches, torch.inference_mode():
        for batch in batches:
            job.place.at(samples=batch.keys)
            said: list[Said] = []
            if len(batch.blank) < len(batch.keys):
                images = normalize(batch).images
                said = job.maker.said(batch, ask(network, job.saved.task, images, accelerator, asked))
            part.write(_rows(batch, said, len(columns)))
            rows, broken = rows + len(batch.keys), broken + len(batch.blank)
            if time.monotonic() - told >= max(1.0, config.log.every_seconds):
                told = time.monotonic()
                job.console.say(
                    f"          {rows:,} pictures, batch {batch.work.piece + 1:,} of {batch.work.pieces:,}"
                )
    return _Done(rows, broken)


def _batches(job: _Pass) -> Generator[Batch, None, None]:
    config, inputs = job.config, job.inputs

    def work() -> Iterator[Work]:
        return evaluation_work(
            inputs.samples,
            batch=inputs.batch,
            process=job.accelerator.process_index,
            processes=job.accelerator.num_processes,
        )

    data = config.data
    return stream(inputs.recipe, work, workers=data.workers, prefetch=data.prefetch, kind=data.worker_kind)


def _rows(batch: Batch, said: list[Said], width: int) -> Iterator[list[Cell]]:
    """The rows of a batch; the row of a broken picture has nothing but its error."""
    errors = {row: one.exception for row, one in zip(batch.blank, batch.bad, strict=True)}
    for row, key in enumerate(batch.keys):
        if row in errors:
            yield [utf8(key), *[None] * (width - 2), utf8(errors[row])]
        else:
            yield [utf8(key), *said[row].cells, said[row].error]
