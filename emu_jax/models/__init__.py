"""The towers of Emu, one module each, and the layers beneath them.

emu.py              EmuModel: the towers put together
eva_clip.py         EVA-CLIP's vision transformer
cformer.py          the Causal Transformer
llama.py            LLaMA with the regression head
kv_cache.py         its KV cache
unet.py             the denoiser
vae.py              the autoencoder
clip.py             contrastive pretraining of the visual encoder
lora.py             low-rank adapters
layers.py           linear layers, norms and other layers that towers share
conv.py             convolutional layers of the denoiser and the autoencoder
remat.py            what a backward pass saves
attention.py        the one entry point of attention, and its backends
short_attention.py  a Pallas kernel for short rows on TPUs
backend.py          chooses the kernels below by platform
cpu.py              kernels for XLA's CPU compiler
xla.py              the plain kernels, and the reference for tests
"""
