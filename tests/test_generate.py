"""Generation: what the released code gives, and what holds of any model."""

import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import GOLDEN, as_emu2, relative_error
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image
from test_golden import FEEDBACK
from test_golden import emu as release  # noqa: F401  (a fixture)
from test_sources import video

from emu_jax import config, diffusion
from emu_jax.data.sources.video import frame_indices
from emu_jax.errors import UserError
from emu_jax.generate import api, image, logits, mixed, prompt, text
from emu_jax.generate import engine as engines
from emu_jax.generate.api import Emu, _image_keys, _row_keys, load
from emu_jax.generate.batching import Shapes
from emu_jax.generate.engine import Engine, Usage, batches
from emu_jax.generate.safety import find_checker
from emu_jax.generate.settings import (
    RENAMED,
    DynamicSettings,
    GenerationConfig,
    ImageConfig,
    ImageSettings,
    MixedSettings,
    StaticSettings,
    TextConfig,
)
from emu_jax.models import emu as models
from emu_jax.models.cpu import UnstackedKVCache
from emu_jax.models.eva_clip import normalize_images
from emu_jax.models.kv_cache import KVCache
from emu_jax.sharding import AbstractModel, make_mesh, nest
from emu_jax.tokenizer import Tokenizer
from emu_jax.train.telemetry.goodput import COMPILATION

# How often each program was traced: once per bucket of shapes.
TRACES: Counter[str] = Counter()


def _count_trace(event: str, duration: float, *, fun_name: str = "", **_: object) -> None:
    if event == "/jax/core/compile/jaxpr_trace_duration" and hasattr(api, fun_name):
        TRACES[fun_name] += 1


jax.monitoring.register_event_duration_secs_listener(_count_trace)

META = json.loads((GOLDEN / "meta.json").read_text())
SPEC = META["spec"]


@pytest.fixture(scope="module")
def tiny(release):  # noqa: F811
    return Emu(release, Tokenizer.load(GOLDEN / "tokenizer"))


@pytest.fixture(scope="module")
def pixels(golden):
    return [prompt.Normalized(p) for p in golden["vit/pixels_nchw"].transpose(0, 2, 3, 1)]


@pytest.fixture(scope="module")
def prompts(pixels):
    words = SPEC["text"]
    return [[pixels[0], words[0], pixels[1], words[1]], [words[2], pixels[2]]]


# --- The release -----------------------------------------------------------------------------


@pytest.mark.parametrize("tag", META["generate"])
def test_text_is_the_releases(tag, tiny, prompts, golden):
    settings = META["generate_defaults"] | META["generate"][tag]["kw"]
    settings = {k: v for k, v in settings.items() if not k.endswith("_token_id")}
    settings["max_new_tokens"] = SPEC["new_tokens"]
    ids = tiny.generate_ids(prompts, **settings)
    np.testing.assert_array_equal(ids, golden[f"generate/{tag}/ids"])
    texts = [tiny.tokenizer.decode(row) for row in ids]
    assert texts == META["generate"][tag]["texts"]


def test_settings_that_mean_nothing_cannot_be_made():
    for kind in (TextConfig, GenerationConfig):
        with pytest.raises(UserError, match="num_beams cannot be 0"):
            kind(num_beams=0)
    for kind in (ImageConfig, GenerationConfig):
        with pytest.raises(UserError, match="unknown scheduler 'eular'; did you mean 'euler'"):
            kind(scheduler="eular")
    with pytest.raises(UserError, match="max_images cannot be -1"):
        GenerationConfig(max_images=-1)


def test_the_releases_defaults_are_ours():
    defaults = META["generate_defaults"]
    ours = dataclasses.asdict(TextConfig())
    assert {k: ours[k] for k in defaults if k in ours} == {
        k: v for k, v in defaults.items() if not k.endswith("_token_id")
    }
    # Its pipeline's: `Emu1/models/pipeline.py`.
    assert ImageConfig() == ImageConfig(
        guidance_scale=7.5,
        num_inference_steps=50,
        scheduler="pndm",
        height=None,
        width=None,
        original_size=None,
        crops_coords_top_left=None,
        target_size=None,
    )


def test_ranks_are_the_releases(tiny, pixels, golden):
    ranks = tiny.rank([SPEC["text"][2], pixels[0]], SPEC["candidates"])
    assert ranks == golden["predict/ranks"][0].tolist()


def test_segments_change_what_the_mean_is_taken_over():
    # Alone, a candidate's loss is divided by its own length: the longer one wins here.
    sums = np.array([10.0, 10.5])
    assert text.mean_losses(sums, [2, 4], 5, segments=1).argmin() == 0
    np.testing.assert_allclose(text.mean_losses(sums, [2, 4], 5, segments=2), [10 / 6, 10.5 / 8])


def test_regressed_embeddings_are_the_releases(tiny, pixels, golden):
    words = SPEC["text"]
    cases = {
        "text_only": [words[0]],
        "in_context": [pixels[0], words[1], pixels[1], words[0]],
        "blend": [pixels[1], pixels[2]],
    }
    for name, parts in cases.items():
        ours = tiny.regress([parts, [""]])
        assert relative_error(ours, golden[f"gen_image/{name}"]) < FEEDBACK


@pytest.mark.parametrize(("steps", "guidance"), SPEC["sampling"])
def test_painting_is_the_releases(steps, guidance, tiny, release, pixels, golden):  # noqa: F811
    words = SPEC["text"]
    cond, uncond = tiny.regress([[pixels[0], words[1], pixels[1], words[0]], [""]])
    start = jnp.asarray(golden["sample/init_latents"].transpose(0, 2, 3, 1))

    @nnx.jit(static_argnames=("guidance",))
    def run(emu, start, cond, uncond, guidance):
        uncond = uncond if guidance > 1 else None
        latents = image.sample_latents(
            emu, start, cond[None], uncond, guidance, steps=steps, method="pndm"
        )
        return latents, image.decode_latents(emu, latents)

    latents, decoded = run(release, start, cond, uncond, guidance=guidance)
    expected = golden[f"sample/{steps}_{guidance}/latents"].transpose(0, 2, 3, 1)
    assert relative_error(latents, expected) < FEEDBACK
    assert relative_error(decoded, golden[f"sample/{steps}_{guidance}/image"]) < FEEDBACK


@pytest.mark.parametrize("case", META["video_frame_indices"])
def test_video_frames_are_the_releases(case):
    ours = frame_indices(case["frames"], case["segments"])
    assert ours.tolist() == case["indices"]


def test_instruct_format_is_the_releases(golden, release):  # noqa: F811
    tokenizer = Tokenizer.load(GOLDEN / "tokenizer", instruct=True)
    pixels = np.zeros((SPEC["img"], SPEC["img"], 3), np.uint8)
    made = prompt.Prompt.of(prompt.instruct([pixels, SPEC["text"][1]]), tokenizer, release.cfg)
    assert made.tokens.tolist() == golden["instruct/ids"][0].tolist()
    # The [IMG] [/IMG] of the system message hold no image.
    assert (made.embedding_index >= 0).sum() == SPEC["n_causal"]
    assert prompt.instruct(["hello"]) == ["[USER]: ", "hello", " [ASSISTANT]:"]


def test_the_system_message_of_a_dialogue():
    one, answer = random_image(0), [" [ASSISTANT]:"]
    for asked, system in (
        ([one, "what?"], f"{prompt.IMAGE_SYSTEM} [USER]: "),
        ([one, one], "[USER]: "),
        ([[one, one], "what?"], f"{prompt.VIDEO_SYSTEM} [USER]: "),
        ([one, [one, one]], f"{prompt.VIDEO_SYSTEM} [USER]: "),
    ):
        assert prompt.instruct(asked) == [system, *asked, *answer]
    assert prompt.instruct("hi", "Be brief.") == ["Be brief. [USER]: ", "hi", *answer]
    # The message stands before the first turn; each answer ends, and its images do not count.
    turns = [["a?"], ["b", one], [one, "c?"]]
    assert prompt.converse(turns) == [
        f"{prompt.IMAGE_SYSTEM} [USER]: ",
        "a?",
        *answer,
        "b",
        one,
        "</s>",
        "[USER]: ",
        one,
        "c?",
        *answer,
    ]


# --- A random model of odd sizes -------------------------------------------------------------


def small_config(tokenizer):
    base = tokenizer.base_size
    return config.EmuConfig(
        tokens=config.TokenIds.after(base),
        vision=config.VisionConfig(
            image_size=12,
            patch_size=4,
            width=24,
            layers=1,
            head_width=8,
            mlp_width=40,
            clip_width=8,
        ),
        cformer=config.CFormerConfig(
            n_causal=3, width=16, layers=1, heads=2, head_width=8, mlp_width=24, normalize=True
        ),
        llama=config.LlamaConfig(
            vocab_size=base + 4,
            vocab_multiple=8,
            width=48,
            layers=2,
            heads=3,
            mlp_width=56,
            max_positions=128,
        ),
        unet=config.UNetConfig(
            sample_size=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            attention_head_dim=2,
            cross_attention_dim=48,
            norm_num_groups=4,
        ),
        vae=config.VAEConfig(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4
        ),
    )


@pytest.fixture(scope="module")
def words():
    return Tokenizer.train(["one two three four five six seven eight nine ten yes. no."] * 9, 320)


@pytest.fixture(scope="module")
def model(words):
    made = models.EmuModel(small_config(words), rngs=nnx.Rngs(3))
    # Sharper than a fresh model, so that probabilities are far from equal.
    head = made.llama.lm_head.kernel
    head[...] = head[...] * 3
    return made


@pytest.fixture(scope="module")
def small(model, words):
    return Emu(model, words)


def random_image(seed, size=12):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


MIXED_PROMPTS = [
    ["one two three four five", random_image(0), "six"],
    ["two"],
    [random_image(1), random_image(2), "seven eight nine ten one two three four five six seven"],
    ["three four"],
    [random_image(3)],
]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 1},
        {"num_beams": 3, "length_penalty": 1.0},
        {"num_beams": 1, "do_sample": True, "temperature": 0.7, "top_k": 30, "seed": 5},
        {"num_beams": 2, "do_sample": True, "top_p": 0.8},
    ],
)
def test_a_prompt_gives_the_same_alone_and_in_a_batch(settings, small):
    settings = settings | {"max_new_tokens": 10, "min_length": 4}
    together = small.generate_ids(MIXED_PROMPTS, **settings)
    assert len({tuple(row) for row in together.tolist()}) == len(MIXED_PROMPTS)
    # Row 0 draws from the same key wherever it is.
    order = [MIXED_PROMPTS[0], MIXED_PROMPTS[4]]
    np.testing.assert_array_equal(small.generate_ids(order, **settings)[0], together[0])
    if not settings.get("do_sample"):
        alone = [small.generate_ids([p], **settings)[0] for p in MIXED_PROMPTS]
        np.testing.assert_array_equal(np.stack(alone), together)


