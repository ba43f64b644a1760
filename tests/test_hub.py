"""The Hugging Face Hub: downloads through its cache, pushes, and one line for each failure."""

import dataclasses
import json
import shutil
from pathlib import Path

import hub_server
import jax
import numpy as np
import pytest
from conftest import GOLDEN
from safetensors.numpy import save

import emu_jax
from emu_jax import checkpoint, cli, hub, publish
from emu_jax.config import CFormerConfig, digits, emu2, save_json
from emu_jax.convert import tensor_files
from emu_jax.convert.convert import convert
from emu_jax.convert.init import FreshSource, init
from emu_jax.convert.source import MULTIMODAL
from emu_jax.data.pipeline import DataConfig
from emu_jax.data.sources import SourceConfig
from emu_jax.errors import UserError
from emu_jax.hub import HubAddress, HubSource, wanted_files
from emu_jax.publish import push
from emu_jax.sharding import make_mesh
from emu_jax.train.config import TrainConfig, WandbConfig
from emu_jax.train.config_file import load_config

# huggingface_hub uploads to anything but its own storage with a call that its client deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

SD = ("unet", "vae", "scheduler")
CARD = b"---\nlicense: other\nlicense_name: tiny-license\n---\n# Tiny\n"


@pytest.fixture(scope="module")
def release():
    """The files of the golden release, with a model card."""
    files = {
        path.relative_to(GOLDEN).as_posix(): path.read_bytes()
        for folder in ("multimodal_encoder", "unet", "vae", "scheduler", "tokenizer")
        for path in sorted((GOLDEN / folder).rglob("*"))
        if path.is_file()
    }
    return {**files, "Emu.json": (GOLDEN / "Emu.json").read_bytes(), "README.md": CARD}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of the Hub's API, and an empty cache."""
    from huggingface_hub import close_session, constants

    with hub_server.serving() as (served, url):
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        close_session()
        yield served
        close_session()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The golden model as a run directory that knows where it comes from."""
    path = tmp_path_factory.mktemp("hub") / "private-name" / "run"
    convert(GOLDEN, path, mesh=make_mesh())
    origin = HubSource(f"hf://baai/emu@{'a' * 40}/pretrain", "hf://baai/emu/pretrain", "mit")
    hub.record_sources(path, {"model": origin})
    return path


def parameters(path):
    shapes = checkpoint.stored_shapes(path / "0" / "params")
    wanted = {k: jax.ShapeDtypeStruct(s.shape, s.dtype) for k, s in shapes.items()}
    return {k: np.asarray(v) for k, v in checkpoint.read_params(path, wanted).items()}


@pytest.fixture(scope="module")
def run_parameters(run):
    return parameters(run)


def assert_same_parameters(path, expected):
    read = parameters(path)
    assert read.keys() == expected.keys()
    assert all(np.array_equal(read[key], expected[key]) for key in expected)


def test_addresses():
    for text, parsed in (
        ("hf://a/b", HubAddress("a/b")),
        ("hf://a/b@v1.0", HubAddress("a/b", "v1.0")),
        ("hf://a/b/c/d/", HubAddress("a/b", "", "c/d")),
        ("hf://a-x/b.c@main/d.pt", HubAddress("a-x/b.c", "main", "d.pt")),
        ("hf://a/b@refs/pr/4", HubAddress("a/b", "refs/pr/4")),
        ("hf://a/b@refs/pr/12/c", HubAddress("a/b", "refs/pr/12", "c")),
    ):
        assert HubAddress.parse(text) == parsed
        assert HubAddress.parse(str(parsed)) == parsed
    for text in ("hf://a", "hf://a/b/../c", "hf:/a/b", "hf://../b", "hf://a/b@"):
        with pytest.raises(UserError, match="hf://ORG/NAME"):
            HubAddress.parse(text)


def test_a_second_copy_of_weights_is_left_out():
    def wanted(*names, subpath="", folders=()):
        return wanted_files(names, subpath, folders)

    card = "README.md"
    shards = ("model-00001-of-00002.safetensors", "model.safetensors.index.json")
    old = ("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "flax.msgpack")
    assert wanted(*shards, *old, "config.json") == [*shards, "config.json", card]
    assert wanted(*old) == [*old[:2], card]
    denoiser = "unet/diffusion_pytorch_model"
    files = [f"{denoiser}{end}" for end in (".bin", ".fp16.safetensors", ".safetensors")]
    text = "unet/model.bin"  # another model of the folder
    assert wanted(*files, text) == [files[2], text, card]
    assert wanted(*files[:2]) == [files[0], card]  # full precision, in the only format
    assert wanted("unet/a", "vae/a", "sd.ckpt", card, folders=("unet",)) == ["unet/a", card]
    assert wanted("x/unet/a", "x/b", subpath="x", folders=("unet",)) == ["x/unet/a", card]
    assert wanted("x.pt", "y.pt", subpath="x.pt") == ["x.pt", card]


def test_convert_pins_the_commit_and_resumes(server, release, run_parameters, tmp_path, capsys):
    """A connection that breaks is opened again."""
    files = {f"pretrain/{name}": data for name, data in release.items()}
    commit = server.commit("baai/emu", {**files, "README.md": CARD, "other/huge.bin": bytes(9)})
    server.broken_after = 5000
    dst = tmp_path / "run"
    assert cli.main(["convert", "hf://baai/emu@main/pretrain", str(dst), "--json"]) == 0
    assert json.loads((dst / "sources.json").read_text()) == {
        "model": {
            "address": f"hf://baai/emu@{commit}/pretrain",
            "requested": "hf://baai/emu@main/pretrain",
            "license": "tiny-license",
        }
    }
    assert server.broken_after is None
    paths = [path for method, path in server.requests if method == "GET"]
    assert not any("huge" in path for path in paths)
    assert_same_parameters(dst, run_parameters)

    # Offline, from the cache: no request is sent.
    server.requests.clear()
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        path, source = hub.download_snapshot("hf://baai/emu/pretrain")
        assert (path / "Emu.json").is_file() and source.address.endswith(f"@{commit}/pretrain")
        capsys.readouterr()
        assert cli.main(["convert", "hf://baai/none", str(tmp_path / "x")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "offline mode is on and the cache lacks it: unset HF_HUB_OFFLINE" in line
    assert not server.requests


def test_without_a_listing_all_files_are_downloaded(server, monkeypatch):
    server.commit("org/open", {"README.md": CARD, "model/a.txt": b"a"})
    monkeypatch.setattr(hub, "_listed", lambda address: [])  # the Hub failed to answer
    path, _ = hub.download_snapshot("hf://org/open/model")
    assert (path / "a.txt").read_bytes() == b"a"


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty cache folder, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def cached(cache, name, commit, files, revision="main"):
    """Writes a repository into a cache folder, as huggingface_hub lays it out."""
    folder = cache / f"models--{name.replace('/', '--')}"
    ref = folder / "refs" / revision
    ref.parent.mkdir(parents=True)
    ref.write_text(commit)
    for number, (path, data) in enumerate(files.items()):
        blob, link = folder / "blobs" / f"{number:040}", folder / "snapshots" / commit / path
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(data)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)


def test_load_from_a_cache_folder_offline(offline, monkeypatch, run, run_parameters):
    """A hand-made cache folder holds a run directory, whose files are links to blobs."""
    cached(offline, "org/tiny", "c" * 40, files_of(run))
    from emu_jax.generate import api

    seen = []
    monkeypatch.setattr(api, "Emu", lambda model, tokenizer, **_: seen.append((model, tokenizer)))
    emu_jax.load("hf://org/tiny@" + "c" * 40)
    snapshot = offline / "models--org--tiny" / "snapshots" / ("c" * 40)
    with hub.downloaded("hf://org/tiny") as copy:
        assert copy == snapshot
    with pytest.raises(UserError, match="has no absent; see .*/tree/main"):
        emu_jax.load("hf://org/tiny/absent")
    with pytest.raises(UserError, match="is hf://org/tiny/tokenizer a checkpoint"):
        emu_jax.load("hf://org/tiny/tokenizer")
    ((model, tokenizer),) = seen
    assert len(tokenizer) == model.cfg.llama.vocab_size
    kernel = run_parameters["llama.lm_head.kernel"]
    assert np.array_equal(np.asarray(model.llama.lm_head.kernel[...]), kernel)


def test_convert_from_a_cache_folder_offline(offline, release, run_parameters, tmp_path):
    files = {f"pretrain/{name}": data for name, data in release.items()}
    cached(offline, "org/emu", "d" * 40, {**files, "README.md": CARD}, revision="refs/pr/4")
    address = "hf://org/emu@refs/pr/4/pretrain"
    assert cli.main(["convert", address, str(tmp_path / "run")]) == 0
    assert_same_parameters(tmp_path / "run", run_parameters)
    source = HubSource(f"hf://org/emu@{'d' * 40}/pretrain", address, "tiny-license")
    assert hub.recorded_sources(tmp_path / "run") == {"model": source}


@pytest.fixture(scope="module")
def parents():
    """The files of the golden model's parents: {repository: {path: content}}."""
    (release,) = tensor_files.open_tensors(GOLDEN / MULTIMODAL)[0].values()
    language = {
        key.removeprefix("decoder.lm."): tensor.read()
        for key, tensor in release.items()
        if key.startswith(("decoder.lm.model.", "decoder.lm.lm_head."))
    }
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        language[key] = language[key][:512]  # without Emu's own tokens
    return {
        "org/llama": files_of(GOLDEN / "tokenizer") | {"model.safetensors": save(language)},
        "org/eva": {"eva.pt": (GOLDEN / MULTIMODAL).read_bytes()},
        "org/sd": {
            **{f"{part}/{n}": d for part in SD for n, d in files_of(GOLDEN / part).items()},
            "README.md": CARD,
            "text_encoder/model.safetensors": bytes(9),
            "v1-5.ckpt": bytes(9),
        },
    }


