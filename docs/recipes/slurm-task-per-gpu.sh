#!/bin/bash
# As slurm.sh, with a process for each GPU: where the site asks for it.
#SBATCH --job-name=s1jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail
srun --kill-on-bad-exit=1 .venv/bin/python "$@"
