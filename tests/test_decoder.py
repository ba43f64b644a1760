"""The visual decoder (U-Net, autoencoder, samplers) against the released code and diffusers."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error
from flax import nnx
from helpers import kernels_of
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from emu_jax import config, diffusion, sharding
from emu_jax.convert import release_config, tensor_files
from emu_jax.errors import UserError
from emu_jax.models.unet import UNet
from emu_jax.models.vae import VAE

pytestmark = pytest.mark.optimized

GOLDEN = Path(__file__).parent / "golden"
TINY = GOLDEN / "tiny"
EMU2 = GOLDEN / "emu2_tiny"

# diffusers' names (the autoencoder's old ones too) -> ours, where they differ.
RENAMED = [
    (r"\.to_out\.0\.", ".to_out."),
    (r"\.ff\.net\.0\.proj\.", ".ff.proj."),
    (r"\.ff\.net\.2\.", ".ff.out."),
    (r"(attentions\.\d+)\.query\.", r"\1.to_q."),
    (r"(attentions\.\d+)\.key\.", r"\1.to_k."),
    (r"(attentions\.\d+)\.value\.", r"\1.to_v."),
    (r"(attentions\.\d+)\.proj_attn\.", r"\1.to_out."),
]


def our_name(key: str) -> str:
    for old, new in RENAMED:
        key = re.sub(old, new, key)
    name, kind = key.rsplit(".", 1)
    norm = re.search(r"(^|[._])(norm\d?|group_norm|conv_norm_out)$", name)
    return f"{name}.{'scale' if norm else 'kernel'}" if kind == "weight" else key


def our_array(array: np.ndarray) -> np.ndarray:
    return {2: lambda a: a.T, 4: lambda a: a.transpose(2, 3, 1, 0)}.get(array.ndim, lambda a: a)(
        array
    )


def template(cls: type, cfg, mesh=None) -> sharding.AbstractModel:
    mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    return sharding.AbstractModel(lambda: cls(cfg, rngs=nnx.Rngs(0)), mesh)


def load(cls: type, cfg, tensors: dict[str, np.ndarray]):
    """`cls(cfg)` with the parameters of a torch state dict, none left on either side."""
    ours = template(cls, cfg)
    arrays = {our_name(k): our_array(np.asarray(v)) for k, v in tensors.items()}
    assert {k: v.shape for k, v in arrays.items()} == {k: v.shape for k, v in ours.shapes.items()}
    return ours.module(jax.tree.map(jnp.asarray, arrays))


def diffusers_config(cls: type, folder: Path):
    values = json.loads((folder / "config.json").read_text())
    names = {f.name for f in dataclasses.fields(cls)}
    return config.from_dict(cls, {k: v for k, v in values.items() if k in names})


def close(ours, theirs, tolerance: float) -> None:
    assert relative_error(ours, theirs) <= tolerance


def nhwc(x) -> jax.Array:
    return jnp.asarray(np.asarray(x).transpose(0, 2, 3, 1))


@pytest.fixture(scope="module")
def unet() -> UNet:
    tensors = load_file(TINY / "unet" / "diffusion_pytorch_model.safetensors")
    cfg = diffusers_config(config.UNetConfig, TINY / "unet")
    return load(UNet, cfg, tensors)


@pytest.fixture(scope="module")
def vae() -> VAE:
    tensors = load_file(TINY / "vae" / "diffusion_pytorch_model.safetensors")
    cfg = diffusers_config(config.VAEConfig, TINY / "vae")
    return load(VAE, cfg, tensors)


@pytest.fixture(scope="module")
def scheduler() -> config.SchedulerConfig:
    values = json.loads((TINY / "scheduler" / "scheduler_config.json").read_text())
    names = {f.name for f in dataclasses.fields(config.SchedulerConfig)}
    return config.from_dict(config.SchedulerConfig, {k: v for k, v in values.items() if k in names})


# --- against the release ---------------------------------------------------------------------


def test_unet_golden(golden, unet):
    sample, t, cond = (jnp.asarray(golden[f"unet/{k}"]) for k in ("sample", "t", "cond"))
    out = nnx.jit(UNet.__call__)(unet, nhwc(sample), t, cond)
    close(out, nhwc(golden["unet/out"]), 2e-5)


def test_vae_golden(golden, vae):
    mean, logvar = nnx.jit(VAE.encode)(vae, nhwc(golden["vae/image"]))
    close(mean, nhwc(golden["vae/mean"]), 2e-5)
    close(logvar, nhwc(golden["vae/logvar"]), 2e-5)
    decoded = nnx.jit(VAE.decode)(vae, nhwc(golden["vae/mean"]))
    close(decoded, nhwc(golden["vae/decoded"]), 2e-5)


@pytest.mark.parametrize("steps, guidance", [(10, 7.5), (4, 1.0)])
def test_sampling_golden(golden, unet, vae, scheduler, steps, guidance):
    tag = f"sample/{steps}_{guidance}"
    table = diffusion.sampling_steps(scheduler, steps)
    np.testing.assert_array_equal(table.t, golden[f"{tag}/timesteps"])

    @nnx.jit
    def paint(unet, vae, latents, cond):
        latents = diffusion.sample(
            unet, latents, cond[:1], cond[1:], cfg=scheduler, steps=steps, guidance=guidance
        )
        image = vae.decode(latents / vae.cfg.scaling_factor)
        return latents, jnp.clip(image / 2 + 0.5, 0, 1)

    latents, image = paint(unet, vae, nhwc(golden["sample/init_latents"]), golden["sample/cond"])
    close(latents, nhwc(golden[f"{tag}/latents"]), 1e-4)
    close(image, golden[f"{tag}/image"], 1e-4)


@pytest.fixture(scope="module")
def golden2():
    """Recorded outputs of the released code of Emu2."""
    return np.load(EMU2 / "expected.npz")


@pytest.fixture(scope="module")
def painter2() -> tuple[UNet, VAE, config.SchedulerConfig]:
    """The decoder of Emu2-Gen."""
    folder = EMU2 / "Emu2-Gen"
    unet, vae, scheduler = release_config.decoder(folder)
    towers = []
    for cls, cfg, name in ((UNet, unet, "unet"), (VAE, vae, "vae")):
        (tensors,) = tensor_files.open_tensors(
            tensor_files.find(folder / name, "diffusion_pytorch_model")
        )[0].values()
        arrays = {key: t.read().astype(np.float32) for key, t in tensors.items()}
        towers.append(load(cls, cfg, arrays))
    return *towers, scheduler


def test_emu2_decoder_golden(golden2, painter2):
    unet, vae, _ = painter2
    names = ("t", "cond", "time_ids", "text_embeds")
    rest = (jnp.asarray(golden2[f"unet/{name}"]) for name in names)
    out = nnx.jit(UNet.__call__)(unet, nhwc(golden2["unet/sample"]), *rest)
    close(out, nhwc(golden2["unet/out"]), 2e-5)
    mean, logvar = nnx.jit(VAE.encode)(vae, nhwc(golden2["vae/image"]))
    close(mean, nhwc(golden2["vae/mean"]), 2e-5)
    close(logvar, nhwc(golden2["vae/logvar"]), 2e-5)
    decoded = nnx.jit(VAE.decode)(vae, nhwc(golden2["vae/mean"]))
    close(decoded, nhwc(golden2["vae/decoded"]), 2e-5)


@pytest.mark.slow
def test_emu2_sampling_golden(golden2, painter2):
    """Euler with guidance and without, square and not, from other sizes and crops."""
    unet, vae, scheduler = painter2
    assert scheduler.sampler == "euler"

    @nnx.jit
    def paint(unet, vae, noise, cond, uncond, sizes, table, count, guidance):
        def denoise(x, t, cond):
            return unet(x, t, cond, jnp.broadcast_to(sizes, (len(x), 6)))

        state = diffusion.advance(
            denoise,
            diffusion.initial_state(noise),
            cond,
            uncond,
            table=table,
            first=0,
            last=count,
            guidance=guidance,
        )
        image = vae.decode(state.latents / vae.cfg.scaling_factor)
        return state.latents, jnp.clip(image / 2 + 0.5, 0, 1)

    tags = sorted({key.split("/")[1] for key in golden2 if key.startswith("sample/")})
    assert len(tags) == 5
    for tag in tags:
        recorded = {
            key.split("/")[2]: golden2[key] for key in golden2 if key.startswith(f"sample/{tag}/")
        }
        steps, guidance = tag.split("_")[-2:]
        table, count = diffusion.padded_steps(scheduler, int(steps), scheduler.sampler)
        np.testing.assert_array_equal(table.t[:count], recorded["timesteps"])
        latents, image = paint(
            unet,
            vae,
            nhwc(recorded["init_latents"]),
            jnp.asarray(recorded["cond"][:1]),
            jnp.asarray(recorded["cond"][-1:]),
            jnp.asarray(recorded["time_ids"][0]),
            table,
            jnp.int32(count),
            jnp.float32(guidance),
        )
        close(latents, nhwc(recorded["latents"]), 1e-4)
        close(image, recorded["image"], 1e-4)
        assert np.abs(np.round(np.asarray(image) * 255) - recorded["image_uint8"]).max() <= 1


# --- against diffusers -----------------------------------------------------------------------


def torch_module(cls, **kwargs):
    """A diffusers model with random weights, norms and biases included, and its state dict."""
    torch = pytest.importorskip("torch")
    module = cls(**kwargs).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return module, {k: v.numpy() for k, v in module.state_dict().items()}


def check_norms(ours, theirs) -> None:
    """Each norm's epsilon: outputs hardly tell 1e-5 from 1e-6."""
    expected = {name: m.eps for name, m in theirs.named_modules() if hasattr(m, "eps")}
    found = {
        ".".join(map(str, path)): node.eps
        for path, node in nnx.iter_graph(ours)
        if hasattr(node, "eps")
    }
    assert found == expected and expected


