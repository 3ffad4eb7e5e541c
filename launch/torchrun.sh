#!/usr/bin/env bash
# Starts one node of a training run with torchrun; run it on every node with the same arguments:
#
#   NODES=2 NODE=0 MASTER=node0.example launch/torchrun.sh RECIPE [key=value ...] --data D --run R
#   NODES=2 NODE=1 MASTER=node0.example launch/torchrun.sh RECIPE [key=value ...] --data D --run R
#
# D and R are folders that all nodes see. A rank that is lost or hangs makes every node start its
# ranks again, up to RESTARTS times; the run goes on from its last complete checkpoint.
#
#   NODES           number of nodes                        (1)
#   NODE            this one, from 0                       (0)
#   MASTER          name or address of node 0              (needed where NODES > 1)
#   PORT            a free port on node 0                  (29500)
#   RANKS_PER_NODE  processes here, one a GPU              (as many as GPUs)
#   RESTARTS        how often ranks are started again      (3)
#   GRACE_S         seconds for a checkpoint after SIGTERM (600)
#   JOB             any name, the same on all nodes        (hrm-text)
#   VERB            train, or doctor to check all nodes    (train)
#   PYTHON          interpreter that has hrm-text          (python)
set -euo pipefail

if [[ $# -eq 0 ]]; then
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
  exit 2
fi
nodes=${NODES:-1}
if [[ $nodes -gt 1 && -z ${MASTER:-} ]]; then
  echo "error: NODES=$nodes needs MASTER, the name of node 0 that all nodes reach" >&2
  exit 2
fi
if [[ $nodes -eq 1 ]]; then
  # A port of the system's choice, so that several runs fit on one machine.
  where=(--standalone)
else
  where=(
    --nnodes "$nodes" --node-rank "${NODE:-0}" --rdzv-backend c10d --rdzv-id "${JOB:-hrm-text}"
    --rdzv-endpoint "$MASTER:${PORT:-29500}"
  )
fi
# torchrun would kill its ranks 30 s after SIGTERM, in the middle of a large checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${GRACE_S:-600}
exec "${PYTHON:-python}" -m torch.distributed.run "${where[@]}" \
  --nproc-per-node "${RANKS_PER_NODE:-gpu}" --max-restarts "${RESTARTS:-3}" \
  -m -- hrmtext.cli.main "${VERB:-train}" "$@" # without the dashes it takes --run for its own
