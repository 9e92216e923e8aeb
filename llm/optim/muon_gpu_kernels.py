"""Triton kernels behind `llm.optim.muon_gpu`. In all of them a program has one row of one matrix of a stack (n, r, c).

Gradients, momentum and weights are lists of matrices, given by their addresses (n,) and not copied into stacks.
ALIGNMENT is a number of bytes that divides all of them, by which the compiler knows whether it may read four numbers at
once. Offsets are of 64 bits: a stack may have more than 2^31 numbers. A row is read at once, and BLOCK is a power of 2,
at least as large as its length.
"""

import triton
import triton.language as tl


@triton.jit
def row_of(addresses, row, rows, cols, ALIGNMENT: tl.constexpr):
    """Return the address of a row of a list's matrices, in fp32."""
    matrix = tl.load(addresses + row // rows).to(tl.pointer_type(tl.float32))
    return tl.multiple_of(matrix, ALIGNMENT) + (row % rows) * cols


@triton.jit
def look_ahead(grads, buffers, update, rows, cols, momentum, length, ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr):
    """Update the momentum and write Nesterov's update, divided by `length` times the norm of its row."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    is_inside, buffer = at < cols, row_of(buffers, row, rows, cols, ALIGNMENT)
    g = tl.load(row_of(grads, row, rows, cols, ALIGNMENT) + at, mask=is_inside, other=0.0)
    m = tl.load(buffer + at, mask=is_inside, other=0.0)
    m += (1 - momentum) * (g - m)
    tl.store(buffer + at, m, mask=is_inside)
    g += momentum * (m - g)
    norm = tl.maximum(tl.sqrt(tl.sum(g * g, 0)), 1e-10) * length
    tl.store(update + row * cols + at, (g / norm).to(update.dtype.element_ty), mask=is_inside)


@triton.jit
def mean_squares_of_rows(update, means, cols, BLOCK: tl.constexpr):
    """Write the mean square of a row."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(update + row * cols + at, mask=at < cols, other=0.0).to(tl.float32)
    tl.store(means + row, tl.sum(x * x, 0) / cols)


@triton.jit
def mean_squares_of_columns(update, means, rows, cols, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write the mean squares of COLUMNS columns of a matrix, which this program reads by tiles of ROWS rows."""
    matrix, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        is_inside = (row[:, None] < rows) & (at[None, :] < cols)
        x = tl.load(update + (matrix * rows + row[:, None]) * cols + at[None, :], mask=is_inside, other=0.0)
        x = x.to(tl.float32)
        total += tl.sum(x * x, 0)
    tl.store(means + matrix * cols + at, total / rows, mask=at < cols)


@triton.jit
def scaled(update, factors, step, rows, cols, BY_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Write a row times its factor, or times the factors of the columns of its matrix."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    is_inside = at < cols
    x = tl.load(update + row * cols + at, mask=is_inside, other=0.0).to(tl.float32)
    if BY_ROWS:
        x *= tl.load(factors + row)
    else:
        x *= tl.load(factors + row // rows * cols + at, mask=is_inside, other=0.0)
    tl.store(step + row * cols + at, x, mask=is_inside)


@triton.jit
def apply(params, step, rows, cols, decay, ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr):
    """Add a row of the step to the weights; numbers whose size it does not raise lose `decay` times themselves."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    is_inside, weights = at < cols, row_of(params, row, rows, cols, ALIGNMENT)
    w = tl.load(weights + at, mask=is_inside, other=0.0)
    s = tl.load(step + row * cols + at, mask=is_inside, other=0.0)
    tl.store(weights + at, w + tl.where(s * w <= 0, s - decay * w, s), mask=is_inside)