@pytest.mark.slow
def test_small_batches_give_what_a_large_one_gives(model, words, small):
    chunked = Emu(model, words, batch_size=2)
    for settings in ({"num_beams": 1}, {"num_beams": 2}, {"do_sample": True, "num_beams": 1}):
        settings = settings | {"max_new_tokens": 7}
        np.testing.assert_array_equal(
            chunked.generate_ids(MIXED_PROMPTS, **settings),
            small.generate_ids(MIXED_PROMPTS, **settings),
        )
    assert relative_error(chunked.regress(MIXED_PROMPTS), small.regress(MIXED_PROMPTS)) < 1e-5


def test_shapes_are_compiled_once(small):
    settings = {"num_beams": 1, "max_new_tokens": 5}
    small.generate_ids([["one"]], **settings)
    before = TRACES.copy()
    small.generate_ids([["two three"]], **settings)
    small.generate_ids([["four"]], **settings | {"max_new_tokens": 8, "min_length": 3})
    assert TRACES == before
    small.generate_ids([["four"]], **settings | {"max_new_tokens": 33})
    assert TRACES["_decode"] == before["_decode"] + 1


def log_probabilities(model, prompt_ids, ids):
    """log p of each of `ids` after `prompt_ids` and those before it, by full forward passes."""
    tokens = np.concatenate([prompt_ids, ids])[None]
    x = model.embed(jnp.asarray(tokens))
    hidden = model.llama(x, jnp.arange(tokens.shape[1])[None])
    logp = jax.nn.log_softmax(model.llama.logits(hidden)[0], axis=-1)
    return np.asarray(logp)[np.arange(len(prompt_ids) - 1, tokens.shape[1] - 1), ids]


def test_greedy_takes_the_likeliest_token_each_time(small, model):
    ids = small.generate_ids([["one two"]], num_beams=1, max_new_tokens=6)[0, 1:]
    so_far = small.tokenizer.encode("one two")
    for token in ids:
        hidden = model.llama(model.embed(jnp.asarray([so_far])), jnp.arange(len(so_far))[None])
        assert token == int(jnp.argmax(model.llama.logits(hidden)[0, -1]))
        so_far.append(int(token))
        if token == small.cfg.tokens.eos:
            break


def reference_beam_search(next_logp, beams, vocab, eos, max_length, penalty, early, least):
    """Beam search over Python lists, after the description in transformers 4.31."""
    open_beams, finished, done = [((1,), 0.0)], [], False
    worst = np.inf
    while not done and len(open_beams[0][0]) < max_length:
        length = len(open_beams[0][0])
        options = []
        for ids, score in open_beams:
            logp = next_logp(ids).astype(np.float64)
            if length < least:
                logp[eos] = -np.inf
            options += [(score + logp[t], ids, t) for t in range(vocab)]
        options.sort(key=lambda o: -o[0])
        options, following = options[: 2 * beams], []
        for rank, (score, ids, token) in enumerate(options):
            if token != eos:
                following.append(((*ids, token), score))
            elif rank < beams:
                value = score / length**penalty
                if len(finished) < beams or value > worst:
                    finished = sorted([*finished, (value, (*ids, eos))])[-beams:]
                    worst = finished[0][0]
            if len(following) == beams:
                break
        open_beams = following
        if len(finished) == beams:
            reach = max_length if early == "never" and penalty > 0 else length
            done = early is True or worst >= options[0][0] / reach**penalty
    if not done:
        finished += [(s / len(ids) ** penalty, ids) for ids, s in open_beams]
    return max(finished)[1]


TOKENS = config.TokenIds(pad=7, img=8, img_end=9, image=10)
VOCAB = 11


def chains(rows):
    """Logits [rows, V, V] of the token after the last one; `</s>` is frequent."""
    table = np.random.default_rng(0).normal(size=(rows, VOCAB, VOCAB)).astype(np.float32) * 1.5
    table[:, :, TOKENS.eos] += 2
    return jnp.asarray(table)


def search(table, settings):
    """Beam search on Markov chains, one for each row."""
    static, dynamic = StaticSettings.of(settings, TOKENS), DynamicSettings.of(settings)
    rows = jnp.repeat(table, static.num_beams, axis=0)
    extend = jax.jit(lambda state, logits: state.extend(logits, static, dynamic, None, None))
    state = text.BeamState.start(len(table), static)
    while int(state.length) < int(dynamic.max_length) and not bool(jnp.all(state.done)):
        last = jnp.take(state.sequences, state.length - 1, axis=2).reshape(-1)
        state = extend(state, rows[jnp.arange(len(rows)), last])
    return np.asarray(state.best(static, dynamic))


@pytest.mark.parametrize("early", [True, False, "never"])
@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.5])
def test_beam_search_is_that_of_transformers(early, penalty):
    settings = TextConfig(
        max_new_tokens=6, num_beams=4, length_penalty=penalty, early_stopping=early, min_length=2
    )
    table = chains(8)
    ours = search(table, settings)
    logp = np.asarray(jax.nn.log_softmax(table, axis=-1))
    for row, answer in enumerate(ours):
        expected = reference_beam_search(
            lambda ids, row=row: logp[row, ids[-1]], 4, VOCAB, TOKENS.eos, 7, penalty, early, 2
        )
        padding = [TOKENS.pad] * (ours.shape[1] - len(expected))
        assert answer.tolist() == [*expected, *padding]
    assert len({tuple(a) for a in ours.tolist()}) > 4


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.5])
def test_a_wide_enough_beam_finds_the_best_of_all_sequences(penalty):
    longest = 3
    settings = TextConfig(
        max_new_tokens=longest, num_beams=36, length_penalty=penalty, early_stopping="never"
    )
    table = chains(3)[:, :6, :6]
    ours, logp = search(table, settings), np.asarray(jax.nn.log_softmax(table, axis=-1), float)
    others = [t for t in range(6) if t != TOKENS.eos]
    for row, answer in enumerate(ours):
        best = (-np.inf, ())
        for n in range(longest + 1):
            for ids in itertools.product(others, repeat=n):
                path = (1, *ids) if n == longest else (1, *ids, TOKENS.eos)
                score = sum(logp[row, a, b] for a, b in itertools.pairwise(path))
                best = max(best, (score / (n + 1) ** penalty, path))
        assert tuple(answer[: len(best[1])]) == best[1]
        assert set(answer[len(best[1]) :]) <= {TOKENS.pad}


# --- Processors ------------------------------------------------------------------------------


def test_a_repeated_token_is_penalised_and_the_dummy_counts():
    scores = jnp.asarray([[2.0, -2.0, 4.0, -4.0, 1.0]] * 2)
    sequences = jnp.asarray([[1, 2, 0, 0], [1, 3, 0, 0]])
    ours = logits.penalize_repetition(scores, sequences, jnp.int32(2), jnp.float32(2.0))
    np.testing.assert_allclose(ours, [[2, -4, 2, -4, 1], [2, -4, 4, -8, 1]])


def test_no_ngram_comes_twice():
    sequences = jnp.asarray([[1, 4, 5, 6, 4, 5, 0, 0], [1, 4, 5, 6, 4, 6, 0, 0]])
    for n, length, expected in [
        (1, 6, [{1, 4, 5, 6}, {1, 4, 6, 5}]),
        (2, 6, [{6}, {4}]),
        (3, 6, [{6}, set()]),
        (2, 5, [{5}, {5}]),
        (4, 2, [set(), set()]),
        (2, 1, [set(), set()]),
    ]:
        ours = logits.forbid_ngrams(jnp.zeros((2, 8)), sequences, jnp.int32(length), n)
        assert [set(np.flatnonzero(np.isneginf(row))) for row in np.asarray(ours)] == expected
    # The newest n-gram counts, too, whose end begins the next one.
    ours = logits.forbid_ngrams(jnp.zeros((1, 8)), jnp.asarray([[1, 4, 5, 5, 0]]), jnp.int32(4), 2)
    assert set(np.flatnonzero(np.isneginf(ours[0]))) == {5}


def test_the_dummy_counts_for_the_minimal_length():
    for length, forbidden in [(1, True), (2, True), (3, False)]:
        ours = logits.enforce_min_length(jnp.zeros((1, 5)), jnp.int32(length), jnp.int32(3), 2)
        assert bool(jnp.isneginf(ours[0, 2])) == forbidden


def test_only_allowed_sequences_go_on():
    table = text.choices_table(((5, 6, 2), (5, 7, 2), (8, 2)))
    sequences = jnp.asarray([[1, 5, 7, 0, 0], [1, 8, 2, 0, 0], [1, 6, 6, 0, 0]])
    for length, expected in [
        (1, [{5, 8}] * 3),
        (2, [{6, 7}, {2}, set()]),
        (3, [{2}, set(), set()]),
        (4, [set()] * 3),
    ]:
        ours = logits.allow_only(jnp.zeros((3, 9)), sequences, jnp.int32(length), table)
        assert [set(np.flatnonzero(np.isfinite(row))) for row in np.asarray(ours)] == expected


def test_warping_keeps_the_right_tokens():
    probabilities = np.array([0.05, 0.4, 0.1, 0.25, 0.2], np.float32)
    scores = jnp.log(probabilities)[None]

    def kept(temperature=1.0, top_k=0, top_p=1.0, min_tokens=1):
        ours = logits.filter_logits(
            scores,
            jnp.float32(temperature),
            jnp.int32(top_k),
            jnp.float32(top_p),
            min_tokens=min_tokens,
        )
        return set(np.flatnonzero(np.isfinite(np.asarray(ours)[0])))

    assert kept() == {0, 1, 2, 3, 4}
    assert kept(top_k=2) == {1, 3}
    assert kept(top_p=0.5) == {1, 3}
    assert kept(top_p=0.66) == {1, 3, 4}
    assert kept(top_p=0.3) == {1}
    assert kept(top_p=0.3, min_tokens=2) == {1, 3}
    # 0.4 and 0.25 of the three best are 76% of them, not 65%.
    assert kept(top_k=3, top_p=0.7) == {1, 3}
    assert kept(temperature=0.5, top_p=0.5) == {1}  # squared: 0.57 of the mass
    warm = logits.filter_logits(scores, jnp.float32(2.0), jnp.int32(0), jnp.float32(1.0))
    np.testing.assert_allclose(
        jax.nn.softmax(warm)[0], probabilities**0.5 / np.sum(probabilities**0.5), rtol=1e-5
    )


