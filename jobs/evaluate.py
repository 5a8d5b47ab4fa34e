"""Measure a tokenizer on held-out images.

    python jobs/evaluate.py cifar10 tokenizer.checkpoint=runs/cifar10-train evaluate.baselines=[kmeans]
    ray job submit --working-dir . -- python jobs/evaluate.py cifar10 ...

Writes report.md and pictures/reconstructions.png into the run folder, logs to MLflow and shows a table.
tokenizer.checkpoint may be a name in the box, tatok64. Without it, what `jobs/train.py` made with the same
configuration is taken, and --make trains that first where there is none.
"""

from pipeline.core.job import main

if __name__ == "__main__":
    main("evaluate", __doc__)