def init_from_the_hub(dst):
    return init(
        dst,
        llama="hf://org/llama",
        eva_clip="hf://org/eva/eva.pt",
        sd="hf://org/sd",
        model_config=GOLDEN / "Emu.json",
        cformer=CFormerConfig(width=24, layers=1, heads=3, head_width=8, mlp_width=40),
    )


def test_init_downloads_the_folders_that_it_reads(server, parents, tmp_path, monkeypatch):
    for name, files in parents.items():
        server.commit(name, files)

    def stop(*paths, **_):
        raise UserError("all parents are there")

    monkeypatch.setattr(FreshSource, "open", stop)
    with pytest.raises(UserError, match="all parents"):
        init_from_the_hub(tmp_path / "run")
    files = f"/org/sd/resolve/{server.files('org/sd')[0]}/"
    read = {path.removeprefix(files) for _, path in server.requests if path.startswith(files)}
    assert {"unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"} <= read
    assert not any("text_encoder" in path or "ckpt" in path for path in read)


def test_init_from_a_cache_folder_offline(offline, parents, run_parameters, tmp_path):
    for (name, files), letter in zip(parents.items(), "abc", strict=True):
        cached(offline, name, letter * 40, files)
    report = init_from_the_hub(tmp_path / "run")
    fresh = parameters(tmp_path / "run")
    inherited = {"unet.conv_in.kernel", "llama.layers.mlp.up_proj.kernel", "visual.pos_embed"}
    assert not inherited & set(report.fresh)
    for key in inherited:
        assert np.array_equal(fresh[key], run_parameters[key]), key
    assert hub.recorded_sources(tmp_path / "run") == {
        "llama": HubSource(f"hf://org/llama@{'a' * 40}", "hf://org/llama"),
        "eva_clip": HubSource(f"hf://org/eva@{'b' * 40}/eva.pt", "hf://org/eva/eva.pt"),
        "sd": HubSource(f"hf://org/sd@{'c' * 40}", "hf://org/sd", "tiny-license"),
    }