def test_samples_have_the_warped_distribution():
    """Two successive tokens are sampled independently: shares of pairs are products."""
    probabilities = jnp.asarray([0.05, 0.4, 0.1, 0.25, 0.2])
    draws = 20_000
    static = StaticSettings.of(
        TextConfig(do_sample=True, num_beams=1),
        config.TokenIds(bos=0, eos=2, pad=0, img=0, img_end=0, image=0),
    )
    dynamic = DynamicSettings.of(TextConfig(top_k=4, top_p=0.8, min_length=0))
    keys = jax.vmap(jax.random.key)(jnp.arange(draws))
    logits = jnp.broadcast_to(jnp.log(probabilities), (draws, 5))
    extend = jax.jit(lambda state: state.extend(logits, static, dynamic, keys, None))
    one, two = np.asarray(extend(extend(text.SampleState.start(draws, static))).sequences[:, 1:3]).T
    # Of the four best 0.4, 0.25 and 0.2 make 89%; without the last 68%.
    expected = np.array([0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85])
    share = np.bincount(5 * one + two, minlength=25).reshape(5, 5) / draws
    np.testing.assert_allclose(share, np.outer(expected, expected), atol=0.015)


def test_settings_reach_the_program():
    settings = TextConfig(
        max_new_tokens=7,
        num_beams=3,
        do_sample=True,
        temperature=0.7,
        top_k=4,
        top_p=0.6,
        min_length=2,
        repetition_penalty=1.5,
        length_penalty=0.5,
        no_repeat_ngram_size=5,
        early_stopping="never",
    )
    # The dummy <s> counts for the longest and the shortest length.
    expected = [8, 2, 1.5, 0.5, 0.7, 4, 0.6]
    np.testing.assert_allclose(
        [float(x) for x in DynamicSettings.of(settings)], expected, rtol=1e-6
    )
    assert StaticSettings.of(settings, TOKENS) == StaticSettings(
        8, 3, True, True, 5, "never", TOKENS
    )
    assert not StaticSettings.of(TextConfig(), TOKENS).penalize_repetition


def test_rows_have_keys_of_their_own():
    for rows, seeds in (([4, 0, 4], [9, 9, 9]), ([0, 0, 0], [3, 9, 3])):
        ours = _row_keys(np.array(rows), 9 if rows[0] else seeds)
        expected = [
            jax.random.split(jax.random.fold_in(jax.random.key(seed), row))
            for row, seed in zip(rows, seeds, strict=True)
        ]
        for keys, theirs in zip(ours, zip(*expected, strict=True), strict=True):
            found, wanted = jax.random.key_data(keys), [jax.random.key_data(k) for k in theirs]
            np.testing.assert_array_equal(found, wanted)


def test_images_of_a_continuation_share_no_key_with_its_words():
    text_keys, image_keys = _row_keys(np.arange(2), 9)
    steps = [jax.vmap(jax.random.fold_in, (0, None))(text_keys, n) for n in range(4)]
    images = [_image_keys(image_keys, n) for n in range(4)]
    found = np.concatenate([jax.random.key_data(each) for each in (*steps, *images)])
    assert len(np.unique(found, axis=0)) == 16


def test_a_row_that_has_ended_is_padded():
    settings = TextConfig(num_beams=1, max_new_tokens=3)
    static, dynamic = StaticSettings.of(settings, TOKENS), DynamicSettings.of(settings)
    state = text.SampleState.start(2, static)
    for tokens in ([TOKENS.eos, 4], [5, 6], [5, TOKENS.eos]):
        logits = jax.nn.one_hot(jnp.asarray(tokens), VOCAB)
        state = state.extend(logits, static, dynamic, None, None)
    assert state.sequences[:, :4].tolist() == [
        [TOKENS.bos, TOKENS.eos, TOKENS.pad, TOKENS.pad],
        [TOKENS.bos, 4, 6, TOKENS.eos],
    ]
    assert state.done.tolist() == [True, True]


def test_beams_that_are_sampled_draw_anew_at_each_step():
    """From equal probabilities two beams draw two of 2 x 50 continuations, then again."""
    rows, vocab = 600, 50
    tokens = config.TokenIds(bos=0, eos=49, pad=0, img=0, img_end=0, image=0)
    settings = TextConfig(do_sample=True, num_beams=2, min_length=9, top_p=1.0)
    static, dynamic = StaticSettings.of(settings, tokens), DynamicSettings.of(settings)
    keys = jax.vmap(jax.random.key)(jnp.arange(rows))
    extend = jax.jit(lambda s, logits, dynamic: s.extend(logits, static, dynamic, keys, None))
    start, equal = text.BeamState.start(rows, static), jnp.zeros((2 * rows, vocab))
    first = extend(start, equal, dynamic)
    second = extend(first, equal, dynamic)
    one, two = (np.asarray(s.sequences[:, :, int(s.length) - 1]) for s in (first, second))
    assert set(one.flatten()) == set(two.flatten()) == set(range(49))  # </s> is too early
    # By chance one in 49 is the same again; both of a step are the same in one of 49, too.
    for same in (one == two, one[:, 0] == one[:, 1]):
        assert np.mean(same) == pytest.approx(1 / 49, abs=0.017)
    parents = np.asarray(second.parents)
    assert np.mean(parents) == pytest.approx(0.5, abs=0.06)
    # What came before goes with the beam that a new one continues.
    before = np.take_along_axis(one, parents, axis=1)
    np.testing.assert_array_equal(second.sequences[:, :, 1], before)
    # Of a beam's tokens two are kept, however likely one is: there are enough to go on with.
    sure = extend(start, equal.at[:, 3].set(99.0), dynamic._replace(top_p=jnp.float32(0.5)))
    assert np.isfinite(sure.scores).all()


class Silent:
    """A language model of which only the embedding of a chosen token is asked."""

    def embed_tokens(self, tokens):
        return jnp.zeros((len(tokens), 3))


def choose_with(cfg, static, dynamic, keys=None):
    """`mixed._choose` for a model that reads embeddings as they are."""
    emu = SimpleNamespace(cfg=cfg, to_language=lambda embeddings: embeddings)
    return jax.jit(lambda state: mixed._choose(emu, Silent(), state, static, dynamic, keys))


@pytest.mark.parametrize("may_start_image", [True, False])
def test_tokens_that_no_model_may_choose_in_a_mixed_sequence(may_start_image):
    """Each special token is the likeliest of one row; the next best ordinary one is taken."""
    ids = config.TokenIds(pad=7, img=8, img_end=9, image=10)
    cfg = dataclasses.replace(config.EmuConfig(), tokens=ids)
    closed = [ids.bos, ids.pad, ids.image, ids.img_end]
    likeliest = jnp.asarray([*closed, ids.img, ids.eos])
    rows = len(likeliest)
    state = mixed.MixedState(
        tokens=jnp.full((rows, 8), ids.pad),
        images=jnp.zeros((rows, 1, 32, 3)),
        step=jnp.int32(0),
        offset=jnp.full(rows, -1),
        count=jnp.zeros(rows, jnp.int32),
        written=jnp.zeros(rows, jnp.int32),
        done=jnp.zeros(rows, bool),
        element=jnp.zeros((rows, 3)),
        positions=jnp.zeros(rows, jnp.int32),
        logits=jnp.zeros((rows, 11)).at[:, 5].set(1.0).at[jnp.arange(rows), likeliest].set(2.0),
        regressed=jnp.zeros((rows, 3)),
        cache=None,
    )
    static = mixed.StaticMixedSettings(
        text_length=8, max_images=1, do_sample=False, may_start_image=may_start_image
    )
    dynamic = mixed.DynamicMixedSettings(np.int32(2), np.float32(1), np.int32(0), np.float32(1))
    choose = choose_with(cfg, static, dynamic)
    state = choose(state)
    opened = ids.img if may_start_image else 5
    assert state.tokens[:, 0].tolist() == [5, 5, 5, 5, opened, ids.eos]
    assert state.done.tolist() == [False] * 5 + [True]
    # Two tokens of text are all; an image that was opened is still to come.
    state = choose(state)
    assert state.done.tolist() == [True] * 4 + [not may_start_image, True]
    assert state.tokens[-1, 1] == ids.pad


def test_mixed_sequences_are_sampled_anew_at_each_element():
    rows, vocab = 2_000, 50
    ids = config.TokenIds(bos=0, eos=1, pad=0, img=0, img_end=0, image=0)
    cfg = dataclasses.replace(config.EmuConfig(), tokens=ids)
    state = mixed.MixedState(
        tokens=jnp.zeros((rows, 2), jnp.int32),
        images=jnp.zeros((rows, 0, 32, 3)),
        step=jnp.int32(0),
        offset=jnp.full(rows, -1),
        count=jnp.zeros(rows, jnp.int32),
        written=jnp.zeros(rows, jnp.int32),
        done=jnp.zeros(rows, bool),
        element=jnp.zeros((rows, 3)),
        positions=jnp.zeros(rows, jnp.int32),
        logits=jnp.zeros((rows, vocab)).at[:, 1].set(-jnp.inf),
        regressed=jnp.zeros((rows, 3)),
        cache=None,
    )
    static = mixed.StaticMixedSettings(
        text_length=2, max_images=0, do_sample=True, may_start_image=False
    )
    dynamic = mixed.DynamicMixedSettings(np.int32(9), np.float32(1), np.int32(0), np.float32(1))
    keys = jax.vmap(jax.random.key)(jnp.arange(rows))
    choose = choose_with(cfg, static, dynamic, keys)
    one, two = np.asarray(choose(choose(state)).tokens).T
    assert set(one) == set(two) == set(range(2, vocab))
    assert np.mean(one == two) == pytest.approx(1 / 48, abs=0.012)


@pytest.mark.parametrize("layout", [KVCache, UnstackedKVCache])
def test_a_repeated_cache_has_each_row_in_a_row(layout):
    cfg = config.LlamaConfig(width=6, heads=3, layers=2, mlp_width=4)
    cache = layout.empty(cfg, 4, 5)
    numbered = lambda a: jnp.arange(a.size, dtype=a.dtype).reshape(a.shape)  # noqa: E731
    k, v = jax.tree.map(numbered, (cache.k, cache.v))
    valid = jnp.asarray(np.random.default_rng(0).random((4, 5)) > 0.5)
    cache = layout(k, v, valid, jnp.int32(3))
    many = cache.repeat(2)
    for before, after in zip(
        jax.tree.leaves((cache.k, cache.v)), jax.tree.leaves((many.k, many.v)), strict=True
    ):
        # Layers, rows, heads, and what a head has.
        rows = np.asarray(before).reshape(-1, 4, 3, *before.shape[-2:])
        expected = rows[:, [0, 0, 1, 1, 2, 2, 3, 3]]
        np.testing.assert_array_equal(np.asarray(after).reshape(expected.shape), expected)
    np.testing.assert_array_equal(many.valid, np.repeat(valid, 2, axis=0))
    assert many.used == 3


