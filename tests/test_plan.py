"""The plan: model FLOPs by hand, the counting of compiled modules, the network, real compiles."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emu_jax import cli
from emu_jax.config import RematConfig, emu_14b, emu_ladder
from emu_jax.errors import UserError
from emu_jax.hardware import CHIPS, Topology, chip_of, peak_flops
from emu_jax.models.blockwise import CAUSAL_BLOCK
from emu_jax.models.remat import RECOMPUTED_SCOPE
from emu_jax.plan import hlo
from emu_jax.plan.plan import (
    SAFE,
    CompiledReport,
    CompilerCrash,
    Report,
    _report,
    collective_bytes,
    compiler_flags,
    plan,
    run_in_subprocess,
    summary,
)
from emu_jax.plan.roofline import (
    Network,
    Operation,
    busiest,
    exposed_seconds,
    host_seconds,
    times,
)
from emu_jax.plan.sweep import (
    SettingGroup,
    Trial,
    _key,
    check_page,
    family,
    plot_scaling,
    put_on_page,
    sweep,
    trials_table,
)
from emu_jax.sharding import MESH_AXES, RowShares, choose_mesh, make_mesh, row_shares
from emu_jax.train.config import GroupConfig, OptimizerConfig, TrainConfig
from emu_jax.train.config_file import load_config
from emu_jax.train.device_memory import abstract_batch
from emu_jax.train.distributed import check_same_reads
from emu_jax.train.flops import jaxpr_flops, train_flops
from emu_jax.train.objectives import get_objective
from emu_jax.train.step import Trainer

ROOT = Path(__file__).parent.parent


def config(name: str = "emu_14b", *overrides: str) -> TrainConfig:
    return load_config(TrainConfig, ROOT / "configs" / f"{name}.py", list(overrides))


# --- Model FLOPs ----------------------------------------------------------------------------------


def test_flops_of_the_14b_step_by_hand():
    """6 x parameters x their tokens, tower by tower, and attention, causal counted half."""
    rows, tokens, images, patches, causal = 1024, 2048, 16 * 1024, 257, 32
    cfg = config()
    assert (cfg.data.batch_size, cfg.data.row_tokens, cfg.data.row_images) == (rows, tokens, 16)

    block = 4 * 1408 * 1408 + 2 * 1408 * 6144
    seen = 40 * block + 14 * 14 * 3 * 1408
    visual = 6 * images * patches * seen + 3 * images * 40 * 4 * 1408 * patches**2

    per_query = 4 * 768 * 768 + 2 * 768 * 768 + 2 * 768 * 3072  # self, cross q and o, MLP
    per_patch = 2 * 1408 * 768  # cross k and v
    cformer = 6 * images * (causal * (12 * per_query + 768 * 5120) + patches * 12 * per_patch)
    cformer += 3 * images * 12 * 4 * 768 * (causal**2 / 2 + causal * patches)

    layers = 40 * (4 * 5120 * 5120 + 3 * 5120 * 13824) + 5120 * 32004
    llama = 6 * rows * tokens * layers + 6 * images * (causal + 1) * 5120 * 5120
    llama += 3 * rows * 40 * 4 * 5120 * tokens**2 / 2

    flops = train_flops(cfg)
    for tower, expected in (("visual", visual), ("cformer", cformer), ("llama", llama)):
        assert flops.towers[tower] == pytest.approx(expected, rel=1e-12), tower
    assert flops.total == pytest.approx(visual + cformer + llama, rel=1e-12)


def test_flops_are_those_of_the_traced_step():
    """The convention against the products in the jaxpr, which counts all of causal attention,
    the regression head everywhere, and the logits twice forward."""
    cfg = config("emu_100m", "data.batch_size=2", "data.row_tokens=128", "data.row_images=2")
    cfg = dataclasses.replace(cfg, remat=RematConfig(), attention="blockwise")
    objective = get_objective(cfg)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: objective.build(nnx.Rngs(0))))
    from emu_jax.data.pipeline import batch_shapes

    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype)
        for name, (shape, dtype) in batch_shapes(cfg.data, "rows").items()
    }

    def loss(state, batch):
        return objective.loss(nnx.merge(graphdef, state), batch, jax.random.key(0))[0]

    traced = jaxpr_flops(
        jax.make_jaxpr(jax.grad(loss))(state, batch).jaxpr, without=RECOMPUTED_SCOPE
    )
    llama, rows, tokens, n = cfg.model.llama, 2, 128, cfg.model.n_embeddings
    images, inner = 4, cfg.model.cformer.heads * 64
    extra = 3 * 4 * rows * llama.layers * llama.width * tokens**2 / 2
    extra += 3 * 4 * images * cfg.model.cformer.layers * inner * n**2 / 2
    extra += 6 * (rows * tokens - images * (n + 1)) * llama.width**2
    head = rows * tokens * llama.width
    extra += 8 * head * llama.padded_vocab - 6 * head * llama.vocab_size
    # No gradient goes to the pixels, nor to the C-Former's first self-attention's constants.
    patch = 2 * images * 256 * 14 * 14 * 3 * cfg.model.vision.width
    counted = train_flops(cfg).total + extra - patch
    assert traced == pytest.approx(counted, rel=2e-3)


def test_products_in_a_jaxpr_by_hand():
    def function(x, w, kernel):
        x, _ = jax.lax.scan(lambda x, _: (jnp.einsum("bij,bjk->bik", x, w), None), x, length=3)
        with jax.named_scope(RECOMPUTED_SCOPE):
            x = x @ w[0]
        return jax.lax.conv_general_dilated(
            x, kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=2
        )

    shapes = ((2, 5, 6), (2, 6, 6), (3, 3, 8))
    traced = jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
    often, again, convolution = 3 * 2 * 2 * 5 * 6 * 6, 2 * 2 * 5 * 6 * 6, 2 * 2 * 3 * 8 * 3 * 3
    assert jaxpr_flops(traced.jaxpr) == often + again + convolution
    assert jaxpr_flops(traced.jaxpr, without=RECOMPUTED_SCOPE) == often + convolution

    def halved(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (2,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        ).sum()

    # Each product of a convolution with a stride costs as much towards its input and its kernel.
    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 8, 3), (2, 3, 5)))
    traced = jax.make_jaxpr(jax.value_and_grad(halved, (0, 1)))(*shapes)
    assert jaxpr_flops(traced.jaxpr) == 3 * 2 * 4 * 2 * 3 * 5

    def computed_again(x, w):
        with jax.named_scope(RECOMPUTED_SCOPE):
            return jnp.sum(jnp.square(x @ w))

    # With nothing around it, a gradient's scope is called transpose(jvp(again)).
    square = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    traced = jax.make_jaxpr(jax.grad(computed_again, (0, 1)))(square, square)
    assert jaxpr_flops(traced.jaxpr) == 3 * 2 * 4**3
    assert jaxpr_flops(traced.jaxpr, without=RECOMPUTED_SCOPE) == 0


def test_frozen_towers_cost_less():
    whole = config("emu_100m")
    frozen = OptimizerConfig(groups=(GroupConfig(r"^llama\.", lr=1e-3), GroupConfig(".*", lr=0.0)))
    part = dataclasses.replace(whole, optimizer=frozen)
    full, some = train_flops(whole).towers, train_flops(part).towers
    assert some["llama"] == full["llama"]
    assert some["visual"] == pytest.approx(full["visual"] / 3)  # forward alone
    first = OptimizerConfig(groups=(GroupConfig("^visual", lr=1e-3), GroupConfig(".*", lr=0.0)))
    through = train_flops(dataclasses.replace(whole, optimizer=first)).towers
    # The gradient passes through the language model, and finds nothing to train there.
    llama, data = whole.model.llama, whole.data
    attention = 6 * data.batch_size * llama.layers * llama.width * data.row_tokens**2
    assert through["llama"] == pytest.approx((full["llama"] - attention) * 2 / 3 + attention)


# --- Meshes and topologies ------------------------------------------------------------------------


def fake_mesh(processes, data: int, fsdp: int, tensor: int) -> Any:
    """A mesh of devices of some processes, in the order of the mesh."""
    devices = np.array([SimpleNamespace(process_index=p) for p in processes])
    shape = {"data": data, "fsdp": fsdp, "tensor": tensor}
    return SimpleNamespace(devices=devices.reshape(*shape.values()), shape=shape)


def test_a_process_reads_the_rows_of_its_devices(monkeypatch):
    # 4 x 4 chips, each 2 x 2 a host; the mesh follows rows of chips.
    hosts = [2 * (x // 2) + y // 2 for x in range(4) for y in range(4)]
    for mesh, want in (
        ((1, 16, 1), {0: (0, 1, 4, 5), 1: (2, 3, 6, 7), 3: (10, 11, 14, 15)}),
        ((2, 4, 2), {0: (0, 2), 1: (1, 3), 2: (4, 6)}),
        ((1, 4, 4), {0: (0, 1), 1: (0, 1), 2: (2, 3), 3: (2, 3)}),  # two hosts share each row
        ((1, 1, 16), {0: (0,), 3: (0,)}),
    ):
        for process, numbers in want.items():
            monkeypatch.setattr(jax, "process_index", lambda process=process: process)
            lead = not any(want[p] == numbers for p in want if p < process)
            assert row_shares(fake_mesh(hosts, *mesh)) == (numbers, mesh[0] * mesh[1], lead)
    for uneven in ([0, 0, 0, 1], [0, 0, 0, 1, 1, 1, 1, 0]):
        with pytest.raises(UserError, match="unequally among processes, .*: change mesh.tensor"):
            row_shares(fake_mesh(uneven, 1, 4, len(uneven) // 4))


def test_processes_that_share_rows_must_skip_the_same_documents(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    said = []
    monkeypatch.setattr("emu_jax.train.distributed.gather_json", lambda value: said)
    said[:] = [[[0, 1], 7], [[2, 3], 5], [[0, 1], 7]]
    check_same_reads(RowShares((0, 1), 4, True), 7)
    said[2] = [[0, 1], 8]
    with pytest.raises(UserError, match="^processes 0 and 2 share rows .*damaged-2.jsonl"):
        check_same_reads(RowShares((2, 3), 4, True), 5)  # on a process with other rows, too
    check_same_reads(RowShares((0, 1), 6, True), 7)  # no rows are shared: nothing is gathered


def test_mesh_is_chosen_with_a_reason():
    widths = (1408, 768, 5120)
    assert choose_mesh(128, rows=512, heads=40, widths=widths)[0] == (1, 128, 1)
    shape, why = choose_mesh(256, rows=1024, heads=40, widths=widths)
    assert shape == (2, 128, 1) and "more would not divide widths" in why
    assert choose_mesh(512, 2, rows=1024, heads=40, widths=widths)[0] == (4, 128, 1)
    shape, why = choose_mesh(256, rows=64, heads=40, widths=widths)
    assert shape == (1, 64, 4) and "64 rows are too few" in why
    assert choose_mesh(128, fsdp=64)[0] == (2, 64, 1)
    shape, why = choose_mesh(256, max_fsdp=100, rows=1024, heads=40, widths=widths)
    assert shape == (4, 64, 1) and "fsdp=64 (mesh.max_fsdp is 100)" in why
    assert choose_mesh(16, max_fsdp=64, rows=64, widths=widths)[0] == (1, 16, 1)
    assert choose_mesh(8, data=2, fsdp=2, tensor=2) == ((2, 2, 2), "as configured")
    assert choose_mesh(8, data=2, fsdp=2)[0] == (2, 2, 2)
    with pytest.raises(UserError, match="make data.batch_size a multiple of 8"):
        choose_mesh(8, rows=3, heads=5)
    with pytest.raises(UserError, match="make it a multiple of 2"):
        choose_mesh(8, 2, data=1, fsdp=8, tensor=1)
    with pytest.raises(UserError, match="needs 12 devices, 8 are here"):
        choose_mesh(8, data=3, fsdp=2, tensor=2)
    # Devices of `context` share rows, so fewer rows keep all devices busy.
    shape, why = choose_mesh(256, context=4, rows=64, heads=40, widths=widths)
    assert shape == (1, 64, 1) and "context=4" in why
    with pytest.raises(UserError, match="fsdp=2 tensor=2 context=2 needs 16 devices, 8 are here"):
        choose_mesh(8, data=2, fsdp=2, tensor=2, context=2)
    with pytest.raises(UserError, match="which does not divide the 4 devices of a slice"):
        choose_mesh(8, 2, context=8)
    with pytest.raises(UserError, match="which does not divide the 8 devices: set"):
        choose_mesh(8, context=3)
    with pytest.raises(UserError, match=r"by 16 groups of 4 devices \(mesh.context\), nor"):
        choose_mesh(64, context=4, rows=8, heads=5)


def test_topologies_are_read_and_refused():
    slices = Topology.parse("v5p:4x4x8", 2)
    assert (slices.chips, str(slices), slices.links_per_axis()) == (256, "v5p:4x4x8", [2, 2, 2])
    assert Topology.parse("v5e:8x16").links_per_axis() == [1, 2]
    assert Topology.parse("v5p:2x2x1").links_per_axis() == [1, 1, 0]
    for text, message in (
        ("v5x:4x4", "no TPU 'v5x'"),
        ("v5p:4x4", "v5p:4x4x4"),
        ("v5e:4xa", "v5e:4x4"),
        ("v5e:4x²", "v5e:4x4"),
        ("v5e:4x" + "9" * 5000, "v5e:4x4"),
        ("h100:8", "no TPU"),
    ):
        with pytest.raises(UserError, match=message):
            Topology.parse(text)
    with pytest.raises(UserError, match="at least 1"):
        Topology.parse("v5e:4x4", 0)


@pytest.mark.parametrize(
    "kind, teraflops, gigabytes, hbm, ici, dcn, devices",
    [
        # As published: TFLOP/s in bfloat16, GiB (GPUs: GB) of HBM, its GB/s, GB/s over ICI in
        # both directions of all links, Gbit/s to other slices; what JAX calls them.
        ("TPU v4", 275, 32, 1200, 600, 50, 1),
        ("TPU v5 lite", 197, 16, 800, 400, 25, 1),
        ("TPU v5e", 197, 16, 800, 400, 25, 1),
        ("TPU v5p", 459, 95, 2765, 1200, 50, 1),
        ("TPU v5", 459, 95, 2765, 1200, 50, 1),
        ("TPU v6 lite", 918, 32, 1638, 800, 100, 1),
        ("TPU v6e", 918, 32, 1638, 800, 100, 1),
        ("TPU7x", 2307, 192, 7380, 1200, 100, 2),
        ("TPU v7x", 2307, 192, 7380, 1200, 100, 2),
        ("NVIDIA A100-SXM4-80GB", 312, 80, 2039, 0, 0, 1),
        ("NVIDIA H100 80GB HBM3", 989, 80, 3350, 0, 0, 1),
        ("NVIDIA H200", 989, 141, 4800, 0, 0, 1),
        ("NVIDIA B200", 2250, 180, 7700, 0, 0, 1),
    ],
)
def test_chips_are_as_published(kind, teraflops, gigabytes, hbm, ici, dcn, devices):
    chip = chip_of(kind)
    assert (chip.flops, chip.hbm_bandwidth, chip.devices) == (teraflops * 1e12, hbm * 1e9, devices)
    assert chip.hbm_bytes == gigabytes * (2**30 if kind.startswith("TPU") else 1e9)
    assert (2 * 2 * chip.torus_axes * chip.link_bandwidth, 8 * chip.dcn_bandwidth) == (
        ici * 1e9,
        dcn * 1e9,
    )
    assert peak_flops(kind) == chip.flops / devices
    for faster in (chip.int8_flops, chip.fp8_flops):
        assert not faster or 1.99 < faster / chip.flops <= 2.01
    of_float32 = chip.flops / devices / 6 if kind.startswith("TPU") else None
    assert peak_flops(kind, "float32") == of_float32


def test_other_devices_have_no_peak():
    assert peak_flops("cpu") is None and chip_of("cpu") is None


# --- Counting -------------------------------------------------------------------------------------

MODULE = """
HloModule jit_step, is_scheduled=true

