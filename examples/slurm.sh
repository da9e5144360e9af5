#!/bin/bash
# Elastic training on Slurm: Ray on all nodes of the allocation, and the driver on the first.
#
#     sbatch examples/slurm.sh
#
#SBATCH --job-name=digits
#SBATCH --nodes=4
#SBATCH --exclusive
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --no-kill
# --exclusive: `ray symmetric-run` ends with `ray stop`, which ends every Ray of this user on the node.
# --no-kill, here and below: otherwise the loss of one node ends the whole allocation.
# For GPUs add --gpus-per-node=8, and use_gpu=True in the script.
set -euo pipefail

# The same Python, torch, Ray and raylaunch on every node: an environment on shared storage, a module, a container.
# source /shared/venv/bin/activate

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes%%$'\n'*} # the first line
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address)
address=${address%% *} # the first, where a host has several

# How long Ray waits for the other nodes: 30 s by default, which is short for a large allocation.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300

# The checkpoints must be on storage that all nodes share. After the time limit submit this again: it goes on from there.
srun --no-kill --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
    ray symmetric-run --address "$address:6379" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" -- \
    python -u examples/on_a_cluster.py --workers "2:$SLURM_JOB_NUM_NODES" --checkpoints "$SLURM_SUBMIT_DIR/checkpoints"
