"""Records outputs of the released Emu code, for `emu-jax verify --golden`.

Run it in a clone of the release (github.com/baaivision/Emu, folder Emu1 or Emu2) and in the
release's environment: torch, torchvision and transformers 4.31, with peft 0.4 and diffusers 0.15 to
0.21 for Emu1, with diffusers 0.24 for Emu2. It does not import emu_jax.

    cd Emu/Emu1
    python /path/to/record_golden.py --pretrained CKPT --out GOLDEN [--instruct Emu-instruct.pt]
    cd Emu/Emu2
    python /path/to/record_golden.py --pretrained Emu2-Gen --out GOLDEN [--instruct Emu2-Chat]

CKPT is the release's folder (multimodal_encoder/, unet/, vae/, scheduler/); of Emu2 also a native
file, with the decoder's folder as --decoder. Everything runs in float32, so differences are not due
to rounding to bfloat16. The 14B model takes 56 GB, on a GPU or,
slowly, on the CPU. The release's own `generate` and `predict` cast to bfloat16, so this script
repeats their steps without the casts.

It writes GOLDEN/expected.npz, meta.json and the images that it preprocessed.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

TEXT = [
    "a cat sits on a mat.",
    "the dog is wearing a pair of glasses",
    "This is an image where two pandas sleep:",
]
CANDIDATES = ["a cat", "the red bird stands", "two", "a pair of glasses"]
CASES = [
    *TEXT,
    "",
    " two  spaces",
    "h\u00e9llo w\u00f6rld \U0001f642",
    "a\nb\tc",
    "[USER] x [ASSISTANT] y",
]
GENERATE = {
    "greedy": {"num_beams": 1},
    "beam5": {"num_beams": 5, "length_penalty": 0.0},
    "beam5_lp1_min6": {"num_beams": 5, "length_penalty": 1.0, "min_length": 6},
    "beam3_lpneg1": {"num_beams": 3, "length_penalty": -1.0},
    "greedy_rep1.3": {"num_beams": 1, "repetition_penalty": 1.3},
    "greedy_ngram2": {"num_beams": 1, "no_repeat_ngram_size": 2},
}
DEFAULTS = {
    "do_sample": False,
    "min_length": 1,
    "top_p": 0.9,
    "temperature": 1,
    "repetition_penalty": 1.0,
    "length_penalty": 0.0,
    "num_beams": 5,
    "early_stopping": False,
}
SAMPLING = [(10, 7.5), (4, 1.0)]
SYSTEM = (
    "You will be presented with an image: [IMG]ImageContent[/IMG]. You will be able to see the "
    "image after I provide it to you. Please answer my questions based on the given image."
)


def build(weights: Path, model_json: Path, device: str, instruct: bool):
    """Builds the release's model with its weights, in float32."""
    from models.modeling_emu import Emu

    args = SimpleNamespace(instruct=instruct, device=torch.device(device), ckpt_path=str(weights))
    sizes = json.loads(model_json.read_text())
    if device == "cpu":
        sizes["vision_cfg"]["xattn"] = False  # xformers needs a GPU; plain attention is equal
    emu = Emu(**sizes, cast_dtype=torch.float, args=args)
    stored = torch.load(weights, map_location="cpu", weights_only=True, mmap=True)
    stored = stored.get("module", stored)
    if instruct:
        from peft import LoraConfig, get_peft_model

        rank = next(t.shape[0] for key, t in stored.items() if "lora_A" in key)
        config = LoraConfig(
            r=rank,
            lora_alpha=16,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            lora_dropout=0.05,
            bias="none",
            task_type="CAUSAL_LM",
        )
        emu.decoder.lm = get_peft_model(emu.decoder.lm, config)
    # The constructor casts some weights to bfloat16. A cast to float32 before loading keeps all
    # bits of weights that were stored wider. The rotary tables stay rounded, as in the release.
    emu = emu.float()
    emu.load_state_dict(stored, strict=True)
    return emu.eval().to(device)


