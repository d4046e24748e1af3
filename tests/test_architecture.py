"""The shape of the program: who may import whom, how large a part may grow, and what appears nowhere."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import typing
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("launch", "training", "data_pipeline")
MODULE_LINES, FUNCTION_LINES = 250, 60

# Lowest first. A module of training imports modules of training only from the lines above its own.
TRAINING_LAYERS = [
    {
        "buffer_copies",
        "checkpoints",
        "checkpoints.priority",
        "checkpoints.retention",
        "config.arguments",
        "config.durations",
        "console",
        "exact",
        "exact.halving",
        "exact.machine",
        "exact.running_statistics",
        "exact.sum_tree",
        "hardware",
        "journal",
        "name_patterns",
        "networks",
        "networks.names",
        "networks.outputs",
        "networks.sizes",
        "networks.spec",
        "networks.synced_batch_norm",
        "networks.torch_files",
        "networks.unet",
        "nonfinite.layer_watch",
        "plugins",
        "prediction.mask_names",
        "process_group",
        "save_times",
        "scores",
        "scores.confusion",
        "scores.ranking",
        "stopwatch",
        "vigil.ending",
        "vigil.guard_program",
        "vigil.siblings",
        "vigil.verdict",
    },
    {
        "checkpoints.tensor_file",
        "config.tree",
        "exact.flat_gradients",
        "freezing",
        "gradient_sums",
        "networks.catalogue",
        "networks.mlp",
        "plots",
        "vigil.contact",
        "vigil.pid_files",
        "vigil.place",
        "vigil.stacks",
    },
    {
        "checkpoints.manifest",
        "checkpoints.snapshot",
        "config.loss",
        "config.model",
        "config.schedule",
        "config.train",
        "config.transform_parameters",
        "config.update_rules",
        "exact.grain_sums",
        "flags",
        "networks.first_convolution",
        "vigil.guard",
        "vigil.pace",
        "vigil.spokesman",
    },
    {
        "checkpoints.protocol",
        "config.optim",
        "config.transforms",
        "early_stop",
        "networks.fitting",
        "networks.libraries",
        "networks.options",
        "networks.published",
        "vigil",
    },
    {
        "checkpoints.writer",
        "clipping",
        "config.data",
        "networks.build",
        "networks.pretrained",
        "parameter_groups",
        "schedules",
    },
    {"config", "optim"},
    {
        "accounting",
        "exact.conditions",
        "inputs",
        "manual",
        "process",
        "reading",
        "state",
        "tracking",
        "vigil.joining",
    },
    {
        "bad_samples",
        "checkpoints.storage_failures",
        "command",
        "counts",
        "early_signals",
        "objective",
        "stop_flag",
    },
    {"checkpoints.weight_copies", "losses.elements", "step_report", "tasks.task"},
    {
        "evaluation",
        "initial_weights",
        "losses.overlap",
        "losses.own",
        "losses.pointwise",
        "prediction.inputs",
        "prediction.views",
        "scores.bootstrap",
        "scores.text",
        "tasks.multiclass",
        "tasks.multilabel",
        "tasks.segmentation",
    },
    {"losses", "prediction.rows", "run_directory"},
    {"job", "labels", "prediction.masks", "prediction.table", "tasks"},
    {"assembly", "cadence", "introduction", "micro_batch", "prediction.output", "weights"},
    {"evaluate_mode", "exact.settling", "nonfinite.diagnosis", "prediction.answers", "reduction", "saver"},
    {"exact.grains", "nonfinite", "prediction"},
    {"gradients", "predict_mode", "recorder"},
    {"step"},
    {"loop", "rehearsal"},
    {"run"},
]

# What users script against: adding a name here is a decision, taking one away breaks somebody's script.
OPTIONS = {
    "": "allow_config_change config dry_run expect_processes fresh init_from print_config quiet "
    "run_dir weights task loss seed",
    "data.": "root cache cache_gib train_split val_split mean std train_transforms eval_transforms lanes "
    "shuffle_block balance mixup cutmix max_bad workers worker_kind prefetch",
    "model.": "name arguments pretrained freeze unfreeze grad_checkpointing compile channels_last",
    "optim.": "name lr weight_decay momentum arguments schedule warmup layer_decay groups "
    "clip_norm clip_value clip_adaptive",
    "train.": "global_batch micro_batch epochs max_steps max_minutes early_stop precision tf32 on_nonfinite "
    "exact grain sync_batchnorm ema timeout_seconds hang_minutes",
    "eval.": "every_epochs batch best bootstrap",
    "checkpoint.": "every_steps every_epochs every_minutes keep keep_every max_failures weights_every_epochs",
    "log.": "every_steps every_seconds",
    "tracking.": "wandb project",
    "debug.": "batch_digest",
    "predict.": "source out split top_k scores threshold tta overlay",
}


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imports_of(name):
    """Every module of ours that a module names in an import, inside functions too."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} line {node.lineno}: relative import"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {dotted if dotted in FILES else node.module for dotted in whole}
    return {dotted for dotted in found if dotted in FILES}


