"""Patch networks: dense evaluation against patch by patch, and the ways to compute an ensemble of students.

    python -m benchmarks.dense --json benchmarks/results/cpu/dense.json
    python -m benchmarks.dense --ensembles --json benchmarks/results/cpu/ensembles.json

The first evaluates one network of Uninformed Students at every pixel of a picture: by dilated convolutions, with phases
on the batch axis, and by giving each patch to the network. Patch by patch takes a minute and more, so it is timed on
every `--every`-th patch a side, times the number left out; what it gives is compared with the dense map. Other forms
are timed whole. The second evaluates students of a width that fits two cores, forward and with gradients, one after the
other and vmapped. Forms take turns, A B B A; reported are medians and their ratios.
"""

import argparse
import functools
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import environment, turns, write
from jaxad import allocator
from jaxad.methods import uninformed_students as us
from jaxad.nn import patch_net
from jaxad.nn.init import init_flat
from jaxad.nn.patch_net import Shape


def timed(run, *args):
    """Seconds of a call, all its work done."""
    began = time.perf_counter()
    jax.block_until_ready(run(*args))
    return time.perf_counter() - began


def measure(forms, args, repeats):
    """Medians by form, after one run each."""
    for run in forms.values():
        timed(run, *args)
    seconds = {name: [] for name in forms}
    for repeat in range(repeats):
        for name in turns(forms, repeat):
            seconds[name].append(timed(forms[name], *args))
    return {name: statistics.median(values) for name, values in seconds.items()}


def one_network(options):
    """Seconds of a picture by each backend, and the largest difference to patch by patch."""
    network = patch_net.network_of(options.patch, Shape(width=options.width))
    picture = np.random.default_rng(0).uniform(size=(1, options.size, options.size, 3)).astype("f")
    padded = patch_net.pad(patch_net.normalise(picture), options.patch, network.layers)
    variables = init_flat(jax.random.key(0), network, padded)

    def form(backend, out_stride=1):
        run = functools.partial(network.apply, backend=backend, out_stride=out_stride)
        return jax.jit(run).lower(variables, padded).compile()

    dense_forms = {name: form(name) for name in ("dilated", "phase")}
    some = form("patch", options.every)
    whole, part = dense_forms["dilated"](variables, padded), some(variables, padded)
    difference = float(jnp.abs(whole[:, :: options.every, :: options.every] - part).max() / jnp.abs(part).max())
    seconds = measure({**dense_forms, "patch": some}, (variables, padded), options.repeats)
    share = options.size**2 / np.prod(part.shape[1:3])
    seconds["patch"] *= float(share)
    for name in dense_forms:
        print(f"{name}: {seconds['patch'] / seconds[name]:.0f} times as fast as patch by patch")
    print(f"largest difference to patch by patch, of the largest value: {difference:.1e}")
    facts = {"patch": options.patch, "width": options.width, "size": options.size, "patches timed, one of": share}
    return {**facts, "seconds": seconds, "difference": difference}


def ensembles(options):
    """Seconds of `students` networks by each ensemble, scoring and training."""
    found = {}
    forms = {}
    size = (options.size, options.size, 3)
    for how in ("unrolled", "vmap"):
        cfg = us.UninformedStudentsConfig(
            patches=(options.patch,), width=options.width, out_stride=options.every, ensemble=how
        )
        state = jax.jit(lambda key, c=cfg: us.init(key, c, us.Spec(size, {"train": 1})))(jax.random.key(0))
        images = jnp.asarray(np.random.default_rng(0).uniform(size=(1, *size)), jnp.float32)
        rows = jnp.zeros(1, jnp.int32)
        batch = us.Batch(images, rows, images[..., 0], rows, rows == 0)
        score, step = (
            jax.jit(f).lower(*a).compile() for f, a in ((us.score, (state, images)), (step_of, (state, batch)))
        )
        forms |= {f"score {how}": functools.partial(score, state, images)}
        forms |= {f"train {how}": functools.partial(step, state, batch)}
    for work in ("score", "train"):
        own = {name: run for name, run in forms.items() if name.startswith(work)}
        found |= measure(own, (), options.repeats)
        print(f"{work}: vmap takes {found[f'{work} vmap'] / found[f'{work} unrolled']:.2f} times as long as unrolled")
    facts = {"patch": options.patch, "width": options.width, "size": options.size, "out_stride": options.every}
    return {**facts, "students": cfg.students, "seconds": found}


def step_of(state, batch):
    """A training step without its key."""
    return us.train_step(None, state, batch)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ensembles", action="store_true", help="compare ensembles instead of backends")
    parser.add_argument("--patch", type=int, default=33)
    parser.add_argument("--width", type=float, help="default: 1, of ensembles 0.25")
    parser.add_argument("--size", type=int, help="default: 256, of ensembles 128")
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--json", type=pathlib.Path, help="file to write")
    options = parser.parse_args()
    options.width = options.width or (0.25 if options.ensembles else 1.0)
    options.size = options.size or (128 if options.ensembles else 256)
    result = (ensembles if options.ensembles else one_network)(options)
    if options.json:
        write(options.json, {"environment": environment(), **result})


if __name__ == "__main__":
    allocator.keep_freed_memory()  # as the command line does
    main()
