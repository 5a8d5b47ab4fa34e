r"""Train the compact feature network behind `rfd_compact_cifar10` on labelled Parquet files.

    python jobs/train_extractor.py extractor_cifar10 \
        extractor.train_source=TRAIN.parquet extractor.test_source=TEST.parquet

Prints the resolved configuration first and RUN_FOLDER=... last; the weights are RUN_FOLDER/extractor.safetensors.
"""

from pipeline.job import main

if __name__ == "__main__":
    main("train_extractor", "pipeline.extractor", __doc__)
