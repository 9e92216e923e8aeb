"""Matrix products of the blocks in 8-bit floating point: `precision.fp8=true`, on Hopper GPUs and newer.

Each tensor is scaled so that its largest value is the format's largest, just before the product: values and weights in
e4m3, gradients in e5m2, which has the wider range (Micikevicius et al. 2022, arXiv 2209.05433). All three products of a
layer, forward and backward, run in fp8 with bf16 results; master weights stay fp32. Only training steps use it.
"""

import torch

MULTIPLE = 16  # the kernels take matrices whose sides, and numbers of tokens, are multiples of it


def can_fp8(device: torch.device) -> bool:
    """Return True for a CUDA device with fp8 matrix products (compute capability 9.0 and up)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def takes_fp8(x: torch.Tensor) -> bool:
    """Return True if the kernels take the number of tokens in x (..., K), over which the weight gradient sums."""
    return x.numel() // x.size(-1) % MULTIPLE == 0


def fp8_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x (..., K) times the transpose of weight (N, K), in the dtype of x."""
    return _Product.apply(x.flatten(0, -2), weight).view(*x.shape[:-1], -1)


def _quantize(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x / scale in `dtype`, and the scale, an fp32 scalar on the device."""
    largest = torch.finfo(dtype).max
    scale = (x.detach().abs().amax().float() / largest).clamp_min(1e-12)
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


def _multiply(a, scale_a, b, scale_b, dtype: torch.dtype, fast: bool) -> torch.Tensor:
    """Return a (M, K) times the transpose of b (N, K); both are contiguous."""
    return torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=dtype, use_fast_accum=fast)


class HeadProducts:
    """The products of `llm.model.cross_entropy.Products` in fp8. The head is scaled once for all chunks of tokens."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.w_scale = _quantize(weight, torch.float8_e4m3fn)
        self.turned = self.weight.t().contiguous()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of hidden states."""
        x, self.x_scale = _quantize(hidden, torch.float8_e4m3fn)
        self.x = x.t().contiguous()
        return _multiply(x, self.x_scale, self.weight, self.w_scale, hidden.dtype, fast=True)

    def put_d_hidden(self, d_logits: torch.Tensor, out: torch.Tensor) -> None:
        """Write the gradient of hidden states into `out`."""
        self.g, self.g_scale = _quantize(d_logits, torch.float8_e5m2)
        out.copy_(_multiply(self.g, self.g_scale, self.turned, self.w_scale, out.dtype, fast=False))

    def add_d_weight(self, d_logits: torch.Tensor, hidden: torch.Tensor, total: torch.Tensor) -> None:
        """Add the gradient of the head to `total`: by the chunk that came last, as the other two methods scaled it."""
        total += _multiply(self.g.t().contiguous(), self.g_scale, self.x, self.x_scale, hidden.dtype, fast=False)

    @staticmethod
    def takes(hidden: torch.Tensor, weight: torch.Tensor) -> bool:
        """Return whether the kernels take all three products."""
        return takes_fp8(hidden) and not any(side % MULTIPLE for side in weight.shape)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        (x8, x_scale), (w8, w_scale) = _quantize(x, torch.float8_e4m3fn), _quantize(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        ctx.dtypes = x.dtype, weight.dtype
        return _multiply(x8, x_scale, w8, w_scale, x.dtype, fast=True)

    @staticmethod
    def backward(ctx, grad):
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        x_dtype, w_dtype = ctx.dtypes
        g8, g_scale = _quantize(grad, torch.float8_e5m2)
        dx = _multiply(g8, g_scale, w8.t().contiguous(), w_scale, x_dtype, fast=False)
        dw = _multiply(g8.t().contiguous(), g_scale, x8.t().contiguous(), x_scale, x_dtype, fast=False)
        return dx, dw.to(w_dtype)
