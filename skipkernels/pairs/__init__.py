"""Losses of a SkipCLIP on pairs of images and captions, and on images with several labels."""

from .losses import PairLoss, pair_loss, sigmoid_loss

__all__ = ["PairLoss", "pair_loss", "sigmoid_loss"]
