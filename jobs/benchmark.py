"""Measure speed, side by side in one process.

    python jobs/benchmark.py cifar10 benchmark.kind=generation generator.checkpoint=runs/cifar10-train-generator
    ray job submit --working-dir . -- python jobs/benchmark.py cifar10 ...

Prints a table with ratios, writes report.md and logs to MLflow. Without generator.checkpoint it takes the generator
that `jobs/train_generator.py` made for the same preset, and --make trains it first where there is none.
"""

from pipeline.core.job import main

if __name__ == "__main__":
    main("benchmark", __doc__)
