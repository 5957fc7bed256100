"""Deformable sampling against its formula."""

import torch
from torch.autograd import gradcheck

from model.decoders.deformable import DeformableMixer, sample_at


def directly(x, offsets):
    """y(p) = sum_q max(0, 1 - |q_y - p_y|) max(0, 1 - |q_x - p_x|) x(q), over all pixels q of the image."""
    n, _, height, width = x.shape
    y = torch.zeros_like(x)
    rows, columns = torch.arange(height, dtype=x.dtype), torch.arange(width, dtype=x.dtype)
    for image in range(n):
        for i in range(height):
            for j in range(width):
                down = (1 - (rows - (i + offsets[image, 0, i, j])).abs()).clamp_min(0)
                right = (1 - (columns - (j + offsets[image, 1, i, j])).abs()).clamp_min(0)
                y[image, :, i, j] = torch.einsum("chw,h,w->c", x[image], down, right)
    return y


def problem(height, width):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, height, width, dtype=torch.float64, generator=rng)
    return x, 2 * torch.randn(2, 2, height, width, dtype=torch.float64, generator=rng)  # some lie outside


def test_sampling_is_the_formula():
    for shape in ((5, 4), (1, 6), (3, 1), (1, 1)):
        x, offsets = problem(*shape)
        torch.testing.assert_close(sample_at(x, offsets), directly(x, offsets), rtol=1e-12, atol=1e-12)


def test_whole_offsets_shift_and_read_zero_outside():
    x, offsets = problem(4, 5)
    offsets[:, 0], offsets[:, 1] = 1, -2
    expected = torch.zeros_like(x)
    expected[:, :, :3, 2:] = x[:, :, 1:, :3]
    torch.testing.assert_close(sample_at(x, offsets), expected, rtol=1e-12, atol=1e-12)


def test_gradients_reach_image_and_offsets():
    x, offsets = problem(3, 4)
    assert gradcheck(sample_at, (x.requires_grad_(), offsets.requires_grad_()))


def test_a_fresh_mixer_samples_every_pixel_where_it_is():
    mixer = DeformableMixer(3).double().eval()
    x, _ = problem(4, 4)
    y = mixer.norm(torch.nn.functional.gelu(mixer.channels(x)))
    torch.testing.assert_close(mixer(x), y + mixer.sampled(y), rtol=1e-12, atol=1e-12)