# --- Through the whole model -----------------------------------------------------------------


def test_choices_are_all_that_may_come_out(small, model):
    prompts = [["one"], ["two"], ["three four"], [random_image(0)]]
    for settings in ({"num_beams": 1}, {"num_beams": 5}, {"num_beams": 1, "do_sample": True}):
        answers = small.generate_text(prompts, choices=["yes.", "no."], **settings)
        assert set(answers) <= {"yes.", "no."}
    # Beams wider than the trie find the likelier one.
    eos = small.cfg.tokens.eos
    options = {c: [*small.tokenizer.encode(c, bos=False), eos] for c in ("yes.", "no.")}
    for (words,), answer in zip(
        prompts[:3], small.generate_text(prompts, choices=["yes.", "no."])[:3], strict=True
    ):
        ids = np.asarray(small.tokenizer.encode(words))
        sums = {c: log_probabilities(model, ids, np.asarray(o)).sum() for c, o in options.items()}
        assert answer == max(sums, key=sums.get)


def test_candidates_are_ranked_by_their_loss(small, model):
    prompts = [["one two three"], ["six"], ["seven eight"]]
    candidates = [["four", "four five six", "nine ten one", "yes."], ["one", "two", "no."], ["two"]]
    ours = small.rank(prompts, candidates)
    alone = small.rank(prompts[:2], candidates[:2], segments=3)
    likelihoods = small.log_likelihoods(prompts, candidates)
    for row, ((words,), options) in enumerate(zip(prompts, candidates, strict=True)):
        ids = np.asarray(small.tokenizer.encode(words))
        parts = [np.asarray(small.tokenizer.encode(c, bos=False)) for c in options]
        sums = np.array([-log_probabilities(model, ids, p).sum() for p in parts])
        assert ours[row] == np.argsort(sums).tolist()
        np.testing.assert_allclose(likelihoods[row], -sums, rtol=1e-4)
        if row == 0:  # one prompt, whose batch is another
            one = small.log_likelihoods([words], options)
            np.testing.assert_allclose(one, likelihoods[0], rtol=1e-5)
        if row == 1:
            means = sums / [len(ids) + len(p) - 1 for p in parts]
            assert alone[row] == np.argsort(means).tolist()


def test_images_do_not_depend_on_their_batch(small):
    seeds, settings = [4, 9, 4], DRAW | {"guidance_scale": 3.0}
    prompts = [["one"], ["one"], [random_image(0), "two"]]
    images = small.generate_image(prompts, seed=seeds, **settings)
    together = np.stack([np.asarray(image) for image in images]).astype(int)
    assert together.shape == (3, 8, 8, 3)
    assert np.abs(together[0] - together[1]).max() > 10
    for n in range(3):
        alone = small.generate_image(prompts[n], seed=seeds[n], **settings)
        assert np.abs(np.asarray(alone).astype(int) - together[n]).max() <= 1


def test_guidance_moves_away_from_the_negative_prompt(small):
    settings = DRAW | {"seed": 1}
    plain = np.asarray(small.generate_image("one", guidance_scale=1.0, **settings)).astype(int)
    empty = np.asarray(small.generate_image("one", guidance_scale=4.0, **settings)).astype(int)
    other = small.generate_image(
        "one", guidance_scale=4.0, negative_prompt=[random_image(0), "ten"], **settings
    )
    assert np.abs(plain - empty).max() > 0
    assert np.abs(np.asarray(other).astype(int) - empty).max() > 0
    # Guided away from itself, the condition stays what it is.
    same = small.generate_image("one", guidance_scale=4.0, negative_prompt="one", **settings)
    assert np.abs(np.asarray(same).astype(int) - plain).max() <= 1


@pytest.fixture(scope="module")
def autoencoder(words):
    """A small Emu2 with SDXL's decoder."""
    base = small_config(words)
    vision = dataclasses.replace(base.vision, image_size=16)
    cfg = as_emu2(dataclasses.replace(base, vision=vision))
    return Emu(models.EmuModel(cfg, rngs=nnx.Rngs(5)), words)


EULER = {"num_inference_steps": 3, "scheduler": "euler", "guidance_scale": 3.0}


@pytest.mark.slow
def test_a_lone_image_is_painted_from_its_own_features(autoencoder):
    emu, seeds = autoencoder, [3, 4, 5]
    prompts = [["one"], [random_image(1, 16)], ["", random_image(1, 16)]]
    images = emu.generate_image(prompts, seed=seeds, **EULER)
    for parts, seed, painted in zip(prompts, seeds, images, strict=True):
        assert levels(emu.generate_image(parts, seed=seed, **EULER), painted) <= 1
    # Guided away from the null image, which is zero once normalized.
    features, null = (
        emu.model.encode_images(jnp.asarray(pixels)[None])[0]
        for pixels in (normalize_images(random_image(1, 16)), np.zeros((16, 16, 3), np.float32))
    )
    np.testing.assert_allclose(emu._uncond(None, np.array([True])), null, atol=1e-6)
    assert emu._uncond(None, np.array([True, False])).shape == (2, *null.shape)
    nothing = prompt.Normalized(np.zeros((16, 16, 3), np.float32))
    painted = emu.paint(features, seed=4, negative_prompt=[nothing], **EULER)
    assert levels(painted, images[1]) <= 1
    regressed = emu.regress(["", random_image(1, 16)])
    assert relative_error(regressed, features) > 0.1
    painted = emu.paint(regressed, seed=5, **EULER)
    assert levels(painted, images[2]) <= 1


def test_sizes_of_painted_images(autoencoder, small):
    settings = EULER | {"seed": 1, "height": 6, "width": 10}
    plain = autoencoder.generate_image("one", **settings)
    assert plain.size == (10, 6)
    own = {"original_size": (8, 8), "crops_coords_top_left": [0, 0], "target_size": (6, 10)}
    assert levels(autoencoder.generate_image("one", **settings, **own), plain) == 0
    for name in own:
        other = autoencoder.generate_image("one", **settings, **own | {name: (5, 7)})
        assert levels(other, plain) > 0, name
    assert small.generate_image("one", height=4, width=12, **DRAW).size == (12, 4)
    for change, line in (
        ({"height": 7}, "height cannot be 7: give a positive multiple of 2 pixels"),
        ({"width": 0}, "width cannot be 0"),
        ({"original_size": (8,)}, r"original_size cannot be \(8,\): give two numbers"),
        ({"target_size": (8, -1)}, "target_size cannot be"),
        ({"target_size": "88"}, "target_size cannot be '88'"),
    ):
        with pytest.raises(UserError, match=line):
            autoencoder.generate_image("one", **EULER | change)
    with pytest.raises(UserError, match="target_size has no effect on this model's decoder"):
        small.generate_image("one", target_size=(4, 4), **DRAW)


# --- Mixed sequences -------------------------------------------------------------------------


OPENING = [
    ["one two three"],
    ["six seven eight nine"],
    [random_image(6), "one two three"],
    ["ten"],
]
DRAW = {"num_inference_steps": 3, "scheduler": "ddim"}


def levels(image, other):
    """Returns the largest difference of two images, in levels of 255."""
    return np.abs(np.asarray(image).astype(int) - np.asarray(other)).max()


@pytest.fixture(scope="module")
def drawer(model, words):
    """A model that opens an image after the first two of `OPENING`, and after that of the
    first another."""
    graphdef, params = nnx.split(model)
    copy = nnx.merge(graphdef, jax.tree.map(jnp.copy, params))
    ids, llama = copy.cfg.tokens, copy.llama
    contexts = [copy.embed(jnp.asarray([words.encode(t)])) for (t,) in OPENING[:2]]
    opens, closes = (llama.embed_tokens(jnp.asarray([[i]])) for i in (ids.img, ids.img_end))
    drawn = Emu(copy, words).regress(OPENING[:1])
    contexts.append(jnp.concatenate([contexts[0], opens, drawn, closes], axis=1))
    states = [llama(x, jnp.arange(x.shape[1])[None])[0, -1] for x in contexts]
    states, head = jnp.stack(states), llama.lm_head.kernel
    wanted = 1.2 * jnp.max(llama.logits(states), axis=-1)
    head[...] = head[...].at[:, ids.img].set(jnp.linalg.pinv(states) @ wanted)
    return Emu(copy, words)


def reference_mixed(model, x, max_new, max_images, width=96):
    """One row, an element at a time, by full forward passes."""
    ids, n = model.cfg.tokens, model.cfg.n_embeddings

    @nnx.jit
    def forward(llama, x, last):
        state = llama(x, jnp.arange(width)[None])[0, last]
        return llama.logits(state), llama.regress(state)

    tokens, images, written = [], [], 0
    row = np.zeros((1, width, x.shape[-1]), np.float32)
    row[0, : len(x)] = x
    length, slot = len(x), -1
    while slot >= 0 or written < max_new:
        logits, regressed = (np.asarray(a) for a in forward(model.llama, row, length - 1))
        if 0 <= slot < n:
            tokens.append(ids.image)
            images[-1].append(regressed)
            row[0, length], slot = regressed, slot + 1
        else:
            if slot == n:
                token, slot = ids.img_end, -1
            else:
                logits = logits.copy()
                logits[[ids.bos, ids.pad, ids.image, ids.img_end]] = -np.inf
                token, written = int(logits.argmax()), written + 1
                if token == ids.img and len(images) == max_images:
                    break
                if token == ids.img:
                    images.append([])
                    slot = 0
            tokens.append(token)
            if token == ids.eos:
                break
            row[0, length] = np.asarray(model.llama.embed_tokens(jnp.asarray(token)))
        length += 1
    return tokens, images


