"""Turn token streams back into pictures, cut at any threshold.

    python jobs/detokenize.py cifar10 tokens.path=runs/cifar10-tokens tokenizer.checkpoint=runs/cifar10-train \
        filter.rule=count filter.threshold=22
    ray job submit --working-dir . -- python jobs/detokenize.py cifar10 ...

Writes shards like those of `jobs/preprocess.py` and pictures/decoded.png into the run folder. filter.score and
filter.rounds must be those of the stream. Without tokens.path it tokenizes first. A stopped run goes on with --resume.
"""

from pipeline.core.job import main

if __name__ == "__main__":
    main("detokenize", __doc__)