%body (param: (s32[], bf16[8,128], bf16[4,128,128])) -> (s32[], bf16[8,128], bf16[4,128,128]) {
  %param = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[4,128,128]{2,1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%param), index=0
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%param), index=1
  %w = bf16[4,128,128]{2,1,0} get-tuple-element(%param), index=2
  %one = bf16[1,128,128]{2,1,0} fusion(%w, %i), kind=kLoop, calls=%slice
  %whole = bf16[128,128]{1,0} all-gather(%one), channel_id=1, replica_groups=[2,2]<=[4]
  %again = bf16[8,128]{1,0} fusion(%x, %whole), kind=kOutput, calls=%product
  %step = s32[] constant(2)
  %j = s32[] add(%i, %step)
  ROOT %next = (s32[], bf16[8,128], bf16[4,128,128]) tuple(%j, %again, %w)
}

%slice (p0: bf16[4,128,128], p1: s32[]) -> bf16[1,128,128] {
  %p0 = bf16[4,128,128]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %cut = bf16[1,128,128]{2,1,0} dynamic-slice(%p0, %p1, %p1, %p1)
}

%product (p0: bf16[8,128], p1: bf16[128,128]) -> bf16[8,128] {
  %p0 = bf16[8,128]{1,0} parameter(0)
  %p1 = bf16[128,128]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %conv = bf16[8,128]{1,0} convolution(%p0, %p1), dim_labels=bf_io->bf
}

%condition (param.1: (s32[], bf16[8,128], bf16[4,128,128])) -> pred[] {
  %param.1 = (s32[], bf16[8,128], bf16[4,128,128]) parameter(0)
  %bound = s32[]{:T(128)} constant(7)
  %j = s32[] get-tuple-element(%param.1), index=0
  ROOT %less = pred[] compare(%j, %bound), direction=LT
}

