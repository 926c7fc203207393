accelerate launch --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --multi_gpu -m preftune train --method hypo --data 'my pairs.jsonl' --output runs/big
