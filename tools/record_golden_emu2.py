"""Records outputs of the released Emu2 code; `record_golden.py` runs it in the folder Emu2.

The recorded keys are those of `tests/golden/README_emu2.md`. The release's own classes compute
everything, in float32. Two formats are not in its code: the Hub's prompts are spelled here as in
public copies of `build_input_ids`, and boxes are drawn with OpenCV as in the release's README
(without OpenCV they are left out).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

PLH, VIDEO = "[<IMG_PLH>]", ("[VIDEO]", "[/VIDEO]")
TEXT = [
    "a cat sits on a mat.",
    "the dog is wearing a pair of glasses",
    "This is an image where two pandas sleep:",
]
CASES = [
    *TEXT,
    "",
    " two  spaces",
    "h\u00e9llo w\u00f6rld \U0001f642",
    "a\nb\tc",
    "x </s> y",
    "x <unk> y",
    "[USER] x [ASSISTANT] y",
    "[VIDEO][IMG][gIMG][gIMG][/IMG] frames [/gIMG][EOC]",
    "<grounding>a picture.<phrase>a cat</phrase><object><patch_index_0007></object>",
    "x\n[IMG]\ny",
]
ANSWERS = {
    "release": {"max_new_tokens": 10},
    "greedy": {"max_new_tokens": 20, "num_beams": 1},
    "beam5_lp2": {"max_new_tokens": 20, "num_beams": 5, "length_penalty": 2.0},
}
GENERATE = ANSWERS | {
    tag: {"max_new_tokens": 20} | settings
    for tag, settings in {
        "beam5_lp-1": {"num_beams": 5, "length_penalty": -1.0},
        "beam5_lp0": {"num_beams": 5, "length_penalty": 0.0},
        "beam5_lp1": {"num_beams": 5, "length_penalty": 1.0},
        "beam5_lp-1_min6": {"num_beams": 5, "length_penalty": -1.0, "min_len": 6},
        "beam3_lp2_min4": {"num_beams": 3, "length_penalty": 2.0, "min_len": 4},
        "greedy_min15": {"num_beams": 1, "min_len": 15},
        "greedy_rep1.3": {"num_beams": 1, "repetition_penalty": 1.3},
        "greedy_min15_rep1.5": {"num_beams": 1, "min_len": 15, "repetition_penalty": 1.5},
        "beam5_lp2_rep1.4": {"num_beams": 5, "length_penalty": 2.0, "repetition_penalty": 1.4},
        "greedy_ngram2": {"num_beams": 1, "no_repeat_ngram_size": 2},
        "beam5_lp2_ngram2": {"num_beams": 5, "length_penalty": 2.0, "no_repeat_ngram_size": 2},
    }.items()
}
# The defaults of the release's `generate`.
DEFAULTS = {
    "num_beams": 5,
    "max_new_tokens": 10,
    "min_len": 1,
    "do_sample": False,
    "length_penalty": -1,
    "repetition_penalty": 1.0,
}
# Of `generate_image`: texts of a batch, and the images of their placeholders.
REGRESSED = {
    "text_only": ([TEXT[0], ""], []),
    "in_context": ([PLH + TEXT[1] + PLH + TEXT[0], ""], [0, 1]),
    "unequal": ([PLH + TEXT[1] + PLH + TEXT[0], TEXT[2] + PLH], [0, 1, 2]),
    "blend": ([PLH + PLH, ""], [1, 2]),
    "edit": ([PLH + TEXT[1]], [2]),
    "grounded": (
        [f"<grounding>{TEXT[0]}<phrase>{TEXT[1]}</phrase><object>{PLH}</object>{PLH}"],
        [2, 0],
    ),
}
# Images are numbers. `wide` is a size other than square: half as wide again.
SAMPLING: dict[str, dict[str, Any]] = {
    "10_3.0": {"inputs": [TEXT[0]], "num_inference_steps": 10, "guidance_scale": 3.0},
    "4_1.0": {"inputs": [TEXT[0]], "num_inference_steps": 4, "guidance_scale": 1.0},
    "ae_10_3.0": {"inputs": [0], "num_inference_steps": 10, "guidance_scale": 3.0},
    "ae_4_1.0": {"inputs": [0], "num_inference_steps": 4, "guidance_scale": 1.0},
    "context_5_2.0": {
        "inputs": [0, TEXT[1], 1, TEXT[0]],
        "num_inference_steps": 5,
        "guidance_scale": 2.0,
        "wide": True,
        "crop_info": [3, 5],
        "original_size": [40, 24],
    },
}
CHAT: dict[str, dict[str, Any]] = {
    "single": {"turns": [[0, TEXT[1]]]},
    "text": {"turns": [[TEXT[0]]]},
    "multi": {"turns": [[0, TEXT[1]], [TEXT[0]], [TEXT[2], 1]]},
    "video": {"turns": [[VIDEO[0], 1, 2, VIDEO[1], TEXT[2]]]},
    "mixed": {"turns": [[VIDEO[0], 1, 0, VIDEO[1], TEXT[0], 2], [TEXT[1]], [TEXT[2]]]},
    "grounding": {"turns": [[0, TEXT[2]]], "is_grounding": True},
}
# System message and content.
HUB_CHAT = {
    "default": ("", PLH + TEXT[1]),
    "system": (
        "You are a helpful assistant, dedicated to delivering comprehensive and meticulous "
        "responses.",
        TEXT[2] + PLH,
    ),
}
BOXES = [(22, 14, 224, 224), (224, 10, 448, 224), (0, 0, 448, 448), (120, 264, 121, 438)]


def build(weights: Path, model_json: Path | None, llama: Path, device: str, chat: bool) -> Any:
    """Builds the release's model with its weights, in float32."""
    from emu.conf.emu_conf import CLIPVisionCfg, TextDecoderCfg
    from emu.emu import EmuModel

    sizes = {"n_query": 256} if chat else {}
    if model_json is not None:
        values = json.loads(model_json.read_text())
        sizes = values.get("chat_vision_cfg" if chat else "vision_cfg", values["vision_cfg"])
    names = {field.name for field in dataclasses.fields(CLIPVisionCfg)}
    sizes = {key: value for key, value in sizes.items() if key in names}
    if device == "cpu":
        sizes["xattn"] = False  # xformers needs a GPU; plain attention is equal
    emu = EmuModel(CLIPVisionCfg(**sizes), TextDecoderCfg(str(llama), instruct=chat))
    tensors = {}
    for file in weight_files(weights):
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            part = load_file(file)
        else:
            part = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        tensors |= {
            k.removeprefix("multimodal_encoder.").removeprefix("model."): v
            for k, v in part.items()
            if not k.startswith(("unet.", "vae.", "safety_checker."))
        }
    missing, unexpected = emu.load_state_dict(tensors, strict=False)
    wrong = [k for k in missing if not k.endswith("rotary_emb.inv_freq")] + unexpected
    if wrong:
        raise SystemExit(f"{weights} does not fit the release's model: {wrong[:9]}")
    return emu.float().eval().to(device)


