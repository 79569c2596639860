"""Implementations of a method's parts against each other, in the whole network.

    python -m benchmarks.choices memae --preset cpu --batch 16 --against read_impl=naive --against conv_impl=conv

Needs jax, flax, optax and numpy only. Each `--against` is a contender that differs from the method's own choice in that
field of the config, or in several ("cos_impl=vmap conv_impl=conv"); weights and pictures are the same, and so must the
scores and losses be. Expected: no ratio much below 1, or the method's choice is the wrong one on this device.
"""

import argparse
import pathlib

from benchmarks.common import race
from jaxad import allocator, methods, settings
from jaxad.bench.methods import cases, set_up


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method")
    parser.add_argument("--preset")
    parser.add_argument("--image-size", help="pixels a side, or HEIGHTxWIDTH, if not the preset's")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--set", action="append", default=[], help="field=value of the config, for all contenders")
    parser.add_argument("--against", action="append", required=True, help="field=value ... of a contender")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", type=pathlib.Path, help="file to write")
    options = parser.parse_args()
    setting = set_up(
        methods.get(options.method),
        preset=options.preset,
        image_size=settings.parse_size(options.image_size),
        batch=options.batch,
        dtype=options.dtype,
        fields=settings.parse_assignments(options.set),
    )
    variants = {text: settings.parse_assignments(text.split()) for text in options.against}
    facts = {name: value for name, value in vars(options).items() if name != "json"}
    race(cases(setting, variants=variants), settings=facts, rounds=options.rounds, out=options.json)


if __name__ == "__main__":
    allocator.keep_freed_memory()  # as the command line does
    main()