def package_of(dotted):
    return dotted.partition(".")[0]


def test_the_three_packages_have_modules_to_look_at():
    assert len(FILES) > 40
    assert imports_of("training.loop") > {"training.job", "training.step"}
    assert imports_of("training.run") >= {"training.command", "training.loop"}


def test_launch_imports_little_of_ours_and_nothing_heavy():
    """What a command line may hold, and how a job ends: both without torch."""
    allowed = {"training.config", "training.command", "training.vigil.ending"}
    allowed |= {"data_pipeline.command_line", "data_pipeline.fault", "data_pipeline.findings"}
    doctors = {"data_pipeline.doctor_command", "data_pipeline.doctor_report"}
    for name in FILES:
        if package_of(name) == "launch":
            strangers = {one for one in imports_of(name) if package_of(one) != "launch"}
            assert strangers <= (allowed | doctors if name == "launch.doctor" else allowed), name


def test_data_pipeline_knows_neither_training_nor_launch():
    for name in FILES:
        if package_of(name) == "data_pipeline":
            assert {package_of(one) for one in imports_of(name)} <= {"data_pipeline"}, name


def test_training_never_imports_launch_but_for_the_program_itself():
    for name in FILES:
        if package_of(name) == "training":
            may = {"training", "data_pipeline"} | ({"launch"} if name == "training.run" else set())
            assert {package_of(one) for one in imports_of(name)} <= may, name


def test_inside_training_imports_point_downwards_only():
    height = {f"training.{name}": level for level, names in enumerate(TRAINING_LAYERS) for name in names}
    ours = {name for name in FILES if package_of(name) == "training" and name != "training"}
    assert ours == height.keys(), "a new module gets a place in TRAINING_LAYERS, one that is gone leaves it"
    upward = [
        f"{name} -> {imported}"
        for name in sorted(ours)
        for imported in imports_of(name) & ours
        if height[imported] >= height[name]
    ]
    assert upward == []


def test_no_imports_go_in_circles():
    finished, under_way = set(), []

    def visit(name):
        assert name not in under_way, " -> ".join([*under_way[under_way.index(name) :], name])
        if name in finished:
            return
        under_way.append(name)
        for imported in sorted(imports_of(name)):
            visit(imported)
        under_way.pop()
        finished.add(name)

    for name in sorted(FILES):
        visit(name)


def test_run_is_a_contents_page_that_defines_nothing():
    assert len(FILES["training.run"].read_text(encoding="utf-8").splitlines()) < 80
    defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    assert [node for node in ast.walk(TREES["training.run"]) if isinstance(node, defined)] == []