ENTRY %main (a: bf16[8,128], b: bf16[4,128,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %b = bf16[4,128,128]{2,1,0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[8,128], bf16[4,128,128]) tuple(%zero, %a, %b)
  %loop = (s32[], bf16[8,128], bf16[4,128,128]) while(%start), condition=%condition, body=%body
  ROOT %out = bf16[8,128]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_a_module_counted_by_hand():
    counts = hlo.count(MODULE)
    assert counts.flops == 4 * 2 * 8 * 128 * 128  # the loop's body, four times: 0, 2, 4, 6
    # Each turn: a slice of the stack and its number read, the slice written; then the matrix and
    # x read, and the product written; and the counter's three numbers.
    matrix, row = 128 * 128 * 2, 8 * 128 * 2
    assert counts.hbm_bytes == 4 * (2 * matrix + 4 + matrix + 2 * row + 12)
    ((collective, often),) = counts.collectives.items()
    assert collective == hlo.Collective("all-gather", matrix, (0, 1)) and often == 4
    assert not counts.unknown


def test_collectives_of_the_sparse_cores_are_counted():
    """tpu7x gathers in a computation that another core runs."""
    matrix = "bf16[128,128]{1,0}"
    gather = f"ROOT %whole = {matrix} all-gather(%p0), channel_id=1, replica_groups=[2,2]<=[4]"
    text = (
        "HloModule offloaded\n\n"
        f"%called (p0: bf16[64,128]) -> bf16[128,128] {{\n"
        f"  %p0 = bf16[64,128]{{1,0}} parameter(0)\n  {gather}\n"
        '}, execution_thread="sparsecore"\n\n'
        f"ENTRY %main (a: bf16[64,128]) -> bf16[128,128] {{\n"
        "  %a = bf16[64,128]{1,0} parameter(0)\n"
        f"  %started = ((bf16[64,128]{{1,0}}), {matrix}) call-start(%a), "
        'async_execution_thread="sparsecore", to_apply=%called\n'
        f"  ROOT %done = {matrix} call-done(%started)\n"
        "}\n"
    )
    counts = hlo.count(text)
    assert counts.collectives == {hlo.Collective("all-gather", 128 * 128 * 2, (0, 1)): 1}
    assert counts.hbm_bytes == 0  # the network's time, not the memory's


@pytest.mark.parametrize(
    "text, rest, group",
    [
        ("{{0,2},{1,3}}", "", (0, 2)),
        ("[2,2]<=[4]", "", (0, 1)),
        ("[2,2]<=[2,2]T(1,0)", "", (0, 2)),
        (
            "mesh['a'=2",
            "replica_groups=mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'a'}",
            (0, 1),
        ),
        ("mesh['a'=4,'b'=1] {'a'}", "replica_groups=mesh['a'=4,'b'=1] {'a'}", (0, 1, 2, 3)),
    ],
)
def test_replica_groups(text, rest, group):
    assert hlo.first_group(text, rest) == group


def test_batched_products_written_as_convolutions():
    """XLA for TPUs writes batch dimensions as dilated spatial ones: most taps meet nothing."""
    line = (
        "  %c = f32[64,16,257,129]{3,2,1,0} convolution(%a, %b), "
        "window={size=64x16 stride=63x15 lhs_dilate=64x16}, dim_labels=0b1f_0o1i->01bf"
    )
    text = (
        "ENTRY %m (a: bf16[64,257,16,88], b: bf16[64,129,16,88]) -> f32[64,16,257,129] {\n"
        "  %a = bf16[64,257,16,88]{3,2,1,0} parameter(0)\n"
        "  %b = bf16[64,129,16,88]{3,2,1,0} parameter(1)\n" + line + "\n}\n"
    )
    assert hlo.count(text).flops == 2 * 64 * 16 * 257 * 129 * 88


def test_a_part_that_is_fetched_ahead_counts_as_that_part():
    """4 KiB of an array that waits in HBM, fetched to the chip's own memory, and to HBM."""
    text = (
        "ENTRY %m (a: s8[65536]) -> () {\n"
        "  %a = s8[65536]{0} parameter(0)\n"
        "  %near = ((s8[65536]{0}), s8[4096]{0:S(1)}, s32[]{:S(2)}) slice-start(%a), "
        "slice={[0:4096]}\n"
        "  %far = ((s8[65536]{0}), s8[4096]{0}, s32[]{:S(2)}) slice-start(%a), slice={[0:4096]}\n"
        "}\n"
    )
    assert hlo.count(text).hbm_bytes == 4096 + 2 * 4096


@pytest.mark.parametrize("batch, before", [(2, "2,"), (1, "")])
def test_the_kernel_of_long_rows_by_hand(batch, before):
    """Causal splash attention in blocks of 1,024: three of four are visited. One row has no axis
    of rows."""
    x, blocks = f"bf16[{before}40,2048,128]", "s32[1,2,2]"
    text = (
        f"ENTRY %m (a: {blocks}, q: {x}, k: {x}, v: {x}) -> () {{\n"
        f"  %a = {blocks} parameter(0)\n"
        + "".join(f"  %{name} = {x} parameter({n + 1})\n" for n, name in enumerate("qkv"))
        + f"  %splash_mha_fwd_residuals.7 = {x} custom-call(%a, %q, %k, %v), "
        'custom_call_target="tpu_custom_call"\n}\n'
    )
    counts = hlo.count(text)
    assert counts.flops == 2 * 2 * batch * 40 * 2048**2 * 128 * 3 / 4 and not counts.unknown


def test_the_kernel_of_short_rows_by_hand():
    """The visual encoder's attention: products of what is there, and its operands' bytes."""
    x = "bf16[2,257,1408]{2,1,0:T(8,128)(2,1)}"
    text = (
        "ENTRY %m (q: bf16[2,257,1408], k: bf16[2,257,1408], v: bf16[2,257,1408]) -> () {\n"
        + "".join(f"  %{name} = {x} parameter({n})\n" for n, name in enumerate("qkv"))
        + f"  %short_attention_fwd.7 = {x} custom-call(%q, %k, %v), "
        'custom_call_target="tpu_custom_call"\n'
        f"  %short_attention_bwd.3 = ({x}, {x}, {x}) custom-call(%q, %k, %v, "
        '%short_attention_fwd.7), custom_call_target="tpu_custom_call"\n}\n'
    )
    counts = hlo.count(text)
    assert counts.flops == (2 + 5) * 2 * (2 * 16) * 257**2 * 88
    assert counts.hbm_bytes == (4 + 7) * 2 * 257 * 1408 * 2 and not counts.unknown


def test_the_network_by_hand():
    """A v5e pod: rings of 16 in both axes, links of 50 GB/s each way."""
    topology = Topology.parse("v5e:16x16", 2)
    places = [(x, y) for _ in range(2) for x in range(16) for y in range(16)]
    network = Network(topology, places, [0] * 256 + [1] * 256)
    gather = hlo.Collective("all-gather", 256e9, tuple(range(256)))
    ici, dcn = network.seconds(gather)
    assert ici == pytest.approx(256e9 * 255 / 256 / 200e9) and dcn == 0
    row = dataclasses.replace(gather, group=tuple(range(16)))  # one ring
    assert network.seconds(row)[0] == pytest.approx(256e9 * 15 / 16 / 100e9)
    line = dataclasses.replace(gather, group=(0, 1, 2, 3))  # a part of one is a line
    assert network.seconds(line)[0] == pytest.approx(256e9 * 3 / 4 / 50e9)
    across = hlo.Collective("all-reduce", 4e9, (0, 256))
    assert network.seconds(across) == (0, pytest.approx(2 * 4e9 / 2 / CHIPS["v5e"].dcn_bandwidth))
    hop = hlo.Collective("collective-permute", 1e9, (0, 15))  # neighbours round the ring
    assert network.seconds(hop)[0] == pytest.approx(1e9 / 50e9)
    far = dataclasses.replace(hop, group=(0, 15, 0, 8))  # the longest way of all pairs
    assert network.seconds(far)[0] == pytest.approx(8 * 1e9 / 50e9)
    over = dataclasses.replace(hop, group=(0, 15, 0, 256))
    assert network.seconds(over) == (0, pytest.approx(1e9 / CHIPS["v5e"].dcn_bandwidth))


@pytest.mark.parametrize(
    "topology, places, pairs, links",
    [
        # Pairs of devices whose parts cross the middle in one direction, over so many links.
        ("v5p:4x4x4", [(0, 0, 0), (1, 0, 0)], 1, 1),
        ("v5p:4x4x4", [(0, 0, 0), (1, 0, 0), (2, 0, 0)], 2, 1),
        ("v5p:4x4x4", [(n, 0, 0) for n in range(4)], 4, 2),  # a ring
        ("v5e:4x4", [(n, 0) for n in range(4)], 4, 1),  # a line
        ("v5e:4x4", [(x, y) for x in (0, 1) for y in (0, 1)], 4, 2),
        ("v5e:4x4", [(x, y) for x in (0, 1) for y in range(4)], 16, 2),
        ("v5p:4x4x4", [(x, y, 0) for x in (0, 1) for y in range(4)], 16, 4),
        ("v5e:16x16", [(x, y) for x in range(16) for y in range(16)], 128**2, 32),
        # Two devices of one chip; two chips, of which each device has half of the link.
        ("tpu7x:2x2x1", [(0, 0, 0)] * 2, 0, 1),
        ("tpu7x:2x2x1", [(0, 0, 0), (1, 0, 0)], 1, 1 / 2),
        ("tpu7x:2x2x1", [(0, 0, 0), (1, 0, 0)] * 2, 4, 1),
    ],
)
def test_what_crosses_the_middle_of_an_all_to_all(topology, places, pairs, links):
    """Each of n devices that hold S bytes sends S / n^2 to each other one."""
    size, network = len(places), Network(Topology.parse(topology), places, [0] * len(places))
    exchange = hlo.Collective("all-to-all", 8e9, tuple(range(size)))
    crossing = pairs * 8e9 / size**2
    chip = network.topology.chip
    assert network.seconds(exchange) == (pytest.approx(crossing / (links * chip.link_bandwidth)), 0)


def module_of(line: str, *parameters: str, computations: str = "") -> str:
    """A module of one instruction over parameters %a, %b, ... of the given shapes."""
    given = "".join(
        f"  %{name} = {shape} parameter({n})\n"
        for n, (name, shape) in enumerate(zip("abcd", parameters, strict=False))
    )
    return f"{computations}\nENTRY %m (a: {parameters[0]}) -> () {{\n{given}  {line}\n}}\n"


def one(line: str, *parameters: str, computations: str = "") -> hlo.Counts:
    """Counts such a module."""
    return hlo.count(module_of(line, *parameters, computations=computations))


KIB = "f32[256]{0}"


@pytest.mark.parametrize(
    "line, parameters, moved",
    [
        ("%r = f32[256]{0} add(%a, %b)", (KIB, KIB), 3 * 1024),  # two read, one written
        # Of what is sliced, gathered or updated in place only the part: read and written.
        ("%r = f32[16]{0} slice(%a), slice={[0:16]}", (KIB,), 2 * 64),
        ("%r = f32[16]{0} dynamic-slice(%a, %b)", (KIB, "s32[]"), 2 * 64),
        ("%r = f32[3,8]{1,0} gather(%a, %b)", ("f32[32,8]{1,0}", "s32[3]{0}"), 2 * 96),
        ("%r = f32[256]{0} dynamic-update-slice(%a, %b)", (KIB, "f32[16]{0}"), 2 * 64),
        (
            "%r = f32[32,8]{1,0} scatter(%a, %b, %c)",
            ("f32[32,8]{1,0}", "s32[3]{0}", "f32[3,8]{1,0}"),
            2 * (12 + 96),
        ),
        ("%r = f32[256]{0} copy(%a)", (KIB,), 2 * 1024),
        # Fetched to the chip's own memory: read alone. Destination, source and context are named.
        ("%r = (f32[256]{0:S(1)}, f32[256]{0}, u32[]) copy-start(%a)", (KIB,), 1024),
        ("%r = f32[256]{0} copy-done(%a)", (KIB,), 0),
        ("%r = f32[256]{0:S(1)} add(%a, %b)", ("f32[256]{0:S(1)}", KIB), 1024),
        ("%r = f32[256]{0} bitcast(%a)", (KIB,), 0),
        ("%r = (f32[256]{0}, f32[256]{0}) tuple(%a, %b)", (KIB, KIB), 0),
        # Types by their bits.
        ("%r = pred[256]{0} compare(%a, %b)", ("s4[256]{0}", "u8[256]{0}"), 128 + 2 * 256),
        ("%r = f8e4m3fn[256]{0} convert(%a)", ("bf16[256]{0}",), 512 + 256),
        ("%r = c64[256]{0} complex(%a, %b)", (KIB, "f16[256]{0}"), 1024 + 512 + 2048),
        ("%r = f64[256]{0} convert(%a)", ("s64[]",), 8 + 2048),
    ],
)
def test_bytes_of_one_instruction(line, parameters, moved):
    assert one(line, *parameters).hbm_bytes == moved


INNER = """
%deep (p0: f32[32,8]) -> f32[4,8] {
  %p0 = f32[32,8]{1,0} parameter(0)
  ROOT %cut = f32[4,8]{1,0} slice(%p0), slice={[0:4], [0:8]}
}

%nested (p0: f32[32,8], p1: f32[32,8]) -> f32[4,8] {
  %p0 = f32[32,8]{1,0} parameter(0)
  %p1 = f32[32,8]{1,0} parameter(1)
  %same = f32[256]{0} bitcast(%p1)
  %part = f32[32]{0} slice(%same), slice={[0:32]}
  %flat = f32[4,8]{1,0} bitcast(%part)
  %below = f32[4,8]{1,0} fusion(%p0), kind=kLoop, calls=%deep
  ROOT %sum = f32[4,8]{1,0} add(%below, %flat)
}

%whole (p0: f32[32,8]) -> f32[32,8] {
  %p0 = f32[32,8]{1,0} parameter(0)
  %cut = f32[4,8]{1,0} slice(%p0), slice={[0:4], [0:8]}
  ROOT %sum = f32[32,8]{1,0} negate(%p0)
}

%often (p0: f32[32,8]) -> f32[20,8] {
  %p0 = f32[32,8]{1,0} parameter(0)
  %one = f32[20,8]{1,0} slice(%p0), slice={[0:20], [0:8]}
  %two = f32[20,8]{1,0} slice(%p0), slice={[12:32], [0:8]}
  ROOT %sum = f32[20,8]{1,0} add(%one, %two)
}

%update (p0: f32[32,8], p1: f32[4,8]) -> (f32[32,8], f32[4,8]) {
  %p0 = f32[32,8]{1,0} parameter(0)
  %p1 = f32[4,8]{1,0} parameter(1)
  %twice = f32[4,8]{1,0} add(%p1, %p1)
  %put = f32[32,8]{1,0} dynamic-update-slice(%p0, %twice)
  %bits = f32[32,8]{1,0} bitcast(%put)
  ROOT %both = (f32[32,8]{1,0}, f32[4,8]{1,0}) tuple(%bits, %twice)
}

%relaid (p0: f32[32,8]) -> f32[32,8] {
  %p0 = f32[32,8]{1,0} parameter(0)
  ROOT %other = f32[32,8]{0,1} copy(%p0)
}

%cut_relaid (p0: f32[32,8]) -> f32[4,8] {
  %p0 = f32[32,8]{1,0} parameter(0)
  %view = f32[32,8]{0,1} fusion(%p0), kind=kLoop, calls=%relaid
  ROOT %cut = f32[4,8]{1,0} slice(%view), slice={[0:4], [0:8]}
}

%update_relaid (p0: f32[32,8], p1: f32[4,8]) -> f32[32,8] {
  %p0 = f32[32,8]{1,0} parameter(0)
  %p1 = f32[4,8]{1,0} parameter(1)
  %view = f32[32,8]{0,1} fusion(%p0), kind=kLoop, calls=%relaid
  ROOT %put = f32[32,8]{1,0} dynamic-update-slice(%view, %p1)
}

%add_relaid (p0: f32[32,8], p1: f32[32,8]) -> f32[32,8] {
  %p0 = f32[32,8]{1,0} parameter(0)
  %p1 = f32[32,8]{1,0} parameter(1)
  %view = f32[32,8]{0,1} fusion(%p1), kind=kLoop, calls=%relaid
  ROOT %sum = f32[32,8]{1,0} add(%p0, %view)
}
"""
BOARD, PART = "f32[32,8]{1,0}", "f32[4,8]{1,0}"


@pytest.mark.parametrize(
    "result, called, parameters, moved",
    [
        # Both operands are read through slices alone: 128 bytes of each.
        (PART, "nested", (BOARD, BOARD), 3 * 128),
        # One that is also used whole is read whole; of overlapping slices no more than the whole.
        (BOARD, "whole", (BOARD,), 2 * 1024),
        ("f32[20,8]{1,0}", "often", (BOARD,), 1024 + 640),
        # An array that is updated in place is neither read nor written but for the update.
        (f"({BOARD}, {PART})", "update", (BOARD, PART), 128 + 2 * 128),
        # Another layout inside a fusion is not stored: only the part of it that is used is read.
        (PART, "cut_relaid", (BOARD,), 2 * 128),
        (BOARD, "update_relaid", (BOARD, PART), 2 * 128),
        (BOARD, "add_relaid", (BOARD, BOARD), 3 * 1024),
        (BOARD, "relaid", (BOARD,), 2 * 1024),
    ],
)
def test_bytes_of_one_fusion(result, called, parameters, moved):
    names = ", ".join(f"%{name}" for name, _ in zip("ab", parameters, strict=False))
    line = f"%r = {result} fusion({names}), kind=kLoop, calls=%{called}"
    assert one(line, *parameters, computations=INNER).hbm_bytes == moved


GROUP = "replica_groups={{0,1,2,3}}"


@pytest.mark.parametrize(
    "line, shape, kind, size, group",
    [
        # The array as it is gathered, or before it is reduced, once: of an operation that is
        # started apart the result names both.
        (f"%r = f32[32,8]{{1,0}} all-gather(%a), {GROUP}", "f32[8,8]{1,0}", "all-gather", 1024, 4),
        (
            f"%r = (f32[8,8]{{1,0}}, f32[32,8]{{1,0}}) all-gather-start(%a), {GROUP}",
            "f32[8,8]{1,0}",
            "all-gather",
            1024,
            4,
        ),
        (f"%r = f32[8,8]{{1,0}} reduce-scatter(%a), {GROUP}", BOARD, "reduce-scatter", 1024, 4),
        (
            f"%r = (f32[32,8]{{1,0}}, bf16[16]{{0}}) all-reduce(%a, %b), {GROUP}",
            BOARD,
            "all-reduce",
            1024 + 32,
            4,
        ),
        (f"%r = f32[32,8]{{1,0}} all-reduce-start(%a), {GROUP}", BOARD, "all-reduce", 1024, 4),
        (f"%r = f32[32,8]{{1,0}} all-to-all(%a), {GROUP}", BOARD, "all-to-all", 4096, 4),
        (f"%r = (({BOARD}), {BOARD}) all-to-all-start(%a), {GROUP}", BOARD, "all-to-all", 4096, 4),
        (
            f"%r = (({BOARD}), f32[8,8]{{1,0}}, u32[]) reduce-scatter-start(%a), {GROUP}",
            BOARD,
            "reduce-scatter",
            1024,
            4,
        ),
        (
            "%r = (f32[32,8]{1,0}, f32[32,8]{1,0}, u32[]) collective-permute-start(%a), "
            "source_target_pairs={{0,1},{1,0}}",
            BOARD,
            "collective-permute",
            1024,
            4,
        ),
    ],
)
def test_bytes_of_one_collective(line, shape, kind, size, group):
    counts = one(line, shape)
    ((collective, times),) = counts.collectives.items()
    assert (collective.kind, collective.bytes, len(collective.group), times) == (
        kind,
        size,
        group,
        1,
    )
    assert counts.hbm_bytes == 0  # the network's time, not the memory's
    assert not one("%r = f32[32,8]{1,0} all-gather-done(%a)", BOARD).collectives


def test_a_sum_that_leaves_each_device_its_slice_is_a_reduce_scatter():
    """So XLA for TPUs writes one: a fusion around an all-reduce. A channel counts once."""
    inner = (
        "%all-reduce-scatter.1 (p0: f32[32,8]) -> f32[8,8] {\n"
        f"  %p0 = {BOARD} parameter(0)\n"
        f"  %sum = {BOARD} all-reduce(%p0), channel_id=3, {GROUP}\n"
        "  ROOT %mine = f32[8,8]{1,0} slice(%sum), slice={[0:8], [0:8]}\n}\n"
    )
    fusion = "fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1"
    line = f"%r = f32[8,8]{{1,0}} {fusion}\n  %s = f32[8,8]{{1,0}} {fusion}"
    counts = one(line, BOARD, computations=inner)
    assert counts.collectives == {hlo.Collective("reduce-scatter", 1024, (0, 1, 2, 3)): 1}


def loop(body: str, condition: str, attributes: str = "") -> str:
    """A module whose loop adds two arrays of 1 KiB each time it turns."""
    state = "(s32[], f32[256])"
    return (
        f"%body (p: {state}) -> {state} {{\n"
        f"  %p = {state} parameter(0)\n"
        "  %i = s32[]{:S(2)} get-tuple-element(%p), index=0\n"
        "  %x = f32[256]{0} get-tuple-element(%p), index=1\n"
        f"  %y = f32[256]{{0}} add(%x, %x)\n{body}"
        f"  ROOT %next = {state} tuple(%j, %y)\n}}\n\n"
        f"%condition (p: {state}) -> pred[] {{\n"
        f"  %p = {state} parameter(0)\n{condition}"
        "  %i = s32[]{:S(2)} get-tuple-element(%p), index=0\n"
        "  ROOT %less = pred[]{:S(2)} compare(%i, %bound), direction=LT\n}\n\n"
        f"%outer (p: {state}) -> {state} {{\n"
        f"  %p = {state} parameter(0)\n"
        f"  ROOT %l = {state} while(%p), condition=%condition, body=%body{attributes}\n}}\n\n"
        f"ENTRY %m (a: {state}) -> {state} {{\n"
        f"  %a = {state} parameter(0)\n"
        "  %q = pred[]{:S(2)} constant(true)\n"
        "  %t = s32[]{:S(2)} constant(0)\n"
        f"  %inner = {state} while(%a), condition=%condition, body=%body{attributes}\n"
        f"  ROOT %either = {state} conditional(%q, %a, %a), "
        "branch_computations={%outer, %outer}\n}\n"
    )


ADDED = "  %one = s32[]{:S(2)} constant(1)\n  %j = s32[]{:S(2)} add(%i, %one)\n"
BOUND = "  %bound = s32[]{:S(2)} constant(5)\n"


@pytest.mark.parametrize(
    "body, condition, attributes, turns, known",
    [
        (ADDED, BOUND, "", 5, True),
        (ADDED.replace("(1)", "(2)"), BOUND, "", 3, True),  # 0, 2, 4
        (ADDED, BOUND, ', backend_config={"known_trip_count":{"n":"9"}}', 9, True),
        ("  %j = s32[]{:S(2)} multiply(%i, %i)\n", BOUND, "", 5, False),
        (ADDED, BOUND + "  %other = s32[]{:S(2)} constant(8)\n", "", 1, False),
    ],
    ids=["by one", "by two", "as the compiler says", "another counter", "another bound"],
)
def test_turns_of_a_loop(body, condition, attributes, turns, known):
    """The loop runs by itself, and in both branches of a conditional, each of which counts."""
    counts = hlo.count(loop(body, condition, attributes))
    # x is named twice by the sum, and each operand counts.
    assert counts.hbm_bytes == 3 * turns * 3 * 1024
    assert bool(counts.unknown) != known


def test_products_of_one_instruction():
    lhs, rhs = "bf16[3,5,7]{2,1,0}", "bf16[3,7,11]{2,1,0}"
    dot = (
        "%r = bf16[3,5,11]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, "
        "rhs_batch_dims={0}, rhs_contracting_dims={1}"
    )
    assert one(dot, lhs, rhs).flops == 2 * 3 * 5 * 7 * 11
    # Along 9 pixels with a stride of 2 and one of padding at each end, 3 taps find 2 + 3 + 3 + 3
    # + 2 pixels; two groups of 4 features each.
    line = (
        "%r = f32[2,5,6]{2,1,0} convolution(%a, %b), window={size=3 stride=2 pad=1_1}, "
        "dim_labels=b0f_0io->b0f, feature_group_count=2"
    )
    assert one(line, "f32[2,9,8]{2,1,0}", "f32[3,4,6]{2,1,0}").flops == 2 * 2 * 6 * 4 * 13
    # Taps two apart find 2 + 3 + ... + 3 + 2 of 9.
    line = line.replace("stride=2 pad=1_1", "pad=2_2 rhs_dilate=2").replace("[2,5,6]", "[2,9,6]")
    assert one(line, "f32[2,9,8]{2,1,0}", "f32[3,4,6]{2,1,0}").flops == 2 * 2 * 6 * 4 * 23


@pytest.mark.parametrize(
    "name, operands, products",
    [
        ("splash_mha_dkv_no_residuals.1", 4, 5 * 3 / 4),
        ("splash_mha_dq.2", 4, 3 * 3 / 4),
        ("splash_mha_fwd.3", 3, 2),
        ("short_attention_fwd", 3, 2),
        ("short_attention_bwd", 3, 5),
    ],
)
def test_products_of_each_kernel(name, operands, products):
    """With blocks of the mask named, three of four are visited; without, all."""
    long = name.startswith("splash")
    x = "bf16[2,4,256,128]" if long else "bf16[8,256,128]"
    shapes = ["s32[1,2,2]", x, x, x] if operands == 4 else [x, x, x]
    names = ", ".join(f"%{name}" for name in "abcd"[: len(shapes)])
    line = f'%{name} = {x} custom-call({names}), custom_call_target="tpu_custom_call"'
    counts = one(line, *shapes)
    assert counts.flops == 2 * products * 8 * 256**2 * 128 and not counts.unknown
    unknown = one(line.replace(name, "mystery.4"), *shapes)
    assert unknown.flops == 0 and unknown.unknown == {"kernel mystery.4"}


def test_copies_to_and_from_the_hosts_memory():
    """A layer's slice is written to an array on the host, or read from one, without the rest.
    Beside a copy there may be a matmul, a copy the other way, and a gather."""
    small, stack = "f32[1,1024,1024]{2,1,0}", "f32[40,1024,1024]{2,1,0:S(5)}"
    body = (
        "%i = s32[] constant(0)\n"
        f"  %out = (({stack}, {small}, s32[]), {stack}, u32[]) dynamic-update-slice-start("
        "%a, %b, %i)\n"
        f"  %in = (({stack}, s32[]), {small}, u32[]) dynamic-slice-start(%a, %i)\n"
        "  %g = (f32[1,512,1024]{2,1,0}, f32[1,1024,1024]{2,1,0}) all-gather-start(%c), "
        "channel_id=1, replica_groups={{0,1}}\n"
        "  %m = f32[4096,4096]{1,0} dot(%d, %d), lhs_contracting_dims={1}, "
        "rhs_contracting_dims={0}\n"
        f"  %gathered = {small} all-gather-done(%g)\n"
        f"  %there = {stack} dynamic-update-slice-done(%out)\n"
        f"  %here = {small} dynamic-slice-done(%in)"
    )
    shapes = [stack, small, "f32[1,512,1024]{2,1,0}", "bf16[4096,4096]{1,0}"]
    counts = one(body, *shapes)
    size = 4 * 2**20
    copies = {hlo.HostCopy(kind, size): 1 for kind in ("to-host", "from-host")}
    assert counts.host_copies == copies and not counts.unknown
    network = Network(Topology.parse("v5e:2x1"), [(0, 0), (1, 0)], [0, 0])
    t = times(counts, network)
    product = 2 * 4096**3 / 197e12
    assert t.to_host == t.from_host == pytest.approx(size / 15e9)
    assert t.serial == pytest.approx(t.instructions + 2 * size / 15e9 + t.ici)
    assert 0 < t.ici < t.to_host < product and t.exposed == 0

    # Ten times as long as the matmul. Both run at once: the second, which starts when the first has
    # read its slice, is waited for by so much longer.
    slow = dataclasses.replace(CHIPS["v5e"], host_bandwidth=size / product / 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CHIPS, "v5e", slow)
        t = times(counts, network)
        waited = exposed_seconds(counts, network)
    assert t.overlapped == t.to_host == pytest.approx(10 * product)
    assert waited[hlo.HostCopy("to-host", size)] == pytest.approx(10 * product - t.instructions)
    assert t.exposed == pytest.approx(10 * product - t.instructions + size / 800e9)
    # Unknown on tpu7x.
    assert host_seconds(hlo.HostCopy("to-host", 1.0), CHIPS["tpu7x"]) == 0


def test_the_network_between_slices_by_hand():
    """Four slices of four chips. A slice's devices have split an array among them before it
    leaves: each sends its part."""
    topology = Topology.parse("v5e:2x2", 4)
    places = [(x, y) for _ in range(4) for x in range(2) for y in range(2)]
    network = Network(topology, places, [n // 4 for n in range(16)])
    dcn, link = CHIPS["v5e"].dcn_bandwidth, CHIPS["v5e"].link_bandwidth
    every = hlo.Collective("all-gather", 16e9, tuple(range(16)))
    ici, out = network.seconds(every)
    assert ici == pytest.approx(16e9 * 3 / 4 / (2 * link))  # a line along each of two axes
    assert out == pytest.approx(16e9 / 4 * 3 / 4 / dcn)
    summed = dataclasses.replace(every, kind="all-reduce")
    assert network.seconds(summed) == (pytest.approx(2 * ici), pytest.approx(2 * out))
    # 1/256 of the array goes from each device to each: of four pairs in a slice over two links,
    # and from each device to twelve of other slices.
    mixed = dataclasses.replace(every, kind="all-to-all")
    assert network.seconds(mixed) == (
        pytest.approx(4 * 16e9 / 256 / (2 * link)),
        pytest.approx(12 * 16e9 / 256 / dcn),
    )
    assert network.seconds(dataclasses.replace(every, group=(0,))) == (0, 0)
    # Two devices of one chip need no link.
    twins = Network(Topology.parse("tpu7x:2x2x1"), [(0, 0, 0)] * 2, [0, 0])
    assert twins.seconds(dataclasses.replace(every, group=(0, 1))) == (0, 0)
    # One device has half of a chip's links.
    pair = Network(Topology.parse("tpu7x:2x2x1"), [(0, 0, 0), (1, 0, 0)], [0, 0])
    chip = CHIPS["tpu7x"]
    assert pair.seconds(dataclasses.replace(every, group=(0, 1)))[0] == pytest.approx(
        16e9 / 2 / (chip.link_bandwidth / 2)
    )
    # ... and of its way to other slices.
    apart = Network(Topology.parse("tpu7x:2x2x1", 2), [(0, 0, 0)] * 2, [0, 1])
    assert apart.seconds(dataclasses.replace(every, group=(0, 1)))[1] == pytest.approx(
        16e9 / 2 / (chip.dcn_bandwidth / 2)
    )
    # Seven links of a line: no shorter way round.
    line = Network(Topology.parse("v5e:8x1"), [(n, 0) for n in range(8)], [0] * 8)
    far = hlo.Collective("collective-permute", 1e9, (0, 7))
    assert line.seconds(far)[0] == pytest.approx(7e9 / link)
    counts = hlo.Counts(collectives={every: 3, far: 2})
    t = times(counts, network)
    assert t.dcn == pytest.approx(3 * out + 2 * 1e9 / dcn)
    assert t.ici == pytest.approx(3 * ici) and t.serial == t.ici + t.dcn
    assert t.overlapped == max(t.ici, t.dcn)


def test_sums_over_slices_go_through_the_runtime():
    """As XLA hands them over: a send of what the slice has summed, for each device."""
    text = (
        "ENTRY %m (a: f32[64,8,128]) -> f32[64,8,128] {\n"
        "  %a = f32[64,8,128]{2,1,0} parameter(0)\n"
        "  %t = token[] after-all()\n"
        "  %send = (f32[64,8,128]{2,1,0}, u32[], token[]) send(%a, %t), channel_id=2, "
        'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}\n'
        "}\n"
    )
    counts = hlo.count(text)
    assert counts.dcn_bytes == 64 * 8 * 128 * 4
    topology = Topology.parse("v5e:4x4", 4)
    t = times(counts, Network(topology, [(0, 0)], [0]))
    assert t.dcn == pytest.approx(2 * 3 / 4 * counts.dcn_bytes / CHIPS["v5e"].dcn_bandwidth)


def test_bounds_of_a_roofline():
    counts = hlo.Counts(flops=197e12, hbm_bytes=400e9)
    counts.instructions = [
        hlo.Cost(197e12, 80e9, 1.0, "product"),
        hlo.Cost(0.0, 160e9, 2.0, "sum"),
        hlo.Cost(0.0, 8e9, 1.0, "product"),
    ]
    topology = Topology.parse("v5e:1x1")
    t = times(counts, Network(topology, [(0, 0)], [0]))
    assert (t.compute, t.hbm, t.overlapped) == (1.0, 0.5, 1.0)
    assert t.serial == pytest.approx(1.0 + 0.4 + 0.01)
    first, second = busiest(counts, topology)
    assert (first.source, first.compute, first.hbm) == (
        "product",
        1.0,
        pytest.approx(0.11),
    )
    assert first.serial == pytest.approx(1.01) and second.serial == pytest.approx(0.4)


def test_what_the_compiler_scheduled_beside_a_collective():
    """In a loop of three turns: a gather that is started before a matmul and one that is waited for
    at once; then matmuls with parts of a gather inside, and a sum that runs by itself."""
    big, small = "bf16[4096,4096]{1,0}", "bf16[1024,4096]{1,0}"
    dot = "lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    group = "replica_groups={{0,1,2,3}}"
    text = (
        f"%part (p: {small}, q: {big}) -> {big} {{\n"
        f"  %p = {small} parameter(0)\n  %q = {big} parameter(1)\n"
        f"  %g = {big} all-gather(%p), channel_id=7, {group}\n"
        f"  ROOT %r = {big} dot(%q, %q), {dot}\n}}\n\n"
        f"%body (s: (s32[], {small}, {big})) -> (s32[], {small}, {big}) {{\n"
        f"  %s = (s32[], {small}, {big}) parameter(0)\n"
        "  %i = s32[] get-tuple-element(%s), index=0\n"
        f"  %a = {small} get-tuple-element(%s), index=1\n"
        f"  %b = {big} get-tuple-element(%s), index=2\n"
        f"  %x = ({small}, {big}) all-gather-start(%a), channel_id=1, {group}\n"
        f"  %m = {big} dot(%b, %b), {dot}\n"
        f"  %y = {big} all-gather-done(%x)\n"
        f"  %u = ({small}, {big}) all-gather-start(%a), channel_id=2, {group}\n"
        f"  %v = {big} all-gather-done(%u)\n"
        f"  ROOT %n = (s32[], {small}, {big}) tuple(%i, %a, %m)\n}}\n\n"
        f"%condition (s: (s32[], {small}, {big})) -> pred[] {{\n"
        f"  %s = (s32[], {small}, {big}) parameter(0)\n  ROOT %t = pred[] constant(true)\n}}\n\n"
        f"ENTRY %main (a: {small}, b: {big}) -> {big} {{\n"
        f"  %a = {small} parameter(0)\n  %b = {big} parameter(1)\n  %z = s32[] constant(0)\n"
        f"  %s = (s32[], {small}, {big}) tuple(%z, %a, %b)\n"
        f"  %l = (s32[], {small}, {big}) while(%s), condition=%condition, body=%body, "
        'backend_config={"known_trip_count":{"n":"3"}}\n'
        f"  %f1 = {big} fusion(%a, %b), kind=kOutput, calls=%part\n"
        f"  %f2 = {big} fusion(%a, %b), kind=kOutput, calls=%part\n"
        f"  ROOT %sum = {big} all-reduce(%b), channel_id=3, {group}\n}}\n"
    )
    counts = hlo.count(text)
    assert begun(counts.schedule) == counts.collectives
    (loop_, begin, first, second, end, alone, waited) = counts.schedule
    assert isinstance(loop_, hlo.Loop) and loop_.times == 3
    assert [type(event).__name__ for event in loop_.body] == [
        "Begin",
        "Cost",
        "End",
        "Begin",
        "End",
    ]
    assert isinstance(begin, hlo.Begin) and isinstance(end, hlo.End)
    assert begin.channel == end.channel and isinstance(alone, hlo.Begin)
    assert isinstance(waited, hlo.End)
    product = 2 * 4096**3 / 197e12
    network = Network(Topology.parse("v5e:2x2"), [(x, y) for x in (0, 1) for y in (0, 1)], [0] * 4)
    gather, total = (
        network.seconds(hlo.Collective(kind, 4096**2 * 2.0, (0, 1, 2, 3)))[0]
        for kind in ("all-gather", "all-reduce")
    )
    assert product / 5 < gather < product
    t = times(counts, network)
    assert t.ici == pytest.approx(7 * gather + total)
    assert t.exposed == pytest.approx(3 * gather + total)
    assert t.scheduled == pytest.approx(5 * product + t.exposed)
    by_kind = {c.kind: s for c, s in exposed_seconds(counts, network).items()}
    assert by_kind == pytest.approx({"all-gather": 3 * gather, "all-reduce": total})

    # Of two that are under way at once, the second starts when the first has ended.
    whole = hlo.Collective("all-gather", 4096**2 * 2.0, (0, 1, 2, 3))
    begins: hlo.Schedule = [hlo.Begin(name, whole) for name in "ab"]
    ends: hlo.Schedule = [hlo.End(name) for name in "ab"]
    beside = hlo.Cost(1.5 * gather * 197e12, 0.0, 1.0)
    both = hlo.Counts(schedule=[*begins, beside, *ends])
    assert exposed_seconds(both, network) == pytest.approx({whole: gather / 2})

    # A slow network: the first gather of a turn holds up the second, and both are waited for.
    slow = dataclasses.replace(CHIPS["v5e"], link_bandwidth=CHIPS["v5e"].link_bandwidth / 10)
    gather, total = 10 * gather, 10 * total
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CHIPS, "v5e", slow)
        t = times(counts, network)
    assert t.exposed == pytest.approx(3 * (2 * gather - product) + gather - 2 * product + total)


def begun(schedule: hlo.Schedule, times: float = 1.0) -> dict[hlo.Collective, float]:
    """The collectives of a schedule, and how often each begins."""
    found: dict[hlo.Collective, float] = {}
    for event in schedule:
        if isinstance(event, hlo.Loop):
            more = begun(event.body, times * event.times)
        elif isinstance(event, hlo.Begin):
            more = {event.collective: times * event.times}
        else:
            continue
        found |= {collective: found.get(collective, 0) + n for collective, n in more.items()}
    return found


def test_what_is_scheduled_beside_a_computation_of_another_core():
    """The other core runs two loops, one in the other: twice a sum, and each time three gathers and
    matmuls. Beside all of it there is one more matmul."""
    big, small = "bf16[4096,4096]{1,0}", "bf16[1024,4096]{1,0}"
    state, dot = f"({small}, {big})", "lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    group = "replica_groups={{0,1,2,3}}"

    def turn(name: str, lines: str) -> str:
        return (
            f"%{name} (s: {state}) -> {state} {{\n  %s = {state} parameter(0)\n"
            f"  %a = {small} get-tuple-element(%s), index=0\n"
            f"  %b = {big} get-tuple-element(%s), index=1\n{lines}}}\n\n"
        )

    def loop(body: str, n: int) -> str:
        known = f'backend_config={{"known_trip_count":{{"n":"{n}"}}}}'
        return f"{state} while(%s), condition=%condition, body=%{body}, {known}\n"

    text = (
        turn(
            "inner",
            f"  %g = {big} all-gather(%a), channel_id=1, {group}\n"
            f"  %m = {big} dot(%b, %b), {dot}\n  ROOT %n = {state} tuple(%a, %m)\n",
        )
        + turn(
            "outer",
            f"  %r = {big} all-reduce(%b), channel_id=2, {group}\n  ROOT %l = {loop('inner', 3)}",
        )
        + turn("called", f"  ROOT %l = {loop('outer', 2)}")
        + f"ENTRY %main (s: {state}) -> {big} {{\n  %s = {state} parameter(0)\n"
        f"  %b = {big} get-tuple-element(%s), index=1\n"
        f"  %started = (({state}), {state}) call-start(%s), to_apply=%called\n"
        f"  ROOT %m = {big} dot(%b, %b), {dot}\n"
        f"  %done = {state} call-done(%started)\n}}\n"
    )
    counts = hlo.count(text)
    gather, total = (
        hlo.Collective(kind, 4096**2 * 2.0, (0, 1, 2, 3)) for kind in ("all-gather", "all-reduce")
    )
    assert counts.collectives == begun(counts.schedule) == {gather: 6, total: 2}
    network = Network(Topology.parse("v5e:2x2"), [(x, y) for x in (0, 1) for y in (0, 1)], [0] * 4)
    product = 2 * 4096**3 / 197e12
    sent = 6 * network.seconds(gather)[0] + 2 * network.seconds(total)[0]
    t = times(counts, network)
    assert t.ici == pytest.approx(sent) and sent < 7 * product and t.exposed == 0
    assert t.scheduled == pytest.approx(7 * product)
    slow = dataclasses.replace(CHIPS["v5e"], link_bandwidth=CHIPS["v5e"].link_bandwidth / 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CHIPS, "v5e", slow)
        assert times(counts, network).exposed == pytest.approx(10 * sent - 7 * product)


def test_matmuls_in_8_bits_run_at_their_own_peak():
    """Each dtype has one matmul by itself and one in a fusion; int8 also a convolution."""
    shapes = [f"{dtype}[64,64]{{1,0}}" for dtype in ("s8", "f8e4m3fn", "f8e5m2", "bf16")]
    dot = "dot(%{}, %{}), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}"
    lines = [("s32", "a", "a"), ("bf16", "b", "c"), ("bf16", "d", "d"), ("f32", "a", "d")]
    body = "\n  ".join(
        f"%r{n} = {dtype}[64,64]{{1,0}} " + dot.format(*operands)
        for n, (dtype, *operands) in enumerate(lines)
    )
    alone = hlo.count(module_of(body, *shapes))
    convolution = "%r = s32[64,64]{1,0} convolution(%a, %a), dim_labels=bf_io->bf"
    written = one(convolution, *shapes)
    assert written.flops == written.int8_flops == 2 * 64**3
    inner = module_of(body.replace("%r3", "ROOT %r3"), *shapes).replace("ENTRY %m", "%products")
    fused = one(
        "%r = f32[64,64]{1,0} fusion(%a, %b, %c, %d), kind=kOutput, calls=%products",
        *shapes,
        computations=inner,
    )
    for counts in (alone, fused):
        check_8_bits(counts)


def check_8_bits(counts: hlo.Counts) -> None:
    """Checks the counts of a product in int8, one in fp8, and two in wider types."""
    one = 2 * 64**3
    assert (counts.flops, counts.int8_flops, counts.fp8_flops) == (4 * one, one, one)
    for name, parts in {
        "v5e": 3 / 197 + 1 / 393,
        "v6e": 3 / 918 + 1 / 1836,
        "tpu7x": 2 * (3 / 2307 + 1 / 4614),  # for each of two devices
    }.items():
        axes = CHIPS[name].torus_axes
        topology = Topology.parse(f"{name}:{'x'.join('1' * axes)}")
        compute = times(counts, Network(topology, [(0,) * axes], [0])).compute
        assert compute == pytest.approx(parts * one / 1e12)
        found = busiest(counts, topology)
        assert sum(operation.compute for operation in found) == pytest.approx(compute)


# --- The 14B step's sharding, pinned --------------------------------------------------------------


def test_sharding_of_the_14b_step_is_pinned():
    """Path, shape and spec of all that the compiled step reads and writes - parameters, moments,
    counters, and the batch - on data 2, fsdp 2, tensor 2. After a change that means to move it:
    EMU_JAX_PIN=1 pytest -k pinned."""
    cfg = config()
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        trainer = Trainer(cfg, mesh)
        arrays = {"state": trainer.state_shapes, "batch": abstract_batch(trainer)}
    text = "".join(
        f"{jax.tree_util.keystr(path)} {list(leaf.shape)} {tuple(leaf.sharding.spec)}\n"
        for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)
    )
    golden = ROOT / "tests" / "golden" / "emu_14b_sharding.txt"
    if os.environ.get("EMU_JAX_PIN"):
        golden.write_text(text)
    assert text == golden.read_text()


def test_ladder_sizes():
    from emu_jax.models.emu import EmuModel

    for size, least, most in (
        ("0.1B", 0.09e9, 0.12e9),
        ("0.4B", 0.35e9, 0.45e9),
        ("1.5B", 1.4e9, 1.6e9),
        ("7B", 7e9, 8e9),
    ):
        state = nnx.state(nnx.eval_shape(lambda s=size: EmuModel(emu_ladder(s), rngs=nnx.Rngs(0))))
        assert least < sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state)) < most
    assert emu_14b().llama.head_width == emu_ladder("7B").llama.head_width == 128


