"""Say what would fail in the first hour, and how to mend it.

    python jobs/doctor.py cifar10 data.source=PICTURES
    ray job submit --working-dir . -- python jobs/doctor.py cifar10 data.source=PICTURES

Looks at pictures, weights, tracking, upload size, storage, Ray, resources and nodes for a preset; a line on each. Exits
with 1 when something is wrong. With --dry-run only what needs neither Ray nor writing, as bad input: with 2.
"""

from pipeline.doctor import diagnose

if __name__ == "__main__":
    diagnose(__doc__)