def test_the_loop_fits_on_two_screens():
    assert len(FILES["training.loop"].read_text(encoding="utf-8").splitlines()) < 150


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_module_and_no_function_grows_out_of_sight(name):
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= MODULE_LINES
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= FUNCTION_LINES, f"{name}.{node.name}"


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_module_opens_with_one_sentence(name):
    text = ast.get_docstring(TREES[name])
    assert text, "a file says what it is for"
    first = text.split("\n\n")[0].rstrip()
    assert first[-1] in ".;:", first
    assert not re.search(r"\.\s+[A-Z]", first), f"one sentence, then an empty line: {first!r}"


def test_no_module_is_a_drawer_and_no_class_is_a_manager():
    drawers = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "trainer"}
    assert [name for name in FILES if drawers & set(name.split("."))] == []
    classes = [
        f"{name}.{node.name}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name.endswith(("Trainer", "Manager"))
    ]
    assert classes == []


def test_no_module_hides_one_of_pythons_or_of_a_dependency_when_its_folder_is_on_the_path():
    """`python training/run.py` puts training/ on sys.path: a `training/queue.py` would break torch."""
    installed = {name for name, owners in packages_distributions().items() if set(owners) != {"lockstep"}}
    assert {"torch", "timm", "yaml"} <= installed
    taken = installed | set(sys.stdlib_module_names)
    own = {name for name in FILES if not name.endswith("__main__")} | set(PACKAGES)
    assert [name for name in sorted(own) if name.rpartition(".")[2] in taken] == []


@pytest.mark.parametrize(
    "module",
    [
        "training.config",
        "training.command",
        "launch.__main__",
        "data_pipeline.pack_command",
        "data_pipeline.index_command",
        "data_pipeline.show_command",
        "launch.doctor",
        "data_pipeline.urls",
        "data_pipeline.plan",
    ],
)
def test_what_answers_at_once_loads_no_torch(module):
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"torch", "torchvision", "timm", "accelerate", "wandb", "sklearn", "matplotlib", "cv2"}
    if module != "data_pipeline.plan":
        heavy |= {"numpy"}
    loaded = set(done.stdout.split())
    assert package_of(module) in loaded
    assert loaded & heavy == set()


def dotted(node):
    """`torch.nn.Linear` of an expression that is one, else an empty string."""
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return node.id if isinstance(node, ast.Name) else ""


FORBIDDEN_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {
    *("torch.save", "torch.load", "os.system", "os.popen", "eval", "exec"),
    *("yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.unsafe_load_all"),
}
SAFE_LOADERS = {"yaml.SafeLoader", "yaml.CSafeLoader"}


def faults_in(tree):
    """What may run a stranger's code: unpickling, shells, YAML that builds objects."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    tensors_only = {id(call.func) for call in ast.walk(tree) if loads_tensors_only(call)}
    safe = {one.name for one in classes if {dotted(base) for base in one.bases} & SAFE_LOADERS} | SAFE_LOADERS
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named = {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            named = {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            named = {dotted(node)}
        elif isinstance(node, ast.Call):
            named = {dotted(node.func)} | set(dangers_in(node, safe))
        else:
            continue
        if id(node) in tensors_only or id(getattr(node, "func", None)) in tensors_only:
            continue
        for name in named & (FORBIDDEN_MODULES | FORBIDDEN_CALLS | DANGERS):
            yield f"line {node.lineno}: {name}"


def loads_tensors_only(node):
    """Whether a node calls torch.load such that it builds tensors and dicts of them, nothing else."""
    if not isinstance(node, ast.Call) or dotted(node.func) != "torch.load":
        return False
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    only = keywords.get("weights_only")
    return isinstance(only, ast.Constant) and only.value is True


DANGERS = {"shell=", "allow_pickle=", "yaml.load without a safe loader"}


def dangers_in(call, safe):
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    for name in ("shell", "allow_pickle"):
        value = keywords.get(name)
        if value is not None and not (isinstance(value, ast.Constant) and value.value is False):
            yield f"{name}="
    if dotted(call.func) == "yaml.load":
        loader = keywords.get("Loader", call.args[1] if len(call.args) > 1 else None)
        if loader is None or dotted(loader) not in safe:
            yield "yaml.load without a safe loader"


@pytest.mark.parametrize("name", sorted(FILES))
def test_nothing_can_run_a_strangers_code(name):
    assert list(faults_in(TREES[name])) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.save({}, 'a')",
        "import torch\ntorch.load('a')",
        "import torch\ntorch.load('a', weights_only=False)",
        "import torch\ntorch.load('a', weights_only=only)",
        "import torch\nload = torch.load",
        "from torch import load",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import yaml\nyaml.load(text)",
        "import yaml\nyaml.load(text, yaml.Loader)",
        "import yaml\nyaml.load(text, Loader=yaml.FullLoader)",
        "import numpy\nnumpy.load('a', allow_pickle=True)",
        "eval('1')",
    ],
)
def test_the_search_for_what_runs_a_strangers_code_finds_it(code):
    assert list(faults_in(ast.parse(code))) != []


def test_one_module_alone_reads_files_of_torch():
    """What others publish is often a pickle; torch's reader of tensors only is the one way in."""
    readers = [name for name in FILES if any(loads_tensors_only(node) for node in ast.walk(TREES[name]))]
    assert readers == ["training.networks.torch_files"]


