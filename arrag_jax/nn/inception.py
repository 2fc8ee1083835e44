"""Defines the Inception network of the Fréchet Inception distance, as a function over its folded convolutions.

It is the network of the FID's first implementation (TensorFlow, 2015-12-05), which differs from torchvision's: average
pools do not count padding, and the pool of the last block takes the maximum. ``models.inception`` reads its weights.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SIDE = 299  # height and width of the images in pixels
FEATURES = 2048


class Conv(NamedTuple):
    """The shape of one convolution, which a ReLU follows.

    Attributes:
      kernel: height and width.
      padded: the output is as large as the input; else the kernel stays inside the input.
    """

    kernel: tuple[int, int]
    inputs: int
    outputs: int
    stride: int = 1
    padded: bool = True


class ConvWeights(NamedTuple):
    """The weights of a convolution, into which batch norm is folded."""

    kernel: Float[Array, "kh kw I O"]
    bias: Float[Array, " O"]


Weights = Mapping[str, ConvWeights]  # by the names of ``CONVS``


def _block(name: str, **convs: tuple[int, int, int, int]) -> dict[str, Conv]:
    """Returns the padded convolutions of a block; each is given as height, width, inputs, outputs."""
    return {f"{name}.{key}": Conv((kh, kw), i, o) for key, (kh, kw, i, o) in convs.items()}


def _block_a(name: str, i: int, pool: int) -> dict[str, Conv]:
    return _block(
        name,
        branch1x1=(1, 1, i, 64),
        branch5x5_1=(1, 1, i, 48),
        branch5x5_2=(5, 5, 48, 64),
        branch3x3dbl_1=(1, 1, i, 64),
        branch3x3dbl_2=(3, 3, 64, 96),
        branch3x3dbl_3=(3, 3, 96, 96),
        branch_pool=(1, 1, i, pool),
    )


def _block_c(name: str, c: int) -> dict[str, Conv]:
    return _block(
        name,
        branch1x1=(1, 1, 768, 192),
        branch7x7_1=(1, 1, 768, c),
        branch7x7_2=(1, 7, c, c),
        branch7x7_3=(7, 1, c, 192),
        branch7x7dbl_1=(1, 1, 768, c),
        branch7x7dbl_2=(7, 1, c, c),
        branch7x7dbl_3=(1, 7, c, c),
        branch7x7dbl_4=(7, 1, c, c),
        branch7x7dbl_5=(1, 7, c, 192),
        branch_pool=(1, 1, 768, 192),
    )


def _block_e(name: str, i: int) -> dict[str, Conv]:
    return _block(
        name,
        branch1x1=(1, 1, i, 320),
        branch3x3_1=(1, 1, i, 384),
        branch3x3_2a=(1, 3, 384, 384),
        branch3x3_2b=(3, 1, 384, 384),
        branch3x3dbl_1=(1, 1, i, 448),
        branch3x3dbl_2=(3, 3, 448, 384),
        branch3x3dbl_3a=(1, 3, 384, 384),
        branch3x3dbl_3b=(3, 1, 384, 384),
        branch_pool=(1, 1, i, 192),
    )


# The 94 convolutions by the names of the usual PyTorch checkpoint, in the order of its state dict.
CONVS: dict[str, Conv] = {
    "Conv2d_1a_3x3": Conv((3, 3), 3, 32, 2, padded=False),
    "Conv2d_2a_3x3": Conv((3, 3), 32, 32, padded=False),
    "Conv2d_2b_3x3": Conv((3, 3), 32, 64),
    "Conv2d_3b_1x1": Conv((1, 1), 64, 80),
    "Conv2d_4a_3x3": Conv((3, 3), 80, 192, padded=False),
    **_block_a("Mixed_5b", 192, 32),
    **_block_a("Mixed_5c", 256, 64),
    **_block_a("Mixed_5d", 288, 64),
    "Mixed_6a.branch3x3": Conv((3, 3), 288, 384, 2, padded=False),
    **_block("Mixed_6a", branch3x3dbl_1=(1, 1, 288, 64), branch3x3dbl_2=(3, 3, 64, 96)),
    "Mixed_6a.branch3x3dbl_3": Conv((3, 3), 96, 96, 2, padded=False),
    **_block_c("Mixed_6b", 128),
    **_block_c("Mixed_6c", 160),
    **_block_c("Mixed_6d", 160),
    **_block_c("Mixed_6e", 192),
    **_block("Mixed_7a", branch3x3_1=(1, 1, 768, 192)),
    "Mixed_7a.branch3x3_2": Conv((3, 3), 192, 320, 2, padded=False),
    **_block(
        "Mixed_7a", branch7x7x3_1=(1, 1, 768, 192), branch7x7x3_2=(1, 7, 192, 192), branch7x7x3_3=(7, 1, 192, 192)
    ),
    "Mixed_7a.branch7x7x3_4": Conv((3, 3), 192, 192, 2, padded=False),
    **_block_e("Mixed_7b", 1280),
    **_block_e("Mixed_7c", 2048),
}


def features(weights: Weights, x: Float[Array, "B 299 299 3"]) -> Float[Array, "B 2048"]:
    """Returns the features of images: the averages of the last block's output over the image.

    Args:
      x: pixels in [-1, 1], by any rule of ``ops.resizing``.
    """
    net = _Net(weights)
    x = net.chain(x, "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3")
    x = net.chain(_max_pool(x, 2), "Conv2d_3b_1x1", "Conv2d_4a_3x3")
    x = _max_pool(x, 2)
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = net.block_a(x, name)
    x = net.block_b(x, "Mixed_6a")
    for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = net.block_c(x, name)
    x = net.block_d(x, "Mixed_7a")
    x = net.block_e(x, "Mixed_7b", max_pool=False)
    x = net.block_e(x, "Mixed_7c", max_pool=True)
    return x.mean((1, 2))


class _Net:
    """The blocks over given weights."""

    def __init__(self, weights: Weights):
        self.weights = weights

    def chain(self, x: Array, *names: str) -> Array:
        """Returns x after the named convolutions, one after another."""
        for name in names:
            kernel, bias = self.weights[name]
            x = jax.nn.relu(_convolve(x, kernel, CONVS[name]) + bias.reshape(1, 1, 1, -1))
        return x

    def starts(self, x: Array, block: str, *branches: str) -> list[Array]:
        """Returns the outputs of 1 x 1 convolutions of the same input, which are computed as one."""
        names = [f"{block}.{branch}" for branch in branches]
        kernel = jnp.concatenate([self.weights[name].kernel for name in names], axis=-1)
        bias = jnp.concatenate([self.weights[name].bias for name in names])
        y = jax.nn.relu(_convolve(x, kernel, CONVS[names[0]]) + bias.reshape(1, 1, 1, -1))
        ends, total = [], 0
        for name in names:
            ends.append(total := total + CONVS[name].outputs)
        return jnp.split(y, ends[:-1], axis=-1)

    def averaged(self, x: Array, name: str) -> Array:
        """Returns a 1 x 1 convolution of the average pool of x.

        The two commute, because both are linear, and the convolution leaves fewer channels to average.
        """
        kernel, bias = self.weights[name]
        y = _convolve(x, kernel, CONVS[name])
        window = (1, 3, 3, 1)
        total = jax.lax.reduce_window(y, 0.0, jax.lax.add, window, (1, 1, 1, 1), "SAME")
        ones = jnp.ones((1, *y.shape[1:3], 1), y.dtype)
        count = jax.lax.reduce_window(ones, 0.0, jax.lax.add, window, (1, 1, 1, 1), "SAME")
        return jax.nn.relu(total / count + bias.reshape(1, 1, 1, -1))

    def block_a(self, x: Array, name: str) -> Array:
        one, five, three = self.starts(x, name, "branch1x1", "branch5x5_1", "branch3x3dbl_1")
        five = self.chain(five, f"{name}.branch5x5_2")
        three = self.chain(three, f"{name}.branch3x3dbl_2", f"{name}.branch3x3dbl_3")
        return _join(one, five, three, self.averaged(x, f"{name}.branch_pool"))

    def block_b(self, x: Array, name: str) -> Array:
        double = self.chain(x, *_names(name, "branch3x3dbl_", "123"))
        return _join(self.chain(x, f"{name}.branch3x3"), double, _max_pool(x, 2))

    def block_c(self, x: Array, name: str) -> Array:
        one, seven, double = self.starts(x, name, "branch1x1", "branch7x7_1", "branch7x7dbl_1")
        seven = self.chain(seven, *_names(name, "branch7x7_", "23"))
        double = self.chain(double, *_names(name, "branch7x7dbl_", "2345"))
        return _join(one, seven, double, self.averaged(x, f"{name}.branch_pool"))

    def block_d(self, x: Array, name: str) -> Array:
        three, seven = self.starts(x, name, "branch3x3_1", "branch7x7x3_1")
        three = self.chain(three, f"{name}.branch3x3_2")
        return _join(three, self.chain(seven, *_names(name, "branch7x7x3_", "234")), _max_pool(x, 2))

    def block_e(self, x: Array, name: str, max_pool: bool) -> Array:
        one, three, double = self.starts(x, name, "branch1x1", "branch3x3_1", "branch3x3dbl_1")
        double = self.chain(double, f"{name}.branch3x3dbl_2")
        ends = [self.chain(three, f"{name}.branch3x3_2{side}") for side in "ab"]
        ends += [self.chain(double, f"{name}.branch3x3dbl_3{side}") for side in "ab"]
        pool = f"{name}.branch_pool"
        last = self.chain(_max_pool(x, 1), pool) if max_pool else self.averaged(x, pool)
        return _join(one, *ends, last)


def _convolve(x: Array, kernel: Array, conv: Conv) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (conv.stride, conv.stride),
        "SAME" if conv.padded else "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,  # accelerators round the factors otherwise
    )


def _max_pool(x: Array, stride: int) -> Array:
    """Returns maxima over 3 x 3 pixels; with stride 1 the output is as large as the input."""
    padding = "SAME" if stride == 1 else "VALID"
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def _join(*branches: Array) -> Array:
    return jnp.concatenate(branches, axis=-1)


def _names(block: str, prefix: str, ends: Sequence[str]) -> list[str]:
    return [f"{block}.{prefix}{end}" for end in ends]