# --- Reports and errors ---------------------------------------------------------------------------


def report(**changes) -> CompiledReport:
    base = {
        "program": "train",
        "fits": True,
        "topology": "v5e:4x4",
        "slices": 1,
        "chips": 16,
        "devices": 16,
        "mesh": {"data": 1, "fsdp": 16, "tensor": 1},
        "remat": {"llama": "full"},
        "rows": 32,
        "rows_per_chip": 2.0,
        "model_flops": 1.0,
        "hbm_bytes": 2**33,
        "hbm_limit_bytes": 2**34,
        "hbm_by_kind": {"temporaries": 2**30},
        "collective_bytes": {},
        "compile_seconds": 1.0,
        "step_seconds_overlap": 1.0,
        "step_seconds_serial": 1.5,
        "tokens_per_second": 100.0,
        "tokens_per_second_overlap": 150.0,
        "mfu_serial": 0.4,
        "mfu_overlap": 0.6,
        "host_bytes": 0,
        "device_flops": 1.0,
        "hbm_traffic_bytes": 1.0,
        "seconds": {"compute": 1.0, "ici": 0.5},
        "busiest": (Operation("dot", 0.5, 0.25, 0.5),),
        "compiler_seconds": None,
        "not_counted": ("kernel x",),
    }
    return CompiledReport(**(base | changes))