UNETS = [
    # Every kind of block, an odd number of layers, three levels.
    config.UNetConfig(
        in_channels=3,
        out_channels=5,
        block_out_channels=(12, 20, 28),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=11,
        norm_num_groups=4,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-4,
    ),
    config.UNetConfig(
        block_out_channels=(18, 24),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=3,
        cross_attention_dim=7,
        norm_num_groups=6,
    ),
    # SDXL's: levels of different depth and heads, linear projections, sizes.
    config.UNetConfig(
        block_out_channels=(12, 20, 30),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4, 5),
        transformer_layers_per_block=(3, 1, 2),
        cross_attention_dim=9,
        norm_num_groups=2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=9 + 6 * 8,
    ),
]


# Sides that do not halve evenly too, down to a single pixel.
@pytest.mark.parametrize(
    "cfg, sides",
    [
        (UNETS[0], (10, 5)),
        (UNETS[1], (7, 1)),
        (UNETS[2], (5, 6)),
        pytest.param(UNETS[0], (8, 12), marks=pytest.mark.slow),
        pytest.param(UNETS[0], (6, 10), marks=pytest.mark.slow),
        pytest.param(UNETS[0], (3, 6), marks=pytest.mark.slow),
        pytest.param(UNETS[1], (8, 12), marks=pytest.mark.slow),
    ],
)
def test_unet_diffusers(cfg, sides):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    theirs, tensors = torch_module(diffusers.UNet2DConditionModel, **dataclasses.asdict(cfg))
    ours = load(UNet, cfg, tensors)
    check_norms(ours, theirs)
    rng = np.random.default_rng(0)
    sample = rng.normal(size=(3, cfg.in_channels, *sides)).astype(np.float32)
    cond = rng.normal(size=(3, 5, cfg.cross_attention_dim)).astype(np.float32)
    t = np.array([0.0, 37.5, 999.0], np.float32)
    added, sizes = None, None
    if cfg.takes_sizes:
        sizes = np.array([[64, 96, 0, 3, 5, 6], [1, 2, 3, 4, 5, 6], [9, 8, 0, 0, 7, 1]], np.float32)
        pooled = {"text_embeds": torch.from_numpy(cond.mean(1))}
        added = pooled | {"time_ids": torch.from_numpy(sizes)}
        sizes = jnp.asarray(sizes)
    with torch.no_grad():
        arrays = (torch.from_numpy(x) for x in (sample, t, cond))
        expected = theirs(*arrays, added_cond_kwargs=added).sample
    out = nnx.jit(UNet.__call__)(ours, nhwc(sample), jnp.asarray(t), jnp.asarray(cond), sizes)
    close(out, nhwc(expected), 2e-5)


