"""A method on one device and on eight virtual ones, as JSON; `test_shard.py` runs `many_devices.py METHOD [PRESET]`."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxad import methods, score, shard, train
from jaxad.core import Source, as_arrays, spec_of

KEY = jax.random.key(0)
STEPS = 10
SHORTER = {"neural_batch": {"ae_steps": 20}}  # a step of its sampler trains eight autoencoders
MORE = {"neural_batch": {"predictor": "learned"}}  # adds a phase to those of "tiny"; it is compiled and not run


def config(method, preset, **fields):
    return method.config(**{**method.presets[preset].config, **fields})


def pictures(size, channels=3, count=40, seed=0):
    image = np.random.default_rng(seed).integers(0, 255, (count, size, size, channels), np.uint8)
    source = Source(image=image, label=np.zeros(count, np.int32))
    mask = np.zeros((8, size, size), np.uint8)
    mask[:, : size // 4, : size // 4] = 1
    labelled = Source(image=image[:8], label=np.ones(8, np.int32), mask=mask)
    return {"train": source, "holdout": source, "labelled": labelled}


def sharding(mesh):
    return jax.sharding.SingleDeviceSharding(jax.devices()[0]) if mesh is None else shard.replicated(mesh)


def compiled_step(method, cfg, phase, data, mesh):
    """The step of a phase as a compiled program, and the shapes of the state."""
    place = train.unplaced if mesh is None else shard.over_data(mesh)
    state = jax.eval_shape(lambda key: train.init(method, key, as_arrays(cfg), spec_of(data)), KEY)
    shapes = (state, jax.eval_shape(lambda: KEY), data[phase.source], jax.ShapeDtypeStruct((), np.int32))
    where = sharding(mesh)
    arguments = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes)

    def run(state, key, source, t):
        return train.one_step(phase, key, state, source, t, place=place)

    return jax.jit(run, out_shardings=where).lower(*arguments).compile(), state


def run(method, cfg, start, data, mesh):
    """All phases of a method: (a step's program by phase, the state's shapes, moments of its gradient, the state)."""
    programs, state, first = {}, jax.device_put(start, sharding(mesh)), None
    for i, phase in enumerate(method.phases(cfg)):
        program, shapes = compiled_step(method, cfg, phase, data, mesh)
        key, source = jax.device_put((train.phase_key(KEY, i), data[phase.source]), sharding(mesh))
        for t in range(train.num_steps(phase, len(source))):
            state, _ = program(state, key, source, jax.device_put(np.int32(t), sharding(mesh)))
            first = first or moments_of(state)
        programs[phase.name] = program
    return programs, shapes, first, state


def moments_of(state):
    """What the optimizer knows of gradients; None before the first step of a phase that trains."""
    found = [leaf for leaf in jax.tree.leaves(jax.device_get(state.optimizer)) if leaf.dtype == np.float32]
    return found if any(np.abs(leaf).max(initial=0) for leaf in found) else None


def parameters_of(state):
    return getattr(state, "params", state)


def drive(method, cfg, mesh, mode):
    """Scores after the training that commands do."""
    placement = {} if mesh is None else {"place": shard.over_data(mesh), "sharding": shard.replicated(mesh)}
    data = pictures(32) if mesh is None else shard.replicate(pictures(32), mesh)
    unseen = pictures(32, seed=1)["train"]
    for progress in train.drive(method, KEY, cfg, data, mode=mode, chunk=5, **placement):
        state = progress.state
    return score.score_dataset(method, state, unseen, batch_size=13)


def size_of(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def more_phases(name, method, data, mesh):
    """Programs by phase of those that the preset "tiny" leaves out, for one device and for eight."""
    cfg, known = config(method, "tiny", **MORE[name]), [phase.name for phase in method.phases(config(method, "tiny"))]
    missing = [phase for phase in method.phases(cfg) if phase.name not in known]
    return [
        {phase.name: compiled_step(method, cfg, phase, data, given)[0] for phase in missing} for given in (None, mesh)
    ]


def counts(alone, spread, state):
    """Of the programs by phase for one device and for eight."""
    phases = {
        name: {
            "flops": [program.cost_analysis()["flops"] for program in (alone[name], spread[name])],
            "collectives": [shard.collectives(program) for program in (alone[name], spread[name])],
        }
        for name in alone
    }
    return {"phases": phases, "parameters": size_of(parameters_of(state))}


def apart(scores, others):
    """The largest difference of image scores and of maps."""
    return [farthest(a, b) for a, b in zip(scores, others, strict=True)]


def farthest(array, other):
    return float(np.abs(array - other).max())


def main(name, preset="tiny"):
    method, mesh, facts = methods.get(name), shard.data_mesh(), {"devices": jax.device_count()}
    if preset != "tiny":  # too much to be run here
        cfg, data = config(method, preset), pictures(*map(method.presets[preset].data.get, ("image_size", "channels")))
        first = method.phases(cfg)[0]
        (alone, state), (spread, _) = (compiled_step(method, cfg, first, data, given) for given in (None, mesh))
        print(json.dumps(facts | counts({first.name: alone}, {first.name: spread}, state)))
        return
    cfg, data = config(method, "tiny", steps=STEPS, learning_rate=1e-4, **SHORTER.get(name, {})), pictures(32)
    unseen = pictures(32, seed=1)["train"]  # a detector may keep the pictures of its training
    start = jax.device_get(jax.jit(lambda key: train.init(method, key, as_arrays(cfg), spec_of(data)))(KEY))
    programs, scores, moments = [], [], []
    for given in (None, mesh):
        made, shapes, first, state = run(method, cfg, start, data, given)
        facts["held_by"] = len(jax.tree.leaves(state)[0].devices())
        here = jax.tree.map(jnp.asarray, jax.device_get(state))
        scores.append(score.score_dataset(method, here, unseen, batch_size=20))
        programs.append(made)
        moments.append(first)
    if name in MORE:
        programs = [a | b for a, b in zip(programs, more_phases(name, method, data, mesh), strict=True)]
    one, eight = scores
    facts |= counts(*programs, shapes)
    facts |= {"apart": apart(eight, one), "scale": [float(np.ptp(one.image)), float(np.ptp(one.map))]}
    both = pairs(parameters_of(start), parameters_of(here))
    facts["moved"] = max(farthest(a, b) for a, b in both if np.isfinite(a).all())  # minima start at infinity
    largest = max(float(np.abs(leaf).max()) for leaf in moments[0])
    facts["gradient"] = max(farthest(*both) for both in pairs(*moments)) / largest
    untrained = score.score_dataset(method, jax.tree.map(jnp.asarray, start), unseen, batch_size=20)
    facts["learned"] = apart(one, untrained)
    if name == "memae":  # the driver is the same for every method
        facts["drive"] = {mode: apart(drive(method, cfg, mesh, mode), one) for mode in ("loop", "chunks")}
    print(json.dumps(facts))


def pairs(tree, other):
    return zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
