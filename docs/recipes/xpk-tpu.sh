#!/bin/bash
# CLUSTER=my-cluster IMAGE=my-image docs/recipes/xpk-tpu.sh s1 train.py configs/sft/s1-32b-tpu-v5p-32.yaml \
#   training.output_dir=gs://my-bucket/s1
# GKE with xpk: one v5p-32 slice, started again up to ten times.
set -euo pipefail
name=$1
shift
xpk workload create --cluster "$CLUSTER" --workload "$name" --tpu-type v5p-32 --num-slices 1 \
  --docker-image "$IMAGE" --max-restarts 10 --command "python $*"
