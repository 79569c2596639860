"""The parts of the Neural Batch Sampler's meta-iteration timed apart, each beside the plain torch loop.

    python -m benchmarks.neural_batch_parts --preset small --json benchmarks/results/cpu/neural_batch_parts.json

"cycles" is E training cycles as the specification numbers them (its section 1.8, steps 1 to 3): autoencoders trained
from scratch on what walkers pick, profiles of labelled and of normal pictures, and the reward. "predictor" and
"sampler" are the updates that follow. Both sides begin at the same weights with the same random numbers; the torch
loop is the reference: it takes all walkers of an episode through its networks together. Cycles race a second loop,
plainer, whose walkers look and act one after the other. Needs torch.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from benchmarks.common import race
from jaxad import allocator, methods, train
from jaxad.bench import methods as bench
from jaxad.bench.case import Case, Contender
from jaxad.bench.program import compile_program
from jaxad.methods import neural_batch

_PHASE = 1  # of the sampler, after that of the labels


def keys_of_step():
    """(of the cycles, of the predictor's fit), as in the first step of a run."""
    return jax.random.split(jax.random.fold_in(train.phase_key(jax.random.key(0), _PHASE), 0))


def place(images):
    """Pictures as a batch of the peer, which does not read labels and masks of normal ones."""
    return peers.place_batch(images, np.zeros(len(images)), np.zeros(images.shape[:3]))


def cycles_case(setting, state, loops):
    """Draws pictures; compares what the autoencoders lose, on average, and each episode's reward.

    On average, since rounding may turn a move: one episode in eight or so then walks elsewhere, and loses something
    else from the third or fourth digit on. Others agree to six.
    """
    key, episodes = keys_of_step()[0], setting.cfg.episodes

    def run(state, images):
        cycles = neural_batch.run_cycles(key, state, images.astype(jnp.float32) / 255, episodes=episodes)
        profiles, masks, end = neural_batch.judge(state, cycles)
        return {"ae_loss": cycles.cycle.loss.mean(), "reward": end}, (cycles, profiles, masks)

    def draw(numbers):
        return np.asarray(bench.draw_source(setting, numbers, setting.batch).image)

    def rival(name, loop):
        numbers_of_episodes, _, chosen = loop.parts["draw"]()
        return Contender(
            name,
            lambda batch: loop.parts["cycles"](batch, numbers_of_episodes, chosen),
            put=place,
            wait=peers.wait,
            fetch=lambda found: {"ae_loss": found.ae_losses.mean().cpu().numpy(), "reward": found.end.cpu().numpy()},
        )

    rivals = [rival(name, loop) for name, loop in loops.items()]
    return case(setting, "cycles", draw, run, state, *rivals, samples=episodes)


def predictor_case(setting, state, loops):
    """Draws profiles and masks; compares the mean loss."""
    cfg, key, peer = setting.cfg, keys_of_step()[1], loops["torch"]
    count = 2 * min(cfg.profile_pictures, state.labelled.image.shape[0])
    shape = (cfg.episodes, count, cfg.profile_length, *setting.shape[:2])

    def run(state, drawn):
        profiles, masks = drawn
        masks = jnp.broadcast_to(masks, (cfg.episodes, *masks.shape))
        fitted, loss = neural_batch.fit_predictor(key, state, profiles, masks)
        return {"loss": loss}, fitted.params["predictor"]

    def draw(numbers):
        masks = (numbers.uniform(size=(count, *setting.shape[:2])) < 0.1).astype(np.float32)
        return numbers.normal(size=shape).astype(np.float32), masks

    _, drawn_numbers, _ = peer.parts["draw"]()
    rival = Contender(
        "torch",
        lambda given: peer.parts["predictor"](*given, drawn_numbers),
        put=lambda drawn: (peer.reset(), tuple(peers.tensor(array).to(peers.device()) for array in drawn))[1],
        wait=peers.wait,
        fetch=lambda loss: {"loss": loss.cpu().numpy()},
    )
    return case(setting, "predictor", draw, run, state, rival, samples=cfg.predictor_steps)


def sampler_case(setting, state, loops):
    """Draws advantages of the walks of one run of cycles; compares the norm of the policy's gradient."""
    cfg, peer = setting.cfg, loops["torch"]
    images = np.asarray(bench.draw_source(setting, np.random.default_rng(0), setting.batch).image)
    numbers_of_episodes, _, chosen = peer.parts["draw"]()
    walked = peer.parts["cycles"](place(images), numbers_of_episodes, chosen)

    @jax.jit
    def walk(state, images):
        cycles = neural_batch.run_cycles(
            keys_of_step()[0], state, images.astype(jnp.float32) / 255, episodes=cfg.episodes
        )
        return cycles._replace(normals=None)  # a Python number, which jit would make an array

    def run(given, advantages):
        fitted, norm, _ = neural_batch.fit_sampler(*given, advantages)
        return {"norm": norm}, fitted.params["policy"]

    def draw(numbers):
        return numbers.normal(size=walked.rewards.shape).astype(np.float32)

    rival = Contender(
        "torch",
        lambda gains: peer.parts["sampler"](walked.seen.flatten(0, 2), walked.actions.flatten(), gains.flatten()),
        put=lambda drawn: (peer.reset(), peers.tensor(drawn).to(peers.device()))[1],
        wait=peers.wait,
        fetch=lambda norm: {"norm": norm.detach().cpu().numpy()},
    )
    return case(setting, "sampler", draw, run, (state, walk(state, images)), rival, samples=1)


def case(setting, name, draw, run, fixed, rival, *others, samples):
    """`run(fixed, drawn)` beside its rivals, the first of which is the reference; of its outputs the first is compared,
    all are waited for."""
    program = compile_program(run, fixed, jax.device_put(draw(np.random.default_rng(0))))
    own = Contender(
        "jaxad",
        lambda given: program.call(fixed, given),
        fetch=lambda result: jax.device_get(result[0]),
        flops=program.flops,
        program=program,
        compile_seconds=program.seconds,
    )
    return Case(
        setting.name_of(name),
        draw,
        (own, rival, *others),
        samples,
        reference=lambda drawn: rival.fetch(rival.run(rival.put(drawn))),
        tolerance=setting.tolerance,
        facts={**setting.facts, "work": name},
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--batch", type=int, help="pictures of a meta-iteration; default: the preset's")
    parser.add_argument("--parts", default="cycles,predictor,sampler")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", type=pathlib.Path, help="file to write")
    options = parser.parse_args()
    method = methods.get("neural_batch")
    batch = options.batch or method.presets[options.preset].config.get("batch_size", method.config().batch_size)
    setting = bench.set_up(method, preset=options.preset, batch=batch, tolerance=1e-4)
    spec = bench.spec_of(setting)
    state = bench.start(setting, setting.cfg, spec)
    loops = {"torch": peers.make("neural_batch", state, spec)}
    loops |= {
        f"torch, {form}": peers.make("neural_batch", state, spec, form=form) for form in peers.forms("neural_batch")
    }
    makers = {"cycles": cycles_case, "predictor": predictor_case, "sampler": sampler_case}
    cases = (makers[name](setting, state, loops) for name in options.parts.split(","))
    race(cases, settings={"backend": jax.default_backend()}, rounds=options.rounds, out=options.json)


if __name__ == "__main__":
    allocator.keep_freed_memory()  # as the command line does
    main()
