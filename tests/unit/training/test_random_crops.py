"""Random crops of a fit: what is drawn, and which pixels a box shows."""

import numpy as np
import torch
from torch.nn import functional as F

from captioner.training.fit.random_crops import cropped, random_boxes


def boxes(rows, **place):
    return random_boxes(np.array(rows), **{"min_area": 0.3, "seed": 5, "epoch": 2, **place})


def test_a_box_depends_on_seed_epoch_and_example_and_not_on_its_batch():
    drawn = boxes([9, 4, 1_000_000])
    np.testing.assert_array_equal(drawn[1], boxes([4])[0])
    others = [boxes([4], seed=6)[0], boxes([4], epoch=3)[0], drawn[0]]
    assert all((other != drawn[1]).any() for other in others)


def test_boxes_lie_inside_the_image_and_keep_at_least_their_share():
    left, top, width, height = boxes(range(500)).T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left + width <= 1 + 1e-6).all()
    assert (top + height <= 1 + 1e-6).all()
    ratio, area = width / height, width * height
    assert (ratio > 0.74).all()
    assert (ratio < 1.34).all()
    assert area.min() > 0.3 * 0.95  # a side that would be longer than the image's is cut
    assert area.max() > 0.9
    assert np.quantile(left[width < 0.7], [0.1, 0.9]).tolist() != [0, 0]


def test_the_whole_image_is_the_image_itself():
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16), dtype=np.uint8))
    assert torch.equal(cropped(pixels, torch.tensor([[0.0, 0, 1, 1]] * 2)), pixels)


def test_a_box_is_cut_out_and_resized():
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 16, 16), dtype=np.uint8))
    found = cropped(pixels, torch.tensor([[0.25, 0.5, 0.5, 0.25]]))  # columns 4 to 12, rows 8 to 12
    expected = F.interpolate(pixels[:, :, 7:13, 3:13].float(), scale_factor=(4, 2), mode="bilinear")
    torch.testing.assert_close(found.float(), expected[:, :, 4:-4, 2:-2], rtol=0, atol=0.51)
