"""An image codec written by hand into AutoencoderKL: tiny models need no trained VAE.

A random VAE turns pictures into noise, and no one could tell whether a tiny model learnt anything.
Here the weights are chosen so that the encoder is a 4x4 average in a luminance-chroma space and
the decoder undoes it with smooth enlargement; the sample pictures show shapes and colours.

Everything but the last normalisation and activation is made linear: the second convolution of
each residual block and the output of the attention are zero, so they pass their input on. Two
identities deal with the rest. Features travel as pairs (+x, -x), whose mean is 0, next to two
constants ±K that fix the variance, so the GroupNorm only divides by a known number. And
silu(x) - silu(-x) = x, so the last convolution gets x back from the pair exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CHANNELS = 16
LATENTS = 4
ANCHOR = 64.0  # K; far above any feature, so that features do not move the variance
ANCHOR_CHANNELS = (2 * LATENTS, 2 * LATENTS + 1)
LOGVAR = -20.0  # practically no noise: the mode and a sample are the same picture

# Luminance, red against blue, green against both; the rows of the inverse give R, G, B.
TO_FEATURES = ((1 / 3, 1 / 3, 1 / 3), (0.5, 0.0, -0.5), (-0.25, 0.5, -0.25))
TO_RGB = ((1.0, 1.0, -2 / 3), (1.0, 0.0, 4 / 3), (1.0, -1.0, -2 / 3))
# Make scaled latents of photographs about unit variance. The fourth is the difference between the
# upper and the lower half of a cell: there to be learnt, not drawn.
GAINS = (1.9, 7.5, 12.0, 11.5)
SHARPEN = (-0.15, 1.3, -0.15)  # makes up for what the smooth enlargement takes away

VAE_CONFIG: dict[str, Any] = {
    "block_out_channels": (CHANNELS,) * 3,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "latent_channels": LATENTS,
    "norm_num_groups": 1,
    "sample_size": 64,
}


def set_codec_weights(vae: Any, scaling_factor: float) -> None:
    """Write the codec into an AutoencoderKL built from `VAE_CONFIG`."""
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.zero_()
        for module in vae.modules():
            if isinstance(module, nn.GroupNorm):
                module.weight.fill_(1.0)
        scale = torch.tensor(GAINS) / scaling_factor
        _set_encoder(vae, scale)
        _set_decoder(vae, scale)


def _set_encoder(vae: Any, scale: Tensor) -> None:
    encoder = vae.encoder
    for feature, row in enumerate(TO_FEATURES):
        for colour, weight in enumerate(row):
            _pair(encoder.conv_in.weight, feature, colour, weight)
    mean = torch.zeros(3, 3)
    mean[:2, :2] = 0.25  # the kernel reaches one pixel beyond the cell, with weight 0
    for block in encoder.down_blocks[:2]:
        for channel in range(2 * LATENTS):
            block.downsamplers[0].conv.weight[channel, channel] = mean
    halves = mean * torch.tensor([[1.0], [-1.0], [0.0]])
    last = encoder.down_blocks[1].downsamplers[0].conv.weight
    for sign in (0, 1):  # the fourth feature comes from the first one, luminance
        last[6 + sign, 6 + sign] = 0.0
        last[6 + sign, sign] = halves
    _linear_output(encoder.mid_block.resnets[-1], encoder.conv_norm_out)
    for latent in range(LATENTS):
        _difference(encoder.conv_out.weight, latent, latent, float(scale[latent]))
        vae.quant_conv.weight[latent, latent] = 1.0
        vae.quant_conv.bias[LATENTS + latent] = LOGVAR
        vae.post_quant_conv.weight[latent, latent] = 1.0


def _set_decoder(vae: Any, scale: Tensor) -> None:
    decoder = vae.decoder
    edge = torch.tensor(SHARPEN)
    for feature in range(LATENTS):
        kernel = torch.outer(edge, edge) / float(scale[feature])
        decoder.conv_in.weight[2 * feature, feature] = kernel
        decoder.conv_in.weight[2 * feature + 1, feature] = -kernel
    binomial = torch.tensor([1.0, 2.0, 1.0]) / 4
    smooth = torch.outer(binomial, binomial)
    for block in decoder.up_blocks[:2]:
        for channel in range(2 * LATENTS):
            block.upsamplers[0].conv.weight[channel, channel] = smooth
    _linear_output(decoder.up_blocks[-1].resnets[-1], decoder.conv_norm_out)
    for colour, row in enumerate(TO_RGB):
        for feature, weight in enumerate(row):
            _difference(decoder.conv_out.weight, colour, feature, weight)


def _pair(weight: Tensor, feature: int, source: int, value: float) -> None:
    """Let the two channels of a feature be plus and minus `value` times a source channel."""
    weight[2 * feature, source, 1, 1] = value
    weight[2 * feature + 1, source, 1, 1] = -value


def _difference(weight: Tensor, target: int, feature: int, value: float) -> None:
    """Let a target channel be `value` times a feature, read from its pair behind the silu."""
    weight[target, 2 * feature, 1, 1] = value
    weight[target, 2 * feature + 1, 1, 1] = -value


def _linear_output(last_resnet: Any, norm: nn.GroupNorm) -> None:
    """Bring in the constants just before the last norm, and undo its division."""
    plus, minus = ANCHOR_CHANNELS
    last_resnet.conv2.bias[plus], last_resnet.conv2.bias[minus] = ANCHOR, -ANCHOR
    norm.weight.fill_(ANCHOR * (2 / CHANNELS) ** 0.5)