def test_the_set_of_options_is_frozen():
    from training.config import Config
    from training.config.tree import fields_of
    from training.flags import Flags

    frozen = [section + name for section, names in OPTIONS.items() for name in names.split()]
    assert sorted(chain(Flags.model_fields, (name for name, _ in fields_of(Config)))) == sorted(frozen)


def test_every_option_says_what_it_is():
    from training.config import Config
    from training.config.tree import fields_of
    from training.flags import Flags

    mute = [name for name, field in chain(fields_of(Flags), fields_of(Config)) if not field.description]
    assert mute == []


def test_recipes_can_name_the_transforms_that_exist_and_no_others():
    from data_pipeline.transforms import TRANSFORMS
    from training.config import DataConfig

    step, _ = typing.get_args(DataConfig.model_fields["train_transforms"].annotation)
    assert step.model_fields.keys() == TRANSFORMS.keys()
    for name, transform in TRANSFORMS.items():
        (section,) = set(typing.get_args(step.model_fields[name].annotation)) - {type(None)}
        fields = section.model_fields
        written = {one: field.default for one, field in fields.items() if not field.is_required()}
        parameters = inspect.signature(transform).parameters.values()
        known = {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}
        assert fields.keys() == known.keys(), name
        assert written == {one: value for one, value in known.items() if value is not inspect.Parameter.empty}


def test_names_that_the_configuration_allows_are_those_that_the_program_knows():
    from training.assembly import PRECISIONS
    from training.config import Config, OptimConfig, TrainConfig
    from training.config.loss import LossTerms
    from training.config.schedule import Schedule
    from training.losses import LOSSES
    from training.optim import OPTIMIZERS
    from training.schedules import SCHEDULES
    from training.tasks import TASKS

    def choices(section, name):
        return set(typing.get_args(section.model_fields[name].annotation))

    assert choices(Config, "task") == TASKS.keys()
    assert choices(OptimConfig, "name") == OPTIMIZERS.keys()
    assert choices(TrainConfig, "precision") == PRECISIONS.keys()
    assert LossTerms.model_fields.keys() - {"own"} == LOSSES.keys()
    assert Schedule.model_fields.keys() - {"own"} == SCHEDULES.keys()


def test_every_shipped_recipe_is_a_whole_configuration_and_tells_how_to_run_it():
    from training.command import read_request
    from training.config import RECIPES, recipe_names

    assert "digits" in recipe_names()
    for name in recipe_names():
        assert read_request(["--config", name]).config.as_yaml()
        header = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").split("\ntask:")[0]
        assert "accelerate launch training/run.py" in header, name
