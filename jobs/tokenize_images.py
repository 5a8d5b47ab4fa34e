"""Turn pictures into token streams, ranked once for every threshold.

    python jobs/tokenize_images.py cifar10 data.shards=runs/SHARDS tokenizer.checkpoint=runs/cifar10-train
    ray job submit --working-dir . -- python jobs/tokenize_images.py cifar10 filter.score=entropy filter.rounds=8 ...

Writes tokens.json and tokens/*.parquet into the run folder; give it to other jobs as tokens.path. filter.score and
filter.rounds decide the ranking; filter.rule and filter.threshold only which lengths are reported. Without
tokenizer.checkpoint what `jobs/train.py` made with the same configuration is taken, and --make trains that first where
there is none. A stopped run goes on with --resume.
"""

from pipeline.core.job import main

if __name__ == "__main__":
    main("tokenize_images", __doc__)
