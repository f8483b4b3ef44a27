# What the batch scripts beside it share; they source it. Not submitted by itself.
set -euo pipefail
again=0 cancelled=0 code=0 step=
trap 'again=1; [ -z "$step" ] || kill -USR1 "$step"' USR1     # before the limit, or preempted: save, then queue again
trap 'cancelled=1; [ -z "$step" ] || kill -TERM "$step"' TERM # scancel: save, then leave for good
export DISTILL_HOME=${DISTILL_HOME:-$SLURM_SUBMIT_DIR}
source "$DISTILL_HOME/slurm/env.sh"
cd "$DISTILL_HOME"
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then # since Slurm 22.05 srun does not take sbatch's --cpus-per-task over
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi
# A task is a rank. Submitted with one task a node, a node has as many ranks as GPUs, which share the task's CPUs.
if [ "${SLURM_NTASKS_PER_NODE:-1}" = 1 ] && [ "${SLURM_NTASKS:-$SLURM_JOB_NUM_NODES}" = "$SLURM_JOB_NUM_NODES" ]; then
  ranks_per_node=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
else
  ranks_per_node=1
fi

announce() { # COMMAND...: what runs where, of which versions
  echo "$(date -Is) job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), $SLURM_JOB_NUM_NODES node(s) $SLURM_JOB_NODELIST: $*"
  echo "commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown); $(python -V); $(python - <<'END'
from importlib.metadata import version
print("; ".join(f"{name} {version(name)}" for name in ("distill", "torch", "deepspeed", "transformers")))
END
)"
}

on_all_ranks() { # COMMAND...: `distill COMMAND` on every rank, told of what SLURM sends. Sets code
  if [ "$again$cancelled" != 00 ]; then # told before there was anything to save
    [ "$cancelled" = 1 ] && code=143 || code=138
    return
  fi
  local layout=()
  if [ "$ranks_per_node" -gt 1 ]; then
    layout=(--ntasks-per-node="$ranks_per_node" --ntasks=$((ranks_per_node * SLURM_JOB_NUM_NODES)) --overcommit)
    export SRUN_CPUS_PER_TASK=$(((${SLURM_CPUS_PER_TASK:-1} + ranks_per_node - 1) / ranks_per_node))
  fi
  # When a rank has died its peers see it and say so; those that only wait for it are killed after --wait seconds.
  srun "${layout[@]}" --label --kill-on-bad-exit=0 --wait=45 python -m distill "$@" &
  step=$!
  [ "$again" = 0 ] || kill -USR1 "$step" # which came just before
  [ "$cancelled" = 0 ] || kill -TERM "$step"
  while :; do # `wait` returns when a trap runs
    wait "$step" && code=0 || code=$?
    kill -0 "$step" 2>/dev/null || break
  done
  step=
}

requeue() { # this job, to go on where it stopped
  scontrol requeue "$SLURM_JOB_ID"
  sleep 60 # until it is taken away
}

train_and_requeue() { # SETTINGS...: `distill train` on all ranks; saved and put back into the queue when time is up
  announce distill train "$@"
  python -m distill attempt start "$@"
  on_all_ranks train "$@"
  case $code in
    0) exit 0 ;;
    2 | 130 | 143) [ "$again" = 1 ] || cancelled=1 ;; # bad input, which stays bad, or told to leave
    138) python -m distill attempt stopped "$@" ;;
  esac
  echo "$(date -Is) job $SLURM_JOB_ID: distill train ended with code $code"
  [ "$cancelled" = 0 ] || exit "$code"
  python -m distill attempt again "$@" || exit "$code"
  requeue
}