def test_vae_diffusers():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    cfg = config.VAEConfig(
        in_channels=2,
        out_channels=3,
        latent_channels=5,
        block_out_channels=(12, 18, 24),
        layers_per_block=1,
        norm_num_groups=6,
    )
    levels = len(cfg.block_out_channels)
    theirs, tensors = torch_module(
        diffusers.AutoencoderKL,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        **dataclasses.asdict(cfg),
    )
    ours = load(VAE, cfg, tensors)
    check_norms(ours, theirs)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, cfg.in_channels, 12, 20)).astype(np.float32)
    z = rng.normal(size=(2, cfg.latent_channels, 3, 5)).astype(np.float32)
    with torch.no_grad():
        posterior = theirs.encode(torch.from_numpy(x)).latent_dist
        decoded = theirs.decode(torch.from_numpy(z)).sample
    mean, logvar = nnx.jit(VAE.encode)(ours, nhwc(x))
    close(mean, nhwc(posterior.mean), 2e-5)
    close(logvar, nhwc(posterior.logvar), 2e-5)
    close(nnx.jit(VAE.decode)(ours, nhwc(z)), nhwc(decoded), 2e-5)


CLASSES = {
    "pndm": "PNDMScheduler",
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}
SPACES = [
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "linspace", "steps_offset": 0},
    {"timestep_spacing": "trailing", "steps_offset": 0},
]


