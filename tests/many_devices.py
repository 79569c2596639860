"""A training step on one device and on eight virtual ones, as JSON; `test_shard.py` runs it in a process of its own."""

import json

import jax
import numpy as np

from jaxad import methods, score, shard, train
from jaxad.core import Source, spec_of

METHOD = methods.get("memae")
KEY = jax.random.key(0)


def config(preset, **fields):
    return METHOD.config(**{**METHOD.presets[preset].config, **fields})


def pictures(size, count=40):
    image = np.random.default_rng(0).integers(0, 255, (count, size, size, 3), np.uint8)
    return {"train": Source(image=image, label=np.zeros(count, np.int32))}


def placement(mesh):
    return {} if mesh is None else {"place": shard.over_data(mesh), "sharding": shard.replicated(mesh)}


def trained(cfg, mesh, mode):
    """Scores after training, and where the detector lies."""
    data = pictures(32) if mesh is None else shard.replicate(pictures(32), mesh)
    for progress in train.drive(METHOD, KEY, cfg, data, mode=mode, chunk=5, **placement(mesh)):
        state = progress.state
    scores = score.score_dataset(METHOD, state, data["train"], batch_size=13)
    return scores, len(jax.tree.leaves(state.params)[0].devices())


def step(cfg, size, mesh):
    """The compiled training step."""
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0]) if mesh is None else shard.replicated(mesh)
    place = train.unplaced if mesh is None else shard.over_data(mesh)
    data, (phase,) = pictures(size), METHOD.phases(cfg)
    state = jax.eval_shape(lambda key: train.init(METHOD, key, cfg, spec_of(data)), KEY)
    shapes = (state, jax.eval_shape(lambda: KEY), data["train"], jax.ShapeDtypeStruct((), np.int32))
    arguments = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes)

    def run(state, key, source, t):
        return train.one_step(phase, key, state, source, t, place=place)

    return jax.jit(run, donate_argnums=0, out_shardings=where).lower(*arguments).compile(), state


def main():
    mesh, facts = shard.data_mesh(), {"devices": jax.device_count()}
    cfg = config("tiny", steps=10, learning_rate=1e-4)
    alone, _ = trained(cfg, None, "loop")
    facts["spread"] = float(alone.image.max() - alone.image.min())
    for mode in ("loop", "chunks"):
        scores, facts["held_by"] = trained(cfg, mesh, mode)
        facts[mode] = [float(np.abs(a - b).max()) for a, b in zip(scores, alone, strict=True)]
    untrained, _ = trained(config("tiny", steps=0), mesh, "loop")
    facts["learned"] = float(np.abs(untrained.image - alone.image).max())
    for name, preset, size in (("tiny", "tiny", 32), ("cpu", "cpu", 128)):
        (one, state), (many, _) = step(config(preset), size, None), step(config(preset), size, mesh)
        leaves = {part: sum(leaf.size for leaf in jax.tree.leaves(getattr(state, part))) for part in state._fields}
        facts[name] = {
            "flops": [compiled.cost_analysis()["flops"] for compiled in (one, many)],
            "collectives": [shard.collectives(compiled) for compiled in (one, many)],
            "parameters": leaves["params"],
            "statistics": leaves["batch_stats"],
        }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
