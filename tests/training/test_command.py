"""The command line: what wins over what, and how mistakes are told."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from training.command import Flags, read_request
from training.config import Config, UserError, changed
from training.config.loss import LossTerms
from training.config.schedule import Schedule
from training.config.transforms import TransformStep
from training.config.tree import fields_of
from training.config.update_rules import UpdateRules

ROOT = Path(__file__).parent.parent.parent
RUN = ROOT / "training" / "run.py"
BIN = Path(sys.executable).parent
NAMES = [*dict(fields_of(Flags)), *dict(fields_of(Config))]


def option(name):
    return "--" + name.replace("_", "-")


def program(*words, cwd=None, python=(), command=None):
    """Run the real program in a process of its own."""
    command = command or [sys.executable, *python, str(RUN)]
    env = {**os.environ, "COLUMNS": "110", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, words)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def mistakes_of(*words):
    """What is wrong with the words, a line a mistake, and the code."""
    with pytest.raises(UserError) as caught:
        read_request([str(word) for word in words])
    return caught.value.what.splitlines(), caught.value.code


def printed(capsys, *words):
    assert read_request([*map(str, words), "--print-config"]) is None
    return capsys.readouterr().out


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe file from text; its path."""

    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


# What wins.


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(recipe):
    path = recipe("optim: {lr: 0.5, momentum: 0.7}\ntrain: {epochs: 3}\n")
    config = read_request(["--config", str(path), "--optim.lr", "0.25"]).config
    assert config.optim.lr == 0.25
    assert config.optim.momentum == 0.7
    assert config.train.epochs == 3
    assert config.optim.weight_decay == Config().optim.weight_decay


def test_without_a_config_the_digits_are_trained_into_their_own_run_directory():
    request = read_request([])
    assert request.mode == "train"
    assert request.config.data.root == "embedded:digits"
    assert request.run_dir == Path("runs/digits")


def test_the_run_directory_is_named_after_the_recipe_file_unless_it_is_given(recipe):
    path = str(recipe("{}"))
    assert read_request(["--config", path]).run_dir == Path("runs/recipe")
    assert read_request(["--config", path, "--run-dir", "here"]).run_dir == Path("here")


def test_a_later_flag_wins_over_an_earlier_one():
    assert read_request(["--seed", "1", "--seed", "2"]).config.seed == 2


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--model.pretrained"], True),
        (["--model.pretrained", "true"], True),
        (["--model.pretrained=True"], True),
        (["--model.pretrained", "false"], False),
        (["--model.no-pretrained"], False),
        (["--model.pretrained", "--model.no-pretrained"], False),
    ],
)
def test_a_switch_is_on_by_its_name_and_off_by_no(words, value):
    assert read_request([*words, "--seed", "3"]).config.model.pretrained is value
    assert read_request([*words, "--seed", "3"]).config.seed == 3


@pytest.mark.parametrize("joined", ["--data.root=a=b", "--data.root=--seed", "--data.root=", "--data.root= "])
def test_everything_behind_the_first_equals_sign_is_the_value(joined):
    assert read_request([joined]).config.data.root == joined.partition("=")[2]


def test_dashes_and_underscores_in_names_are_the_same():
    assert read_request(["--train.global_batch", "32"]).config.train.global_batch == 32
    assert read_request(["--train.global-batch", "32"]).config.train.global_batch == 32


def test_none_empties_what_may_be_empty():
    config = read_request(["--train.epochs", "none", "--train.max-steps", "7"]).config
    assert config.train.epochs is None
    assert config.train.max_steps == 7


def test_lists_of_transforms_are_written_as_yaml():
    words = ["--data.eval-transforms", "[{resize: {size: 40}}, {center_crop: {size: 32}}]"]
    steps = read_request(words).config.data.eval_transforms
    assert [step.call for step in steps] == [("resize", {"size": 40}), ("center_crop", {"size": 32})]


@pytest.mark.parametrize("root", ["123", "1e3", "true", "null.d", "~", "2024-01-01", "0x10", "a: b"])
def test_a_path_stays_the_text_that_was_typed(root):
    assert read_request(["--data.root", root]).config.data.root == root


# What is wrong.


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("--epochs", "--train.epochs"),
        ("--lr", "--optim.lr"),
        ("--trian.epochs", "--train.epochs"),
        ("--train.epoch", "--train.epochs"),
        ("--train.globalbatch", "--train.global-batch"),
        ("--data.worker", "--data.workers"),
        ("--global-batch", "--train.global-batch"),
        ("--rundir", "--run-dir"),
        ("--optim.learning-rate", None),
        ("--xyzzy", None),
    ],
)
def test_a_typo_names_the_nearest_option(typo, meant):
    (line,), code = mistakes_of(typo, 3)
    assert code == "USAGE"
    assert typo in line
    assert (f"did you mean {meant}?" in line) if meant else True


