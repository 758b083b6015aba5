"""Ops on images: pooling, padding at the edges, resizing, shuffling of pixels, sampling of a grid.

Owns: how ownership moves through ops whose batch is the first dimension and that mix pixels alone.
Does not know: parameters. Whatever one pools is left to the fallback.
"""

import re

from pergrad.graph.layout import Layout, along, smear
from pergrad.graph.ops import Op, Result, Why, declare, owners, resized

_SPATIAL = """
avg_pool2d avg_pool3d max_pool2d max_pool2d_with_indices max_pool3d_with_indices
adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d
fractional_max_pool2d fractional_max_pool3d mkldnn_max_pool2d mkldnn_max_pool3d
reflection_pad1d reflection_pad2d reflection_pad3d
replication_pad1d replication_pad2d replication_pad3d
upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_nearest_exact1d
upsample_nearest_exact2d upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d
upsample_bilinear2d_aa upsample_bicubic2d upsample_bicubic2d_aa upsample_trilinear3d
mkldnn_adaptive_avg_pool2d upsample_lanczos2d_aa
""".split()
declare(*_SPATIAL)


@owners(*_SPATIAL)
def _spatial(op: Op, out: Layout) -> list[Result]:
    shape = op.in_shapes[0]
    assert shape is not None
    found = re.search(r"([123])d", op.name)
    assert found is not None
    rank = len(out.shape)
    return [resized(smear(out, range(rank - int(found[1]), rank)), shape)]


declare("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")


@owners("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
def _pixel_shuffle(op: Op, out: Layout) -> list[Result]:
    shape = op.in_shapes[0]
    assert shape is not None
    rank = len(out.shape)
    lead = 1 if op.name == "channel_shuffle" else rank - 3
    return [resized(smear(out, range(lead, rank)), shape)]


_BATCH_FIRST = (
    "im2_col", "col2_im", "grid_sampler2d", "grid_sampler3d", "affine_grid_generator",
    "grid_sampler2d_cpu_fallback", "cudnn_grid_sampler",
)  # fmt: skip
declare(*_BATCH_FIRST)


@owners(*_BATCH_FIRST)
def _batch_first(op: Op, out: Layout) -> list[Result]:
    plain = smear(out, range(1, len(out.shape)))
    results: list[Result] = []
    for shape in op.in_shapes:
        if shape is None:
            results.append(None)
        elif plain is None or not shape or shape[0] != out.shape[0]:
            results.append(Why.UNKNOWN)
        else:
            results.append(along(shape, 0, plain.owner.reshape(-1).expand(shape[0])))
    return results
