"""Adaptive kernel guidance (paper, Eq. 2): convolution whose kernel is mixed at each pixel, and its fast forms."""

from ucdir_plugin.archs.akgm.convolution import adaptive_kernel_conv

__all__ = ["adaptive_kernel_conv"]
