import pytest
import torch

from tatok_model.metrics.extractors.extractor import FeatureExtractor, check_images


def test_uint8_pictures_of_any_size_pass() -> None:
    check_images(torch.zeros(1, 3, 7, 5, dtype=torch.uint8))


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8).byte(), torch.zeros(1, 8, 8, 3).byte()]
)
def test_other_pictures_are_refused_with_their_shape_and_type(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be \(B, 3, H, W\) uint8, got \("):
        check_images(images)


def test_an_extractor_without_forward_says_which_one() -> None:
    class Unfinished(FeatureExtractor):
        pass

    with pytest.raises(NotImplementedError, match="Unfinished does not implement"):
        Unfinished()(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
