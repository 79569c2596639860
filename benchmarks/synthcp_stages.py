"""SynthCP's three stages timed apart: segment, synthesise, compare, beside the whole score.

    python -m benchmarks.synthcp_stages --preset cpu --batch 8 --json benchmarks/results/cpu/synthcp_stages.json

Pictures are noise and weights are untrained; neither changes what is computed. Needs jax and numpy.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import race
from jaxad import allocator
from jaxad.bench import methods as bench
from jaxad.bench.case import Case, Contender
from jaxad.bench.program import compile_program
from jaxad.methods import synthcp


def stages(state, images):
    """Each stage as (function, its arguments on the device, what of its output is compared)."""
    shape = images.shape[1:]
    # Through a function of its own: jit knows the others, and their compilation is timed later.
    segmented = jax.jit(lambda s, x: synthcp.segment(s, x))(state, images)
    made = jax.jit(lambda s, labels: synthcp.synthesise(s, labels, shape))(state, segmented.labels)
    return {
        "segment": (synthcp.segment, (state, images), lambda out: {"confidence": out.confidence}),
        "synthesise": (
            lambda state, labels: synthcp.synthesise(state, labels, shape),
            (state, segmented.labels),
            lambda out: {"picture": out},
        ),
        "compare": (synthcp.compare, (state, images, segmented, made), lambda out: {"map": out.map}),
        "score": (synthcp.score, (state, images), lambda out: {"map": out.map}),
    }


def cases(setting):
    spec = bench.spec_of(setting)
    state = bench.start(setting, setting.cfg, spec)
    images = jnp.asarray(np.random.default_rng(0).uniform(size=(setting.batch, *setting.shape)), jnp.float32)
    for name, (function, arguments, telling) in stages(state, images).items():
        program = compile_program(function, *arguments)
        one = Contender(
            "jaxad",
            lambda given, program=program: program.call(*given),
            put=lambda drawn, arguments=arguments: arguments,  # the same every time: no stage reads what it is given
            fetch=lambda result, telling=telling: jax.device_get(telling(result)),
            flops=program.flops,
            program=program,
            compile_seconds=program.seconds,
        )
        facts = {**setting.facts, "work": name}
        yield Case(setting.name_of(name), lambda numbers: None, (one,), setting.batch, facts=facts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="cpu")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", type=pathlib.Path, help="file to write")
    options = parser.parse_args()
    setting = bench.set_up(
        synthcp.METHOD,
        preset=options.preset,
        image_size=options.image_size,
        batch=options.batch,
        dtype=options.dtype,
    )
    race(cases(setting), settings={"backend": jax.default_backend()}, rounds=options.rounds, out=options.json)


if __name__ == "__main__":
    allocator.keep_freed_memory()  # as the command line does
    main()