@pytest.fixture(scope="module")
def continuing(drawer):
    """Prompts of unequal length, and what continues them in one batch, given the images that
    each row has room for."""
    model = nnx.merge(drawer._graphdef, drawer._params)
    prompts = [prompt.Prompt.of(p, drawer.tokenizer, model.cfg) for p in OPENING]
    batch = prompt.pad(prompts, "left", rows=4, length=24, images=1, fill=model.cfg.tokens.pad)
    images, tokens, embedding_index, valid = drawer._inputs(batch)
    static = mixed.StaticMixedSettings(
        text_length=8, max_images=2, do_sample=False, may_start_image=True
    )

    @nnx.jit
    def run(emu, images, tokens, embedding_index, valid, room):
        dynamic = mixed.DynamicMixedSettings(
            np.int32(7), np.float32(1), np.int32(0), np.float32(1), room
        )
        x = emu.embed(tokens, images, embedding_index)
        return x, mixed.complete(emu, x, valid, np.zeros(4, bool), static, dynamic, None)

    def continue_(*room):
        x, (ids, drawn) = run(model, images, tokens, embedding_index, valid, np.int32(room))
        contexts = [np.asarray(row[mask]) for row, mask in zip(x, valid, strict=True)]
        return model, contexts, np.asarray(ids), np.asarray(drawn)

    return continue_


@pytest.fixture(scope="module")
def continued(continuing):
    return continuing(2, 2, 2, 2)


def test_a_mixed_continuation_is_that_of_full_passes(continued):
    model, contexts, ids, drawn = continued
    opened = 0
    for row, context in enumerate(contexts):
        tokens, images = reference_mixed(model, context, max_new=7, max_images=2)
        assert ids[row, : len(tokens)].tolist() == tokens
        assert set(ids[row, len(tokens) :]) <= {model.cfg.tokens.pad}
        for n, expected in enumerate(images):
            assert relative_error(drawn[row, n], np.stack(expected)) < 1e-5
        opened += len(images)
    assert opened >= 3
    assert len({len(c) for c in contexts}) > 2
    assert ids[0].tolist().count(model.cfg.tokens.img) == 2


def test_a_continuations_image_is_the_one_regressed_alone(continued, drawer):
    _, _, ids, drawn = continued
    assert (ids[:2, 0] == drawer.cfg.tokens.img).all()
    assert relative_error(drawn[:2, 0], drawer.regress(OPENING[:2])) < 1e-5


def test_complete_gives_texts_and_images_in_order(drawer, continued):
    settings = DRAW | {"max_new_tokens": 7, "max_images": 2}
    ours = drawer.complete(OPENING, **settings)
    for row, parts in enumerate(ours):
        ids = continued[2][row].tolist()
        expected = [isinstance(p, str) for p in parts].count(False)
        assert expected == ids.count(drawer.cfg.tokens.img)
        said = "".join(p for p in parts if isinstance(p, str))
        assert "".join(said.split()) == "".join(drawer.tokenizer.decode(ids).split())
    alone = drawer.complete(OPENING[0], **settings)
    assert isinstance(alone[0], Image.Image)
    assert levels(alone[0], ours[0][0]) <= 1
    # In batches of one, each still gets its own noise.
    single = Emu(nnx.merge(drawer._graphdef, drawer._params), drawer.tokenizer, batch_size=1)
    for a, b in zip(ours, single.complete(OPENING, **settings), strict=True):
        for p, q in zip(a, b, strict=True):
            assert p == q if isinstance(p, str) else levels(p, q) <= 1


def test_streamed_parts_are_those_of_complete(drawer):
    """Text comes in pieces, an image where it stands."""
    counts = [0, 0]
    for seed, opening in enumerate([OPENING[0], OPENING[1], ["ten", "[IMG]"], "three"]):
        settings = DRAW | {"max_new_tokens": 12, "max_images": 2, "seed": seed}
        whole = drawer.complete(opening, **settings)
        pieces = list(drawer.stream(opening, **settings))
        counts = [counts[0] + len(whole), counts[1] + len(pieces)]
        joined: list = []
        for piece in pieces:
            if isinstance(piece, str) and joined and isinstance(joined[-1], str):
                joined[-1] += piece
            else:
                joined.append(piece)
        joined = [p.strip() if isinstance(p, str) else p for p in joined]
        joined = [p for p in joined if p != ""]
        assert [type(p) for p in joined] == [type(p) for p in whole]
        for a, b in zip(joined, whole, strict=True):
            assert np.array_equal(np.asarray(a), np.asarray(b))
    assert counts[1] > counts[0]


def test_a_prompt_may_open_the_image_itself(drawer):
    parts = drawer.complete(["ten", "[IMG]"], max_new_tokens=3, max_images=1, **DRAW)
    assert isinstance(parts[0], Image.Image)


def test_no_image_is_opened_where_none_can_be_painted(drawer, words):
    model = nnx.merge(drawer._graphdef, drawer._params)
    model.unet = None
    blind = Emu(model, words)
    assert all(isinstance(p, str) for p in blind.complete("one two three", max_new_tokens=7))
    with pytest.raises(UserError, match="no visual decoder"):
        blind.generate_image("one")


# --- Users' mistakes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.generate_text("one", num_beam=3), "'num_beam'; did you mean 'num_beams'"),
        (lambda e: e.generate_text("one", top_p=0.0), "top_p cannot be 0.0"),
        (lambda e: e.generate_text("one", min_length=9, max_new_tokens=7), "max_new_tokens 7"),
        (lambda e: e.generate_text("one", early_stopping="sometimes"), "early_stopping"),
        (lambda e: e.generate_text("one", choices=[]), "at least one answer"),
        (lambda e: e.generate_text(["one", 2]), "not int"),
        (lambda e: e.generate_text("an <image> here"), "must not spell <image>"),
        (lambda e: e.generate_text(["one " * 200]), "the model reads 128: shorten it"),
        (lambda e: e.generate_text([np.zeros((12, 12), np.uint8)]), r"uint8 \[h, w, 3\]"),
        (lambda e: e.generate_text([np.zeros((12, 12, 3), np.int64)]), "not int64"),
        (lambda e: e.generate_text([np.zeros((0, 12, 3), np.uint8)]), "has no pixels"),
        (lambda e: e.generate_text([np.full((12, 12, 3), 9.0)]), "floats from 9 to 9"),
        (lambda e: e.generate_text([np.full((12, 12, 3), -0.1)]), "floats from -0.1 to -0.1"),
        (lambda e: e.generate_text([np.full((12, 12, 3), np.nan)]), "floats from nan to nan"),
        (lambda e: e.generate_text([prompt.Normalized(np.ones((9, 9, 3)))]), "reads .12, 12, 3."),
        (
            lambda e: e.generate_text([prompt.Normalized(np.ones((12, 12, 3))), random_image(0)]),
            "both `Normalized` and other",
        ),
        (lambda e: e.generate_text("one", system="be kind"), "instruction-tuned"),
        (lambda e: e.generate_image("one", scheduler="pmdm"), "did you mean 'pndm'"),
        (lambda e: e.generate_image("one", num_inference_steps=0), "steps cannot be 0"),
        (lambda e: e.generate_image("one", steps=9), "'steps': it is now 'num_inference_steps'"),
        (lambda e: e.generate_image([["one"], ["two"]], seed=[1]), "1 seeds for 2 images"),
        (lambda e: e.complete("one", repetition_penalty=1.2), "no effect on mixed"),
        (lambda e: e.rank("one", []), "list of candidates"),
        (lambda e: e.generate_text("one", seed=-1), r"seed cannot be -1: .* from 0 to 4294967295"),
        (lambda e: e.generate_text("one", seed=2**32 + 5), "seed cannot be 4294967301"),
        (lambda e: e.complete("one", seed=10**4000), "seed cannot be a number of 13288 bits"),
        (lambda e: e.generate_image("one", seed=-1, num_inference_steps=2), "seed cannot be -1"),
        (lambda e: e.generate_image([["one"]], seed=[2**32]), "seed cannot be 4294967296"),
        (lambda e: e.generate_image([["one"]], seed=1.5), "seed cannot be 1.5"),
        (lambda e: next(e.stream("one", seed="7")), "seed cannot be '7'"),
        (lambda e: e.generate_text("one", max_new_tokens=7.5), "max_new_tokens cannot be 7.5"),
        (lambda e: e.generate_text("one", max_new_tokens=2**31), "max_new_tokens cannot be"),
        (lambda e: e.generate_text("one", temperature=float("nan")), "temperature cannot be nan"),
        (
            lambda e: e.generate_image("one", guidance_scale=float("inf")),
            "guidance_scale cannot be inf",
        ),
        (lambda e: e.generate_image("one", scheduler=3), "scheduler cannot be 3: give a string"),
        (lambda e: e.generate_text("half \ud800"), r"'half \\ud800' is not valid Unicode"),
        (lambda e: e.generate_text([["one"], ["a \udcff"]]), r"prompt 2 of 2: the text"),
        (lambda e: e.generate_text("one", choices=["\udcff"]), "not valid Unicode"),
        (lambda e: e.rank("one", ["two", "\udcff"]), "not valid Unicode"),
        (lambda e: e.generate_image([["one"], ["\udcff"]]), "not valid Unicode"),
        (
            lambda e: e.generate_text([["one"], "two"]),
            "list within a prompt is a video.*not a text",
        ),
        (lambda e: e.complete(3), "a list of texts and images, not int"),
        (lambda e: e.generate_text(3), "a list of texts and images, not int"),
        (lambda e: e.generate_text(["one", []]), "has no frames"),
        (lambda e: e.complete(["one", "[IMG]"], max_images=0), "no room for one .max_images 0"),
        (lambda e: next(e.stream("[IMG]", max_images=0)), "no room for one .max_images 0"),
    ],
)
def test_mistakes_are_named(call, message, small):
    with pytest.raises(UserError, match=message):
        call(small)


def test_prompt_and_new_tokens_are_counted_together(small):
    text = "one two " * 30
    length, positions = len(small.tokenizer.encode(text)), small.cfg.llama.max_positions
    left = positions - length
    assert 8 < left < 100
    many = [["one"], [text]]
    message = rf"prompt 2 of 2 has {length} tokens and {left + 1} are to follow, .* at most {left}$"
    for call in (small.generate_text, small.complete):
        with pytest.raises(UserError, match=message):
            call(many, max_new_tokens=left + 1, num_beams=1)
    full = "one " * positions
    while (length := len(small.tokenizer.encode(f"{full}[IMG]"))) >= positions:
        full = full.removesuffix("one ")
    with pytest.raises(UserError, match=rf"{length} tokens and 3 are .*: shorten it$"):
        small.generate_image(full)
    candidates = ["two", "two three four five six"]
    with pytest.raises(UserError, match="are to follow, but the model has 128 positions"):
        small.rank(full, candidates)