@pytest.mark.parametrize(
    "value", ["0", "-3", "nan", "inf", "two", "1.5", "1e3x", "", "none", "[1]", "{a: 1}"]
)
@pytest.mark.parametrize("name", ["train.global_batch", "checkpoint.keep"])
def test_a_count_must_be_a_whole_positive_number(name, value):
    (line,), code = mistakes_of(f"{option(name)}={value}")
    assert code == "CONFIG"
    assert line.startswith(f"{option(name)}: ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optim.lr", "nan"),
        ("optim.lr", "inf"),
        ("optim.lr", "-0.1"),
        ("optim.lr", "two"),
        ("optim.momentum", "1.5"),
        ("optim.clip_norm", "0"),
        ("optim.clip_norm", "nan"),
        ("train.timeout_seconds", "-1"),
        ("train.timeout_seconds", "inf"),
        ("train.timeout_seconds", "1e30"),
        ("log.every_seconds", "nan"),
        ("seed", "-1"),
        ("seed", str(2**32)),
        ("data.workers", "-1"),
        ("data.workers", str(10**30)),
        ("train.precision", "fp8"),
        ("optim.name", "adams"),
        ("optim.warmup", "soon"),
        ("optim.warmup", "1.5st"),
        ("optim.warmup", "-1"),
        ("optim.schedule", "cosinus"),
        ("optim.schedule", "{step: {}}"),
        ("optim.schedule", "{step: {step_size: 3, gama: 0.1}}"),
        ("optim.schedule", "{step: {step_size: 3}, cosine: {}}"),
        ("optim.groups", "[{lr: 0.1}]"),
        ("loss", "dicee"),
        ("loss", "{}"),
        ("loss", "{dice: -1}"),
        ("loss", "{dice: {weight: 1, smoth: 0}}"),
        ("task", "detection"),
        ("train.ema", "1"),
        ("predict.threshold", "0"),
        ("tracking.wandb", "on"),
        ("data.train_transforms", "[{blur: {}}]"),
        ("data.train_transforms", "[{resize: {size: 0}}]"),
        ("data.train_transforms", "[{resize: {size: 3, center_crop: 4}}]"),
        ("data.train_transforms", "[{resize: {size: 3}, center_crop: {size: 4}}]"),
        ("data.train_transforms", "[{resize"),
        ("data.lanes", "7"),
    ],
)
def test_a_value_outside_its_limits_is_named_with_its_option(name, value):
    lines, code = mistakes_of(f"{option(name)}={value}")
    assert code == "CONFIG"
    assert all(name in line.replace("-", "_") for line in lines), lines


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--loss", "{dicee: 1}"], "--loss: dicee: no such name (did you mean loss.dice?)"),
        (
            ["--loss", "{dice: {smoth: 0}}"],
            "--loss: dice.smoth: no such name (did you mean loss.dice.smooth?)",
        ),
        (
            ["--optim.schedule", "cosin"],
            "--optim.schedule: cosin: no such name (did you mean optim.schedule.cosine?)",
        ),
    ],
)
def test_a_typo_inside_a_value_names_the_nearest_of_its_own_section(words, said):
    (line,), code = mistakes_of(*words)
    assert (line, code) == (said, "CONFIG")


def test_a_loss_is_a_name_or_a_sum_of_names_and_import_paths():
    assert list(read_request(["--loss", "dice"]).config.loss.terms) == ["dice"]
    loss = read_request(
        ["--loss", "{bce: 0.5, dice: {smooth: 0}, 'mine:Loss': {weight: 2, k: 3}}"]
    ).config.loss
    assert (loss.bce.weight, loss.dice.weight, loss.dice.smooth) == (0.5, 1, 0)
    assert (loss.own["mine:Loss"].weight, loss.own["mine:Loss"].arguments) == (2, {"k": 3})


def test_the_loss_that_nobody_names_is_that_of_the_task():
    assert list(read_request([]).config.loss.terms) == ["cross_entropy"]
    assert list(read_request(["--task", "multilabel"]).config.loss.terms) == ["bce"]
    assert list(read_request(["--task", "segmentation", "--loss", "none"]).config.loss.terms) == [
        "cross_entropy"
    ]


