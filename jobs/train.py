"""Train a tokenizer.

    python jobs/train.py cifar10 data.source=cifar10_train.parquet
    ray job submit --working-dir . -- python jobs/train.py cifar10 ...

Writes checkpoints, `checkpoint/` (what `TaTok.from_pretrained` loads), pictures and metrics.jsonl into the run folder
and logs to MLflow. Without data.shards it preprocesses data.source first. A stopped run goes on with --resume.
"""

from pipeline.core.job import main

if __name__ == "__main__":
    main("train", __doc__)
