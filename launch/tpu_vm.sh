#!/usr/bin/env bash
# Train on every worker of a Cloud TPU VM slice. From the root of the repository:
#
#   export TPU=my-slice ZONE=us-west4-a
#   launch/tpu_vm.sh --config=configs/t5_1_1_base.py --workdir=/mnt/runs/base
#
# Once before that: the slice (here v5e 4x4, four workers), the code, the environment, and
# a file system that all workers share (NFS) at the same path, for text and workdir:
#
#   gcloud compute tpus tpu-vm create "$TPU" --zone="$ZONE" \
#     --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite
#   git archive --prefix=t5x_lite/ --output=t5x_lite.tar HEAD
#   gcloud compute tpus tpu-vm scp t5x_lite.tar "$TPU": --zone="$ZONE" --worker=all
#   gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command='
#     tar -xf t5x_lite.tar && cd t5x_lite && pip install uv &&
#     ~/.local/bin/uv venv --seed --python=3.11 .venv &&
#     .venv/bin/pip install -c .ci/constraints.txt -e . "jax[tpu]"
#     sudo apt-get install -y nfs-common && sudo mkdir -p /mnt/runs &&
#     sudo mount NFS_SERVER:/SHARE /mnt/runs && sudo chown "$USER" /mnt/runs'
#
# jax.distributed finds the workers through the metadata server of the TPU. The command
# lasts as long as the run: start it in tmux. Run again, it goes on from the last
# checkpoint; Ctrl-C ends the connections, not the run: stop that with
#
#   gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
#     --command='pkill -TERM -f t5x_lite.train'

gcloud compute tpus tpu-vm ssh "${TPU:?name of the TPU VM}" --zone="${ZONE:?its zone}" \
  --worker=all \
  --command="cd t5x_lite && exec .venv/bin/python -m t5x_lite.train$(printf ' %q' "$@")"
