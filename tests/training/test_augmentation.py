import inspect
import subprocess
import sys
import typing

import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from data_pipeline.batch import Pixels
from data_pipeline.draws import Purpose, bit_stream
from data_pipeline.masks import IGNORED
from data_pipeline.transforms import TRANSFORMS
from training.command import read_request
from training.config import UserError
from training.config.transforms import TransformStep
from training.config.tree import fields_of

# The least that must be said about each.
REQUIRED = {
    "resize": {"size": 24},
    "resize_to": {"height": 24, "width": 20},
    "resized_center_crop": {"size": 20, "shorter": 24},
    "random_resized_crop": {"size": 24},
    "center_crop": {"size": 24},
    "random_crop": {"size": 24},
    "pad": {"padding": 2},
    "random_shift": {"fraction": 0.1},
    "rotation": {"degrees": 10},
    "sharpness": {"factor": 2},
    "posterize": {"bits": 4},
    "solarize": {"threshold": 128},
}
NAMES = list(TransformStep.model_fields)


def section_of(name):
    (section,) = set(typing.get_args(TransformStep.model_fields[name].annotation)) - {type(None)}
    return section


def step(name, **parameters):
    return TransformStep.model_validate({name: {**REQUIRED.get(name, {}), **parameters}})


def test_the_transforms_that_can_be_written_are_those_that_exist():
    assert set(NAMES) == set(TRANSFORMS)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_defaults_are_those_of_the_function(name):
    fields = section_of(name).model_fields
    written = {one: field.default for one, field in fields.items() if not field.is_required()}
    parameters = inspect.signature(TRANSFORMS[name]).parameters.values()
    known = {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}
    assert fields.keys() == known.keys()
    assert written == {one: value for one, value in known.items() if value is not inspect.Parameter.empty}


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_says_what_it_is(name):
    assert [one for one, field in fields_of(section_of(name)) if not field.description] == []


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_runs_and_is_read_back_from_its_yaml(name):
    written = step(name)
    called, parameters = written.call
    rng = np.random.default_rng(0)
    pixels = Pixels(rng.integers(0, 256, (40, 50, 3), np.uint8), np.zeros((40, 50), np.uint8))
    for number in range(5):
        draws = np.random.Generator(bit_stream(0, Purpose.AUGMENTATION, at=(number, 0)))
        assert TRANSFORMS[called](pixels, draws, **parameters).image.ndim == 3
    text = yaml.safe_dump(written.model_dump(mode="json"))
    assert TransformStep.model_validate(yaml.safe_load(text)) == written


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(REQUIRED)))
def test_a_name_alone_is_a_transform_with_its_defaults(name):
    assert TransformStep.model_validate({name: None}) == step(name)


@pytest.mark.parametrize(
    ("name", "parameters", "complaint"),
    [
        ("rotation", {"degrees": 181}, "from 0 to 180"),
        ("rotation", {"degrees": -1}, "from 0 to 180"),
        ("rotation", {"degrees": [10, -10]}, "the least first"),
        ("rotation", {"degrees": [1, 2, 3]}, "2 items"),
        ("rotation", {"degrees": ".nan"}, "from 0 to 180"),
        ("affine", {"scale": [0, 1]}, "from 0.01 to 100"),
        ("affine", {"shear": 90}, "from 0 to 80"),
        ("affine", {"translate": [0.1, 1.5]}, "less than or equal to 1"),
        ("color_jitter", {"hue": 0.6}, "from 0 to 0.5"),
        ("color_jitter", {"brightness": [0.5]}, "Field required"),
        ("random_resized_crop", {"ratio": [0, 1]}, "from 0.01"),
        ("random_resized_crop", {"scale": [1.0, 0.5]}, "the least first"),
        ("resized_center_crop", {"size": 30}, "size 30 is more than shorter 24"),
        ("random_erasing", {"fill": "white"}, "'zero', 'mean' or 'noise'"),
        ("rand_augment", {"magnitude": 31}, "less than or equal to 30"),
        ("elastic", {"sigma": 0}, "greater than or equal to 0.1"),
        ("posterize", {"bits": 0}, "greater than or equal to 1"),
        ("pad", {"padding": -1}, "greater than or equal to 0"),
        ("gaussian_blur", {"sigma": [0, 2]}, "from 0.01"),
        ("quarter_turn", {"probability": 0.5}, "Extra inputs"),
        ("random_crop", {"mask_fill": 256}, "less than or equal to 255"),
    ],
)
def test_values_beyond_the_limits_are_refused_with_the_limits(name, parameters, complaint):
    if parameters.get("degrees") == ".nan":
        parameters = {"degrees": float("nan")}
    with pytest.raises(ValidationError, match=complaint):
        step(name, **parameters)


def test_one_line_holds_one_transform():
    with pytest.raises(ValidationError, match="here are 2: horizontal_flip, vertical_flip"):
        TransformStep.model_validate({"vertical_flip": {}, "horizontal_flip": {}})
    with pytest.raises(ValidationError, match="here are 0"):
        TransformStep.model_validate({})


def test_mistakes_in_a_recipe_are_named_with_their_line(tmp_path):
    lines = [{"rotation": {"degrees": 200}}, {"horizontal_flip": None}, {"resize": None}]
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump({"data": {"train_transforms": lines}}), encoding="utf-8")
    with pytest.raises(UserError) as refused:
        read_request(["--config", str(recipe)])
    assert "train_transforms.0.rotation.degrees" in refused.value.what
    assert "train_transforms.2.resize.size" in refused.value.what
    assert "horizontal_flip" not in refused.value.what


def test_the_class_of_pixels_from_outside_is_the_ignored_one_unless_told_otherwise():
    assert {
        section_of(name).model_fields["mask_fill"].default
        for name in NAMES
        if "mask_fill" in section_of(name).model_fields
    } == {IGNORED}


def test_reading_the_names_loads_neither_torch_nor_numpy():
    code = "import sys, training.config.transforms; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "numpy", "cv2"} & set(done.stdout.split()) == set()
