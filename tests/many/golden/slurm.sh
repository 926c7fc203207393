#!/bin/bash
#SBATCH --job-name=preftune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=preftune-%j.log

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=280
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export head

asked=
save() {
    asked=yes
    scancel --signal=TERM "$SLURM_JOB_ID" # the steps, not this script
}
trap save USR1 TERM

srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --num_processes 16 --num_machines 2 --machine_rank "$SLURM_NODEID" --main_process_ip "$head" --main_process_port 29500 --mixed_precision no --dynamo_backend no --use_fsdp --fsdp_version 2 -m preftune train --method hypo --data '"'"'my pairs.jsonl'"'"' --output runs/big --resume' &
step=$!
wait "$step"
code=$?
if [ -n "$asked" ]; then
    wait "$step" # the first one ended with the signal
    code=$?
    [ "$code" = 0 ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