@pytest.fixture
def compiled():
    """A list that grows with every compilation, or with every look into its cache."""
    seen = []

    def listen(event, seconds, *, fun_name="", **_):
        if event == COMPILATION:
            seen.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def run_together(engine, answers):
    """All parts of several answers, each iterator asked in turn."""
    parts, running = [[] for _ in answers], dict(enumerate(answers))
    while running:
        waiting = True
        for number, answer in list(running.items()):
            part = next(answer, running)
            if part is running:
                del running[number]
            elif part is not None:
                parts[number].append(part)
            waiting &= part is None
        if waiting:
            engine.step()
    return parts


def joined(parts):
    """The text and the images of an answer, with its usage."""
    said = "".join(part for part in parts if isinstance(part, str))
    images = [np.asarray(part).tolist() for part in parts if isinstance(part, Image.Image)]
    return said, images, [part for part in parts if isinstance(part, Usage)]


@pytest.mark.slow
def test_requests_share_a_batch_and_do_not_notice(drawer):
    """Requests of unequal length, greedy and sampled, with and without images, more than slots."""
    engine = Engine(drawer, slots=3, image_slots=2, new_tokens=8, max_images=1)
    sampled = {"do_sample": True, "temperature": 2.0, "max_images": 0, "top_p": 1.0}
    asked = [
        (engine.stream, drawer.stream, OPENING[0], {"max_new_tokens": 7, "max_images": 1} | DRAW),
        (engine.stream, drawer.stream, OPENING[2], {"max_new_tokens": 3, "max_images": 0}),
        (engine.stream, drawer.stream, OPENING[3], sampled | {"max_new_tokens": 8, "seed": 1}),
        (engine.stream, drawer.stream, OPENING[3], sampled | {"max_new_tokens": 8, "seed": 2}),
        (engine.stream, drawer.stream, OPENING[3], sampled | {"max_new_tokens": 5, "top_k": 1}),
        (engine.generate_image, drawer.generate_image, [OPENING[2]], {"seed": 3} | DRAW),
        (
            engine.generate_image,
            drawer.generate_image,
            [OPENING[3]],
            {"seed": 4} | DRAW | {"num_inference_steps": 6},
        ),
    ]
    together = run_together(engine, [ask(given, **more) for ask, _, given, more in asked])
    assert engine.active == (0, 0)
    said = []
    for parts, (ask, alone, given, more) in zip(together, asked, strict=True):
        assert joined(parts) == joined(*run_together(engine, [ask(given, **more)])), more
        text, images, _ = joined(parts)
        expected = list(alone(given, **more))
        assert text.strip() == "".join(p for p in expected if isinstance(p, str)).strip(), more
        drawn = [p for p in expected if isinstance(p, Image.Image)]
        assert all(levels(a, b) <= 1 for a, b in zip(images, drawn, strict=True))
        said.append(text)
    assert said[2] != said[3], "a seed has no effect"
    # An image that nobody waits for makes room for another.
    many = DRAW | {"num_inference_steps": 60, "previews": True}
    drawing = [engine.generate_image([OPENING[3]], seed=seed, **many) for seed in (4, 5)]
    while engine.active[1] < 2:
        assert [next(each) for each in drawing] == [None, None]
        engine.step()
    drawing.pop().close()
    assert engine.active == (0, 1)
    (images,) = run_together(engine, drawing)
    assert len(joined(images)[1]) == 1 and engine.active == (0, 0)
    assert [part.step for part in images[:-1]] == [10, 20, 30, 40, 50]
    assert [usage.completion_tokens for usage in joined(together[1])[2]] == [3]


def test_images_of_one_size_share_a_batch(drawer, monkeypatch):
    """A batch begins with all that have the size of the oldest. One of another size has its turn
    before those that came later."""
    engine, batches = Engine(drawer, slots=5, image_slots=2, max_images=0), []

    def denoise(graphdef, params, state, cond, uncond, sizes, steps, left, guidance):
        batches.append((state.latents.shape[2:4], int((left > 0).sum())))
        return state

    monkeypatch.setattr(engines, "_denoise_slots", denoise)
    wide = {"height": 4, "width": 12}
    more = [{}, wide, {}, wide, {}]
    asked = [engine.generate_image(["one"], seed=1, **DRAW, **size) for size in more]
    images = run_together(engine, asked)
    own = drawer.image_size
    expected = [(12, 4) if size else (own, own) for size in more]
    assert [image.size for (image,) in images] == expected
    side = own // 2
    assert batches == [((side, side), 2), ((2, 6), 2), ((side, side), 1)]


@pytest.mark.slow
def test_images_of_emu2_share_slots(autoencoder):
    """Each has its own sizes as conditions. They are of texts and of lone images, of two shapes,
    and more than there are slots."""
    engine = Engine(autoencoder, slots=2, image_slots=2, new_tokens=8, max_images=1)
    wide = {"height": 6, "width": 10}
    asked = [
        (["one"], {}),
        (["two", random_image(1, 16)], wide),
        (["two", random_image(1, 16)], wide | {"original_size": (2, 3)}),
        ([random_image(2, 16)], wide),
        ([random_image(2, 16)], {"target_size": (4, 4)}),
        (["three"], {}),
    ]
    settings = EULER | {"seed": 7}
    answers = [engine.generate_image([given], **settings, **more) for given, more in asked]
    together = [images for (images,) in run_together(engine, answers)]
    for drawn, (given, more) in zip(together, asked, strict=True):
        alone = autoencoder.generate_image(given, **settings, **more)
        assert drawn.size == alone.size and levels(drawn, alone) <= 1
    assert levels(together[1], together[2]) > 1 and engine.active == (0, 0)