def test_a_run_without_a_validation_split_is_written_as_none():
    assert read_request(["--data.val-split", "none"]).config.data.val_split is None


def test_a_run_without_an_end_is_refused():
    (line,), _ = mistakes_of("--train.epochs", "none")
    assert "train.epochs" in line
    assert "train.max_steps" in line


@pytest.mark.parametrize(
    "words",
    [
        ["--seed"],
        ["--seed", "--train.epochs", "3"],
        ["trian"],
        ["train", "evaluate"],
        ["--seed", "1", "2"],
        ["-seed", "1"],
        ["--"],
        ["--=3"],
        ["--.seed", "1"],
        ["--data", "digits"],
        ["--data.root.x", "digits"],
    ],
)
def test_words_that_say_nothing_are_refused(words):
    assert mistakes_of(*words)[1] == "USAGE"


def test_all_typos_are_told_at_once():
    lines, code = mistakes_of("--sede", 1, "--train.epoch", 2, "--seed")
    assert code == "USAGE"
    assert [line.split(":")[0] for line in lines] == ["--sede", "--train.epoch", "--seed"]


def test_all_bad_values_are_told_at_once_whether_flags_or_file(recipe):
    path = recipe("optim: {lr: fast, nesterov: true}\ntrain: {epochs: -1}\n")
    flags = ["--seed", "-1", "--train.global-batch", "0"]
    lines, code = mistakes_of("--config", path, *flags)
    assert code == "CONFIG"
    assert len(lines) == 5
    assert sum(line.startswith("--") for line in lines) == 2
    in_the_file = [line for line in lines if line.startswith(f"{path}: ")]
    assert [any(name in line for line in in_the_file) for name in ("optim.lr", "nesterov", "train.epochs")]


def test_a_name_that_a_file_misspells_is_told_with_the_file_and_the_nearest_name(recipe):
    path = recipe("train: {epoch: 3}\n")
    (line,), _ = mistakes_of("--config", path)
    assert line.startswith(f"{path}: train.epoch: ")
    assert "did you mean train.epochs?" in line


@pytest.mark.parametrize(
    ("words", "mistakes"),
    [
        (["--train.epoch", "3"], 1),
        (["--train.global-batch", "-64"], 1),
        (["--config", "nowhere.yaml"], 1),
        (["--sede", "3", "--optim.lar", "4", "nonsense"], 3),
        (["--seed", "x", "--optim.lr", "nan", "--train.epochs", "0", "--eval.batch", "1.5"], 4),
    ],
)
def test_the_program_ends_with_2_and_a_line_a_mistake_and_one_that_scripts_read(words, mistakes, tmp_path):
    done = program(*words, cwd=tmp_path)
    lines = done.stderr.splitlines()
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(lines) == mistakes + 1
    assert all(line.startswith("error: ") for line in lines[:-1])
    assert re.fullmatch(r'FATAL code=(USAGE|CONFIG) rank=0 hint=".+"', lines[-1])
    assert list(tmp_path.iterdir()) == []


# Files.

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]\nc: [*b, *b, *b, *b]\n"


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "task: !!python/object/apply:os.system ['touch canary']\n",
        "task: !!python/name:os.system\n",
        "train: {epochs: 3\n",
        "\tseed: 3\n",
        "",
        "- seed\n",
        "just words\n",
        "seed: 1\n---\nseed: 2\n",
        "\0",
    ],
)
def test_a_file_that_is_not_plain_yaml_with_sections_is_refused_and_runs_nothing(
    text, recipe, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (line,), code = mistakes_of("--config", recipe(text))
    assert code == "CONFIG"
    assert "recipe.yaml" in line
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_flag_that_is_yaml_can_neither_repeat_itself_nor_run_anything():
    for value in ("[&a {resize: {size: 3}}, *a]", "[!!python/name:os.system ]"):
        assert mistakes_of("--data.train-transforms", value)[1] == "CONFIG"


def test_a_file_of_other_bytes_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"seed: \xff\xfe\n")
    assert mistakes_of("--config", tmp_path / "recipe.yaml")[1] == "CONFIG"
    assert mistakes_of("--config", tmp_path)[1] == "CONFIG"


def test_a_section_that_is_no_section_is_refused(recipe):
    lines, code = mistakes_of("--config", recipe("train: 3\n"), "--train.epochs", 4)
    assert code == "CONFIG"
    assert "train" in lines[0]


# What it prints.

