"""The plug-ins of lmms-eval and VLMEvalKit, with stand-ins for the harnesses and for the model."""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from emu_jax import config
from emu_jax.errors import UserError
from emu_jax.evaluate.harnesses import model as core
from emu_jax.evaluate.harnesses.model import ChatTurn, HarnessModel
from emu_jax.generate.settings import GenerationConfig

PLUGINS = "emu_jax.evaluate.harnesses"
RED, BLUE = Image.new("RGB", (2, 2), "red"), Image.new("RGB", (2, 2), "blue")


class Echo:
    """Stands in for a model: answers with its prompt, and notes how it was asked."""

    def __init__(self, instruct=False, cfg=None):
        self.cfg, self.asked = cfg or config.digits(), []
        self.tokenizer = SimpleNamespace(instruct=instruct, encode=self.encode)
        self.defaults = GenerationConfig.of(self.cfg).replace(system="Be kind.")

    @staticmethod
    def encode(text, bos=True):
        return [len(word) for word in text.split(" ")]

    def generate_text(self, prompts, **settings):
        self.asked.append((len(prompts), settings))
        return ["|".join(map(self.spelled, prompt)) for prompt in prompts]

    def generate_ids(self, prompts, *, max_new_tokens, **settings):
        assert settings["num_beams"] == 1 and not settings["do_sample"]
        said = np.full((len(prompts), max_new_tokens + 1), 3)
        said[:, 0] = 1  # <s>
        return said

    def log_likelihoods(self, prompts, candidates):
        assert self.defaults.system is None  # `Emu` refuses one beside a spelled prompt
        self.asked.append((len(prompts), candidates))
        return [[-float(len(c)) for c in row] for row in candidates]

    @staticmethod
    def spelled(part):
        if isinstance(part, Image.Image):
            return {(255, 0, 0): "RED", (0, 0, 255): "BLUE"}[part.getpixel((0, 0))]
        return str(part)


@pytest.fixture
def harness(monkeypatch):
    """Puts modules of a harness in its place, and imports a plug-in."""

    def install(plugin, echo, **modules):
        for name, contents in modules.items():
            parts = name.split("__")
            for depth in range(1, len(parts)):
                package = ".".join(parts[:depth])
                monkeypatch.setitem(sys.modules, package, ModuleType(package))
            module = ModuleType(".".join(parts))
            vars(module).update(contents)
            monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(core, "load", lambda checkpoint, **settings: echo)
        monkeypatch.delitem(sys.modules, f"{PLUGINS}.{plugin}", raising=False)
        return importlib.import_module(f"{PLUGINS}.{plugin}")

    return install


def user(*parts):
    return ChatTurn("user", list(parts))


def test_images_stand_where_the_text_marks_them():
    assert core.interleaved([RED, BLUE, "a <image> b <image>"]) == ["a ", RED, " b ", BLUE]
    assert core.interleaved([RED, "<image>", "c"]) == [RED, "c"]
    assert core.interleaved([RED, BLUE, "only <image> one"]) == [RED, BLUE, "only ", " one"]
    assert core.interleaved([RED, "no mark"]) == [RED, "no mark"]


def test_a_dialogue_is_spelled_as_the_model_reads_it():
    dialogue = [
        ChatTurn("system", ["Be brief."]),
        user(RED),
        user("what?"),
        ChatTurn("assistant", ["red"]),
        user("sure?"),
    ]
    plain = HarnessModel(Echo(), template="{text} short answer:").answer([dialogue])
    assert plain == ["Be brief.|RED|what?|red|sure? short answer:"]
    tuned = HarnessModel(Echo(instruct=True)).answer([dialogue])[0]
    first, _, second = tuned.partition("|</s>|")
    assert first == "Be brief. [USER]: |RED|what?| [ASSISTANT]:|red"
    assert second == "[USER]: |sure?| [ASSISTANT]:"
    kind = HarnessModel(Echo(instruct=True)).answer([[user("a")]])
    assert kind == ["Be kind. [USER]: |a| [ASSISTANT]:"]
    assert HarnessModel(Echo(), template="the digit").answer([[user(RED)]]) == ["RED|the digit"]
    with pytest.raises(UserError, match="end with the user"):
        HarnessModel(Echo()).answer([dialogue[:-1]])
    with pytest.raises(UserError, match="take turns"):
        HarnessModel(Echo(instruct=True)).answer([dialogue[3:]])


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"max_new_tokens": 9, "image_aspect_ratio": "pad"}, {"max_new_tokens": 9}),
        ({"temperature": 0, "top_p": None, "num_beams": 1}, {"num_beams": 1}),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.5}, {}),
        ({"temperature": 0.7}, {"do_sample": True, "temperature": 0.7, "num_beams": 1}),
        ({"do_sample": True, "num_beams": 2}, {"do_sample": True, "num_beams": 2}),
    ],
)
def test_settings_of_a_task(given, expected):
    assert core.task_settings(given) == {"do_sample": False} | expected


def test_settings_of_the_model_win():
    echo = Echo()
    HarnessModel(echo, max_new_tokens=3).answer([[user("a")]], {"max_new_tokens": 9, "top_k": 2})
    assert echo.asked[0][1]["max_new_tokens"] == 3 and echo.asked[0][1]["top_k"] == 2
    with pytest.raises(UserError, match="did you mean"):
        HarnessModel(echo, max_new_token=3)
    with pytest.raises(UserError, match="did you mean"):  # not that the checkpoint is missing
        HarnessModel.load("missing", max_new_token=3)


