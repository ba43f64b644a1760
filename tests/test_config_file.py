"""Config files and the command line's overrides on top of them."""

import dataclasses
import json
from pathlib import Path

import pytest

from emu_jax import checkpoint
from emu_jax.config import EmuConfig, LlamaConfig, digits, from_dict, to_dict
from emu_jax.data import DataConfig
from emu_jax.errors import UserError
from emu_jax.storage import shipped
from emu_jax.train.config import TrainConfig
from emu_jax.train.config_file import load_config, read_config

SOURCE = """
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict()
    config.steps = 100
    config.name = "digits"
    config.rate = 0.5
    config.keep = True
    config.nothing = None
    config.sizes = (1, 2)
    config.groups = [dict(lr=1e-3), ConfigDict(dict(lr=2e-3, pattern="x"))]
    config.model = ConfigDict(dict(llama=dict(width=64)))
    config.parents = ConfigDict()
    return config
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "digits.py"
    path.write_text(SOURCE)
    return path


@pytest.mark.parametrize(
    "override, key, value",
    [
        ("steps=7", "steps", 7),
        ("steps=1_000", "steps", 1000),
        ("rate=2", "rate", 2.0),
        ("rate=1e-4", "rate", 1e-4),
        ("name=emu", "name", "emu"),
        ("name=12", "name", "12"),
        ("name=a=b", "name", "a=b"),
        ("name=", "name", ""),
        ("keep=False", "keep", False),
        ("keep=false", "keep", False),
        ("nothing=3", "nothing", 3),
        ("nothing=words", "nothing", "words"),
        ("nothing={'a': (1, 2)}", "nothing", {"a": [1, 2]}),
        ("rate=None", "rate", None),
        ("sizes=(3,)", "sizes", [3]),
        ("sizes.1=5", "sizes", [1, 5]),
        ("groups.1.lr=1", "groups", [{"lr": 1e-3}, {"lr": 1.0, "pattern": "x"}]),
        ("model.llama.width=32", "model", {"llama": {"width": 32}}),
        ("parents.vae=../vae", "parents", {"vae": "../vae"}),
    ],
)
def test_overrides(config_file, override, key, value):
    before = read_config(config_file, []).to_dict()
    after = read_config(config_file, [override]).to_dict()
    assert after[key] == value and type(after[key]) is type(value)
    assert before[key] != after[key]
    assert {**before, key: value} == after  # nothing else


def test_an_empty_group_takes_several_keys(config_file):
    after = read_config(config_file, ["parents.unet=../fresh", "parents.vae=../fresh"])
    assert after.parents.to_dict() == {"unet": "../fresh", "vae": "../fresh"}


@pytest.mark.parametrize(
    "override, message",
    [
        ("step=7", "unknown config key 'step'; did you mean 'steps'?"),
        ("model.lama.width=7", "unknown config key 'model.lama'; did you mean 'llama'?"),
        ("model.llama.widht=7", "unknown config key 'model.llama.widht'; did you mean 'width'?"),
        ("zzz=7", "unknown config key 'zzz'; known: groups, keep, model,"),
        ("steps.x=7", "unknown config key 'steps.x'; 'steps' is a value, not a group"),
        ("groups.2.lr=7", "unknown config key 'groups.2'; 'groups' is a list of 2"),
        ("groups.².lr=7", "unknown config key 'groups.²'; 'groups' is a list of 2"),
        (f"groups.{'9' * 5000}.lr=7", "unknown config key 'groups.999"),
        ("steps=many", "config key 'steps' must be int, not 'many'"),
        ("steps=1.5", "config key 'steps' must be int, not '1.5'"),
        ("steps=True", "config key 'steps' must be int, not 'True'"),
        ("keep=1", "config key 'keep' must be bool, not '1'"),
        ("rate=high", "config key 'rate' must be float, not 'high'"),
        ("sizes=3", "config key 'sizes' must be list, not '3'"),
        ("model.llama=3", "config key 'model.llama' is a group: set one of its keys; known: width"),
        ("steps", "--config.steps has no value: write --config.steps=VALUE"),
    ],
)
def test_mistakes_in_overrides(config_file, override, message):
    with pytest.raises(UserError) as error:
        read_config(config_file, [override])
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "source, message",
    [
        ("x = 1\n", "defines no get_config()"),
        ("def get_config():\n    return 3\n", "get_config() must return a ConfigDict, not 3"),
        ("def get_config(:\n", "line 1: SyntaxError"),
        ("def get_config():\n    x = 1\n    return x.y\n", "line 3: AttributeError"),
        ("\nimport no_such_module\n", "line 2: ModuleNotFoundError"),
    ],
)
def test_mistakes_in_the_file(tmp_path, source, message):
    path = tmp_path / "broken.py"
    path.write_text(source)
    with pytest.raises(UserError) as error:
        read_config(path, [])
    assert str(path) in str(error.value) and message in str(error.value)


def test_missing_file_suggests_its_neighbour(config_file):
    path = config_file.with_name("digit.py")
    with pytest.raises(UserError) as error:
        read_config(path, [])
    assert str(error.value) == f"no config file {path}; did you mean 'digits'?"


def test_a_config_of_the_package_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_config(Path("configs/digits.py"), []) == read_config(
        shipped("configs") / "digits.py", []
    )
    with pytest.raises(UserError, match="did you mean 'digits'"):
        read_config(Path("configs/digit.py"), [])
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "digits.py").write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n    return ConfigDict({'a': 1})\n"
    )
    assert read_config(Path("configs/digits.py"), []).a == 1  # one's own comes first


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("llama.heads", 3, "llama.width = 128 must be a multiple of twice llama.heads = 6"),
        ("llama.heads", 0, "llama.heads = 0 must be positive"),
        ("llama.width", -128, "llama.width = -128 must be positive"),
        ("llama.width", 10**12, "llama.width = 1000000000000 must be at most 1048576"),
        ("llama.layers", 10**6, "llama.layers = 1000000 must be at most 4096"),
        ("llama.rope_theta", float("nan"), "llama.rope_theta = nan must be positive, and finite"),
        ("llama.eps", float("inf"), "llama.eps = inf"),
        ("llama.rope_dtype", "bfloat61", "did you mean 'bfloat16'"),
        ("llama.lora", {"alpha": float("nan")}, "LoRA alpha nan"),
        ("llama.lora", {"rank": 10**9}, "llama.lora.rank"),
        ("tokens.image", 10**6, "tokens .* must be different ids below llama.vocab_size = 350"),
        ("tokens.img", 2, "must be different ids"),
        ("vision.head_width", 25, "vision.width = 96 must be a multiple"),
        ("vision.image_size", 33, "must be a multiple of vision.patch_size"),
        ("unet.block_out_channels", [48, 90], "= 90 must be a multiple of unet.norm_num_groups"),
        ("unet.block_out_channels", [48], "one entry for each level"),
        ("unet.block_out_channels", [], "must not be empty"),
        ("scheduler.beta_end", -1.0, "scheduler.beta_end = -1.0 must be positive"),
    ],
)
def test_impossible_models_are_one_line(tmp_path, key, value, message):
    """As edited in a run's config.json: the line names the file and the key."""
    config = to_dict(digits(346))
    *groups, last = key.split(".")
    node = config
    for group in groups:
        node = node[group]
    node[last] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as error:
        checkpoint.load_model_config(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: ")


@dataclasses.dataclass(frozen=True)
class Stage:
    steps: int = 10
    rate: float = 0.1
    model: EmuConfig = EmuConfig()
    parents: dict[str, str] = dataclasses.field(default_factory=dict)


def load(tmp_path, body, *overrides):
    path = tmp_path / "stage.py"
    path.write_text(
        "from ml_collections import ConfigDict\nfrom emu_jax.config import digits\n"
        f"def get_config():\n    return ConfigDict({body})\n"
    )
    return load_config(Stage, path, list(overrides))


def test_load_lays_the_file_over_the_defaults(tmp_path):
    assert load(tmp_path, "dict()") == Stage()
    # Also keys that the file leaves out can be overridden.
    stage = load(tmp_path, "dict(steps=20)", "rate=1", "model.llama.width=160", "model.vae=None")
    assert (stage.steps, stage.rate) == (20, 1.0)
    assert stage.model == EmuConfig(llama=LlamaConfig(width=160), vae=None)
    stage = load(tmp_path, "dict(model=digits(40), parents=dict(vae='a'))", "steps=3")
    assert stage == Stage(steps=3, model=digits(40), parents={"vae": "a"})
    lora = load(tmp_path, "dict()", "model.llama.lora={'rank': 4}").model.llama.lora
    assert lora is not None and (lora.rank, lora.alpha) == (4, 16.0)


@pytest.mark.parametrize(
    "body, override, message",
    [
        ("dict(stepz=1)", "steps=1", "unknown config key 'stepz'; did you mean 'steps'?"),
        ("dict(model=dict(vea=1))", "steps=1", "unknown config key 'model.vea'"),
        ("dict(steps='1')", "rate=1", "config key 'steps' must be int"),
        ("dict()", "steps=None", "config key 'steps' must be int, not None"),
        ("dict()", "model.llama.lora={'rnk': 4}", "unknown config key 'model.llama.lora.rnk'"),
    ],
)
def test_load_reports_what_the_dataclass_forbids(tmp_path, body, override, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, body, override)


def test_former_names_of_keys_are_read(tmp_path):
    """Run directories and command lines from before `picture_first` became `image_first`."""
    saved = to_dict(DataConfig(image_first=0.25))
    saved["picture_first"] = saved.pop("image_first")
    assert from_dict(DataConfig, saved).image_first == 0.25
    path = tmp_path / "config.py"
    path.write_text("from ml_collections import ConfigDict\nget_config = ConfigDict\n")
    assert load_config(TrainConfig, path, ["data.picture_first=0.75"]).data.image_first == 0.75
    with pytest.raises(UserError, match="'data.image_first' and its former name are both set"):
        from_dict(TrainConfig, {"data": saved | {"image_first": 0.5}})
    with pytest.raises(UserError, match="unknown config key 'picture_first'"):
        from_dict(LlamaConfig, {"picture_first": 0.5})
