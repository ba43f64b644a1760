"""Names of the values that a backward pass may save, and the policies that choose among them."""

from __future__ import annotations

from typing import Any

import jax

# Names for `jax.ad_checkpoint.checkpoint_name`: the residuals of attention's backward pass; its
# queries, keys and values; its output projection, which is added to the residual stream. And the
# output of a matmul in int8 or fp8.
CHECKPOINT_ATTENTION = "attention"
CHECKPOINT_QKV = "qkv"
CHECKPOINT_RESIDUAL = "added"
CHECKPOINT_MATMUL = "matmul"

# The named scope of operations that a backward pass recomputes. FLOP counts of a model exclude it.
RECOMPUTED_SCOPE = "again"

_policies = jax.checkpoint_policies
_names = CHECKPOINT_ATTENTION, CHECKPOINT_QKV, CHECKPOINT_RESIDUAL

# Policies: the values that a layer saves for its backward pass, from most memory to least. It
# recomputes all others.
#   none     everything
#   dots     the output of every matmul with a parameter, and of attention
#   minimal  attention, its inputs, and its output projection; the MLP is recomputed
#   offload  like minimal, but in host memory
#   full     only the layer's input
REMAT: dict[str, Any] = {
    "none": _policies.everything_saveable,
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable,
        _policies.save_only_these_names(CHECKPOINT_ATTENTION, CHECKPOINT_MATMUL),
    ),
    "minimal": _policies.save_only_these_names(*_names),
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(_names),
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "full": _policies.nothing_saveable,
}