def trial(curve: str = "weak", **changes) -> Trial:
    return Trial("key", curve, report(**changes))


def test_a_report_survives_its_json():
    """If a program does not fit, its bounds are null, and the rest of its speed is missing."""
    compiled = report()
    values = json.loads(json.dumps(compiled.to_json()))
    assert Report.from_json(values | {"key": "k", "curve": ""}) == compiled
    common = {field.name: getattr(compiled, field.name) for field in dataclasses.fields(Report)}
    over = Report(**common | {"fits": False})
    values = json.loads(json.dumps(over.to_json()))
    assert Report.from_json(values) == over and type(Report.from_json(values)) is Report
    assert values["mfu_serial"] is values["tokens_per_second"] is None and "seconds" not in values
    with pytest.raises(UserError, match="no 'hbm_bytes'"):
        Report.from_json({key: value for key, value in values.items() if key != "hbm_bytes"})


def test_a_summary_says_only_what_a_report_has():
    network = {"compute": 1.0, "hbm": 0.5, "ici": 0.5, "dcn": 0.0}
    assert "as scheduled" not in summary(report(seconds=network))
    said = summary(report(seconds=network, step_seconds_scheduled=1.2, mfu_scheduled=0.5))
    assert "; 1.200 s as scheduled" in said and "; 0.500 as scheduled" in said


