"""Images of iterated function systems with the statistics of photographs, for calibration without data.

Fractals as calibration images are the idea of arXiv 2104.15023. A system is a few affine maps of the plane; points that
are mapped by them in random order converge to its attractor, which has detail at every scale, as photographs have. The
properties that determine activation ranges are then matched to photographs: mean, contrast, correlation of the channels,
and amplitudes that fall about as 1 / frequency.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnxq_plugins.spec import Array

_MAPS = 7  # in a system at most; unused ones are zero
_BATCH = 24  # systems drawn at a time
_FACTORS = (0.2, 0.6, 1.4, 1.8)  # on one coefficient of a system, for a variant
_COVERED = 0.2  # of a coarse grid, by an attractor worth drawing
_SETTLE = 10  # steps until points are on the attractor
_STEPS = 40  # steps that are drawn


def fractals(count: int, height: int, width: int, channels: int, rng: np.random.Generator) -> Iterator[Array]:
    """`count` images, float32 [height, width, channels] in 0..1, one at a time.

    One channel is grey and three are RGB; with another number each channel is its own mixture of the same planes. Image k
    depends on `rng` and the size, not on `count`. Raises ValueError if a size is below one, or `count` below zero.

    Cost: four points per pixel are mapped. 224 x 224 x 3 takes some 40 ms on one core (`python -m benchmarks.fractals`);
    memory grows with the size of one image, not with their count.
    """
    if min(height, width, channels) < 1 or count < 0:
        raise ValueError("fractals needs a count of at least 0, and height, width and channels of at least 1")
    systems, images = rng.spawn(2)
    return (
        _draw(maps, height, width, channels, images.spawn(1)[0])
        for _, maps in zip(range(count), _systems(systems), strict=False)
    )


def _systems(rng: np.random.Generator) -> Iterator[Array]:
    """An endless stream of systems [_MAPS, 6]: those of a batch that cover enough, then variants of them."""
    while True:
        used = np.arange(_MAPS) < rng.integers(2, _MAPS + 1, (_BATCH, 1))
        systems = _covering(rng.uniform(-1, 1, (_BATCH, _MAPS, 6)) * used[..., None], rng)
        yield from systems
        for factor in _FACTORS:
            varied = systems.copy()
            for maps in varied:
                maps[rng.integers(np.count_nonzero(maps.any(axis=1))), rng.integers(6)] *= factor
            yield from _covering(varied, rng)


def _covering(maps: Array, rng: np.random.Generator) -> Array:
    """Those of the systems [S, _MAPS, 6] that do not diverge and cover enough of the box around their attractor."""
    if not len(maps):
        return maps
    cells, chains = 24, 100
    points, _ = _orbit(maps, chains, rng)
    points = points.transpose(1, 2, 0, 3).reshape(2, len(maps), -1)
    stays = (np.abs(points) < 1e3).all(axis=(0, 2))
    maps, points = maps[stays], points[:, stays]
    low, high = points.min(axis=2, keepdims=True), points.max(axis=2, keepdims=True)
    row, column = ((points - low) / np.maximum(high - low, 1e-6) * (cells - 1e-3)).astype(np.intp)
    hit = np.zeros((len(maps), cells * cells), bool)
    np.put_along_axis(hit, row * cells + column, True, axis=1)
    covering: Array = maps[hit.mean(axis=1) >= _COVERED]
    return covering


def _orbit(maps: Array, chains: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Points [_STEPS, 2, S, chains] and the map that led to each [_STEPS, S, chains], for systems [S, _MAPS, 6].

    A row a b c d e f maps (x, y) to (a x + b y + e, c x + d y + f), and is drawn with a probability in proportion to its
    determinant, the size of its image."""
    probability = np.abs(maps[..., 0] * maps[..., 3] - maps[..., 1] * maps[..., 2]).cumsum(axis=1).astype(np.float32)
    probability /= probability[:, -1:]  # of this map or an earlier one; exactly 1 from the last used map on
    drawn = rng.random((_SETTLE + _STEPS, len(maps), chains), np.float32)
    which = np.zeros(drawn.shape, np.int8)
    for limit in probability.T[:-1]:
        which += drawn >= limit[:, None]
    rows = maps.reshape(-1, 6).T.astype(np.float32)
    first = np.arange(len(maps))[:, None] * _MAPS
    points = np.empty((_SETTLE + _STEPS, 2, len(maps), chains), np.float32)
    x, y = np.zeros((2, len(maps), chains), np.float32)
    for at, step in zip(points, which, strict=True):
        a, b, c, d, e, f = rows.take(step + first, axis=1)
        x, y = at[:] = a * x + b * y + e, c * x + d * y + f
    return points[_SETTLE:], which[_SETTLE:]


