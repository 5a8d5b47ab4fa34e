"""Make shards of square pictures from a folder, Parquet or WebDataset files, or the samples in scikit-image.

    python jobs/preprocess.py cifar10 data.source=/data/cifar10.parquet
    python jobs/preprocess.py smoke data.source=~/pictures data.image_size=64
    ray job submit --working-dir . -- python jobs/preprocess.py smoke run.output=/data/runs

The run folder holds manifest.json, shards/ and rejected.parquet; give it to other jobs as data.shards. A killed run
goes on with --resume.
"""

from pipeline.core.job import main

if __name__ == "__main__":
    main("preprocess", __doc__)