ROUND_TRIPS = [
    [],
    ["--train.epochs", "none", "--train.max-steps", "3"],
    ["--data.root", "123", "--model.name", "null", "--tracking.project", "yes"],
    ["--data.train-transforms", "[{horizontal_flip: {}}, {resize: {size: 9}}]", "--optim.lr", "1e-30"],
    ["--data.root", "Bücher: #1 'x' \"y\"", "--optim.clip-norm", "0.1"],
]


@pytest.mark.parametrize("words", ROUND_TRIPS)
def test_the_printed_configuration_is_a_config_file_that_prints_itself(words, recipe, capsys):
    once = printed(capsys, *words)
    assert printed(capsys, "--config", recipe(once)) == once
    assert read_request(["--config", str(recipe(once))]).config == read_request(words).config


@settings(deadline=None)
@given(
    lr=st.floats(0, 1e300),
    seed=st.integers(0, 2**32 - 1),
    root=st.text(st.characters(exclude_categories=["C"])),
)
def test_any_value_survives_being_printed_and_read(lr, seed, root):
    config = read_request([f"--optim.lr={lr!r}", f"--seed={seed}", f"--data.root={root}"]).config
    assert (config.optim.lr, config.seed, config.data.root) == (lr, seed, root)
    assert Config.model_validate(yaml.safe_load(config.as_yaml())) == config


def modules_of(done):
    """The modules that a `python -X importtime` has loaded."""
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "import time:" in line}


@pytest.mark.parametrize(
    ("words", "code"), [(["--help"], 0), (["--train.epoch", "3"], 2), (["--print-config"], 0)]
)
def test_help_a_typo_and_the_printed_configuration_need_no_torch(words, code, tmp_path):
    done = program(*words, cwd=tmp_path, python=["-X", "importtime"])
    assert done.returncode == code
    loaded = modules_of(done)
    assert {"training.command", "pydantic"} <= loaded
    assert loaded & {"torch", "numpy", "timm", "accelerate", "wandb", "torchvision", "matplotlib"} == set()


def test_help_lists_every_option_and_no_other(tmp_path):
    done = program("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr == ""
    listed = set(re.findall(r"│ (--[a-z][a-z0-9.-]+)", done.stdout)) - {"--help"}
    assert listed == {option(name) for name in NAMES}
    said = " ".join(re.sub("[│ \n]+", " ", done.stdout).split())
    for field in dict(fields_of(Config)).values():
        assert " ".join(field.description.split())[:30] in said


@pytest.fixture(scope="module")
def manual(tmp_path_factory):
    """What `--help` prints behind the options: section's head -> its lines."""
    done = program("--help", cwd=tmp_path_factory.mktemp("manual"))
    heads = re.split(r"^(transforms|losses|schedules|update rules)\b", done.stdout, flags=re.MULTILINE)[1:]
    return dict(zip(heads[::2], heads[1::2], strict=True))


@pytest.mark.parametrize(
    ("head", "names"),
    [
        ("transforms", TransformStep),
        ("losses", LossTerms),
        ("schedules", Schedule),
        ("update rules", UpdateRules),
    ],
)
def test_help_lists_every_name_of_a_recipe_with_its_arguments_and_defaults(head, names, manual):
    listed = re.findall(r"^  (\S+): \S", manual[head], flags=re.MULTILINE)
    assert listed == ["mymodule:name" if name == "own" else name for name in names.model_fields]
    chapters = re.split(r"^  \S+: ", manual[head], flags=re.MULTILINE)[1:]
    for chapter, field in zip(chapters, names.model_fields.values(), strict=True):
        (spec,) = (one for one in typing.get_args(field.annotation) if hasattr(one, "model_fields"))
        lines = dict(re.findall(r"^      (\w+) +(.+)$", chapter, flags=re.MULTILINE))
        assert lines.keys() == spec.model_fields.keys()
        for argument, told in spec.model_fields.items():
            shown = re.search(r"\(([^()]+)\)$", lines[argument])[1]
            assert (shown == "required") == told.is_required()
            assert told.is_required() or json.loads(shown) == json.loads(json.dumps(told.default))
            if typing.get_origin(told.annotation) is typing.Literal:
                assert f": {', '.join(typing.get_args(told.annotation))} (" in lines[argument]


def test_help_shows_a_loss_and_a_schedule_as_one_would_write_them(tmp_path):
    words = ["--loss", "{dice: 0.5}", "--optim.schedule", "{step: {step_size: 7ep}}"]
    done = program("--help", *words, "--optim.groups", "[{match: head, lr: 0.5}]", cwd=tmp_path)
    said = " ".join(re.sub("[│ \n]+", " ", done.stdout).split())
    assert "{dice: {weight: 0.5, smooth: 1.0, foreground: false}}" in said
    assert "{step: {step_size: 7ep, gamma: 0.1}}" in said
    assert "match: head" in said
    for name in ("--loss", "--optim.schedule", "--optim.arguments", "--model.unfreeze"):
        assert re.search(rf"{name} (\{{None\}}\|)?STR ", said), name


@pytest.mark.parametrize("words", [["--help"], ["--print-config"]])
def test_a_reader_that_goes_away_is_no_crash(words, tmp_path):
    """`run.py --help | head -1`"""
    command = [sys.executable, str(RUN), *words]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() in (0, 141)


def values_for_every_option():
    """A word that each option accepts: the value that it has."""
    flags, config = Flags().model_dump(mode="json"), Config().model_dump(mode="json")
    for name in NAMES:
        value = flags.get(name)
        if name not in flags:
            value = config
            for part in name.split("."):
                value = value[part]
        yield name, "none" if value is None else json.dumps(value) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("name", "value"), list(values_for_every_option()))
