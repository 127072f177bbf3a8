#!/bin/bash
# sbatch docs/recipes/slurm.sh train.py configs/sft/s1-32b-h100-8x2.yaml
# sbatch docs/recipes/slurm.sh decode.py evaluate configs/eval/s1-32b.yaml
#SBATCH --job-name=s1jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
# Two minutes before the time is over, and when another job takes the nodes: SIGTERM, upon which training saves.
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail
srun --kill-on-bad-exit=1 .venv/bin/python "$@"
