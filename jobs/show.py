"""Show what pictures look like from fewer of their tokens: a page with a slider, and one PNG for documents.

    python jobs/show.py                                  # three photographs inside scikit-image
    python jobs/show.py photo.jpg drawing.png            # any size, any kind that Pillow reads
    python jobs/show.py photo.jpg --tokenizer runs/tiny64-train/checkpoint

Writes show.html and show.png into the folder `show`. Needs no data, no training and no Ray.
"""

from pipeline.show import main

if __name__ == "__main__":
    main(__doc__)