# torch's arrays in numpy, inside diffusers.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("method", CLASSES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("space", SPACES, ids=lambda s: s["timestep_spacing"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
def test_samplers_diffusers(method, prediction_type, space, steps):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    cfg = config.SchedulerConfig(
        beta_schedule="linear" if steps == 7 else "scaled_linear",
        prediction_type=prediction_type,
        set_alpha_to_one=steps == 3,
        **space,
    )
    cls = getattr(diffusers, CLASSES[method])
    options = {"clip_sample": False} if method == "ddim" else {}
    theirs = cls.from_config({**dataclasses.asdict(cfg), **options})
    theirs.set_timesteps(steps)
    if method == "euler" and cfg.timestep_spacing != "leading":
        with pytest.raises(UserError, match="timestep_spacing"):
            diffusion.sampling_steps(cfg, steps, method)
        return
    table = diffusion.sampling_steps(cfg, steps, method)
    np.testing.assert_array_equal(table.t, theirs.timesteps)

    # A denoiser whose answer depends on everything, and smoothly.
    initial = np.random.default_rng(steps).normal(size=(2, 3, 5, 4)).astype(np.float32)

    def answer(xp, x, t):
        return 0.7 * x + xp.sin(2 * x + t / 300)

    x = torch.from_numpy(initial) * theirs.init_noise_sigma
    for t in theirs.timesteps:
        output = answer(torch, theirs.scale_model_input(x, t), t)
        x = theirs.step(output, t, x).prev_sample

    def denoise(x, t, cond):
        return answer(jnp, x, t[:, None, None, None]) + cond[:, :1, :1, None]

    cond = jnp.zeros((2, 1, 1))
    out = jax.jit(
        lambda latents: diffusion.sample(
            denoise, latents, cond, cfg=cfg, steps=steps, method=method
        )
    )(jnp.asarray(initial))
    close(out, x, 1e-4)