@pytest.mark.slow
def test_a_pull_of_a_push_has_the_same_bits(server, run, run_parameters, tmp_path, capsys):
    (run / "generation.json").write_text('{"max_new_tokens": 7}')
    (run / "metrics.jsonl").write_text(f'{{"host": "secret", "workdir": "{run}"}}\n')
    assert cli.main(["push", str(run), "hf://me/tiny", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    commit, files = server.files("me/tiny")
    assert result["commit"] == commit and result["license"] == "mit"
    assert result["files"] == len(files) and server.uploads > 0
    assert not any(str(run).encode() in data or b"private-name" in data for data in files.values())
    assert "metrics.jsonl" not in files and "generation.json" in files
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: ") and 'license: "mit"' in card
    assert '- "baai/emu"' in card and 'emu_jax.load("hf://me/tiny")' in card

    assert cli.main(["convert", "hf://me/tiny", str(tmp_path / "pulled")]) == 0
    assert_same_parameters(tmp_path / "pulled", run_parameters)

    # A second push needs --overwrite, and leaves no old file behind.
    with pytest.raises(UserError, match="has files: use --overwrite"):
        push(run, "hf://me/tiny")
    push(run, "hf://me/tiny", to="emu", overwrite=True, license="apache-2.0")
    _, files = server.files("me/tiny")
    assert "multimodal_encoder/pytorch_model.bin" in files and "config.json" not in files
    assert 'license: "apache-2.0"' in files["README.md"].decode()


def test_each_failure_is_one_line(server, release, run, tmp_path, capsys, monkeypatch):
    server.commit("org/open", {"README.md": CARD})
    server.commit("org/empty", {})
    server.commit("org/gated", release)
    server.gated.add("org/gated")
    server.commit("org/shared", {".gitattributes": b""})
    server.read_only.add("org/shared")
    with pytest.raises(UserError, match="the repository org/open has no sub"):
        hub.download_snapshot("hf://org/open/sub")
    assert not any("/resolve/" in path for _, path in server.requests)  # nothing is downloaded
    cases = {
        "hf://org/gated": "it is gated: accept its terms at http://127.0.0.1",
        "hf://org/none": "it does not exist or is private: check the name",
        "hf://org/open@v9": "it has no revision 'v9'",
        "hf://org/open/sub": "the repository org/open has no sub",
        "hf://org/open": "error: hf://org/open is neither a release",
        "hf://org/empty": "the repository org/empty has no files",
        "hf://org": "not an address on the Hub: write hf://ORG/NAME",
        "https://huggingface.co/org/open": "write hf://org/open, or use a local path",
    }
    dst = tmp_path / "dst"
    commands = {message: ["convert", text, str(dst)] for text, message in cases.items()}
    commands["is hf://org/open a checkpoint"] = [
        *("serve", "--port", "0", "--checkpoint", "hf://org/open")
    ]
    commands["hf://org/open has no tokenizer.json"] = [
        *("init", str(dst), "--llama", "hf://org/open"),
        *("--eva-clip", "hf://org/open", "--sd", "hf://org/open"),
    ]
    commands["access is denied (403): log in"] = ["push", str(run), "hf://org/shared"]
    commands["with a token that may write"] = ["push", str(run), "hf://others/x"]
    commands["names a revision: push to the repository"] = ["push", str(run), "hf://me/x@v1"]
    for message, arguments in commands.items():
        assert cli.main(arguments) == 2, message
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert line.startswith("emu-jax: error: ") and message in line, line
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for arguments in (["convert", "hf://org/never", str(dst)], ["push", str(run), "hf://me/x"]):
        assert cli.main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert "http://127.0.0.1:9 cannot be reached" in line
        assert ("the cache lacks it" in line) == (arguments[0] == "convert")
    assert not dst.exists()
    address = hub.HubAddress.parse("hf://me/x")
    with pytest.raises(UserError, match="HF_HUB_DISABLE_XET"), hub._explained(address, "upload to"):
        raise ConnectionError("Network error: 404")
    with pytest.raises(UserError, match="cannot be reached"), hub._explained(address):
        raise ConnectionResetError(104, "Connection reset by peer")


def test_the_card_says_what_was_trained(run, tmp_path):
    """Sources by name, hyperparameters, newest held-out values; no path, host or account."""
    trained = tmp_path / "trained"
    shutil.copytree(run, trained)
    (trained / "sources.json").unlink()
    source = SourceConfig(name="laion", format="webdataset", paths=("/secret/laion/*.tar",))
    data = DataConfig(root="/secret/root", sources=(source,))
    cfg = TrainConfig(
        name="x",
        data=data,
        steps=900,
        init_from="../first",
        wandb=WandbConfig(entity="secret-team"),
    )
    save_json(cfg, trained / "train.json")
    first = load_config(TrainConfig, Path("configs/digits_clip.py"), ["steps=50"])
    first = dataclasses.replace(
        first, init_from=str(run), data=dataclasses.replace(first.data, root="/secret/root")
    )
    (tmp_path / "first" / "40").mkdir(parents=True)
    (tmp_path / "first" / "40" / checkpoint.COMMIT_MARKER).touch()
    save_json(first, tmp_path / "first" / "train.json")
    rows = [
        {"stage": "x", "evaluation": "heldout", "step": step, "time": 1.0, "seconds": 2.0}
        | {"text_loss": loss}
        for step, loss in ((10, 3.25), (20, 1.125))
    ]
    (trained / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = push(trained, "hf://me/x", out=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert report.commit == "" and report.license == "mit"  # of the first run's own parent
    assert "| laion | webdataset | 1 |" in card and "| step | 0 of 900 |" in card
    stages = ["| `digits_clip` | clip | 40 | 128 | digits |", "| `x` | emu | 0 | 128 | laion |"]
    assert "\n".join(stages) in card
    command = "emu-jax train --config configs/digits_clip.py --workdir runs/digits_clip"
    assert f"{command} \\\n  --config.steps=50\n# The config of x does not come with" in card
    assert "These keys also differ from the configs: `init_from`." in card
    assert "`heldout` at step 20" in card and "| text_loss | 1.125 |" in card
    everything = b"".join(p.read_bytes() for p in Path(tmp_path / "out").rglob("*") if p.is_file())
    assert b"secret" not in everything and b"private-name" not in everything
    assert 'emu.generate_image(["a red circle"])' in card
    digits_card = publish.model_card(
        tmp_path / "first", HubAddress("me/x"), digits(), to="jax", license="", parents=[]
    )
    assert 'emu.generate_image(["the digit seven"])' in digits_card


def test_the_card_of_an_emu2_names_its_paper_and_connector(tmp_path):
    for cfg, paper, connector in (
        (emu2(), "2312.13286", "its projections"),
        (digits(), "2307.05222", "the Causal Transformer"),
    ):
        address = HubAddress("me/x")
        card = publish.model_card(tmp_path, address, cfg, to="hf", license="", parents=[])
        assert paper in card and f"The visual encoder and {connector} have no counterpart" in card


def test_a_layout_is_that_of_the_release_s_files(run, tmp_path):
    with pytest.raises(UserError, match="--layout hub is for --to emu, not --to jax"):
        push(run, "hf://me/x", layout="hub", out=tmp_path / "out")
    with pytest.raises(UserError, match="--layout native is for --to emu, not --to hf"):
        convert(run, tmp_path / "out", to="hf", layout="native")
    with pytest.raises(UserError, match="--layout native is for Emu2"):  # as `convert` says
        push(run, "hf://me/x", to="emu", layout="native", out=tmp_path / "out")


def test_all_parents_decide_the_license(tmp_path):
    """Also those of one role, of which each came from another repository."""
    for name in ("mit", "apache-2.0"):
        (tmp_path / name).mkdir()
        source = HubSource(f"hf://org/{name}@{'a' * 40}", f"hf://org/{name}", name)
        hub.record_sources(tmp_path / name, {"model": source})
    trained = tmp_path / "trained"
    trained.mkdir()
    parents = {"llama": str(tmp_path / "apache-2.0")}
    cfg = TrainConfig(name="x", data=DataConfig(), init_from=str(tmp_path / "mit"), parents=parents)
    save_json(cfg, trained / "train.json")
    found = list(publish._parents(trained))
    assert [source.license for _, source in found] == ["mit", "apache-2.0"]
    assert publish._common_license(found) == "" and publish._common_license(found[:1]) == "mit"