def test_an_instructed_model_has_room_for_long_answers():
    """The default applies if neither the task, the user nor the checkpoint gives a limit."""

    def room(echo, settings=None, **own):
        HarnessModel(echo, **own).answer([[user("a")]], settings)
        return echo.asked[-1][1].get("max_new_tokens")

    chat = config.emu2_chat()
    assert room(Echo(instruct=True, cfg=chat)) == 512  # the release's 10 would cut it
    assert room(Echo(instruct=True)) == 128  # half of 256 positions
    assert room(Echo(cfg=chat)) is None
    assert room(Echo(instruct=True, cfg=chat), {"max_new_tokens": 9}) == 9
    assert room(Echo(instruct=True, cfg=chat), max_new_tokens=7) == 7
    tuned = Echo(instruct=True, cfg=chat)
    tuned.defaults = tuned.defaults.replace(max_new_tokens=33)  # as generation.json says
    assert room(tuned) is None


DOCUMENTS = [{"image": RED, "word": "one"}, {"image": BLUE, "word": "two six"}]
TASKS = {"digits": {"test": DOCUMENTS}}


def lmms_request(*args):
    return SimpleNamespace(args=args)


def test_lmms_eval_asks_in_messages(harness):
    echo = Echo()
    plugin = harness("lmms_eval", echo, lmms_eval__api__model={"lmms": object})
    lm = plugin.EmuChat("runs/demo", batch_size=1, device="cuda", max_new_tokens=5)
    lm.task_dict = TASKS

    def messages(doc):
        image = {"type": "image", "url": doc["image"]}
        return [
            {"role": "user", "content": [image, {"type": "text", "text": f"{doc['word']}. so"}]}
        ]

    long, short = {"until": ["."], "num_beams": 2}, {"until": []}
    requests = [
        lmms_request("", messages, settings, n, "digits", "test")
        for n, settings in [(0, long), (1, short), (1, long)]
    ]
    answers = lm.generate_until(requests)
    assert answers == ["RED|one", "BLUE|two six. so", "BLUE|two six"]
    assert [count for count, _ in echo.asked] == [2, 1]  # those with the same settings at once
    assert [settings.get("num_beams") for _, settings in echo.asked] == [2, None]
    assert not lm.is_simple
    with pytest.raises(UserError, match="force_simple"):
        lm.loglikelihood(requests)
    sound = lambda doc: [{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}]  # noqa: E731
    with pytest.raises(UserError, match="audio"):
        lm.generate_until([lmms_request("", sound, {}, 0, "digits", "test")])


def test_lmms_eval_compares_losses(harness):
    echo = Echo()
    plugin = harness(
        "lmms_eval",
        echo,
        lmms_eval__api__model={"lmms": object},
        lmms_eval__api__instance={"GenerationResult": lambda text: text},
    )
    lm = plugin.EmuSimple("runs/demo")
    lm.task_dict = TASKS
    visual = lambda doc: [doc["image"]]  # noqa: E731
    target = lambda doc: f" {doc['word']}"  # noqa: E731
    rows = [(0, " one"), (1, " three"), (0, " six nine"), (1, target)]
    requests = [
        lmms_request("the digit", cont, visual, doc, "digits", "test") for doc, cont in rows
    ]
    losses = lm.loglikelihood(requests)
    # The stand-in says words of three letters alone, and each letter costs 1.
    assert losses == [(3.0, True), (5.0, False), (4.0, False), (3.5, True)]
    assert echo.asked == [(2, [["one", "six nine"], ["three", "two six"]])]
    asked = lmms_request("<image> is", {"until": "\n"}, visual, 1, "digits", "test")
    assert lm.generate_until([asked]) == ["BLUE| is"] and lm.is_simple


def test_lmms_eval_finds_the_models(harness, monkeypatch):
    plugin = harness("lmms_eval", Echo(), lmms_eval__api__model={"lmms": object})
    registry = ModuleType("lmms_eval.models.registry_v2")
    registry.ModelManifest = lambda name, **paths: (name, paths)
    monkeypatch.setitem(sys.modules, "lmms_eval.models", ModuleType("lmms_eval.models"))
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    name, paths = importlib.import_module(PLUGINS).lmms_eval_manifest()
    assert name == "emu_jax"
    for kind, path in paths.items():
        module, _, cls = path.rpartition(".")
        assert module == plugin.__name__
        assert getattr(plugin, cls).is_simple == kind.startswith("simple")


def test_vlmevalkit_runs_with_the_checkpoint(harness, tmp_path, monkeypatch):
    echo, models, ran = Echo(), {}, []
    RED.save(tmp_path / "red.png")
    monkeypatch.setattr(sys, "argv", ["harness"])
    plugin = harness(
        "vlmevalkit",
        echo,
        vlmeval__vlm__base={"BaseModel": object},
        vlmeval__config={"supported_VLM": models},
        vlmeval__run={"main": lambda: ran.append(sys.argv[1:])},
    )
    arguments = ["--checkpoint", "runs/demo", "--set", "num_beams=1", "--template", "Q: {text}"]
    plugin.main([*arguments, "--data", "Digits", "--mode", "infer"])
    assert ran == [["--model", "emu_jax", "--data", "Digits", "--mode", "infer"]]
    vlm = models["emu_jax"]()
    image = {"type": "image", "value": str(tmp_path / "red.png")}
    question = [image, {"type": "text", "value": "which digit?"}]
    assert vlm.generate_inner(question, dataset="Digits") == f"{image['value']}|Q: which digit?"
    turns = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "value": "one"}]},
        {"role": "user", "content": [{"type": "text", "value": "sure?"}]},
    ]
    assert vlm.chat_inner(turns).endswith("which digit?|one|Q: sure?")
    assert echo.asked[0][1]["num_beams"] == 1
    with pytest.raises(UserError, match="num_beam"):
        plugin.main(["--checkpoint", "runs/demo", "--set", "num_beam=1"])
