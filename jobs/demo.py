"""Walk every stage on photographs that ship inside scikit-image.

    make demo
    python jobs/demo.py

Ends with a table, a picture of originals over reconstructions, one of generated pictures, and how to open the MLflow
UI on the runs.
"""

from pipeline.core.job import main

if __name__ == "__main__":
    main("demo", __doc__)