def test_trials_counted_by_other_rules_are_compiled_again(monkeypatch):
    cfg, topology = config("emu_100m"), Topology.parse("v5e:2x2")
    key = _key(cfg, topology, "")
    assert key == _key(cfg, topology, "")
    monkeypatch.setattr(hlo, "RULES_VERSION", hlo.RULES_VERSION + 1)
    assert key != _key(cfg, topology, "")


def test_a_decode_step_does_not_share_rows():
    cfg = config("emu_100m", "mesh.context=2")
    with pytest.raises(UserError, match="mesh.context is 2, but a decode step"):
        plan(cfg, Topology.parse("v5e:2x2"), "generate")


def test_sweep_table_and_plot(tmp_path):
    slow = trial("", step_seconds_serial=3.0, mfu_serial=0.2)
    lines = trials_table(
        [slow, trial(""), trial("", fits=False), Trial("key", "", None)]
    ).splitlines()
    assert len(lines) == 4 and "| 0.400 | - | 0.600 |" in lines[2] and "| 0.200 |" in lines[3]
    (line,) = trials_table([trial("", mfu_scheduled=0.45)]).splitlines()[2:]
    assert "| 0.400 | 0.450 | 0.600 |" in line
    plot_scaling(
        [trial(), trial(chips=32, topology="v5e:4x8"), trial("strong")], tmp_path / "x.png"
    )
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_the_page_on_scaling_has_a_table():
    page = ROOT / "docs" / "scaling.md"
    assert check_page(page, "emu_14b") == "sweep"
    assert check_page(page, "emu2_37b") == "sweep emu2_37b"
    text = page.read_text()
    assert trials_table([]).splitlines()[0] in text and "| v5e:16x16 | 256 |" in text


