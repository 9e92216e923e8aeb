"""Elementwise parts of the model, each a single autograd node.

As plain expressions they would pass over memory many times in the backward pass. These forms save one tensor each and
pass over it as seldom as eager PyTorch allows.
"""

import torch
import torch.nn.functional as F

NORM_EPS = torch.finfo(torch.float32).eps


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    """Return x / sqrt(mean(x^2) + eps) over the last dimension, without weights; the mean is taken in fp32 or wider."""
    return _RMSNorm.apply(x)


def relu_squared(x: torch.Tensor) -> torch.Tensor:
    """Return relu(x)^2 (Primer, arXiv 2109.08668)."""
    return _ReLUSquared.apply(x)


def leaky_relu_squared(x: torch.Tensor) -> torch.Tensor:
    """Return leaky_relu(x)^2 with slope 1/2: x^2 where x > 0, else x^2 / 4 (parameter-golf, 2026)."""
    return _LeakyReLUSquared.apply(x)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        wide = torch.promote_types(x.dtype, torch.float32)
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square_().div_(x.size(-1))
        scale = mean_square.add_(NORM_EPS).rsqrt_()
        if torch.compiler.is_compiling():
            # Where what is returned has two names in the graph (out=, a cast to the same dtype), torch 2.11 loses the
            # gradient without a word.
            y = x * scale if scale.dtype == x.dtype else (x * scale).to(x.dtype)
        else:  # one pass, with no copy in fp32
            y = torch.mul(x, scale, out=torch.empty_like(x))
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, scale = ctx.saved_tensors
        along = (grad * y).sum(-1, keepdim=True, dtype=scale.dtype)  # the part of grad that only stretches x
        dx = torch.addcmul(grad, y, along.to(y.dtype), value=-1 / y.size(-1))
        return dx.mul_(scale)


class _ReLUSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        h = F.relu(x)
        ctx.save_for_backward(h)
        return h * h

    @staticmethod
    def backward(ctx, grad):
        (h,) = ctx.saved_tensors
        return (grad * h).mul_(2)


class _LeakyReLUSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.leaky_relu(x, 0.5).square()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return F.leaky_relu(x, 0.25).mul_(grad).mul_(2)  # slopes 2 x and x / 2
