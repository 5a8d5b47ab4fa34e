import numpy as np
import pytest
import torch

from pipeline.training.order import Batches, SampleOrder, read_ahead


class Made:
    """Sample i is a 2 x 2 picture whose left half is i and whose right half is 100 + i."""

    in_memory = True

    def __len__(self):
        return 20

    def images(self, indices):
        pictures = np.repeat(np.asarray(indices, dtype=np.uint8)[:, None, None, None], 2, axis=1).repeat(2, axis=2)
        pictures = pictures.repeat(3, axis=3)
        pictures[:, :, 1] += 100
        return pictures


def batches(rank=0, world=1, flip=False, pictures=None):
    return Batches(pictures or Made(), SampleOrder(20, 0, 8), rank, world, flip)


def test_workers_share_a_global_batch_out_among_themselves():
    whole = batches().load(3).images
    parts = [batches(rank, world=4).load(3).images for rank in range(4)]
    assert torch.equal(torch.cat(parts), whole)


def test_mirroring_does_not_depend_on_the_number_of_workers():
    whole = batches(flip=True).load(3).images
    parts = [batches(rank, world=2, flip=True).load(3).images for rank in range(2)]
    assert torch.equal(torch.cat(parts), whole)


def test_about_half_of_the_pictures_are_mirrored_anew_in_each_epoch():
    loaded = batches(flip=True)
    mirrored = [bool(image[0, 0, 0] >= 100) for step in range(50) for image in loaded.load(step).images]
    assert 0.4 < np.mean(mirrored) < 0.6
    first_epoch, later = mirrored[:20], mirrored[20:40]
    assert first_epoch != later


def test_reading_ahead_gives_the_batches_in_order():
    loaded = batches()
    found = list(read_ahead(loaded.load, 2, 6))
    assert [batch.step for batch in found] == [2, 3, 4, 5]
    assert all(torch.equal(batch.images, loaded.load(batch.step).images) for batch in found)


def test_an_error_while_reading_is_raised_where_the_batch_is_wanted():
    class Broken(Made):
        def images(self, indices):
            raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        next(read_ahead(batches(pictures=Broken()).load, 0, 3))


def test_the_reading_thread_ends_when_the_loop_leaves_early():
    import threading

    stream = read_ahead(batches().load, 0, 1000)
    next(stream)
    stream.close()
    for thread in threading.enumerate():
        if thread.name == "batches":
            thread.join(timeout=5)
            assert not thread.is_alive()
