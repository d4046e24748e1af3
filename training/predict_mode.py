"""`run.py predict`: what saved weights say of pictures that nobody has labelled."""

from __future__ import annotations

from training.assembly import join
from training.command import Request
from training.prediction import predict, predictor_of
from training.process import Place, forget_failure, leave
from training.vigil.joining import watch_over
from training.weights import read_weights


def predict_with_weights(request: Request, place: Place) -> None:
    """Write predictions for `predict.source`; every process comes here."""
    forget_failure(request.run_dir)
    accelerator = join(request.config, place=place)
    watch_over(place, accelerator, request.config)
    predict(request, accelerator, predictor_of(read_weights(request)), place=place)
    leave(accelerator, place)
