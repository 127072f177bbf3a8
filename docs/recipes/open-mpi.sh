#!/bin/bash
# HOSTS=gpu1,gpu2 docs/recipes/open-mpi.sh train.py configs/sft/s1-32b-h100-8x2.yaml
# One process a host, started from the first of the hosts. Open MPI 4 tells its processes where that is; Open MPI 5 does
# not, so it is said here.
set -euo pipefail
mpirun --host "$HOSTS" --map-by ppr:1:node --bind-to none -x PATH -x LD_LIBRARY_PATH \
  .venv/bin/python "$@" "mesh.coordinator=${HOSTS%%,*}:8476"