def weight_files(path: Path) -> list[Path]:
    """Returns the files of tensors of a native file or of a folder as on the Hub."""
    if path.is_file():
        return [path]
    if (path / "multimodal_encoder").is_dir():
        path = path / "multimodal_encoder"
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    if not files:
        raise SystemExit(f"{path} has no .safetensors and no .bin files")
    return files


class Recorder:
    """Collects arrays under the names that `emu-jax verify` knows."""

    def __init__(self, emu: Any, images: Sequence[Image.Image], size: int) -> None:
        from emu.chat import EmuChatGeneration

        self.emu, self.images = emu, list(images)
        self.chat = EmuChatGeneration(emu, eva_size=size)
        self.tokenizer, self.lm = emu.decoder.tokenizer, emu.decoder.lm
        self.arrays: dict[str, np.ndarray] = {}

    def save(self, key: str, value: Any) -> None:
        value = value.detach().cpu().numpy() if torch.is_tensor(value) else np.asarray(value)
        self.arrays[key] = value

    def inputs(self, parts: Sequence[Any]) -> list[Any]:
        return [self.images[part] if isinstance(part, int) else part for part in parts]

    def pixels(self, *numbers: int) -> torch.Tensor:
        stacked = torch.stack([self.chat.transform(self.images[i]) for i in numbers])
        return stacked.to(self.emu.device())

    def read(self, texts: Sequence[str], stills: Any, frames: Any, side: str = "left") -> Any:
        """Returns ids, mask, hidden states and logits, the last two zero at padding."""
        t, emu = self.tokenizer, self.emu
        spelled = [
            text.replace(PLH, emu.image_placeholder).replace("[<VID_PLH>]", emu.video_placeholder)
            for text in texts
        ]
        t.padding_side = side
        out = t(spelled, padding="longest", return_tensors="pt").to(emu.device())
        t.padding_side = "left"
        x = self.lm.model.embed_tokens(out.input_ids)
        for token, images, n in (
            ("<image>", stills, emu.n_query),
            ("[gIMG]", frames, emu.v_query),
        ):
            if images is not None:
                features = emu.project_up(emu.encode_image(images, n_query=n))
                x[out.input_ids == t.convert_tokens_to_ids(token)] = features.flatten(0, 1)
        hidden = self.lm.model(
            inputs_embeds=x, attention_mask=out.attention_mask, return_dict=True
        ).last_hidden_state
        real = out.attention_mask[..., None]
        return out.input_ids, out.attention_mask, hidden * real, self.lm.lm_head(hidden) * real

    @contextlib.contextmanager
    def captured(self) -> Iterator[list[torch.Tensor]]:
        """Yields a list that receives the ids which the release decodes to text."""
        found: list[torch.Tensor] = []
        decode = self.tokenizer.batch_decode

        def keep(ids: torch.Tensor, **settings: Any) -> list[str]:
            found.append(ids)
            return decode(ids, **settings)

        self.tokenizer.batch_decode = keep
        try:
            yield found
        finally:
            self.tokenizer.batch_decode = decode

    def answers(self, key: str, kinds: dict[str, Any], **arguments: Any) -> dict[str, Any]:
        """Records what the release generates with each of the settings."""
        texts = {}
        for tag, kw in kinds.items():
            with self.captured() as ids:
                text = self.emu.generate(**arguments, **kw)
            self.save(f"{key}/{tag}/ids", ids[0])
            texts[tag] = {"kw": kw, "text": text[0], "texts": text}
        return texts

    # --- The base model ---

    def base(self) -> dict[str, Any]:
        emu, t = self.emu, self.tokenizer
        pixels = self.pixels(0, 1, 2)
        self.save("vit/pixels_nchw", pixels)
        self.save("vit/features", emu.visual(pixels))
        for name, n in (("n_query", emu.n_query), ("v_query", emu.v_query)):
            features = emu.encode_image(pixels, n_query=n)
            self.save(f"encode/{name}", features)
            self.save(f"encode/{name}_up", emu.project_up(features))
        self.save("encode/null", emu.encode_image(torch.zeros_like(pixels[:1])))

        documents = [PLH + TEXT[0] + PLH + TEXT[1], TEXT[2] + PLH]
        ids, mask, hidden, logits = self.read(documents, pixels, None, "right")
        start, end, image = t.convert_tokens_to_ids(["[IMG]", "[/IMG]", "<image>"])
        unscored = torch.tensor([t.pad_token_id, start, end, image], device=ids.device)
        targets = ids.masked_fill(torch.isin(ids, unscored), -100)[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
        after = torch.cat([ids[:, 1:], ids[:, :1]], 1)
        predict = ((ids == start) | (ids == image)) & (after == image)
        predicted = emu.project_down(hidden[predict])
        target = emu.encode_image(pixels).flatten(0, 1)
        for name, value in {
            "ids": ids,
            "mask": mask,
            "hidden": hidden,
            "logits": logits,
            "llm_loss": loss,
            "llm_targets": (targets != -100).sum(),
            "regress_pred": predicted,
            "regress_target": target,
            "regress_loss": torch.nn.functional.mse_loss(predicted, target),
        }.items():
            self.save(f"train/{name}", value)
        for name, value in zip(
            ("ids", "mask", "hidden"), self.read(documents, pixels, None)[:3], strict=True
        ):
            self.save(f"left/{name}", value)
        meta: dict[str, Any] = {
            "documents": documents,
            "prompts": [text.replace(PLH, emu.image_placeholder) for text in documents],
            "generate_defaults": DEFAULTS,
            "generate": self.answers("generate", GENERATE, text=documents, image=pixels),
            "video": {},
            "gen_image": {},
        }
        for tag, parts in {
            "video": [VIDEO[0], 1, 2, VIDEO[1], TEXT[1]],
            "video_still": [0, TEXT[0], VIDEO[0], 2, 1, VIDEO[1], TEXT[2]],
        }.items():
            text, stills, frames, *_ = self.chat._prepare_inputs(
                self.inputs(parts), emu.device(), emu.dtype()
            )
            ids, _, hidden, _ = self.read(text, stills, frames)
            self.save(f"{tag}/ids", ids)
            self.save(f"{tag}/hidden", hidden)
            out = self.answers(tag, ANSWERS, text=text, image=stills, video=frames)
            meta["video"][tag] = {"inputs": named(parts), "text": text[0], "out": out}
        for tag, (texts, numbers) in REGRESSED.items():
            images = self.pixels(*numbers) if numbers else None
            self.save(f"gen_image/{tag}", emu.generate_image(text=list(texts), image=images))
            meta["gen_image"][tag] = {"text": texts, "pictures": numbers}
        return meta

    # --- The chat model ---

    def conversations(self) -> dict[str, Any]:
        emu, meta = self.emu, {}
        for name, n in (("n_query", emu.n_query), ("v_query", emu.v_query)):
            self.save(f"chat/encode/{name}", emu.encode_image(self.pixels(0), n_query=n))
        for tag, recorded in CHAT.items():
            grounding = recorded.get("is_grounding", False)
            turns = [self.inputs(turn) for turn in recorded["turns"]]
            text, stills, frames, *_ = self.chat._prepare_chat_inputs(
                turns, grounding, emu.device(), emu.dtype()
            )
            ids, _, hidden, logits = self.read(text, stills, frames)
            self.save(f"chat/{tag}/ids", ids)
            self.save(f"chat/{tag}/hidden", hidden)
            self.save(f"chat/{tag}/last_logits", logits[:, -1])
            special = {"skip_special_tokens": False} if grounding else {}
            kinds = {kind: kw | special for kind, kw in ANSWERS.items()}
            out = self.answers(f"chat/{tag}", kinds, text=text, image=stills, video=frames)
            turns = [named(turn) for turn in recorded["turns"]]
            meta[tag] = recorded | {"turns": turns, "text": text[0], "out": out}
        return meta

    def hub_prompts(self) -> dict[str, Any]:
        """Records prompts in the Hub's format, with the ids of the release's tokenizer."""
        meta = {}
        for tag, (system, content) in HUB_CHAT.items():
            text = f"{system}[USER]: {content}[ASSISTANT]:"
            spelled = text.replace(PLH, self.emu.image_placeholder)
            ids = self.tokenizer(spelled, return_tensors="pt").input_ids
            self.save(f"chat_hub/{tag}/ids", ids)
            meta[tag] = {"system_msg": system, "content": content, "text": text}
        return meta

    # --- The image decoder ---

    def painting(self, folder: Path, size: int) -> dict[str, Any]:
        from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
        from emu.diffusion import EmuVisualGeneration

        def load(cls: Any, part: str) -> Any:
            names = [p.name for p in (folder / part).glob("diffusion_pytorch_model*")]
            variant = next((v for v in ("bf16", "fp16") if any(f".{v}." in n for n in names)), None)
            model = cls.from_pretrained(folder / part, variant=variant)
            return model.float().eval().to(self.emu.device())

        unet, vae = load(UNet2DConditionModel, "unet"), load(AutoencoderKL, "vae")
        scheduler = EulerDiscreteScheduler.from_pretrained(folder / "scheduler")
        pipeline = EmuVisualGeneration(self.emu, scheduler, unet, vae, None, None, eva_size=size)
        generator = torch.Generator().manual_seed(0)
        side = unet.config.sample_size

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(self.emu.device())

        cond = torch.from_numpy(self.arrays["gen_image/text_only"]).to(self.emu.device())
        width = cond.shape[-1]
        sizes = torch.tensor([[1024, 1024, 0, 0, 1024, 1024], [700, 512, 3, 5, 512, 700]])
        call = {
            "sample": noise(2, unet.config.in_channels, side, side),
            "t": torch.tensor([5, 907]),
            "cond": cond,
            "text_embeds": noise(2, width),
            "time_ids": sizes,
        }
        for name, value in call.items():
            self.save(f"unet/{name}", value)
        added = {"text_embeds": call["text_embeds"], "time_ids": sizes.to(cond.device)}
        t = call["t"].to(cond.device)
        out = unet(call["sample"], t, encoder_hidden_states=cond, added_cond_kwargs=added)
        self.save("unet/out", out.sample)
        pixels = side * pipeline.vae_scale_factor
        image = torch.tanh(noise(1, 3, pixels, pixels))
        posterior = vae.encode(image).latent_dist
        self.save("vae/image", image)
        self.save("vae/mean", posterior.mean)
        self.save("vae/logvar", posterior.logvar)
        self.save("vae/decoded", vae.decode(posterior.mean).sample)

        def width_of(recorded: dict[str, Any]) -> int:
            return pixels * 3 // 2 if recorded.get("wide") else pixels

        meta, randn, decode = {}, torch.randn, pipeline.decode_latents
        for tag, recorded in SAMPLING.items():
            latent_width = width_of(recorded) // pipeline.vae_scale_factor
            start = noise(1, unet.config.in_channels, side, latent_width)
            self.save(f"sample/{tag}/init_latents", start)

            def watched(latents: torch.Tensor, tag: str = tag) -> np.ndarray:
                images = decode(latents)
                self.save(f"sample/{tag}/latents", latents)
                self.save(f"sample/{tag}/image", images)
                self.save(f"sample/{tag}/image_uint8", (images * 255).round().astype("uint8"))
                return images

            pipeline.decode_latents = watched
            torch.randn = lambda *args, start=start, **kw: start.clone()
            settings = {k: v for k, v in recorded.items() if k not in ("inputs", "wide")}
            settings |= {"height": pixels, "width": width_of(recorded)}
            try:
                pipeline(self.inputs(recorded["inputs"]), **settings)
            finally:
                torch.randn = randn
            guided = recorded["guidance_scale"] > 1
            rows = pipeline._prepare_and_encode_inputs(self.inputs(recorded["inputs"]), guided)
            self.save(f"sample/{tag}/cond", rows)
            self.save(f"sample/{tag}/text_embeds", rows.mean(1))
            ids = [
                *recorded.get("original_size", [1024, 1024]),
                *recorded.get("crop_info", [0, 0]),
                *(settings["height"], settings["width"]),
            ]
            self.save(f"sample/{tag}/time_ids", np.tile(ids, (len(rows), 1)))
            self.save(f"sample/{tag}/timesteps", scheduler.timesteps)
            self.save(f"sample/{tag}/sigmas", scheduler.sigmas)
            self.save(f"sample/{tag}/init_noise_sigma", scheduler.init_noise_sigma)
            meta[tag] = settings | {"inputs": named(recorded["inputs"])}
        return meta


def boxes() -> np.ndarray | None:
    """Returns the box images, one of three equal channels each, or None without OpenCV."""
    try:
        import cv2
    except ImportError:
        print("OpenCV is missing: box/pictures is left out")
        return None
    drawn = []
    for left, top, right, bottom in BOXES:
        mask = np.zeros((448, 448, 3), np.uint8)
        drawn.append(cv2.rectangle(mask, (left, top), (right, bottom), (255, 255, 255), 3)[..., 0])
    return np.stack(drawn)


def named(parts: Sequence[Any]) -> list[str]:
    """Returns inputs with images by name."""
    return [f"picture:{part}" if isinstance(part, int) else part for part in parts]


def cases(tokenizer: Any) -> list[dict[str, Any]]:
    """Returns texts with the slow tokenizer's ids."""
    return [{"text": text, "ids": tokenizer(text).input_ids} for text in CASES]


def record(args: argparse.Namespace) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the arrays and the settings of a recording."""
    images = []
    for i, path in enumerate(args.images):
        image = Image.open(path)
        image.save(args.out / f"preprocess_{i}.png")
        images.append(image.convert("RGB"))
    emu = build(args.pretrained, args.model_json, args.llama, args.device, chat=False)
    patch = emu.visual.patch_embed
    size = patch.img_size[0] if isinstance(patch.img_size, tuple) else patch.img_size
    recorder = Recorder(emu, images, size)
    for i, image in enumerate(images):
        recorder.save(f"preprocess/{i}/pipeline", recorder.chat.transform(image))
    meta = recorder.base()
    meta["tokenizer_cases"] = cases(recorder.tokenizer)
    if (box_images := boxes()) is not None:
        recorder.save("box/pictures", box_images)
        meta["boxes"] = BOXES
    decoder = args.pretrained if args.pretrained.is_dir() else args.decoder
    if decoder and (decoder / "unet").is_dir():
        meta["sampling"] = recorder.painting(decoder, size)
    arrays = recorder.arrays
    if args.instruct:
        del emu, recorder
        emu = build(args.instruct, args.model_json, args.llama, args.device, chat=True)
        recorder = Recorder(emu, images, size)
        meta["chat"] = recorder.conversations()
        meta["chat_hub"] = recorder.hub_prompts()
        meta["tokenizer_cases_chat"] = cases(recorder.tokenizer)
        arrays |= recorder.arrays
    return arrays, meta
