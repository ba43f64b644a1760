#!/usr/bin/env bash
# Compiler flags by accelerator. This is the only place that names any, except for the two flags that
# every plan needs (`SAFE` in emu_jax/plan/plan.py). Prints the variable to export:
#
#   source <(launch/flags.sh v5p)             # one slice
#   source <(launch/flags.sh v5e 2)           # two slices
#   emu-jax plan --config configs/emu_14b.py --topology v5e:16x16 --flags launch/flags.sh
#
# Only flags that differ from the defaults of the pinned libtpu or jaxlib are listed, each with its
# reason and its source (docs/launch.md lists the sources). tests/test_launch.py compiles with every
# flag. EXTRA_FLAGS comes last, so it wins.
set -euo pipefail

# Prints the flags of the accelerator `$1` for `$2` slices, one per line: flag, `#`, reason.
flags() {
  case $1 in
    v4) cat <<'END'
--xla_enable_async_all_gather=true           # weights arrive while the chip computes; the default from v5 on [axlearn, MaxText v4]
--xla_enable_async_collective_permute=true   # the same for the permutes of tensor sharding [axlearn]
END
      ;;
    v5e) cat <<'END'
--xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true  # gradients' all-reduces overlap with compute [openxla]
--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000        # no collective matmuls: their partial sums go through HBM [docs/notes/scaling.md]
END
      ;;
    v5p) cat <<'END'
--xla_enable_async_collective_permute=true      # permutes of tensor sharding overlap with compute [MaxText v5p]
--xla_tpu_enable_sparse_core_collective_offload_all_gather=true    # SparseCores gather weights, TensorCores compute [MaxText v5p]
--xla_tpu_enable_async_collective_fusion_fuse_all_gather=false     # excludes the line above [MaxText]
--xla_tpu_use_tc_device_shape_on_sc=true        # what the offload needs [MaxText]
--xla_sc_disable_megacore_partitioning=true     # what the offload needs [MaxText]
--xla_tpu_use_minor_sharding_for_major_trivial_input=true          # gradients laid out so that they reduce-scatter without a copy [docs/notes/scaling.md]
--xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1       # the same [docs/notes/scaling.md]
--xla_tpu_assign_all_reduce_scatter_layout=true # the same [docs/notes/scaling.md]
END
      ;;
    v6e) cat <<'END'
--xla_tpu_scoped_vmem_limit_kib=98304           # 96 of 128 MiB for the op at hand, the rest for prefetching: best where compute binds [MaxText, axlearn]
--xla_tpu_use_minor_sharding_for_major_trivial_input=true          # gradients laid out so that they reduce-scatter without a copy [MaxText v6e]
--xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1       # the same [MaxText v6e]
--xla_tpu_assign_all_reduce_scatter_layout=true # the same [MaxText v6e]
--xla_tpu_enable_sparse_core_collective_offload_all_reduce=true    # SparseCores reduce gradients, the TensorCore computes [MaxText, axlearn]
--xla_tpu_use_tc_device_shape_on_sc=true        # what the offload needs [MaxText, axlearn]
--xla_sc_disable_megacore_partitioning=true     # what the offload needs [MaxText, axlearn]
--xla_sc_enable_instruction_fusion=false        # what the offload needs [MaxText, axlearn]
--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000            # no collective matmuls: they cost more than they hide on a chip of this intensity [axlearn]
END
      ;;
    tpu7x) cat <<'END'
--xla_tpu_scoped_vmem_limit_kib=61440           # 60 of 64 MiB for the op at hand, as above [tpu-recipes]
--xla_tpu_bf16_emission_mode=NATIVE_EMISSION    # bfloat16 operations are emitted as such [tpu-recipes]
--xla_tpu_enable_sparse_core_collective_offload_all_reduce=true    # SparseCores reduce gradients, the TensorCores compute [tpu-recipes]
--xla_tpu_use_single_sparse_core_for_all_gather_offload=true       # one of the SparseCores gathers, the others stay free [tpu-recipes]
--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000            # no collective matmuls: their partial sums go through HBM [docs/notes/scaling.md]
END
      ;;
    gpu) cat <<'END'
--xla_gpu_enable_latency_hiding_scheduler=true              # collectives start early and overlap with compute [JAX-Toolbox]
--xla_gpu_enable_pipelined_all_gather=true                  # the next layer's weights arrive during this one [JAX-Toolbox]
--xla_gpu_enable_pipelined_reduce_scatter=true              # the last layer's gradients leave during this one [JAX-Toolbox]
--xla_gpu_enable_pipelined_all_reduce=true                  # the same between replicas [JAX-Toolbox]
--xla_gpu_enable_while_loop_double_buffering=true           # scanned layers: no copy between two of them [JAX-Toolbox]
--xla_gpu_all_gather_combine_threshold_bytes=1073741824     # one gather for a layer: more than its 0.63 GB of weights [JAX-Toolbox]
--xla_gpu_reduce_scatter_combine_threshold_bytes=1073741824 # one reduce-scatter for a layer [JAX-Toolbox]
--xla_gpu_all_reduce_combine_threshold_bytes=134217728      # small enough to overlap with the backward pass [JAX-Toolbox]
--xla_disable_hlo_passes=rematerialization                  # `remat` of the config decides what is recomputed [JAX-Toolbox]
END
      ;;
    *) echo "flags.sh: '$1' is none of v4, v5e, v5p, v6e, tpu7x, gpu" >&2; return 2 ;;
  esac
  if [[ $1 != gpu ]]; then
    cat <<'END'
--xla_tpu_nested_dot_fusion=false               # libtpu 0.0.42.1 overflows its stack on some nested matmuls [docs/notes/scaling.md]
--xla_tpu_dot_dot_fusion=false                  # the same [docs/notes/scaling.md]
END
  fi
  if [[ $1 != gpu && $2 -gt 1 ]]; then
    cat <<'END'
--megascale_grpc_premap_memory_bytes=17179869184  # host memory for transfers between slices; the default of 4 GiB is small for a large model [axlearn]
--megascale_graph_hang_threshold=10m              # the default of 5 minutes takes a slow save for a hang [axlearn]
--megascale_error_reporter_abort_on_hang=true     # a hanging slice ends the run, which then restarts [axlearn]
--megascale_error_reporter_abort_on_error=true    # the same for a failing slice [axlearn]
END
  fi
}

# Prints these flags as one environment variable, NAME=VALUE.
flags_variable() {
  local lines line words=() name=LIBTPU_INIT_ARGS
  [[ $1 != gpu ]] || name=XLA_FLAGS
  lines=$(flags "$1" "${2:-1}") || return
  while IFS= read -r line; do
    words+=("${line%% *}")
  done <<<"$lines"
  [[ -z ${EXTRA_FLAGS:-} ]] || words+=("$EXTRA_FLAGS")
  echo "$name=${words[*]}"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  if [[ $# -lt 1 || $# -gt 2 || ! ${2:-1} =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: launch/flags.sh v4|v5e|v5p|v6e|tpu7x|gpu [SLICES]" >&2
    exit 2
  fi
  variable=$(flags_variable "$@")
  printf "export %s='%s'\n" "${variable%%=*}" "${variable#*=}"
fi
