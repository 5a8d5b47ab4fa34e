import pytest
import torch

from tatok_model.ranking import grid_order, pixel_entropy_units, random_order


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7, 16])
def test_the_grid_order_holds_every_position_once(side):
    assert sorted(grid_order(side * side).tolist()) == list(range(side * side))


def test_a_quarter_of_the_grid_is_spread_evenly():
    rows, columns = grid_order(64)[:16] // 8, grid_order(64)[:16] % 8
    cells = (rows // 2 * 4 + columns // 2).tolist()
    assert sorted(cells) == list(range(16))  # one in every block of 2 x 2


def test_the_random_order_is_a_shuffle_keyed_by_the_global_tokens_alone():
    indices = torch.randint(0, 1000, (50, 8), generator=torch.Generator().manual_seed(0))
    order = random_order(indices, 64)
    assert order.sort(1).values.tolist() == [list(range(64))] * 50
    assert random_order(indices[7:8], 64).tolist() == order[7:8].tolist()
    assert len({tuple(row) for row in order.tolist()}) == 50
    places = order.argsort(1).double().mean(0)  # no position is favoured
    assert (places - 31.5).abs().max() < 12


def test_without_global_tokens_all_images_share_one_random_order():
    order = random_order(torch.zeros(3, 0, dtype=torch.int64), 16)
    assert order[0].tolist() == order[2].tolist()
    assert order[0].tolist() != list(range(16))


def test_pixel_entropy_is_that_of_the_grey_levels():
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    images[..., :4, 4:] = torch.tensor([0, 0, 255, 255], dtype=torch.uint8)  # two levels: 1 bit
    images[..., 4:, :4] = torch.arange(16, dtype=torch.uint8).view(4, 4) * 10  # 16 levels: 4 bits
    expected = [[0, 1024, 4096, 0]]
    assert pixel_entropy_units(images, 4).tolist() == expected
    assert pixel_entropy_units(images.float() / 255, 4).tolist() == expected