def test_a_sweep_takes_the_best_that_fits_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """The compiler replaced by a rule: what the sweep tries, keeps, chooses, scales and draws."""
    asked, compiled_with = [], set()
    again = {"dots": 1.0, "minimal": 1.2, "full": 1.3}
    room = {"dots": 4, "minimal": 2, "full": 1}

    def trace(cfg, topology, policy, fsdp):
        return SettingGroup(policy, fsdp, 3 * 2**30, 2.9 * 2**30 * room[policy], again[policy], 0.5)

    def pretend(cfg, topology, *, flags):
        compiled_with.add(flags)
        policy, rows = cfg.remat.llama, cfg.data.batch_size / topology.chips
        asked.append((str(topology), topology.slices, policy, rows, cfg.mesh.fsdp))
        if rows == 3:
            raise CompilerCrash("the TPU compiler crashed")
        # What does not grow with rows is shared by more of them; half of the links, twice as long.
        seconds = rows * again[policy] + (1.5 if cfg.mesh.fsdp == 8 else 0.7)
        return report(
            topology=str(topology),
            slices=topology.slices,
            chips=topology.chips,
            fits=rows * room[policy] <= 4,
            rows=cfg.data.batch_size,
            rows_per_chip=rows,
            mesh={"data": 1, "fsdp": cfg.mesh.fsdp, "tensor": 1},
            remat={"llama": policy},
            hbm_by_kind={"temporaries": 2**30},
            step_seconds_overlap=seconds,
            step_seconds_serial=seconds,
            seconds={"compute": rows * again[policy], "ici": 0.5},
        )

    monkeypatch.setattr("emu_jax.plan.sweep.plan_in_subprocess", pretend)
    monkeypatch.setattr("emu_jax.plan.sweep.family", trace)
    monkeypatch.setattr("emu_jax.plan.sweep._meshes", lambda *_: [16, 8])
    pairs = [(config("emu_100m"), Topology.parse("v5e:4x4"))]
    found = sweep(pairs, tmp_path, scaling=["weak", "strong"])
    # Of 16 GiB a fifth is thought to be temporary at first: full may have three rows, which
    # crash the compiler, and fits two, 1.65 s a row. That done there is room for one of dots,
    # 1.7, and for two of minimal, 1.55, which are worse on the other mesh. Nothing that could not
    # fit was compiled.
    best = found.best["v5e:4x4"]
    assert (best.remat["llama"], best.rows_per_chip, best.mesh["fsdp"]) == (
        "minimal",
        2,
        16,
    )
    tried = [(policy, rows, fsdp) for name, _, policy, rows, fsdp in asked if name == "v5e:4x4"]
    assert tried == [
        ("full", 3, 16),
        ("full", 2, 16),
        ("dots", 1, 16),
        ("minimal", 2, 16),
        ("minimal", 2, 8),
    ]
    curves = [r for r in json.loads((tmp_path / "sweep.json").read_text()) if r["curve"]]
    weak = {(r["chips"], r["rows_per_chip"]) for r in curves if r["curve"] == "weak"}
    assert weak == {(16, 2), (64, 2), (256, 2), (512, 2)}
    assert {r["chips"] for r in curves if r["curve"] == "strong"} == {16}  # 32 rows
    assert "| minimal | 2 |" in (tmp_path / "sweep.md").read_text()

    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    begin, end = "<!-- sweep -->", "<!-- /sweep -->"
    before = f"between `{begin}` and `{end}`\n"
    page.write_text(f"{before}{begin}\nold\n{end}\nafter\n")
    put_on_page(tmp_path, page)
    text = (tmp_path / "sweep.md").read_text()
    assert page.read_text() == f"{before}{begin}\n{text}{end}\nafter\n"
    assert (page.parent / "scaling.png").stat().st_size > 10_000
    page.write_text(f"{begin}\n{end}\n<!-- sweep mine -->\n{end}\n")
    put_on_page(tmp_path, page, "mine")
    assert page.read_text() == f"{begin}\n{end}\n<!-- sweep mine -->\n{text}{end}\n"
    assert (page.parent / "scaling-mine.png").stat().st_size > 10_000
    page.write_text("no place")
    with pytest.raises(UserError, match="page.md: no lines"):
        put_on_page(tmp_path, page)

    before = len(asked)
    again_found = sweep(pairs, tmp_path, scaling=["weak", "strong"])
    assert again_found.best == found.best
    assert asked[before:] == [("v5e:4x4", 1, "full", 3, 16)]  # all but the crash was kept
    script = tmp_path / "flags.sh"
    script.write_text("echo \"export LIBTPU_INIT_ARGS='--$1=$2'\"")
    sweep(pairs, tmp_path, scaling=["weak"], flags=script)
    assert len(asked) > before + 2 and {"--v5e=1", "--v5e=2"} < compiled_with
    monkeypatch.setattr(
        "emu_jax.plan.sweep.plan_in_subprocess",
        lambda *_, **flags: dataclasses.replace(pretend(*_, **flags), fits=False),
    )
    with pytest.raises(UserError, match="no setting fits v5e:2x2"):
        sweep([(pairs[0][0], Topology.parse("v5e:2x2"))], tmp_path, scaling=[])