# --- alone -----------------------------------------------------------------------------------

SCHEDULER = config.SchedulerConfig()


def test_pndm_calls_the_denoiser_once_more_than_steps():
    assert len(diffusion.sampling_steps(SCHEDULER, 50, "pndm").t) == 51
    assert len(diffusion.sampling_steps(SCHEDULER, 50, "ddim").t) == 50


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noise_and_targets_by_hand(kind):
    """Stable Diffusion's schedule: its betas rise with the square of an even step."""
    betas = [(0.00085**0.5 + n * (0.012**0.5 - 0.00085**0.5) / 999) ** 2 for n in range(1000)]
    cfg = dataclasses.replace(SCHEDULER, prediction_type=kind)
    rng = np.random.default_rng(0)
    latents, noise = rng.normal(size=(2, 3, 2, 5, 4)).astype(np.float32)
    times = jnp.asarray([0, 400, 999])
    noised = diffusion.add_noise(cfg, latents, noise, times)
    target = diffusion.denoiser_target(cfg, latents, noise, times)
    for row, t in enumerate(times.tolist()):
        left = math.prod(1 - beta for beta in betas[: t + 1])
        signal, spread = left**0.5, (1 - left) ** 0.5
        expected = signal * latents[row] + spread * noise[row]
        np.testing.assert_allclose(noised[row], expected, rtol=1e-4, atol=1e-6)
        velocity = signal * noise[row] - spread * latents[row]
        expected = noise[row] if kind == "epsilon" else velocity
        np.testing.assert_allclose(target[row], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kernels", ["cpu", "xla"])
@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_guidance_and_its_passes(guidance, kernels):
    """On a CPU the halves are computed apart."""
    rows = []

    def denoise(x, t, cond):
        rows.append(x.shape[0])
        return 0.1 * x + cond[:, :1, :1, None]

    x = jnp.ones((2, 4, 6, 3))
    cond, uncond = jnp.full((2, 5, 7), 0.5), jnp.full((2, 5, 7), -1.0)
    run = partial(diffusion.sample, denoise, x, cfg=SCHEDULER, steps=4, method="ddim")
    with kernels_of(kernels):
        out = run(cond, uncond, guidance=guidance)
        assert set(rows) == {4 if guidance > 1 and kernels == "xla" else 2}
        guided = len(rows)
        # The answer is affine in the condition, so guidance is a condition further off.
        close(out, run(uncond + guidance * (cond - uncond)), 1e-6)
        assert guided == (len(rows) - guided) * (2 if guidance > 1 and kernels == "cpu" else 1)
        traced = jax.jit(lambda g: run(cond, uncond, guidance=g))(jnp.asarray(guidance))
        close(traced, out, 1e-6)


def test_one_compiled_denoiser_whatever_the_steps():
    def calls(method, steps):
        denoise = jax.jit(lambda x, t, cond: x * 0.5)
        x, cond = jnp.zeros((1, 4, 4, 2)), jnp.zeros((1, 1, 1))
        run = partial(diffusion.sample, denoise, cfg=SCHEDULER, steps=steps, method=method)
        return str(jax.make_jaxpr(run)(x, cond)).count("jit[")

    for method in diffusion.METHODS:
        assert calls(method, 3) == calls(method, 40)


@pytest.mark.parametrize(
    "method, prediction_type",
    # Not PNDM on velocities: it extrapolates them, and they turn with time.
    [(m, "epsilon") for m in diffusion.METHODS] + [(m, "v_prediction") for m in ("ddim", "dpm++")],
)
def test_samplers_recover_what_was_noised(method, prediction_type):
    """A denoiser that knows the latents leads back to them, from `add_noise` by its target."""
    cfg = config.SchedulerConfig(prediction_type=prediction_type, set_alpha_to_one=True)
    rng = np.random.default_rng(0)
    clean, noise = (jnp.asarray(rng.normal(size=(2, 3, 5, 4)), jnp.float32) for _ in range(2))

    def denoise(x, t, cond):
        a = jnp.asarray(diffusion.alphas_cumprod(cfg), jnp.float32)[t][:, None, None, None]
        found = (x - jnp.sqrt(a) * clean) / jnp.sqrt(1 - a)
        return diffusion.denoiser_target(cfg, clean, found, t)

    start = int(diffusion.sampling_steps(cfg, 20, method).t[0])
    noisy = diffusion.add_noise(cfg, clean, noise, jnp.full(2, start))
    out = diffusion.sample(denoise, noisy, jnp.zeros((2, 1, 1)), cfg=cfg, steps=20, method=method)
    close(out, clean, 1e-5)


@pytest.mark.parametrize(
    "change, steps, method, line",
    [
        ({}, 0, "pndm", "0 sampling steps"),
        ({}, 1001, "ddim", "1001 sampling steps"),
        ({}, 1000, "ddim", "do not fit"),
        ({}, 1000, "dpm++", "do not fit"),
        ({}, 5, "ddpm", "unknown sampler 'ddpm'; did you mean 'ddim'"),
        ({"beta_schedule": "cosine"}, 5, "ddim", "unknown scheduler.beta_schedule 'cosine'"),
        ({"timestep_spacing": "trail"}, 5, "ddim", "did you mean 'trailing'"),
        ({"prediction_type": "sample"}, 5, "ddim", "unknown scheduler.prediction_type"),
        ({"skip_prk_steps": False}, 5, "pndm", "skip_prk_steps"),
    ],
)
def test_sampler_mistakes(change, steps, method, line):
    with pytest.raises(UserError, match=line):
        diffusion.sampling_steps(dataclasses.replace(SCHEDULER, **change), steps, method)


def test_network_mistakes(vae):
    with pytest.raises(UserError, match="image of 9x8.*multiple of 2"):
        vae.encode(jnp.zeros((1, 9, 8, 3)))

    def build(**change):
        cfg = dataclasses.replace(config.UNetConfig(), **change)
        nnx.eval_shape(lambda: UNet(cfg, rngs=nnx.Rngs(0)))

    with pytest.raises(UserError, match="unknown block 'UpBlock'"):
        build(up_block_types=("UpBlock",) * 4)
    with pytest.raises(UserError, match="down_block_types names 1 blocks"):
        build(down_block_types=("DownBlock2D",))
    with pytest.raises(UserError, match="attention_head_dim.*one for each of the 4 levels"):
        build(attention_head_dim=(8, 8))
    with pytest.raises(UserError, match="320 must be a multiple of unet.attention_head_dim = 6"):
        build(attention_head_dim=(6, 8, 8, 8))
    with pytest.raises(UserError, match="unknown unet.addition_embed_type 'image'"):
        build(addition_embed_type="image")
    with pytest.raises(UserError, match="6 addition_time_embed_dim = 80"):
        unet = config.UNetConfig(
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=81,
        )
        config.EmuConfig(unet=unet)
    small = template(UNet, SMALL).init()
    with pytest.raises(ValueError, match="takes no sizes"):
        template(UNet, SMALL).module(small)(
            jnp.zeros((1, 2, 2, 4)), jnp.zeros(1), jnp.zeros((1, 2, 8)), jnp.zeros((1, 6))
        )


def test_full_size_shapes():
    """The 14B release's U-Net and autoencoder, key by key."""
    shapes = json.loads((GOLDEN / "emu14b_state_dict_shapes.json").read_text())
    cfg = config.emu_14b()
    autoencoders = ["vae", "vae_diffusers_0_15"]
    for cls, part, cases in ((UNet, cfg.unet, ["unet"]), (VAE, cfg.vae, autoencoders)):
        ours = {k: v.shape for k, v in template(cls, part).shapes.items()}
        for case in cases:
            theirs = {k: np.broadcast_to(np.float32(0), s) for k, s in shapes[case].items()}
            assert ours == {our_name(k): our_array(v).shape for k, v in theirs.items()}
            count = sum(math.prod(s) for s in shapes[case].values())
            assert sum(map(math.prod, ours.values())) == count


def test_full_size_sdxl():
    """Emu2-Gen's decoder has as many parameters as the release's."""
    release = config.emu2_gen()
    parts = ((UNet, release.unet, 2_525_520_644), (VAE, release.vae, 83_653_863))
    for cls, cfg, count in parts:
        assert sum(math.prod(s.shape) for s in template(cls, cfg).shapes.values()) == count


SMALL = config.UNetConfig(
    block_out_channels=(16,),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("UpBlock2D",),
    attention_head_dim=2,
    cross_attention_dim=8,
    norm_num_groups=4,
)


def small_unet(mesh=None):
    """A small U-Net's template, and loss(params, remat=) on a fixed batch."""
    unet = template(UNet, SMALL, mesh)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(8, 4, 6, 4)), jnp.float32)
    t, cond = jnp.arange(8) * 100, jnp.asarray(rng.normal(size=(8, 3, 8)), jnp.float32)

    def loss(params, remat="none"):
        module = unet.module(params)
        module.remat = remat
        return jnp.mean(jnp.square(module(x, t, cond)))

    return unet, loss


