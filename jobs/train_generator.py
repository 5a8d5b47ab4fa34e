"""Train a generator on a ranked token stream.

    python jobs/train_generator.py cifar10 tokens.path=runs/TOKENS tokenizer.checkpoint=runs/cifar10-train
    ray job submit --working-dir . -- python jobs/train_generator.py cifar10 filter.threshold=0.5 ...

The section train_generator says how, generator what; filter.rule and filter.threshold cut the stream, whose ranking
serves every cut. Writes checkpoints, `checkpoint/` (what `Generator.from_pretrained` loads), sampled pictures and
metrics.jsonl into the run folder and logs to MLflow. Without tokens.path it tokenizes data.shards first. A stopped run
goes on with --resume.
"""

from pipeline.core.job import main

if __name__ == "__main__":
    main("train_generator", __doc__)
