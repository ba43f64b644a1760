"""Later language models as parents: logits of transformers, its greedy ids, and the way back."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conftest import GOLDEN, relative_error
from flax import nnx
from test_tokenizer import write_byte_level

from emu_jax.config import CFormerConfig, emu2
from emu_jax.convert import export, release_config, source, tables
from emu_jax.convert.convert import convert
from emu_jax.convert.init import init
from emu_jax.errors import UserError
from emu_jax.generate.api import load
from emu_jax.models.llama import Llama
from emu_jax.sharding import AbstractModel, make_mesh

SIZES = {
    "vocab_size": 512,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES = {
    "llama2": (transformers.LlamaConfig, {"num_key_value_heads": 6, "rms_norm_eps": 1e-5}),
    "llama3": (transformers.LlamaConfig, {"rope_parameters": ROPE, "tie_word_embeddings": True}),
    "mistral": (
        transformers.MistralConfig,
        {"num_key_value_heads": 3, "head_dim": 8, "sliding_window": 64, "rms_norm_eps": 1e-5},
    ),
    "qwen2": (
        transformers.Qwen2Config,
        {"rope_parameters": {"rope_theta": 1e6}, "tie_word_embeddings": True},
    ),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 10, "rope_parameters": {"rope_theta": 1e6}}),
}
TIGHT = 2e-5


def random_model(family):
    """A transformers model of a family, with every parameter random."""
    torch.manual_seed(1)
    kind, more = FAMILIES[family]
    hf = transformers.AutoModelForCausalLM.from_config(kind(**{**SIZES, **more})).eval()
    for name, parameter in hf.named_parameters():
        torch.nn.init.normal_(parameter, mean="norm" in name, std=0.3)
    return hf


def one_device():
    return make_mesh(devices=jax.devices()[:1])


def build(hf, folder):
    """Our language model with the parameters of a transformers model, and its configuration."""
    hf.config.save_pretrained(folder)
    llama = release_config.llama_config(folder / "config.json")
    llama = dataclasses.replace(llama, rope_dtype="float32", regression_head=False)
    abstract = AbstractModel(lambda: Llama(llama, rngs=nnx.Rngs(0)), one_device())
    state, params = hf.state_dict(), {}
    for row in tables.llama(dataclasses.replace(emu2(), llama=llama)):
        path = row.path.removeprefix("llama.")
        shape = row.layer_shape(abstract.shapes[path].shape)
        layers = [
            row.transform.from_release(state[key.removeprefix("decoder.lm.")].numpy(), shape)
            for key in row.keys
        ]
        params[path] = jnp.asarray(np.stack(layers) if row.stacked else layers[0])
    return abstract.module(params), llama


SLOW = pytest.mark.slow
FAST = ("llama3", "qwen2", "qwen3")  # each has a feature that the others lack


@pytest.mark.parametrize(
    "family", [f if f in FAST else pytest.param(f, marks=SLOW) for f in FAMILIES]
)
def test_logits_of_transformers(family, tmp_path):
    """Logits of whole rows, and through the cache: of a prompt, and of its greedy continuation."""
    hf = random_model(family)
    llama, cfg = build(hf, tmp_path)
    prompts = torch.tensor(np.random.default_rng(0).integers(3, 512, (2, 19)))
    tokens = hf.generate(prompts, min_new_tokens=2, max_new_tokens=2, do_sample=False)
    with torch.no_grad():
        expected = hf(tokens).logits.numpy()
    tokens = tokens.numpy()
    positions = jnp.broadcast_to(jnp.arange(21), (2, 21))

    @jax.jit
    def run(tokens):
        x = llama.embed_tokens(tokens)
        whole = llama.logits(llama(x, positions))
        cache = llama.empty_cache(2, 21, jnp.float32)
        hidden = []
        for start, end in ((0, 19), (19, 20), (20, 21)):
            part = slice(start, end)
            valid = jnp.ones((2, end - start), bool)
            h, cache = llama.extend(x[:, part], positions[:, part], valid, cache)
            hidden.append(h)
        return whole, llama.logits(jnp.concatenate(hidden, 1)), jax.tree.leaves(cache.k)

    whole, cached, keys = run(jnp.asarray(tokens))
    assert relative_error(whole, expected) < TIGHT
    assert relative_error(cached, expected) < TIGHT
    np.testing.assert_array_equal(jnp.argmax(cached, -1)[:, 18:20], tokens[:, 19:])
    width = cfg.kv_heads * cfg.head_width
    assert sum(k.size for k in keys) == 2 * 2 * 21 * width  # keys are not repeated


def parent_folder(hf, folder):
    """A transformers folder with LLaMA's tokenizer, or with a byte-level BPE of fewer tokens."""
    if hf.config.model_type.startswith("qwen"):
        write_byte_level(folder, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    hf.save_pretrained(folder)
    if not (folder / "tokenizer.json").exists():
        for file in (GOLDEN / "tokenizer").glob("tokenizer*"):
            shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The visual encoder of the golden model in a file of its own."""
    path = tmp_path_factory.mktemp("encoder") / "eva.pt"
    tensors = torch.load(GOLDEN / source.MULTIMODAL, weights_only=True)
    tensors = tensors.get("module", tensors)
    torch.save({k: v for k, v in tensors.items() if k.startswith("visual.")}, path)
    return path


@SLOW
@pytest.mark.parametrize("family", FAMILIES)
def test_a_parent_comes_back_to_transformers(family, encoder, tmp_path):
    hf = random_model(family)
    init(
        tmp_path / "run",
        llama=parent_folder(hf, tmp_path / "parent"),
        eva_clip=encoder,
        sd=GOLDEN,
        model_config=GOLDEN / "Emu.json",
        cformer=CFormerConfig(width=24, layers=1, heads=3, head_width=8, mlp_width=40),
        mesh=one_device(),
    )
    config = tmp_path / "run" / "config.json"
    values = json.loads(config.read_text())
    rounded = values["llama"]["rope_dtype"] == "bfloat16"
    assert rounded == (family == "llama2")  # as the release rounds LLaMA's
    config.write_text(json.dumps(values | {"llama": values["llama"] | {"rope_dtype": "float32"}}))

    convert(tmp_path / "run", tmp_path / "back", to="hf", mesh=one_device())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back" / "llama").eval()
    assert type(theirs) is type(hf)
    original, back = hf.state_dict(), theirs.state_dict()
    assert original.keys() == back.keys()
    tokens = values["tokens"]["pad"]  # of the parent; the other rows of its tables are padding
    assert tokens < 512 if family.startswith("qwen") else tokens == 512
    for name, tensor in original.items():
        known = slice(tokens if "embed_tokens" in name or "lm_head" in name else None)
        assert torch.equal(back[name][known], tensor[known]), name
    if not rounded:
        with pytest.raises(UserError, match="its language model is LLaMA-1"):
            convert(tmp_path / "run", tmp_path / "release", to="emu", mesh=one_device())

    if family != "qwen3":
        return
    model = load(tmp_path / "run", mesh=one_device())
    ids = torch.tensor([model.tokenizer.encode("a quick brown")])
    expected = theirs.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    expected = expected[0, ids.shape[1] :].tolist()
    ours = model.generate_ids("a quick brown", max_new_tokens=12, min_length=0, num_beams=1)
    assert ours[1 : len(expected) + 1].tolist() == expected
    assert len(set(expected)) > 3


# --- Files of the releases -----------------------------------------------------------------------

# The settings of released config.json files that emu_jax reads, and the number of parameters.
RELEASED = {
    "LLaMA-2-7B": (
        {
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 32000,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "pretraining_tp": 1,
            "tie_word_embeddings": False,
        },
        6_738_415_616,
    ),
    "LLaMA-3.1-8B": (
        {
            "model_type": "llama",
            "attention_bias": False,
            "mlp_bias": False,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "tie_word_embeddings": False,
        },
        8_030_261_248,
    ),
    "LLaMA-3.2-1B": (
        {
            "model_type": "llama",
            "head_dim": 64,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "tie_word_embeddings": True,
        },
        1_235_814_400,
    ),
    "Mistral-7B": (
        {
            "model_type": "mistral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
        },
        7_241_732_096,
    ),
    "Qwen2.5-0.5B": (
        {
            "model_type": "qwen2",
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "max_position_embeddings": 32768,
            "max_window_layers": 24,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "use_sliding_window": False,
            "tie_word_embeddings": True,
        },
        494_032_768,
    ),
    "Qwen2.5-7B": (
        {
            "model_type": "qwen2",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "max_position_embeddings": 131072,
            "max_window_layers": 28,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
            "use_sliding_window": False,
            "tie_word_embeddings": False,
        },
        7_615_616_512,
    ),
    "Qwen3-0.6B": (
        {
            "model_type": "qwen3",
            "attention_bias": False,
            "head_dim": 128,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000,
            "rope_scaling": None,
            "sliding_window": None,
            "use_sliding_window": False,
            "tie_word_embeddings": True,
        },
        596_049_920,
    ),
    "Qwen3-8B": (
        {
            "model_type": "qwen3",
            "attention_bias": False,
            "head_dim": 128,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
            "max_window_layers": 36,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000,
            "rope_scaling": None,
            "sliding_window": None,
            "use_sliding_window": False,
            "tie_word_embeddings": False,
        },
        8_190_735_360,
    ),
}
SMALLEST = ("LLaMA-3.2-1B", "Mistral-7B", "Qwen3-0.6B")


@pytest.mark.parametrize(
    "name", [n if n in SMALLEST else pytest.param(n, marks=SLOW) for n in RELEASED]
)
def test_a_released_file_describes_the_whole_model(name, tmp_path):
    """Every parameter counted, and the file written again as transformers reads the original."""
    values, parameters = RELEASED[name]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    llama = release_config.llama_config(path)
    cfg = dataclasses.replace(llama, regression_head=False)
    shapes = nnx.state(nnx.eval_shape(lambda: Llama(cfg, rngs=nnx.Rngs(0))))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == parameters
    written = export.llama_json(dataclasses.replace(emu2(), llama=cfg))
    for key in values.keys() & written.keys():
        assert written[key] == values[key], key
    path.write_text(json.dumps(written))
    assert release_config.llama_config(path) == llama
    assert llama.context_length == min(
        values["max_position_embeddings"], llama.sliding_window or 2**20
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "mixtral"}, "with model_type mixtral: use"),
        ({"model_type": "qwen3_moe"}, "with model_type qwen3_moe: use"),
        ({"attention_bias": True}, "with attention biases: use"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "with rope scaling 'yarn': use"),
        ({"use_sliding_window": True}, "with a sliding window in some of its layers: use"),
        ({"quantization_config": {"bits": 4}}, "with quantized weights: use"),
        ({"num_key_value_heads": -2}, "num_key_value_heads must be a positive number, not -2"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "original_max_position_embeddings must be"),
    ],
)
def test_other_decoders_are_refused_in_one_line(change, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RELEASED["Qwen3-8B"][0] | change))
    with pytest.raises(UserError, match=message) as error:
        release_config.llama_config(tmp_path / "config.json")
    assert "\n" not in str(error.value)
