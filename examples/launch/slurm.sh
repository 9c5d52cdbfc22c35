#!/bin/bash
# Stage 1 on several nodes, requeued until it is done:  sbatch examples/launch/slurm.sh MODEL SHARDS OUT1
#SBATCH --job-name=higgs-tune
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@300
# USR1 comes five minutes before the time limit. torchrun passes it on and waits 30 s: the trainer
# saves a checkpoint and writes OUT/stopped.json. Its exit code is 75, but torchrun's own is 1, so that file decides.
set -u
model=$1 shards=$2 out=$3
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node 8 --max_restarts 3 \
    --signals_to_handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    --rdzv_backend c10d --rdzv_endpoint "$head:29500" --rdzv_id "$SLURM_JOB_ID" \
    -m higgs_tune.train --config examples/configs/multi_node.yaml \
    --model_path "$model" --train_data_dir "$shards" --output_dir "$out"
code=$?

if [ -e "$out/stopped.json" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