def test_a_sweep_leaves_out_what_promises_less(tmp_path, monkeypatch):
    """The setting that needs most memory and computes least fits with many rows: one compile."""
    asked = []

    def pretend(cfg, topology, *, flags):
        asked.append((cfg.remat.llama, cfg.data.batch_size // topology.chips))
        rows = asked[-1][1]
        return report(
            chips=4,
            rows=rows * 4,
            rows_per_chip=rows,
            remat={"llama": cfg.remat.llama},
            hbm_by_kind={"temporaries": 2**30},
            seconds={"compute": rows * 1.0, "ici": 0.1},
            step_seconds_overlap=rows * 1.0,
            step_seconds_serial=rows * 1.05,
        )

    monkeypatch.setattr("emu_jax.plan.sweep.plan_in_subprocess", pretend)
    cost = {"dots": 1.0, "minimal": 1.2, "full": 1.3}
    monkeypatch.setattr(
        "emu_jax.plan.sweep.family",
        lambda cfg, topology, policy, fsdp: SettingGroup(
            policy, fsdp, 2**30, 2**30, cost[policy], 0.1
        ),
    )
    monkeypatch.setattr("emu_jax.plan.sweep._meshes", lambda *_: [4])
    sweep([(config("emu_100m"), Topology.parse("v5e:2x2"))], tmp_path, scaling=[])
    assert asked == [("dots", 8)]


def test_a_sweep_of_a_config_that_accumulates_keeps_its_batch(tmp_path, monkeypatch):
    """Smaller parts of one batch, and rows per chip counted in a part."""
    asked = []

    def pretend(cfg, topology, *, flags):
        rows, whole = cfg.data.batch_size // topology.chips // cfg.accumulate, cfg.data.batch_size
        asked.append((topology.chips, rows, cfg.accumulate, whole))
        return report(
            topology=str(topology),
            chips=topology.chips,
            fits=rows <= 3,
            rows=whole,
            rows_per_chip=whole / topology.chips,
            accumulate=cfg.accumulate,
            seconds={"compute": 1.0 * cfg.accumulate * rows, "ici": 0.1},
        )

    monkeypatch.setattr("emu_jax.plan.sweep.plan_in_subprocess", pretend)
    monkeypatch.setattr(
        "emu_jax.plan.sweep.family",
        lambda cfg, topology, policy, fsdp: SettingGroup(policy, fsdp, 0, 2**31, 1.0, 0.0),
    )
    monkeypatch.setattr("emu_jax.plan.sweep._meshes", lambda *_: [16])
    cfg = config("emu_100m")
    cfg = dataclasses.replace(cfg, accumulate=4, data=dataclasses.replace(cfg.data, batch_size=256))
    pairs = [(cfg, Topology.parse("v5e:4x4"))]
    sweep(pairs, tmp_path, scaling=["weak"], policies=["full"], rows=[1, 3, 4, 6, 8])
    # 16 rows a chip: as many parts as leave whole ones.
    assert asked[:3] == [(16, 6, 2, 192), (16, 4, 4, 256), (16, 3, 5, 240)]
    assert (64, 3, 1, 192) in asked
    assert "| full | 3 |" in (tmp_path / "sweep.md").read_text()


def test_a_traced_step_says_what_it_holds_without_compiling(monkeypatch):
    """`family` on the devices that are here, against the state counted by hand."""
    monkeypatch.setattr("emu_jax.plan.sweep.devices_of", lambda topology: jax.devices()[:4])
    cfg, topology = config("emu_100m"), Topology.parse("v5e:2x2")
    full, dots = (family(cfg, topology, policy, 4) for policy in ("full", "dots"))
    assert full.fixed_bytes == dots.fixed_bytes == pytest.approx(12 * 102.5e6 / 4, rel=0.02)
    assert full.bytes_per_row < dots.bytes_per_row
    # The forward pass again, but for each layer's last product, whose result is not needed.
    llama, tokens = cfg.model.llama, cfg.data.row_tokens
    seen = (tokens + CAUSAL_BLOCK) / 2  # keys that a query meets, on average
    again = 4 * llama.width**2 + 2 * llama.width * llama.mlp_width + 2 * seen * llama.width
    more = (full.products - dots.products) * CHIPS["v5e"].flops
    assert more == pytest.approx(2 * tokens * llama.layers * again, rel=0.02)
    model = train_flops(cfg).total / cfg.data.batch_size / CHIPS["v5e"].flops
    assert model < dots.products < 1.2 * model  # all of causal attention, logits twice
    assert full.network == pytest.approx(3 * 2 * 102.5e6 / (2 * 50e9), rel=0.02)


def test_a_crash_of_the_compiler_is_one_line_and_not_the_end():
    with pytest.raises(CompilerCrash, match="crashed: try other rows per chip"):
        run_in_subprocess(os.abort)
    with pytest.raises(UserError, match="no TPU 'x'"):  # a mistake stays one
        run_in_subprocess(Topology.parse, "x:1")
    assert run_in_subprocess(os.getenv, "LIBTPU_INIT_ARGS", flags="--a=1 --b=2") == "--a=1 --b=2"


def test_flags_are_those_of_the_chip_and_its_slices(monkeypatch, tmp_path):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--old=1")
    script = ROOT / "launch" / "flags.sh"
    one, two = (compiler_flags(script, Topology.parse("v6e:16x16", n)) for n in (1, 2))
    assert "98304" in one and "megascale" not in one and "--old" not in one
    assert two.startswith(one) and "megascale" in two
    assert compiler_flags(None, Topology.parse("v6e:16x16")) == "--old=1"
    silent = tmp_path / "silent.sh"
    silent.write_text("true")
    with pytest.raises(UserError, match="silent.sh v6e 1 gives no compiler flags: .*not set"):
        compiler_flags(silent, Topology.parse("v6e:16x16"))
    with pytest.raises(UserError, match="none.sh v6e 1 gives .*No such file"):
        compiler_flags(tmp_path / "none.sh", Topology.parse("v6e:16x16"))


def test_a_plan_that_is_killed_takes_the_compiler_along(tmp_path):
    said = tmp_path / "pid"
    command = f"echo $PPID > {said}.part; mv {said}.part {said}; exec sleep 100"
    program = (
        "import os; from emu_jax.plan.plan import run_in_subprocess; "
        f"run_in_subprocess(os.system, {command!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    until = time.monotonic() + 60
    while not said.exists():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    while Path(f"/proc/{int(said.read_text())}").exists():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_collectives_of_a_plan_are_told_by_the_axes_that_they_run_over():
    mesh: Any = SimpleNamespace(size=8, devices=np.zeros((2, 2, 2)), axis_names=MESH_AXES)
    gather = hlo.Collective("all-gather", 100.0, (0, 2))
    counts = hlo.Counts(dcn_bytes=7.0)
    counts.collectives |= {
        gather: 3,
        dataclasses.replace(gather, group=(4, 6)): 2,
        dataclasses.replace(gather, kind="all-reduce", group=(0, 1, 2, 3)): 1,
        # Of a permutation a pair, of those that follow each its own.
        hlo.Collective("collective-permute", 10.0, (0, 4, 1, 2)): 1,
    }
    assert collective_bytes(counts, mesh) == {
        "fsdp": {"all-gather": 500},
        "fsdp+tensor": {"all-reduce": 100},
        "data": {"collective-permute": 10},
        "slices": {"all-reduce": 7},
    }


def test_what_a_plan_reports_by_hand():
    """A product of 1024 x 1024 matrices on each of four chips, of which half is the model's."""
    cfg, topology = config("emu_100m"), Topology.parse("v5e:2x2")
    devices = [SimpleNamespace(coords=(x, y, 0)) for x in range(2) for y in range(2)]
    mesh: Any = SimpleNamespace(
        size=4,
        devices=np.array(devices, object).reshape(1, 4, 1),
        shape={"data": 1, "fsdp": 4, "tensor": 1},
        axis_names=MESH_AXES,
    )
    square = "bf16[1024,1024]{1,0}"
    product = f"%r = {square} dot(%a, %b), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}"
    text = module_of(product, square, square)
    limit = 16 * 2**30

    def report(memory: Any, topology: Topology = topology, text: str = text) -> Any:
        def compile(compiler_options):
            if isinstance(memory, Exception):
                raise memory
            return SimpleNamespace(
                memory_analysis=lambda: memory,
                as_text=lambda: text,
                cost_analysis=lambda: {"optimal_seconds": 5.0},
            )

        lowered: Any = SimpleNamespace(compile=compile)
        kinds = {"parameters": 100.0, "optimizer": 200.0, "activations": 30.0}
        return _report(cfg, topology, mesh, lowered, kinds, 4 * 2**31 / 2, "train")

    def sizes(total: int) -> Any:
        return SimpleNamespace(
            argument_size_in_bytes=total - 75,
            output_size_in_bytes=60,
            alias_size_in_bytes=50,
            temp_size_in_bytes=45,
            generated_code_size_in_bytes=20,
            host_temp_size_in_bytes=7,
        )

    found = report(sizes(limit))
    seconds = 2 * 1024**3 / 197e12  # longer than its six MiB take
    assert found.fits and found.hbm_bytes == found.hbm_limit_bytes == limit
    assert not report(sizes(limit + 1)).fits
    assert found.hbm_by_kind["temporaries"] == 15 and found.host_bytes == 7
    assert (found.device_flops, found.hbm_traffic_bytes) == (2**31, 6 * 2**20)
    assert found.step_seconds_overlap == found.step_seconds_serial == pytest.approx(seconds)
    assert found.mfu_overlap == found.mfu_serial == pytest.approx(0.5)
    tokens = cfg.data.batch_size * cfg.data.row_tokens / seconds
    assert found.tokens_per_second == pytest.approx(tokens)
    assert found.tokens_per_second_overlap == pytest.approx(tokens)
    assert found.rows_per_chip == cfg.data.batch_size / 4 and found.compiler_seconds == 5

    # tpu7x: a chip is two devices, each with half of what it has; its network is waited for.
    twice = Topology.parse("tpu7x:2x1x1")
    gathered = module_of(
        f"{product}\n  %g = {square} all-gather(%a), replica_groups={{{{0,1,2,3}}}}", square, square
    )
    found = report(sizes(limit), twice, gathered)
    assert found.hbm_limit_bytes == 96 * 2**30
    seconds = 2 * 1024**3 / (2307e12 / 2)
    assert found.mfu_overlap == pytest.approx(2**32 / (2 * 2307e12) / found.seconds["ici"])
    serial = seconds + found.seconds["ici"]
    assert found.step_seconds_serial == pytest.approx(serial)
    tokens = cfg.data.batch_size * cfg.data.row_tokens
    assert found.tokens_per_second == pytest.approx(tokens / serial)

    # Two slices: the runtime's sums are waited for.
    send = '%s = (f32[1024]{0}, u32[], token[]) send(%a), frontend_attributes={x="megascale"}'
    found = report(sizes(limit), Topology.parse("v5e:2x1", 2), module_of(send, square))
    for network in (found.collective_seconds, found.exposed_seconds):
        assert network == {"slices": {"all-reduce": pytest.approx(found.seconds["dcn"])}}
    assert found.seconds["exposed"] == pytest.approx(4096 / CHIPS["v5e"].dcn_bandwidth)

    # What the compiler says that it needs comes on top of what lies there already.
    full = "RESOURCE_EXHAUSTED: Allocation (size=1) (18.25G) exceeds available HBM (15.75G)"
    over = report(jax.errors.JaxRuntimeError(full))
    assert not over.fits and over.to_json()["mfu_serial"] is None
    assert over.hbm_bytes == 300 + 18.25 * 2**30
    assert over.hbm_by_kind["temporaries"] == 18.25 * 2**30 - 30
    with pytest.raises(jax.errors.JaxRuntimeError):
        report(jax.errors.JaxRuntimeError("INTERNAL: something else"))


def test_a_plan_is_compiled_with_the_flags_that_keep_the_compiler_from_crashing():
    class Lowered:
        def compile(self, compiler_options):
            assert compiler_options == SAFE
            raise Compiled

    class Compiled(Exception):
        pass

    cfg, topology = config("emu_100m"), Topology.parse("v5e:2x2")
    mesh: Any = SimpleNamespace(size=4, shape={"data": 1, "fsdp": 4, "tensor": 1})
    lowered: Any = Lowered()
    with pytest.raises(Compiled):
        _report(cfg, topology, mesh, lowered, {}, 1.0, "train")
    for chip in ("v5e", "v5p", "v6e", "tpu7x"):
        done = subprocess.run(
            [ROOT / "launch" / "flags.sh", chip], capture_output=True, text=True, check=True
        )
        for name, value in SAFE.items():
            assert f"--{name}={str(value).lower()}" in done.stdout


def plan_cli(*arguments: str, timeout: int = 1200) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "emu_jax.cli", "plan", *arguments],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=timeout,
    )


def test_mistakes_are_one_line(monkeypatch, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # which the verb sets
    monkeypatch.chdir(ROOT)
    ladder = ("--config", "configs/emu_100m.py", "--topology", "v5e:2x2")
    for arguments, message in (
        ((), "give --config and --topology"),
        (("--config", "configs/emu_14b.py", "--topology", "v5p:4x4"), "v5p:4x4x4"),
        (("--config", "configs/emu_14b.py", "--topology", "v5e:4x4,v5e:8x8"), "need --sweep"),
        ((*ladder, "--sweep", "--for", "generate"), "leave out --for"),
        (
            (*ladder, "--sweep", "--policies", "ful"),
            "--policies 'ful' is not known; did you mean 'full'",
        ),
        ((*ladder, "--sweep", "--meshes", "whole"), "--meshes 'whole' is not known"),
        ((*ladder, "--sweep", "--rows", "8,0"), "--rows 8,0: write numbers"),
        ((*ladder, "--config.remat.llama=ful"), "did you mean 'full'"),
    ):
        assert cli.main(["plan", *arguments]) == 2
        said = capsys.readouterr()
        assert message in said.err and len(said.err.splitlines()) == 1 and said.out == ""


needs_libtpu = pytest.mark.skipif(
    not any((Path(p) / "libtpu").is_dir() for p in sys.path if p), reason="libtpu is not installed"
)


@needs_libtpu
@pytest.mark.slow
def test_scanned_and_unrolled_builds_count_the_same():
    """Real compiles for v5e: a scanned stack of layers, forward and backward, against the same
    layers unrolled; the kernel's FLOPs within both."""
    code = """
import jax, jax.numpy as jnp, json
from emu_jax.hardware import Topology
from emu_jax.plan import hlo
from emu_jax.plan.plan import devices_of
from jax.sharding import SingleDeviceSharding
where = SingleDeviceSharding(devices_of(Topology.parse("v5e:2x2"))[0])
from emu_jax.models.attention import splash
def layer(x, w):
    q = (x @ w).reshape(2, 512, 2, 128)
    y = splash(q, q, q, causal=True, segment_ids=None, scale=0.1).reshape(x.shape)
    return x + jax.nn.relu(y) @ w
def scanned(x, ws):
    return jnp.sum(jax.lax.scan(lambda x, w: (layer(x, w), None), x, ws)[0].astype(jnp.float32))
def unrolled(x, ws):
    for n in range(4):
        x = layer(x, ws[n])
    return jnp.sum(x.astype(jnp.float32))
shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=where)
          for s in ((2, 512, 256), (4, 256, 256))]
counts = [hlo.count(jax.jit(jax.value_and_grad(f, (0, 1))).lower(*shapes).compile().as_text())
          for f in (scanned, unrolled)]
print(json.dumps([[c.flops, c.hbm_bytes, sorted(c.unknown)] for c in counts]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=900,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (scanned, _, unknown), (unrolled, _, more) = json.loads(done.stdout.splitlines()[-1])
    assert not unknown and not more
    # Two products forward and four backward a layer, and attention's 2 + 5, one block whole.
    products = 4 * 6 * 2 * (2 * 512) * 256 * 256
    attention = 4 * 7 * 2 * 2 * 2 * 512 * 512 * 128
    assert scanned == unrolled == products + attention


@needs_libtpu
@pytest.mark.slow
def test_plan_of_the_smallest_model_on_a_small_slice():
    done = plan_cli(
        "--config",
        "configs/emu_100m.py",
        "--topology",
        "v5p:2x2x1",
        "--json",
        "--config.data.batch_size=8",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["fits"] and found["chips"] == 4 and found["rows_per_chip"] == 2
    assert 0 < found["mfu_serial"] <= found["mfu_overlap"] < 1
    kinds = found["hbm_by_kind"]
    # Float32 parameters and two moments, split four ways.
    assert kinds["optimizer"] == pytest.approx(2 * kinds["parameters"], rel=1e-3)
    assert kinds["parameters"] == pytest.approx(4 * 102.5e6 / 4, rel=0.02)
    assert found["hbm_bytes"] >= kinds["parameters"] + kinds["optimizer"] + kinds["activations"]
    moved = found["collective_bytes"]["fsdp"]
    assert moved["all-gather"] > 0 and found["not_counted"] == []
