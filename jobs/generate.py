"""Make pictures with a generator.

    python jobs/generate.py cifar10 generator.checkpoint=runs/cifar10-train-generator \
        tokenizer.checkpoint=runs/cifar10-train generate.images=5000
    ray job submit --working-dir . -- python jobs/generate.py cifar10 ...

Writes shards like those of `jobs/preprocess.py`, the generated tokens, generated.json and pictures/samples.png into the
run folder; `jobs/evaluate.py` measures it with evaluate.generated. Without generator.checkpoint it takes the one that
`jobs/train_generator.py` made, and --make trains that first where there is none. A stopped run goes on with --resume.
"""

from pipeline.core.job import main

if __name__ == "__main__":
    main("generate", __doc__)
