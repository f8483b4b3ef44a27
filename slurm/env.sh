# The one site-specific file: what a node needs before Python starts. Every batch script reads it.
# module load cuda/12.8                       # your site's modules
source "$DISTILL_HOME/.venv/bin/activate"     # made by `make venv` in $DISTILL_HOME
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
export PYTHONWARNINGS=ignore::FutureWarning   # torch repeats deprecations by the hundred on every rank
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0   # your site's fast network; gloo passes the teachers' bytes on
export XDG_CACHE_HOME=${TMPDIR:-/tmp}         # on the node's own disk: teachers that come from storage are kept there
