"""Random poses and colors for a batch of icons, in a few operations for the whole batch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

SCALE, ANGLE, SHEAR, SHIFT = (0.75, 1.2), math.radians(20), 0.15, 0.12
PLAIN = 0.4  # share of images on white, and of monochrome ones in black or white
CONTRAST = 0.35  # least difference in luminance between an icon and the background

_LUMINANCE = torch.tensor([0.299, 0.587, 0.114])


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Normalize images in [0, 1], [B, 3, S, S], as open_clip's transform does."""
    mean, std = images.new_tensor(OPENAI_DATASET_MEAN), images.new_tensor(OPENAI_DATASET_STD)
    return (images - mean[:, None, None]) / std[:, None, None]


def on_white(rgba: torch.Tensor, size: int) -> torch.Tensor:
    """Draw premultiplied RGBA images in [0, 1], [B, 4, S, S], on white, at another size."""
    images = rgba[:, :3] + 1 - rgba[:, 3:]
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def random_pose(rgba: torch.Tensor, size: int, mirrored: torch.Tensor) -> torch.Tensor:
    """Apply a random affine map to each image, and mirror half of those that may be, [B, 4, size, size]."""
    count = len(rgba)

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.empty(count, device=rgba.device).uniform_(low, high)

    scale, angle, shear = uniform(*SCALE), uniform(-ANGLE, ANGLE), uniform(-SHEAR, SHEAR)
    flip = 1 - 2 * (mirrored & (uniform(0, 1) < 0.5)).float()
    aspect = uniform(0.9, 1.1)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    theta = torch.stack(
        [
            torch.stack([cos * flip * aspect, (cos * shear - sin) * aspect, uniform(-SHIFT, SHIFT)], -1),
            torch.stack([sin * flip / aspect, (sin * shear + cos) / aspect, uniform(-SHIFT, SHIFT)], -1),
        ],
        1,
    )  # [B, 2, 3], from places in the output to places in the input
    grid = F.affine_grid(theta, [count, 4, size, size], align_corners=False)
    return F.grid_sample(rgba, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def random_colors(rgba: torch.Tensor, mono: torch.Tensor) -> torch.Tensor:
    """Draw images on random backgrounds, [B, 3, S, S]; monochrome ones in a random color."""
    count, device = len(rgba), rgba.device
    luminance = _LUMINANCE.to(device)
    front = torch.rand(count, 3, device=device) * mono[:, None]
    plain = (torch.rand(count, device=device) < PLAIN)[:, None]
    front = torch.where(plain, torch.zeros_like(front), front)
    back = torch.where(torch.rand(count, 1, device=device) < PLAIN, torch.ones_like(front), torch.rand_like(front))
    # A background too close to the icon is moved away from it, towards white or black, whichever is farther.
    own = front @ luminance
    close = ((back @ luminance - own).abs() < CONTRAST) & mono
    far = (own < 0.5).float()[:, None]
    back = torch.where(close[:, None], 0.35 * back + 0.65 * far, back)
    swap = mono & (torch.rand(count, device=device) < 0.25)
    front, back = torch.where(swap[:, None], back, front), torch.where(swap[:, None], front, back)
    color, alpha = rgba[:, :3], rgba[:, 3:]
    painted = torch.where(mono[:, None, None, None], front[:, :, None, None] * alpha, color)
    return painted + (1 - alpha) * back[:, :, None, None]


def augment(rgba: torch.Tensor, mono: torch.Tensor, mirrored: torch.Tensor, size: int) -> torch.Tensor:
    """Normalized random views of icons, [B, 3, size, size]."""
    return normalize(random_colors(random_pose(rgba, size, mirrored), mono).clamp(0, 1))
