"""What a tokenizer has to beat: a k-means codebook of patches that spends the same bits on an image.

No network: N patches, one codeword each, K_b = floor(2^(bits / N)) codewords fitted to patches of the training split.

Shapes: B images, N patches, P patch side, K_b codewords, V = 3 P P values of a patch.
"""

import warnings

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.evaluation.budget import check_kmeans, codewords_for, sampled
from pipeline.evaluation.evaluator import ImageSource
from pipeline.progress import say
from tatok_model.config import TokenizerConfig
from tatok_model.tokens import Tokens
from tatok_model.vit import patchify, unpatchify

ITERATIONS = 25  # of Lloyd's algorithm; on CIFAR-10 mini-batches are faster and end 0.05 dB lower
READ = 256  # images read at a time
SEED = 0


class PatchVQ(nn.Module):
    """Nearest codeword for each patch, in pixel space; encodes and decodes as `TaTok` does.

    Args:
        config: image_size, patch_size and codebook_size count.
        codewords: (K_b, V) floats in [0, 1].
    """

    codewords: Tensor

    def __init__(self, config: TokenizerConfig, codewords: Tensor) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("codewords", codewords)

    def encode(self, images: Tensor) -> Tokens:
        """(B, 3, H, W) uint8 to N patch tokens each."""
        patches = patchify(images.float() / 255, self.config.patch_size)  # (B, N, V)
        # argmin |p - c|^2 = argmax p.c - |c|^2 / 2
        scores = patches @ self.codewords.T - self.codewords.square().sum(1) / 2  # (B, N, K_b)
        indices = scores.argmax(-1)
        empty = torch.zeros(len(images), 0, dtype=torch.int64, device=images.device)
        return Tokens(empty, indices, torch.ones_like(indices, dtype=torch.bool))

    def decode(self, tokens: Tokens) -> Tensor:
        """(B, 3, H, W) floats in [0, 1]."""
        return unpatchify(self.codewords[tokens.patch_indices], self.config.patch_size)


def fit_kmeans(source: ImageSource, images: int, config: TokenizerConfig, bits: float) -> PatchVQ:
    """Fit codewords to patches of the training split.

    Args:
        source: the training split.
        images: how many pictures it has.
        config: image and patch size.
        bits: what an image may cost.

    Raises:
        BadInput: as `check_kmeans`.
    """
    check_kmeans(bits, images, config.patch_positions)
    count, (used, each) = codewords_for(bits, config.patch_positions), sampled(images, config.patch_positions)
    say(f"kmeans baseline: fitting {count} codewords to {used * each} patches of {used} training images")
    codewords = _cluster(sample_patches(source, images, used, each, config.patch_size), count)
    shape = TokenizerConfig(config.image_size, config.patch_size, global_tokens=0, codebook_size=count)
    return PatchVQ(shape, codewords)


def sample_patches(source: ImageSource, images: int, used: int, each: int, patch_size: int) -> np.ndarray:
    """Patches to fit to: (used * each, V) float32 in [0, 1], drawn by a fixed seed from evenly spread pictures.

    Args:
        source: the training split.
        images: how many pictures it has.
        used: of how many of them patches are taken.
        each: how many of each.
        patch_size: P.
    """
    draw = np.random.default_rng(SEED)
    chosen = np.arange(used) * images // used
    taken = []
    for indices in np.split(chosen, range(READ, used, READ)):
        pictures = source.images(indices).transpose(0, 3, 1, 2)  # (READ, 3, H, W)
        patches = patchify(torch.from_numpy(np.ascontiguousarray(pictures)).float() / 255, patch_size).numpy()
        places = draw.random(patches.shape[:2]).argsort(axis=1)[:, :each]
        taken.append(np.take_along_axis(patches, places[..., None], axis=1).reshape(-1, patches.shape[2]))
    return np.concatenate(taken)


def _cluster(patches: np.ndarray, count: int) -> Tensor:
    """(K_b, V) float32 codewords of (patches, V), by Lloyd's algorithm from random patches."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    fitted = KMeans(count, init="random", n_init=1, max_iter=ITERATIONS, tol=0, random_state=SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different patches than codewords: no harm done
        fitted.fit(patches)
    return torch.from_numpy(fitted.cluster_centers_.astype(np.float32)).clamp(0, 1)