class Recorder:
    """Collects arrays under the names that `emu-jax verify` knows."""

    def __init__(self, emu, device: str):
        self.emu, self.device, self.arrays = emu, device, {}
        self.tokenizer = emu.decoder.tokenizer
        self.lm = emu.decoder.lm

    def save(self, key: str, value) -> None:
        value = value.detach().cpu().numpy() if torch.is_tensor(value) else np.asarray(value)
        self.arrays[key] = value
        print(f"{key} {list(value.shape)}", file=sys.stderr)

    def tokens(self, texts, side="right"):
        self.tokenizer.padding_side = side
        out = self.tokenizer(texts, padding="longest", return_tensors="pt").to(self.device)
        self.tokenizer.padding_side = "right"
        return out.input_ids, out.attention_mask

    def embed(self, ids, pixels):
        """Returns token embeddings, with the embeddings of the images at each `<image>`."""
        table = self.lm.get_input_embeddings()
        x = table(ids)
        if pixels is not None and len(pixels):
            features = self.emu.ln_visual(self.emu.visual.forward_features(pixels))
            features = self.emu.cformer(features)
            image = self.tokenizer.convert_tokens_to_ids("<image>")
            x[ids == image] = features.reshape(-1, features.shape[-1])
        return x

    def towers(self, pixels):
        self.save("vit/pixels_nchw", pixels)
        features = self.emu.visual.forward_features(pixels)
        self.save("vit/features", features)
        self.save("vit/ln_visual", self.emu.ln_visual(features))
        self.save("cformer/out", self.emu.cformer(self.emu.ln_visual(features)))

    def training(self, prompts, pixels):
        ids, mask = self.tokens(prompts)
        x = self.embed(ids, pixels)
        out = self.lm.model(inputs_embeds=x, attention_mask=mask, return_dict=True)
        hidden = out.last_hidden_state
        logits = self.lm.lm_head(hidden)
        image, start, end = self.tokenizer.convert_tokens_to_ids(["<image>", "[IMG]", "[/IMG]"])
        unscored = [self.tokenizer.pad_token_id, image, start, end]
        targets = ids.clone()
        targets[torch.isin(ids, torch.tensor(unscored, device=ids.device))] = -100
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]), targets[:, 1:].reshape(-1)
        )
        self.save("train/ids", ids)
        self.save("train/mask", mask)
        self.save("train/logits", logits)
        self.save("train/llm_loss", loss)
        self.save("train/hidden", hidden)
        predict = (ids == start) | (ids == image)
        self.save("train/regress_pred", self.lm.stu_regress_head(hidden[predict]))
        self.save("train/regress_target", x[(ids == image) | (ids == end)])
        self.save("tokenizer/cases_ids", ids)

    def generation(self, prompts, pixels, new_tokens):
        from transformers.generation.configuration_utils import GenerationConfig

        t = self.tokenizer
        special = {
            "bos_token_id": t.bos_token_id,
            "eos_token_id": t.eos_token_id,
            "pad_token_id": t.pad_token_id,
        }
        texts = {}
        ids, mask = self.tokens(prompts, "left")
        x = self.embed(ids, pixels)
        for tag, kw in GENERATE.items():
            settings = DEFAULTS | kw
            # top_p and temperature have no effect without sampling, but the release passes them.
            out = self.lm.generate(
                generation_config=GenerationConfig(**special),
                inputs_embeds=x,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                **settings,
            )
            self.save(f"generate/{tag}/ids", out)
            texts[tag] = {"kw": kw, "texts": t.batch_decode(out, skip_special_tokens=True)}
        return texts, DEFAULTS | special

    def prediction(self, prompt, pixels):
        ids, mask = self.tokens([prompt], "left")
        x = self.embed(ids, pixels)
        out = self.tokenizer(
            CANDIDATES, padding="longest", add_special_tokens=False, return_tensors="pt"
        ).to(self.device)
        n = len(CANDIDATES)
        x = torch.cat([x.expand(n, -1, -1), self.lm.get_input_embeddings()(out.input_ids)], 1)
        mask = torch.cat([mask.expand(n, -1), out.attention_mask], 1)
        targets = out.input_ids.masked_fill(out.input_ids == self.tokenizer.pad_token_id, -100)
        targets = torch.cat([torch.full((n, ids.shape[1]), -100, device=ids.device), targets], 1)
        loss = self.lm(
            inputs_embeds=x, attention_mask=mask, labels=targets, reduction="none", return_dict=True
        ).llm_loss
        self.save("predict/ranks", torch.argsort(loss.reshape(1, n), dim=-1))

    def regression(self, pixels):
        plh = "[<IMG_PLH>]"
        contexts = {
            "text_only": (TEXT[0], None),
            "in_context": (plh + TEXT[1] + plh + TEXT[0], pixels[[0, 1]]),
            "blend": (plh + plh, pixels[[1, 2]]),
        }
        found = {}
        for tag, (text, images) in contexts.items():
            found[tag] = self.emu.generate_image([text, ""], image=images, placeholder=plh)
            self.save(f"gen_image/{tag}", found[tag])
        return found["text_only"]

    def painting(self, folder: Path, cond, generator):
        from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel

        def randn(*shape):
            return torch.randn(shape, generator=generator).to(self.device)

        unet = UNet2DConditionModel.from_pretrained(folder / "unet").float().eval().to(self.device)
        vae = AutoencoderKL.from_pretrained(folder / "vae").float().eval().to(self.device)
        size, channels = unet.config.sample_size, unet.config.in_channels
        sample, t = randn(2, channels, size, size), torch.tensor([5, 907], device=self.device)
        self.save("unet/sample", sample)
        self.save("unet/t", t)
        self.save("unet/cond", cond)
        self.save("unet/out", unet(sample, t, encoder_hidden_states=cond).sample)

        side = size * 2 ** (len(vae.config.block_out_channels) - 1)
        image = torch.tanh(randn(1, 3, side, side))
        posterior = vae.encode(image).latent_dist
        self.save("vae/image", image)
        self.save("vae/mean", posterior.mean)
        self.save("vae/logvar", posterior.logvar)
        self.save("vae/decoded", vae.decode(posterior.mean).sample)

        start = randn(1, channels, size, size)
        self.save("sample/init_latents", start)
        self.save("sample/cond", cond)
        for steps, guidance in SAMPLING:
            scheduler = PNDMScheduler.from_pretrained(folder / "scheduler")
            scheduler.set_timesteps(steps, device=self.device)
            guided, latents = guidance > 1, start
            for t in scheduler.timesteps:
                x = torch.cat([latents] * 2) if guided else latents
                x = scheduler.scale_model_input(x, t)
                noise = unet(x, t, encoder_hidden_states=cond if guided else cond[:1]).sample
                if guided:
                    with_cond, without = noise.chunk(2)
                    noise = without + guidance * (with_cond - without)
                latents = scheduler.step(noise, t, latents).prev_sample
            tag = f"sample/{steps}_{guidance}"
            self.save(f"{tag}/timesteps", scheduler.timesteps)
            self.save(f"{tag}/latents", latents)
            decoded = vae.decode(1 / vae.config.scaling_factor * latents).sample
            image = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
            self.save(f"{tag}/image", image)


