"""Names of the values that a backward pass may save, and the policies that choose among them."""

from __future__ import annotations

from typing import Any

import jax

# Names for `jax.ad_checkpoint.checkpoint_name`: what attention saves for its backward pass; the
# queries, keys and values that it reads; what a block adds to the residual stream after it.
CHECKPOINT_ATTENTION = "attention"
CHECKPOINT_QKV = "qkv"
CHECKPOINT_RESIDUAL = "added"

# The named scope of what a backward pass recomputes: counts of a model's FLOPs leave it out.
RECOMPUTED_SCOPE = "again"

_policies = jax.checkpoint_policies
_names = CHECKPOINT_ATTENTION, CHECKPOINT_QKV, CHECKPOINT_RESIDUAL

# What a layer saves for its backward pass; the rest is recomputed. From most memory to least:
#   none     everything
#   dots     the output of every matmul with a parameter, and of attention
#   minimal  attention, its inputs, and its output projection: the MLP is recomputed
#   offload  as minimal, in the host's memory
#   full     the layer's input alone
REMAT: dict[str, Any] = {
    "none": _policies.everything_saveable,
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable,
        _policies.save_only_these_names(CHECKPOINT_ATTENTION),
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
