# shellcheck shell=bash
# Sourced by the scripts of this directory: options, --dry-run, TPU topologies.
#
# A script sets `usage` (its usage line), `options` (options with a value) and `switches` (options
# without), then calls `parse "$@"`, which fills:
#   verb     the first word
#   option   values by name, without the dashes
#   train    the words after `--`: the arguments of `emu-jax train`
#   given    "yes" if there was a `--`
declare -A option=()
verb='' given='' train=()

# Prints what is wrong and the usage line, and ends the script with status 2.
usage() {
  [[ $# -eq 0 ]] || echo "${0##*/}: $1" >&2
  echo "usage: ${usage:?}" >&2
  exit 2
}

parse() {
  local name value
  while (($#)); do
    case $1 in
      --) given=yes train=("${@:2}"); return ;;
      --*)
        name=${1#--} value=${1#*=}
        if [[ " ${switches:-} " == *" $name "* ]]; then
          option[$name]=yes
        elif [[ " ${options:-} " != *" ${name%%=*} "* ]]; then
          usage "unknown option $1"
        elif [[ $name == *=* ]]; then
          option[${name%%=*}]=$value
        else
          [[ $# -gt 1 && $2 != --* ]] || usage "--$name needs a value"
          option[$name]=$2
          shift
        fi ;;
      *) [[ -z $verb ]] || usage "unexpected argument '$1'"; verb=$1 ;;
    esac
    shift
  done
}

# Ends the script unless these options were given.
need() {
  local name
  for name; do [[ -n ${option[$name]:-} ]] || usage "$verb needs --$name"; done
}

# Ends the script unless there are arguments for `emu-jax train`, with a workdir that it accepts.
need_train() {
  [[ -n $given && ${#train[@]} -gt 0 ]] ||
    usage "$verb needs the arguments of emu-jax train after --"
  local word before=''
  for word in "${train[@]}"; do
    [[ $before != --workdir ]] || word=--workdir=$word
    [[ $word != --workdir=*:/* || $word =~ ^--workdir=(gs|s3)://[^/]+/. ]] ||
      usage "invalid --workdir '${word#*=}': give gs://BUCKET/RUN, s3://BUCKET/RUN or a directory"
    before=$word
  done
}

# Reads --bucket into `bucket` and `mount_point`; both are empty without it.
read_bucket() {
  bucket=${option[bucket]:-} mount_point=''
  [[ -n $bucket ]] || return 0
  [[ $bucket =~ ^[a-z0-9][a-z0-9._-]+(:(/[A-Za-z0-9._-]+)+)?$ ]] ||
    usage "invalid --bucket '$bucket': give my-bucket or my-bucket:/mount/point"
  [[ $bucket != *:* ]] || mount_point=${bucket#*:}
  # shellcheck disable=SC2034 # the scripts use it
  bucket=${bucket%%:*} mount_point=${mount_point:-/bucket}
}

# Prints the value of option `$1` (default: `$2`), which must be a whole number of at least 1.
number() {
  local value=${option[$1]:-$2}
  [[ $value =~ ^[1-9][0-9]*$ ]] || usage "invalid --$1 '$value': give a whole number of at least 1"
  echo "$value"
}

# Prints a command as one line that can be pasted into a shell.
quote() {
  local word line=''
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+=" $word"
  done
  echo "${line# }"
}

# Runs a command; --dry-run prints it instead.
run() {
  if [[ ${option[dry-run]:-} ]]; then quote "$@"; else "$@"; fi
}

# Runs a command with the text `$1` on its stdin; --dry-run prints both.
feed() {
  local text=$1
  shift
  if [[ ${option[dry-run]:-} ]]; then
    printf "%s <<'END'\n%s\nEND\n" "$(quote "$@")" "$text"
  else
    "$@" <<<"$text"
  fi
}

# Reads --topology, spelled as for `emu-jax plan` (v5p:4x4x8), into `generation`, `shape` and `chips`,
# and --slices into `slices`.
read_topology() {
  local topology=${option[topology]} axes=3
  generation=${topology%%:*} shape=${topology#*:}
  case $generation in
    v4 | v5p | tpu7x) ;;
    v5e | v6e) axes=2 ;;
    *) usage "invalid --topology '$topology': the generation is one of v4, v5e, v5p, v6e and tpu7x" ;;
  esac
  [[ $topology == *:* && $shape =~ ^[1-9][0-9]*(x[1-9][0-9]*){$((axes - 1))}$ ]] ||
    usage "invalid --topology '$topology': a $generation has $axes axes, as in $(
      if ((axes == 3)); then echo "$generation:4x4x8"; else echo "$generation:16x16"; fi)"
  chips=$((${shape//x/*}))
  ((chips % 4 == 0)) || usage "invalid --topology '$topology': the number of chips must be a multiple of 4"
  # shellcheck disable=SC2034 # the scripts use it
  slices=$(number slices 1)
}
