"""Find the threshold at which validation images keep a wanted mean number of tokens.

    python jobs/calibrate.py cifar10 filter.rule=marginal filter.mean_tokens=24 tokenizer.checkpoint=runs/cifar10-train
    ray job submit --working-dir . -- python jobs/calibrate.py cifar10 ...

Global tokens are counted. Writes filter.yaml into the run folder and shows the keys for other jobs.
"""

from pipeline.core.job import main

if __name__ == "__main__":
    main("calibrate", __doc__)