def test_every_option_takes_the_value_it_has(name, value):
    words = [option(name), value]
    if name == "train.epochs":
        words += ["--train.max-steps", "3"]
    assert read_request(words) is not None


# Behind other programs.


def torchrun_leaves(words):
    from torch.distributed.run import get_args_parser

    return get_args_parser().parse_args(["--nproc_per_node", "1", "run.py", *words]).training_script_args


def accelerate_leaves(words):
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser().parse_args(["run.py", *words]).training_script_args


@pytest.mark.parametrize("leaves", [torchrun_leaves, accelerate_leaves])
def test_launchers_hand_every_option_on_untouched(leaves):
    """Options of ours that begin one of theirs would be taken for it: `--run` is torchrun's `--run-path`."""
    for name, value in values_for_every_option():
        for words in ([option(name), value], [f"{option(name)}={value}"], ["evaluate", option(name), value]):
            assert leaves(words) == words
    assert leaves(["--model.no-pretrained", "--help"]) == ["--model.no-pretrained", "--help"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        [str(BIN / "torchrun"), "--nproc_per_node", "1", str(RUN)],
        [str(BIN / "accelerate"), "launch", str(RUN)],
    ],
)
def test_a_real_launcher_hands_every_option_on(command, tmp_path, capsys):
    words = [word for name, value in values_for_every_option() for word in (option(name), value)]
    words += ["--train.epochs", "2", "--print-config", "true", "--run-dir", "elsewhere"]
    done = program(*words, cwd=tmp_path, command=command)
    assert done.returncode == 0, done.stderr
    assert read_request(words) is None
    assert done.stdout == capsys.readouterr().out


# What may change on resuming.


def test_only_what_decides_what_is_learned_counts_as_changed():
    config = read_request([]).config
    before = yaml.safe_load(config.as_yaml())
    assert changed(before, config) == []
    free = ["--data.root", "x", "--data.workers", "9", "--train.micro-batch", "3", "--log.every-steps", "5"]
    free += ["--checkpoint.keep", "9", "--tracking.wandb", "offline", "--debug.batch-digest", "keys"]
    assert changed(before, read_request([*free, "--train.max-steps", "9"]).config) == []
    decisive = ["--seed", "4", "--optim.lr", "0.5", "--train.global-batch", "32", "--model.name", "x"]
    lines = changed(before, read_request(decisive).config)
    assert sorted(line.split(":")[0] for line in lines) == sorted(
        [
            "seed",
            "optim.lr",
            "train.global_batch",
            "model.name",
            *(["data.lanes"] * ("data.lanes" in str(lines))),
        ]
    )


def test_where_steps_fix_the_schedule_their_number_decides():
    words = ["--train.epochs", "none", "--train.max-steps"]
    before = yaml.safe_load(read_request([*words, "10"]).config.as_yaml())
    (line,) = changed(before, read_request([*words, "11"]).config)
    assert line == "train.max_steps: 10 -> 11"


def test_mistakes_of_every_kind_are_told_together(recipe):
    path = recipe("train: {epochs: 0}\nmodell: {}\n")
    words = ["--train.epoch", 3, "--fresh", "maybe", "--train.global-batch", -3, "--config", path]
    mistakes, code = mistakes_of(*words)
    assert code == "USAGE"
    assert len(mistakes) == 5
    told = "\n".join(mistakes)
    for word in (
        "--train.epoch:",
        "--fresh: 'maybe'",
        "--train.global-batch: '-3'",
        "train.epochs: 0",
        "modell",
    ):
        assert word in told
