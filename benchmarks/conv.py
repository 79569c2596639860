"""Convolutions of MemAE's two-dimensional network by layer: XLA's, products, both mixed, and torch's beside them.

    python -m benchmarks.conv --json benchmarks/results/cpu/conv.json

Needs jax, flax and numpy; torch (oneDNN, eager) races if it is installed. The layers are those of the preset `mvtec`,
each forward and forward with both gradients; outputs are compared with NumPy's in float64. `jaxad.nn.conv.choose_impl`
decides by this table.
"""

import argparse
import importlib.util
import pathlib

import jax
import numpy as np

from benchmarks.common import race
from jaxad import allocator
from jaxad.bench.case import Case, Contender
from jaxad.bench.program import compile_program
from jaxad.cores import usable_cores
from jaxad.nn import conv

STRIDES, PADDING = (2, 2), ((1, 1), (1, 1))
CHECKED = 1  # pictures of which outputs are compared; gradients of kernels are sums over all
TOLERANCE = 1e-4


def layers(pixels):
    """(is transposed, pixels a side of the input, inputs, outputs) of encoder and decoder of `mvtec`."""
    widths = (3, 96, 128, 256, 256)
    down = [(False, pixels >> i, widths[i], widths[i + 1]) for i in range(4)]
    return down + [(True, pixels >> (i + 1), widths[i + 1], widths[i]) for i in reversed(range(4))]


def apply(image, kernel, *, is_transposed, impl):
    if is_transposed:
        return conv.correlate_transposed(image, kernel, strides=STRIDES, output_padding=(1, 1), impl=impl)
    return conv.correlate(image, kernel, strides=STRIDES, padding=PADDING, impl=impl)


def program_of(impl, *, is_transposed, is_gradient):
    def run(image, kernel, grad):
        def forward(image, kernel):
            return apply(image, kernel, is_transposed=is_transposed, impl=impl)

        if not is_gradient:
            return {"value": forward(image, kernel)}
        value, back = jax.vjp(forward, image, kernel)
        d_image, d_kernel = back(grad)
        return {"value": value, "d_image": d_image, "d_kernel": d_kernel}

    return run


def reference(drawn, *, is_transposed, is_gradient):
    """In float64, tap by tap: d_kernel[t] is the product of the larger image's pixels that tap t meets with the smaller
    image's."""
    image, kernel, grad = (np.asarray(x, np.float64) for x in drawn)
    if is_transposed:
        kernel = kernel[::-1, ::-1].swapaxes(2, 3)  # of the convolution that this transposes
    to_small = lambda large: sum(part @ kernel[tap] for tap, part in parts(large))  # noqa: E731

    def to_large(small):
        padded = np.zeros((len(small), 2 * small.shape[1] + 2, 2 * small.shape[2] + 2, kernel.shape[2]))
        for (i, j), part in parts(padded[:, 1:-1, 1:-1], padded):
            part += small @ kernel[i, j].T
        return padded[:, 1:-1, 1:-1]

    forward, back = (to_large, to_small) if is_transposed else (to_small, to_large)
    found = {"value": forward(image[:CHECKED])}
    if is_gradient:
        large, small = (grad, image) if is_transposed else (image, grad)
        d_kernel = np.zeros_like(kernel)
        for tap, part in parts(large):
            d_kernel[tap] = np.tensordot(part, small, axes=((0, 1, 2), (0, 1, 2)))
        found["d_image"] = back(grad[:CHECKED])
        found["d_kernel"] = d_kernel[::-1, ::-1].swapaxes(2, 3) if is_transposed else d_kernel
    return found


def parts(large, padded=None):
    """For every tap the pixels of the larger image that it meets."""
    padded = np.pad(large, ((0, 0), (1, 1), (1, 1), (0, 0))) if padded is None else padded
    height, width = large.shape[1:3]
    for i in range(3):
        for j in range(3):
            yield (i, j), padded[:, i : i + height : 2, j : j + width : 2]