@pytest.fixture(scope="module")
def small_gradients():
    """(parameters, loss, gradients) of the small U-Net on one device."""
    unet, loss = small_unet()
    params = unet.init()
    return params, *jax.jit(jax.value_and_grad(loss))(params)


def assert_same_gradients(ours, theirs):
    largest = max(float(jnp.abs(g).max()) for g in theirs.values())
    for name, gradient in theirs.items():
        assert np.abs(np.subtract(ours[name], gradient)).max() <= 1e-5 * largest, name


def test_remat_changes_no_gradient(small_gradients):
    params, _, gradients = small_gradients
    _, loss = small_unet()
    again = jax.grad(partial(loss, remat="full"))
    assert "remat" in str(jax.make_jaxpr(again)(params))
    assert "remat" not in str(jax.make_jaxpr(jax.grad(loss))(params))
    assert_same_gradients(jax.jit(again)(params), gradients)


def test_sharded_equals_unsharded(small_gradients):
    """On the mesh on which XLA's partitioner goes wrong when left alone (`Conv`)."""
    params, value, gradients = small_gradients
    mesh = sharding.make_mesh(2, 2, 2)
    unet, loss = small_unet(mesh)
    spec = unet.shardings["mid_block.resnets.0.conv1.kernel"].spec
    assert spec == P(None, None, "fsdp", "tensor")
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, unet.shardings)
        again, sharded = jax.jit(jax.value_and_grad(loss))(placed)
    close(again, value, 1e-5)
    assert_same_gradients(sharded, gradients)


def test_bfloat16_in_bfloat16_out(unet, vae):
    def half(*shape):
        return jnp.ones(shape, jnp.bfloat16)

    out = jax.eval_shape(unet, half(1, 4, 4, 4), jnp.zeros(1, jnp.int32), jnp.ones((1, 2, 64)))
    assert out.dtype == jnp.bfloat16
    assert jax.eval_shape(vae.decode, half(1, 4, 4, 4)).dtype == jnp.bfloat16
    assert jax.eval_shape(vae.encode, half(1, 4, 4, 3))[0].dtype == jnp.bfloat16
