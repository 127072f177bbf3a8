#!/bin/bash
# CLUSTER=my-cluster IMAGE=my-image docs/recipes/xpk-gpu.sh s1 train.py configs/sft/s1-32b-h100-8x2.yaml \
#   training.output_dir=gs://my-bucket/s1
# GKE with xpk: two nodes of 8 H100s, started again up to ten times.
set -euo pipefail
name=$1
shift
xpk workload create --cluster "$CLUSTER" --workload "$name" --device-type h100-80gb-8 --num-nodes 2 \
  --docker-image "$IMAGE" --max-restarts 10 --command "python $*"
