"""What global and patch codes tell of one another, in bits, from code lengths under entropy models.

    redundancy             sum_i H(c_i | g) - H(c | g): patch codes predict one another
    mutual information     I(c; g) = H(c) - H(c | g): global codes predict patch codes

H of all patch codes is a chain: one position a round, each code given those before it, over orders that do not look at
the codes. With a model q in place of the true distribution every term is a cross-entropy, which is too large by what q
does not know. Their differences are therefore estimates and not bounds, in either direction.

Shapes: B images, O orders, N patch positions.
"""

import math

import numpy as np

from tatok_model.metrics.rate_distortion import bootstrap_mean_interval

ORDERS = 4  # over which a chain is averaged


def chain_orders(positions: int, seed: int) -> np.ndarray:
    """(O, N) int64: random orders of the positions, the same for all images; row by row a permutation."""
    random = np.random.default_rng([seed, positions])
    return np.stack([random.permutation(positions) for _ in range(ORDERS)])


def partners(images: int, seed: int) -> np.ndarray:
    """(B,) int64: for each image another one, drawn from all of them, as the null of what its own global codes tell.

    One random cycle through all images, so that each gives its codes once: neighbours may be of one class.

    Args:
        images: B.
        seed: of the draw.

    Raises:
        ValueError: fewer than two images.
    """
    if images < 2:
        raise ValueError(f"images is {images}; expected at least 2 to exchange global codes")
    cycle = np.random.default_rng([seed, images]).permutation(images)
    found = np.empty_like(cycle)
    found[cycle] = np.roll(cycle, 1)
    return found


def redundancy(one_pass: np.ndarray, chain: np.ndarray) -> float:
    """Total correlation of the patch codes given what both lengths were given, in bits an image.

    Args:
        one_pass: (B,) sum of the code lengths of all positions, none given.
        chain: (B, O) code lengths of the chain, by order.
    """
    return float(one_pass.mean() - chain.mean())


def mutual_information(blind: np.ndarray, seeing: np.ndarray, seed: int) -> tuple[float, float, float]:
    """I(c; g) in bits an image, and the ends of its 95% bootstrap interval over images.

    Args:
        blind: (B, O) chain lengths under a model that does not see g.
        seeing: (B, O) the same images and orders, under a model of equal compute that does.
        seed: of the bootstrap.

    Raises:
        ValueError: other images or orders.
    """
    if blind.shape != seeing.shape:
        raise ValueError(f"chains are {blind.shape} and {seeing.shape}; expected the same images and orders")
    gains = blind.mean(1) - seeing.mean(1)
    low, high = bootstrap_mean_interval(gains, seed)
    return float(gains.mean()), low, high


def unigram_bits(indices: np.ndarray, codebook_size: int) -> float:
    """Bits of an image whose codes are coded by how often each entry is used among these images.

    Args:
        indices: (B, N) int64 codes.
        codebook_size: K.
    """
    shares = np.bincount(indices.ravel(), minlength=codebook_size) / indices.size
    used = shares[shares > 0]
    return float(-(used * np.log2(used)).sum() * indices.shape[1])


def limit(global_tokens: int, codebook_size: int) -> float:
    """M log2 K, the most that global codes can tell."""
    return global_tokens * math.log2(codebook_size)