def _draw(maps: Array, height: int, width: int, channels: int, rng: np.random.Generator) -> Array:
    """An image [height, width, channels] of a system [_MAPS, 6]: the attractor in front of a blurred part of itself."""
    from scipy import ndimage  # late: slow to import, and only fractals need it

    size, unit = np.array([height, width]), np.sqrt(height * width) / 224  # blurs are defined for 224 x 224
    points, which = _orbit(maps[None], max(4 * height * width // _STEPS, 1000), rng)
    points, which = points.transpose(1, 2, 0, 3).reshape(2, -1), which.ravel()
    angle, slope = rng.uniform(-30, 30) * np.pi / 180, rng.uniform(0, 2 * np.pi)
    down, right = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    place = (np.cos(slope) * down + np.sin(slope) * right).astype(np.float32) / 2
    tone, dense, cover = _stamp(_counts(points, which, size, angle, rng.uniform(0.8, 1.4), rng), rng)
    image = _palette(rng.uniform(0.5, 1) * tone + rng.uniform(0.5, 1) * dense + rng.uniform(0, 0.7) * place, channels, rng)
    half = len(which) // 2  # of the points are enough for the blurred background
    tone, dense, _ = _stamp(_counts(points[:, :half], which[:half], size, -angle, rng.uniform(1.5, 3), rng), rng)
    far = ndimage.gaussian_filter(rng.uniform(0.3, 0.8) * tone + dense, rng.uniform(3, 20) * unit, truncate=2)
    back = _palette(far + rng.uniform(0.3, 0.7) * place, channels, rng)
    image = back + cover * (image - back)
    kernel = rng.choice(np.arange(1, 16, 2))
    if kernel > 1:
        blurred = ndimage.gaussian_filter(image, (0, *[(0.15 * kernel + 0.35) * unit] * 2), truncate=3)
        image += np.clip(2 * place, 0, 1) * (blurred - image)  # one side goes out of focus
    return np.ascontiguousarray(_expose(image, rng).transpose(1, 2, 0))


def _counts(points: Array, which: Array, size: Array, angle: float, zoom: float, rng: np.random.Generator) -> Array:
    """Number of points [2, N] on each pixel, for each map `which` [N] that led there [maps, *size].

    They are rotated by the angle, possibly mirrored, and scaled so that their inner 98 % fill the canvas or, with a zoom
    above one, a part of them does. Nothing is resampled, so no corner stays empty."""
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    bins = which * np.intp(size[0] + 2)  # a border of one pixel receives the points outside
    for axis, (across, along) in enumerate(((cos, -sin), (sin, cos))):
        turned = across * points[0] + along * points[1]
        low, high = np.quantile(turned[::16], [0.01, 0.99])
        middle = low + (high - low) * (0.5 + rng.uniform(-0.5, 0.5) * abs(1 - 1 / zoom))
        scale = zoom * rng.choice([-1, 1]) * size[axis] / max(high - low, 1e-6)
        turned *= np.float32(scale)
        turned += np.float32(size[axis] / 2 + 1 - middle * scale)
        bins += np.clip(turned, 0, size[axis] + 1, out=turned).astype(np.intp)
        if axis == 0:
            bins *= size[1] + 2
    used, (height, width) = int(which.max()) + 1, size + 2
    counts = np.bincount(bins, minlength=used * height * width).reshape(used, height, width)
    return counts[:, 1:-1, 1:-1].astype(np.float32)


def _stamp(counts: Array, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Three planes in 0..1 [h, w] from counts per pixel [maps, h, w]: the mean tone of the maps, density on a logarithmic
    scale, and opacity.

    A point is stamped as a patch of 3 x 3, a random one for each map: a filter on the map's own plane."""
    from scipy import ndimage  # late: slow to import, and only fractals need it

    used, height, width = counts.shape
    total, mixed = np.zeros((2, height, width), np.float32)
    neighbours = np.float32(min(height * width / 224**2, 1))  # small images show detail pixel by pixel
    for plane, tone in zip(counts, rng.permutation(np.linspace(0, 1, used, dtype=np.float32)), strict=True):
        patch = rng.random((3, 3), np.float32) * neighbours
        patch[1, 1] += 1 - neighbours
        stamped = ndimage.convolve(plane, patch / patch.sum(), mode="constant")
        total += stamped
        mixed += tone * stamped
    typical = max(float(total.mean()), 1e-6)
    dense = np.log1p(total / typical)
    return mixed / np.maximum(total, 1e-6), dense / max(float(dense.max()), 1e-6), 1 - np.exp(-4 * total / typical)


def _palette(at: Array, channels: int, rng: np.random.Generator) -> Array:
    """Smooth colours [channels, h, w] for positions on a palette [h, w]: a different slow wave in each channel."""
    waves, phases = rng.uniform(1, 4, channels), rng.uniform(0, 2 * np.pi, channels)
    return np.stack([np.cos(np.float32(wave) * at + np.float32(phase)) for wave, phase in zip(waves, phases, strict=True)])


def _expose(image: Array, rng: np.random.Generator) -> Array:
    """The image [channels, h, w] with mean and contrast of a photograph, clipped to 0..1.

    Grey and RGB: luminance and colour separately, the deviation of colour a small part of that of luminance, so that
    channels are correlated. Otherwise each channel separately."""
    axes, size = ((0, 1, 2), 1) if len(image) in (1, 3) else ((1, 2), len(image))
    light = image.mean(axis=0, keepdims=True) if size == 1 else image
    hue = image - light
    hue *= np.float32(rng.lognormal(-1.4, 0.5)) / max(float(np.std(hue)), 1e-6)
    light = light - light.mean(axis=axes, keepdims=True)
    light /= np.maximum(np.std(light, axis=axes, keepdims=True), 1e-6)
    mean, contrast = rng.uniform(0.25, 0.65, (size, 1, 1)), rng.uniform(0.16, 0.3, (size, 1, 1))
    exposed: Array = np.clip(mean.astype(np.float32) + contrast.astype(np.float32) * (light + hue), 0, 1)
    return exposed
