"""Train a feature network for Frechet distances on labelled pictures: Parquet files, or shards.

    python jobs/train_extractor.py extractor_cifar10 \
        extractor.train_source=TRAIN.parquet extractor.test_source=TEST.parquet
    python jobs/train_extractor.py extractor64 data.shards=SHARDS extractor.architecture=resnet

The weights are extractor.safetensors in the run folder.
"""

from pipeline.core.job import main

if __name__ == "__main__":
    main("train_extractor", __doc__)