def test_images_that_cannot_be_denoised_end_no_others(drawer, monkeypatch):
    """Images of one batch fail together. A text, and images of another size, are answered."""
    engine, batches = Engine(drawer, slots=1, image_slots=2, new_tokens=8, max_images=0), []

    def denoise(graphdef, params, state, cond, uncond, sizes, steps, left, guidance):
        batches.append(state.latents.shape[2:4])
        if len(batches) == 1:
            raise MemoryError("no room")
        return state

    monkeypatch.setattr(engines, "_denoise_slots", denoise)
    text = engine.stream(OPENING[3], max_new_tokens=8, max_images=0)
    wide = {"height": 4, "width": 12}
    images = [engine.generate_image(["one"], seed=1, **DRAW, **more) for more in (wide, wide, {})]
    assert next(text) is None
    while not batches:
        assert [next(each) for each in images] == [None] * 3
        engine.step()
    for failed in images[:2]:
        with pytest.raises(MemoryError, match="no room"):
            next(failed)
    said, drawn = run_together(engine, [text, images[2]])
    assert said[-1].completion_tokens and len(drawn) == 1
    assert batches == [(2, 6)] + [(drawer.image_size // 2,) * 2] and engine.active == (0, 0)


def test_a_request_that_leaves_frees_its_slot(drawer):
    engine = Engine(drawer, slots=1, new_tokens=8, max_images=0)
    more = {"max_new_tokens": 8, "max_images": 0}
    gone, waits = engine.stream(OPENING[2], **more), engine.stream(OPENING[3], **more)
    next(gone)
    assert next(waits) is None and engine.active == (1, 0)
    gone.close()
    assert engine.active == (0, 0)
    next(waits)
    assert engine.active == (1, 0)
    (said,) = run_together(engine, [waits])
    assert said[-1].prompt_tokens == len(drawer.tokenizer.encode(*OPENING[3]))
    # A stop text ends an answer, and its tokens so far are counted.
    stop = "".join(said[:-1])[:1]
    ((*_, usage),) = run_together(engine, [engine.stream(OPENING[3], stops=[stop], **more)])
    assert 0 < usage.completion_tokens < said[-1].completion_tokens and usage.ended
    assert usage.prompt_tokens == said[-1].prompt_tokens and engine.active == (0, 0)


def test_a_warm_up_that_fails_keeps_no_slot(drawer, monkeypatch):
    engine = Engine(drawer, slots=1, new_tokens=8, max_images=0)
    steps = engine.warm_up()

    def fail(*args):
        raise MemoryError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(engine._text, "decode", fail)
        with pytest.raises(MemoryError, match="no room"):
            steps[0]()
    assert engine.active == (0, 0)
    steps[1]()
    assert engine.active == (0, 0)


@pytest.mark.slow
def test_a_beam_search_lets_others_go_on(drawer):
    """It finds what `generate_text` finds, a few tokens at a time, and ends with its client."""
    engine = Engine(drawer, slots=1, new_tokens=8, max_images=0)
    settings = {"num_beams": 3, "max_new_tokens": 8, "min_length": 9, "length_penalty": 1.0}
    gone, waits = engine.search(OPENING[2], **settings), engine.search(OPENING[3], **settings)
    assert next(gone) is None and next(waits) is None and next(waits) is None
    gone.close()
    other = engine.stream(OPENING[3], max_new_tokens=8, max_images=0)
    (found, usage), (*_, streamed) = run_together(engine, [waits, other])
    assert found == drawer.generate_text(OPENING[3], **settings)
    assert usage.completion_tokens == 8 and not usage.ended
    assert usage.prompt_tokens == streamed.prompt_tokens
    # Two dispatches after the first token.
    again = engine.search(OPENING[3], **settings)
    assert [next(again) for _ in range(3)] == [None, None, found]
    with pytest.raises(ValueError, match="use stream"):
        next(engine.search("one", num_beams=1))


def test_prompts_that_wait_are_prefilled_together(drawer, monkeypatch):
    """Prompts of one padded length share a batch, which may have empty rows. If that fails,
    each is prefilled alone."""
    engine = Engine(drawer, slots=5, new_tokens=8, max_images=0)
    more, read, rows = {"max_new_tokens": 8, "max_images": 0}, engines._prefill_rows, []

    def counted(*args):
        rows.append(len(args[3]))
        if rows in ([4], [4, 1, 1, 1]):
            raise MemoryError("no room")
        return read(*args)

    monkeypatch.setattr(engines, "_prefill_rows", counted)
    prompts = [OPENING[3], [random_image(0), random_image(1), "two"], [random_image(2)]]
    answers = [engine.stream(each, **more) for each in prompts]
    assert [next(each) for each in answers] == [None] * 3 and rows == []
    engine.step()
    with pytest.raises(MemoryError, match="no room"):
        next(answers[2])
    together = run_together(engine, answers[:2])
    # Its slot then holds more tokens than the prompts that follow.
    run_together(engine, [engine.stream(["four five six " * 4], **more)])
    for each, said in zip(prompts, together, strict=False):
        assert joined(run_together(engine, [engine.stream(each, **more)])[0]) == joined(said)
    again = run_together(engine, [engine.stream(each, **more) for each in prompts])
    assert [*map(joined, again[:2])] == [*map(joined, together)]
    assert rows == [4, 1, 1, 1, 1, 1, 1, 4] and engine.active == (0, 0)
    # As in `serve.openai.Trimmer`.
    stopped = [engines.has_stop(said, ["\n"]) for said in ("\n one", "\n one\n", "\n")]
    assert stopped == [False, True, False]
    assert [*batches("abcdefgh", (1, 3))] == [("abc", 3), ("def", 3), ("g", 1), ("h", 1)]
    assert [*batches("abcdefg", (1, 4, 16))] == [("abcd", 4), ("efg", 4)]
    assert [*batches("abcdefghijkl", (1, 4, 16))] == [("abcdefghijkl", 16)]
    assert [*batches("ab", (1, 4))] == [("a", 1), ("b", 1)] and [*batches("", (1,))] == []


def test_prompts_that_round_otherwise_share_no_batch(drawer, monkeypatch):
    """Prompts of other padded lengths, or with images: an answer is the one given alone."""
    engine = Engine(drawer, slots=12, new_tokens=8, max_images=1)
    more = {"max_new_tokens": 8, "max_images": 0}
    texts = [engine.stream(["one " * n], **more) for n in (1, 50, 2, 51, 3, 52)]
    drawn = [engine.generate_image([OPENING[3]], seed=n, **DRAW) for n in range(4)]
    assert [next(each) for each in texts + drawn] == [None] * 10
    batches, inserted, waiting = [], [], engine._text._waiting
    monkeypatch.setattr(engine._text, "_dispatch", lambda *batch: batches.append(batch))
    # Counts the batches that have been dispatched when each is awaited.
    monkeypatch.setattr(engine._text, "_insert_batch", lambda *_: inserted.append(len(batches)))
    engine._text.prefill_waiting()
    assert [size for _, size in batches] == [4, 4, 1, 1, 1, 1] and inserted == [6] * 6
    short, long, *_ = ({len(each.prompt.tokens) for each in batch} for batch, _ in batches)
    assert max(short) < 16 < min(long) and engine.active == (10, 0)
    # Batches with more tokens than a batch may have are not computed together.
    engine._text._waiting = waiting
    monkeypatch.setattr(engines, "PREFILL_TOKENS", 5 * 16)
    batches.clear(), inserted.clear()
    engine._text.prefill_waiting()
    assert [size for _, size in batches] == [4] + [1] * 7 and inserted == [1, 2, 3, 5, 5, 8, 8, 8]


@pytest.mark.parametrize("paints", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_nothing_is_compiled_after_the_warm_up(paints, model, words, compiled, monkeypatch):
    """Whatever the length of a prompt, its images, its settings, and the prompts beside it."""
    mesh = make_mesh(devices=jax.devices()[:1])
    graphdef, params = nnx.split(model)
    copy = nnx.merge(graphdef, jax.device_put(params, NamedSharding(mesh, P())))  # as `load` does
    copy.unet = copy.unet if paints else None
    shapes = Shapes(length=96, images=12, new_tokens=8)
    emu = Emu(copy, words, batch_size=1, shapes=shapes, mesh=mesh)
    engine = Engine(emu, slots=5, image_slots=2, new_tokens=8, max_images=1)
    assert engine._text.prompt_shapes() == [(96, 1), (96, 4), (128, 1), (128, 4)]
    with monkeypatch.context() as patched:  # all answers of the warm-up end with their first token
        stream = engine.stream
        patched.setattr(
            engine, "stream", lambda prompt, **more: stream(prompt, **more | {"max_new_tokens": 1})
        )
        steps = engine.warm_up()
    for step in steps:
        step()
    assert engine.active == (0, 0) and len(compiled) > 12
    del compiled[:]
    sampled = {"do_sample": True, "temperature": 2.0, "seed": 1}
    more = {"max_new_tokens": 8, "max_images": 0}
    images = [random_image(n) for n in range(9)]
    for length in (1, 22):
        text = "one two three " * length
        asked = [[text], [images[0], text], [text], images + [text], [text]]
        answers = [engine.stream(each, **more) for each in asked[:4]]
        answers.append(engine.stream(asked[4], **more | sampled))
        assert len(run_together(engine, answers)) == 5
        run_together(engine, [engine.stream(asked[3], **more), engine.stream(asked[1], **more)])
    assert compiled == []
    if paints:
        drawing = [
            engine.generate_image([prompt], seed=seed, num_inference_steps=seed, previews=True)
            for seed, prompt in enumerate((["one"], [images[0]], ["two", images[1]]), 9)
        ]
        assert all(len(joined(parts)[1]) == 1 for parts in run_together(engine, drawing))
        assert compiled == []


def test_a_prompt_too_long_for_a_slot_is_answered_alone(drawer):
    engine = Engine(drawer, slots=1, new_tokens=8, max_images=0, prompt_tokens=8)
    prompt, more = ["four five six " * 8], {"max_new_tokens": 8, "max_images": 0}
    (said,) = run_together(engine, [engine.stream(prompt, **more)])
    *texts, usage = said
    assert "".join(texts) == "".join(drawer.stream(prompt, **more))
    assert usage.prompt_tokens == len(drawer.tokenizer.encode(*prompt)) > 16
    assert not engine._text.fits(usage.prompt_tokens, 8) and engine.active == (0, 0)
    with pytest.raises(UserError, match="positions"):  # at once: another thread may prepare it
        engine.stream(prompt, max_new_tokens=10**6)


def test_images_take_no_more_positions_than_there_are(drawer, caplog):
    """A row may open as many images as it has room for, whatever it is batched with."""
    n, positions = drawer.cfg.n_embeddings, drawer.cfg.llama.max_positions
    settings = {"max_new_tokens": positions - len(drawer.tokenizer.encode(*OPENING[0])) - (n + 1)}
    cfg = drawer.defaults.replace(max_images=3, **settings)
    rows = drawer._prompts([OPENING[0], "ten"], settings["max_new_tokens"], cfg)
    static, _, room = drawer._mixed(cfg, rows)
    spare = len(rows[0].tokens) - len(rows[1].tokens)
    assert static.max_images == 3 and room.tolist() == [1, min(3, 1 + spare // (n + 1))]
    assert "1 of 2 prompts" in caplog.text or "2 of 2 prompts" in caplog.text
    with pytest.raises(UserError, match="no room for one .max_images 3, 128 positions"):
        drawer.complete(
            [*OPENING[0], "[IMG]"], max_new_tokens=settings["max_new_tokens"] + n, max_images=3
        )


def test_a_row_stops_where_it_has_no_room_for_an_image(continuing, continued):
    """The first of `OPENING` opens two images; with room for one it ends before the second."""
    model, _, ids, drawn = continued
    *_, ours, ours_drawn = continuing(1, 2, 2, 2)
    second = np.flatnonzero(ids[0] == model.cfg.tokens.img)[1]
    np.testing.assert_array_equal(ours[0, :second], ids[0, :second])
    assert set(ours[0, second:]) == {model.cfg.tokens.pad}
    np.testing.assert_array_equal(ours[1:], ids[1:])
    np.testing.assert_array_equal(ours_drawn[0, 0], drawn[0, 0])


def test_no_prompts_give_no_answers(small):
    assert small.generate_text([]) == [] and small.complete([]) == []
    assert small.generate_ids([], max_new_tokens=5).shape == (0, 6)
    assert small.generate_image([]) == [] and small.rank([], []) == []
    assert small.regress([]).shape == (0, 3, 48) and small.embed([]).shape == (0, 24)


@pytest.mark.slow
def test_one_prompt_gives_what_it_gives_among_several(drawer):
    """Each method takes one prompt or many, and returns one result or a list of them."""
    prompts = OPENING[:3]
    candidates = [["two", "three four"], ["one two", "six"], ["ten", "nine", "eight"]]
    images, seeds = [random_image(0), random_image(1), random_image(2)], [5, 6, 7]
    short = {"max_new_tokens": 5}
    texts = drawer.generate_text(prompts, **short)
    ids = drawer.generate_ids(prompts, **short)
    ranked = drawer.rank(prompts, candidates)
    features = drawer.embed(images)
    painted = drawer.generate_image(prompts, seed=seeds, **DRAW)
    embeddings = drawer.regress(prompts)
    repainted = drawer.paint(embeddings, seed=seeds, **DRAW)
    completed = drawer.complete(prompts, **short, **DRAW)
    assert len(set(texts)) == 3 and not np.array_equal(painted[0], painted[1])
    assert isinstance(drawer.generate_text("one"), str)
    for n, one in enumerate(prompts):
        assert drawer.generate_text(one, **short) == texts[n]
        np.testing.assert_array_equal(drawer.generate_ids(one, **short), ids[n])
        assert drawer.rank(one, candidates[n]) == ranked[n]
        np.testing.assert_allclose(drawer.embed(images[n]), features[n], rtol=1e-5, atol=1e-6)
        assert levels(drawer.generate_image(one, seed=seeds[n], **DRAW), painted[n]) <= 1
        assert relative_error(drawer.regress(one), embeddings[n]) < 1e-5
        assert levels(drawer.paint(embeddings[n], seed=seeds[n], **DRAW), repainted[n]) <= 1
        assert levels(repainted[n], painted[n]) <= 1
        parts = drawer.complete(one, **short, **DRAW)
        assert [type(p) for p in parts] == [type(p) for p in completed[n]]
        assert [p for p in parts if isinstance(p, str)] == [
            p for p in completed[n] if isinstance(p, str)
        ]


def test_settings_are_keywords_of_the_methods():
    fields = {f.name: f.type for f in dataclasses.fields(GenerationConfig)}
    keywords = MixedSettings.__annotations__
    assert {name: hint.__forward_arg__ for name, hint in keywords.items()} == fields
    assert set(RENAMED.values()) <= set(ImageSettings.__annotations__)


def test_no_special_token_spans_two_parts(small):
    """Foreign texts in parts of their own cannot spell one; ordinary prompts keep their ids."""

    def tokens(*parts):
        return prompt.Prompt.of(parts, small.tokenizer, small.cfg)

    ids, words = small.cfg.tokens, small.tokenizer
    for halves in (("[IM", "G]"), ("<ima", "ge>"), ("</", "s>"), ("[PA", "D]"), ("<", "s", ">")):
        made = tokens(*halves)
        assert made.tokens.tolist() == [words.bos, *words.encode_plain("".join(halves))]
        assert not {ids.img, ids.image, ids.pad, ids.eos} & set(made.tokens.tolist())
    # An image's slots are its own, whatever stands beside it.
    made = tokens("<ima", "ge>", random_image(0), "<ima", random_image(1), "ge>")
    assert (
        (made.embedding_index >= 0).sum()
        == 2 * small.cfg.n_embeddings
        == (made.tokens == ids.image).sum()
    )
    for parts in (
        ("one ", "two"),
        ("one", "two"),
        (" one ", random_image(0), " two ", "three"),
        ("one [IMG]", " two"),
        ("", "one", ""),
        ("\u00e9", "\u0301 two"),
    ):
        spelled = "".join(
            p if isinstance(p, str) else words.image_placeholder(small.cfg.n_embeddings)
            for p in parts
        )
        assert tokens(*parts).tokens.tolist() == words.encode(spelled)


def test_all_numbers_of_steps_share_a_program(small):
    """It gives the image of each to the last bit of a program for that number alone."""
    cond, key = small.regress([["one"]]), jax.random.split(jax.random.key(3), 1)
    uncond, cfg = small._uncond(None), small.defaults.replace(guidance_scale=3.0)
    ours = small._paint(cond, key, cfg.replace(num_inference_steps=3, scheduler="pndm"))
    traced = TRACES["_paint_steps"]
    others = [(1, "ddim"), (100, "ddim"), (2, "dpm++")]
    for steps, method in others:
        assert not np.array_equal(
            small._paint(cond, key, cfg.replace(num_inference_steps=steps, scheduler=method)), ours
        )
    assert TRACES["_paint_steps"] == traced > 0

    @nnx.jit
    def alone(emu, key, cond, uncond, guidance):
        latents = image.sample_latents(
            emu,
            image.initial_latents(key, emu.cfg),
            cond,
            uncond,
            guidance,
            steps=3,
            method="pndm",
        )
        return jnp.round(image.decode_latents(emu, latents) * 255).astype(jnp.uint8)

    expected = alone(small.model, key, cond, uncond, jnp.float32(3.0))
    np.testing.assert_array_equal(ours, expected)
    for steps, method in others:
        rows = diffusion.sampling_steps(small.cfg.scheduler, steps, method)
        table, count = diffusion.padded_steps(small.cfg.scheduler, steps, method)
        assert count == len(rows.t) and {len(column) for column in table} == {1001}
        for padded, column in zip(table, rows, strict=True):
            np.testing.assert_array_equal(padded[:count], column)


def test_painting_can_be_stopped(small):
    looks = []

    def stop():
        looks.append(1)
        return len(looks) == 3

    whole = small.generate_image(
        "one", num_inference_steps=12, scheduler="ddim", stop=lambda: False
    )
    assert np.array_equal(
        whole, small.generate_image("one", num_inference_steps=12, scheduler="ddim")
    )
    with pytest.raises(image.Stopped):
        small.generate_image("one", num_inference_steps=12, scheduler="ddim", stop=stop)
    assert len(looks) == 3


def test_videos_are_their_frames(small):
    frames = [random_image(n) for n in range(3)]
    one = prompt.Prompt.of([np.stack(frames), "two"], small.tokenizer, small.cfg)
    other = prompt.Prompt.of([*frames, "two"], small.tokenizer, small.cfg)
    assert one.tokens.tolist() == other.tokens.tolist()
    np.testing.assert_array_equal(one.images, np.stack(frames))
    assert prompt.instruct([frames, "what?"])[0].startswith(prompt.VIDEO_SYSTEM)


@pytest.mark.parametrize("end", [".mp4", ".M4V", ".mov", ".webm", ".mkv", ".avi"])
def test_files_of_videos_are_known_by_their_end(end, tmp_path):
    path = tmp_path / f"clip{end}"
    path.write_bytes(video(9))
    frames = prompt.open_file(path)
    shown = [10 * n for n in frame_indices(9)]
    assert [round(np.asarray(f).mean() / 10) * 10 for f in frames] == shown


def test_devices_and_pipes_are_no_parts():
    """Reading one may never end."""
    with pytest.raises(UserError, match="/dev/null: not a regular file"):
        prompt.open_file(Path("/dev/null"))


@pytest.mark.parametrize("side", [8, 13])
def test_floats_from_0_to_1_are_the_image_in_bytes(side, small):
    pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)
    for dtype in (np.float16, np.float32, np.float64):
        made = prompt.preprocess_image((pixels / 255.0).astype(dtype), 8)
        np.testing.assert_array_equal(made, prompt.preprocess_image(pixels, 8))
    ready = np.linspace(-2, 2, 192).reshape(8, 8, 3)
    np.testing.assert_array_equal(
        prompt.preprocess_image(prompt.Normalized(ready), 8), ready.astype(np.float32)
    )


@pytest.mark.slow
def test_a_run_directory_is_all_that_load_needs(tmp_path, model, words, small):
    template = AbstractModel(
        lambda: models.EmuModel(model.cfg, rngs=nnx.Rngs(0)), make_mesh(data=8)
    )
    path = (tmp_path / "7" / "params").absolute()
    ocp.PyTreeCheckpointer().save(path, nest(template.params(model)))
    config.save_json(model.cfg, tmp_path / "config.json")
    words.save(tmp_path / "tokenizer")
    (tmp_path / "generation.json").write_text('{"guidance": 2, "num_beams": 1, "max_images": 2}')
    loaded = load(tmp_path)
    assert loaded.defaults == GenerationConfig(guidance_scale=2.0, num_beams=1, max_images=2)
    assert loaded.generate_text("one two") == small.generate_text("one two", num_beams=1)
    sharded = load(tmp_path, mesh=make_mesh(fsdp=2, tensor=4))
    assert sharded.generate_text("one two") == loaded.generate_text("one two")
    assert relative_error(sharded.regress(["ten"]), small.regress(["ten"])) < 1e-5
    rough = load(tmp_path, dtype=jnp.bfloat16)
    assert all(a.dtype == jnp.bfloat16 for a in jax.tree.leaves(nnx.state(rough.model)))
    ours = rough.regress(["one two"]).astype(jnp.float32)
    assert relative_error(ours, small.regress(["one two"])) < 0.1


@pytest.mark.slow
def test_beams_are_the_same_over_sharded_rows(model, words, small):
    mesh = make_mesh(fsdp=8)
    place = AbstractModel(lambda: models.EmuModel(model.cfg, rngs=nnx.Rngs(0)), mesh)
    params = jax.device_put(place.params(model), place.shardings)
    sharded = Emu(place.module(params), words, mesh=mesh)
    beams = {"num_beams": 3, "max_new_tokens": 5}
    ids = small.generate_ids(MIXED_PROMPTS, **beams)
    np.testing.assert_array_equal(sharded.generate_ids(MIXED_PROMPTS, **beams), ids)


@pytest.mark.slow
def test_seeds_reproduce_on_every_mesh(model, words, small):
    """Sampled text and continuations exactly, images to one level of 255."""
    sample = {"num_beams": 1, "do_sample": True, "temperature": 0.7, "max_new_tokens": 7, "seed": 3}
    drawing = DRAW | {"seed": 5, "guidance_scale": 3.0}
    prompts = [["one"], [random_image(0), "two"], ["three"]]
    text = small.generate_ids(MIXED_PROMPTS, **sample)
    drawn = small.generate_image(prompts, **drawing)
    mixed_sample = {k: v for k, v in sample.items() if k != "num_beams"} | DRAW
    parts = small.complete(prompts, **mixed_sample)
    template = AbstractModel(
        lambda: models.EmuModel(model.cfg, rngs=nnx.Rngs(0)), make_mesh(data=8)
    )
    params = template.params(model)
    for shape in ({"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}):
        mesh = make_mesh(**shape)
        place = AbstractModel(lambda: models.EmuModel(model.cfg, rngs=nnx.Rngs(0)), mesh)
        sharded = Emu(place.module(jax.device_put(params, place.shardings)), words, mesh=mesh)
        np.testing.assert_array_equal(sharded.generate_ids(MIXED_PROMPTS, **sample), text)
        again = sharded.generate_image(prompts, **drawing)
        assert max(levels(a, b) for a, b in zip(again, drawn, strict=True)) <= 1
        for ours, theirs in zip(sharded.complete(prompts, **mixed_sample), parts, strict=True):
            for p, q in zip(ours, theirs, strict=True):
                assert p == q if isinstance(p, str) else levels(p, q) <= 1


def test_a_safety_checker_that_cannot_be_read_is_one_line(tmp_path):
    """It is not left out: what it would have found would be shown."""
    pytest.importorskip("diffusers")
    folder = tmp_path / "safety_checker"
    folder.mkdir()
    for content in ("{", "{}"):  # damaged; whole, but its weights are missing
        (folder / "config.json").write_text(content)
        with pytest.raises(UserError, match="cannot read the safety checker in ") as told:
            find_checker(tmp_path)
        assert "\n" not in str(told.value)


def test_the_safety_checker_of_a_checkpoint_is_run(tmp_path, caplog, small):
    """diffusers' own: what it finds is black, the rest is as it was painted."""
    import torch
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    assert find_checker(tmp_path) is None and "has no safety checker" in caplog.text
    tiny = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    vision = tiny | {"image_size": 16, "patch_size": 8}
    clip = CLIPConfig(text_config=tiny, vision_config=vision, projection_dim=6)
    torch.manual_seed(0)
    checker = StableDiffusionSafetyChecker(clip).eval()
    prompts = [["one"], ["two"], ["three"]]
    images = np.stack([np.asarray(p) for p in small.generate_image(prompts, **DRAW, seed=1)])
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    with torch.no_grad():
        seen = processor(list(images), return_tensors="pt").pixel_values
        embedding = checker.visual_projection(checker.vision_model(seen)[1])
        # One concept, which is the second image.
        checker.concept_embeds.copy_(embedding[1].expand_as(checker.concept_embeds))
        cosines = torch.nn.functional.cosine_similarity(embedding, embedding[1:2])
        nearest = max(cosines[0], cosines[2])
        assert nearest < 0.995
        checker.concept_embeds_weights.fill_((1 + nearest) / 2)
        checker.special_care_embeds_weights.fill_(10.0)
    folder = tmp_path / "release" / "files"
    checker.save_pretrained(folder / "safety_checker")
    processor.save_pretrained(folder / "feature_extractor")

    emu = Emu(small.model, small.tokenizer, safety=find_checker(tmp_path))
    looked = np.stack([np.asarray(p) for p in emu.generate_image(prompts, **DRAW, seed=1)])
    assert images[1].any() and not looked[1].any()
    np.testing.assert_array_equal(looked[[0, 2]], images[[0, 2]])
    assert "found something in 1 images" in caplog.text
