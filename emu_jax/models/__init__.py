"""The towers of Emu, one module each, and the layers that they are built from.

emu.py              EmuModel: the towers put together
eva_clip.py         EVA-CLIP's vision transformer
connectors.py       how images enter the language model: by the Causal Transformer, or by pooling
cformer.py          the Causal Transformer
llama.py            LLaMA and later decoders, with Emu1's regression head
kv_cache.py         LLaMA's KV cache
unet.py             the denoiser
vae.py              the autoencoder
clip.py             contrastive pretraining of the visual encoder
lora.py             low-rank adapters
quantized.py        matrices in int8 and int4
layers.py           linear layers, norms and other layers that the towers share
conv.py             convolutional layers of the denoiser and the autoencoder
remat.py            policies for what a backward pass saves
attention.py        the entry point of attention, and its backends
short_attention.py  a Pallas kernel for short rows on TPUs
backend.py          chooses the kernels below by platform
cpu.py              kernels for XLA's CPU compiler
tpu.py              kernels for XLA's TPU compiler
xla.py              the plain kernels, and the reference for tests
blockwise.py        attention in blocks of queries, for any device

Axis legend of the shape annotations in all of emu_jax. Axes with longer names, such as `beams`,
name themselves. `#B` is B or 1; `*T` is any number of axes; `_` is any size.

B       rows of a batch
T       positions of a row; the queries of attention
t       positions of a row whose logits are computed together
S       keys of attention; the entries of a KV cache
I       images of a row
N       embeddings of an image
P       patches of an image, and the class token
L       layers
H       attention heads
G       heads of keys and values, where several attention heads share each
K       width of a head
D       width of embeddings or features
E       width after a layer, or of a condition, where it may differ from D or C
V       vocabulary
C       channels
R       rank of a matrix
h, w    height and width of an image, its latents or a feature map; Hh, Ww in kernels, and for an
        image beside its latents
y, x    height and width after a layer that may change them; Yy, Xx in kernels
p, q    height and width of a convolution kernel
n       points of a curve
"""