def preprocess(recorder, paths, size: int, out: Path):
    """Records both preprocessing paths of the release. Returns pixels of the first three images."""
    from torchvision import transforms as tf

    mean = (0.48145466, 0.4578275, 0.40821073)
    std = (0.26862954, 0.26130258, 0.27577711)
    pipeline = tf.Compose(
        [
            tf.Resize((size, size), interpolation=tf.InterpolationMode.BICUBIC),
            tf.ToTensor(),
            tf.Normalize(mean=mean, std=std),
        ]
    )
    pixels = []
    for i, path in enumerate(paths):
        image = Image.open(path)
        image.save(out / f"preprocess_{i}.png")
        image = image.convert("RGB")
        plain = (np.array(image.resize((size, size))) / 255.0 - mean) / std
        plain = torch.tensor(plain).float().permute(2, 0, 1)
        recorder.save(f"preprocess/{i}/process_img", plain)
        recorder.save(f"preprocess/{i}/pipeline", pipeline(image))
        pixels.append(plain)
    return torch.stack(pixels[:3])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Record what the released Emu code computes.")
    parser.add_argument("--pretrained", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--instruct",
        type=Path,
        metavar="PATH",
        help="Emu-instruct.pt, or Emu2-Chat's file or folder",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--images",
        type=Path,
        nargs="+",
        metavar="FILE",
        default=[Path("examples") / n for n in ("dog.png", "panda.png", "sunflower.png")],
        help="three images or more; Emu2's folder has other examples, so name them",
    )
    parser.add_argument(
        "--model-json",
        type=Path,
        metavar="FILE",
        help="sizes that the release keeps in its own file or code (default: those)",
    )
    parser.add_argument("--decoder", type=Path, metavar="DIR", help="Emu2: unet/, vae/, scheduler/")
    parser.add_argument(
        "--llama",
        type=Path,
        metavar="DIR",
        default=Path("emu/conf/llama_config"),
        help="Emu2: LLaMA's sizes and tokenizer",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--new-tokens", type=int, default=20)
    args = parser.parse_args()
    if len(args.images) < 3:
        parser.error("--images: give three images or more")
    emu2 = Path("emu/emu.py").is_file()
    if not emu2 and not Path("models/modeling_emu.py").is_file():
        parser.error("run this in the release's folder Emu1 or Emu2")
    sys.path.insert(0, ".")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if emu2:
        import record_golden_emu2

        write(args.out, *record_golden_emu2.record(args))
        return

    args.model_json = args.model_json or Path("models/Emu-14B.json")
    size = json.loads(args.model_json.read_text())["vision_cfg"]["image_size"]
    weights = args.pretrained / "multimodal_encoder" / "pytorch_model.bin"
    emu = build(weights, args.model_json, args.device, instruct=False)
    recorder = Recorder(emu, args.device)
    placeholder = emu.image_placeholder
    prompts = [placeholder + TEXT[0] + placeholder + TEXT[1], TEXT[2] + placeholder]

    pixels = preprocess(recorder, args.images, size, args.out).to(args.device)
    recorder.towers(pixels)
    recorder.training(prompts, pixels)
    texts, defaults = recorder.generation(prompts, pixels, args.new_tokens)
    recorder.prediction(TEXT[2] + placeholder, pixels[:1])
    cond = recorder.regression(pixels)
    recorder.painting(args.pretrained, cond, torch.Generator().manual_seed(0))
    encode = recorder.tokenizer
    cases = [{"text": text, "ids": encode(text).input_ids} for text in [*prompts, *CASES]]
    meta = {
        "prompts": prompts,
        "tokenizer_cases": cases,
        "generate": texts,
        "generate_defaults": defaults,
        "spec": {"text": TEXT, "candidates": CANDIDATES, "new_tokens": args.new_tokens},
        "instruct_prompt": f"{SYSTEM} [USER]: {placeholder}{TEXT[1]} [ASSISTANT]:",
    }
    arrays = recorder.arrays
    if args.instruct:
        del emu, recorder
        gc.collect()
        torch.cuda.empty_cache()
        emu = build(args.instruct, args.model_json, args.device, instruct=True)
        recorder = Recorder(emu, args.device)
        ids, mask = recorder.tokens([meta["instruct_prompt"]])
        x = recorder.embed(ids, pixels[:1])
        recorder.save("instruct/ids", ids)
        out = recorder.lm(inputs_embeds=x, attention_mask=mask, return_dict=True)
        recorder.save("instruct/logits", out.logits)
        arrays |= recorder.arrays
    write(args.out, arrays, meta)


def write(out: Path, arrays: dict[str, np.ndarray], meta: dict) -> None:
    """Writes a recording."""
    temporary = out / "unfinished.npz"
    np.savez(temporary, **arrays)
    temporary.rename(out / "expected.npz")
    (out / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    print(f"{out}: {len(arrays)} tensors", file=sys.stderr)


if __name__ == "__main__":
    main()