def torch_contender(name, *, is_transposed, is_gradient, flops):
    """oneDNN's convolution: "torch" channels first, its default; "torch channels last", as torch.compile may choose."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(usable_cores())

    layout = torch.channels_last if name.endswith("last") else torch.contiguous_format

    def put(drawn):
        image, kernel, grad = drawn
        taps = kernel[::-1, ::-1].transpose(2, 3, 0, 1) if is_transposed else kernel.transpose(3, 2, 0, 1)
        image, grad = (x.transpose(0, 3, 1, 2) for x in (image, grad))
        placed = (torch.from_numpy(np.array(x, order="C")) for x in (image, taps, grad))
        return tuple(x.contiguous(memory_format=layout) for x in placed)

    def forward(image, kernel):
        if is_transposed:
            return functional.conv_transpose2d(image, kernel, None, 2, 1, 1)
        return functional.conv2d(image, kernel, None, 2, 1)

    def run(given):
        image, kernel, grad = given
        if not is_gradient:
            return {"value": forward(image, kernel)}
        image, kernel = image.requires_grad_(), kernel.requires_grad_()
        value = forward(image, kernel)
        d_image, d_kernel = torch.autograd.grad(value, (image, kernel), grad)
        return {"value": value.detach(), "d_image": d_image, "d_kernel": d_kernel}

    def fetch(result):
        found = {name: values.numpy().transpose(0, 2, 3, 1) for name, values in result.items() if name != "d_kernel"}
        if is_gradient:
            taps = result["d_kernel"].numpy()
            found["d_kernel"] = taps.transpose(2, 3, 0, 1)[::-1, ::-1] if is_transposed else taps.transpose(2, 3, 1, 0)
        return found

    return Contender(name, run, put=put, wait=lambda result: result, fetch=fetch, flops=flops)


def case_of(layer, impls, *, batch, is_gradient):
    """One layer, forward or with both gradients, each form a contender."""
    is_transposed, pixels, inputs, outputs = layer
    small = pixels if is_transposed else pixels // 2
    side = 2 * pixels if is_transposed else small
    flops = 2.0 * batch * small**2 * 9 * inputs * outputs * (3 if is_gradient else 1)

    def draw(numbers):
        shapes = (batch, pixels, pixels, inputs), (3, 3, inputs, outputs), (batch, side, side, outputs)
        return tuple(numbers.random(shape, np.float32) - np.float32(0.5) for shape in shapes)

    given, contenders = draw(np.random.default_rng(0)), []
    for impl in impls:
        program = compile_program(program_of(impl, is_transposed=is_transposed, is_gradient=is_gradient), *given)
        contenders.append(
            Contender(
                impl,
                lambda inputs, program=program: program.call(*inputs),
                flops=flops,
                program=program,
                compile_seconds=program.seconds,
            )
        )
    if importlib.util.find_spec("torch"):
        contenders += [
            torch_contender(name, is_transposed=is_transposed, is_gradient=is_gradient, flops=flops)
            for name in ("torch", "torch channels last")
        ]
    work = "gradient" if is_gradient else "forward"
    name = f"{'transposed' if is_transposed else 'convolution'} {pixels}x{pixels} {inputs}->{outputs} {work}"
    return Case(
        name,
        draw,
        tuple(contenders),
        samples=batch,
        reference=lambda drawn: reference(drawn, is_transposed=is_transposed, is_gradient=is_gradient),
        tolerance=TOLERANCE,
        facts={"op": "convolution", "work": work, "batch": batch, "dtype": "float32", "layer": list(layer)},
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pixels", type=int, default=128, help="of the pictures; a multiple of 16")
    parser.add_argument("--batch", type=int, default=16)
    impls = ["winograd", "mixed", "conv", "gemm"]
    parser.add_argument("--impls", nargs="+", default=impls, help="compared with the first")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=pathlib.Path, help="file to write")
    options = parser.parse_args()
    work = [(layer, is_gradient) for layer in layers(options.pixels) for is_gradient in (False, True)]
    cases = (case_of(layer, options.impls, batch=options.batch, is_gradient=g) for layer, g in work)
    settings = {"impls": options.impls, "pixels": options.pixels, "batch": options.batch}
    race(cases, settings=settings, rounds=options.rounds, out=options.json)


if __name__ == "__main__":
    allocator.keep_freed_memory()  # as the command line does
    main()
