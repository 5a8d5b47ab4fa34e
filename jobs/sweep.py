"""Compare many settings: thresholds of a trained tokenizer, or tokenizers that differ.

    python jobs/sweep.py cifar10 tokenizer.checkpoint=runs/cifar10-train 'sweep.cuts={marginal: [0.7, 0.3, 0.1]}'
    python jobs/sweep.py sweep_smoke
    ray job submit --working-dir . -- python jobs/sweep.py ...

Writes table.csv, table.md, pictures/rate_distortion.png and best.yaml (a preset for every job) into the run folder and
logs a parent run with a child for each trial to MLflow. A stopped or killed sweep goes on with --resume.
"""

from pipeline.core.job import main

if __name__ == "__main__":
    main("sweep", __doc__)
