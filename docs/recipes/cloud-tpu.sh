#!/bin/bash
# TPU=my-slice docs/recipes/cloud-tpu.sh train.py configs/sft/s1-32b-tpu-v5p-32.yaml training.output_dir=gs://my-bucket/s1
# A Cloud TPU slice: the same command on all of its hosts, where s1jax was installed with `pip install '.[tpu,buckets]'`.
set -euo pipefail
gcloud compute tpus tpu-vm ssh "$TPU" --worker=all --command "cd s1jax && .venv/bin/python $*"
