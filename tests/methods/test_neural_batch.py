"""What makes it the Neural Batch Sampler: profiles, cycles, rewards, and a sampler that learns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad import score, train
from jaxad.core import Source, Spec, as_arrays, spec_of
from jaxad.methods import neural_batch as method
from jaxad.methods.neural_batch import Pool, Rollout, Weights
from jaxad.nn.conv import lowering_for
from jaxad.nn.pixel_classifier import dilated3

FULL = method.NeuralBatchConfig()
NUMBERS = np.random.default_rng(0)
SMALLEST = {
    "patch": 4,
    "stride": 2,
    "grid": 2,
    "ae_features": (4,),
    "ae_code": 4,
    "ae_steps": 4,
    "profile_length": 2,
    "ae_batch": 4,
    "walkers": 2,
    "episodes": 4,
    "batch_size": 8,
    "profile_pictures": 3,
    "predictor_features": (4,),
    "predictor_steps": 2,
    "predictor_batch": 1,
    "policy_features": (4,),
    "policy_hidden": 8,
    "eval_cycles": 1,
    "steps": 4,
    "reach": "crop",
}


def config(**fields):
    return method.NeuralBatchConfig(**{**SMALLEST, **fields})


def sources(size=8, normal=6, labelled=3, seed=0):
    numbers = np.random.default_rng(seed)
    image = numbers.integers(0, 255, (normal + labelled, size, size, 3), np.uint8)
    mask = np.zeros((labelled, size, size), np.uint8)
    mask[:, 2:5, 1:6] = 1
    known = Source(image=image[normal:], label=np.ones(labelled, np.int32), mask=mask)
    return {"train": Source(image=image[:normal], label=np.zeros(normal, np.int32)), "labelled": known}


@functools.cache
def prepared(**fields):
    """(a detector that knows its labelled pictures, a batch of normal pictures)."""
    cfg, data = config(**fields), jax.device_put(sources())
    phase = method.phases(cfg)[0]

    @jax.jit
    def start(key):
        state = train.init(method.METHOD, key, as_arrays(cfg), spec_of(data))
        return train.some_steps(phase, key, state, data["labelled"], jnp.int32(0), 1)[0]

    return start(jax.random.key(0)), jax.random.uniform(jax.random.key(1), (cfg.batch_size, 8, 8, 3))


def batch_of(images):
    rows = len(images)
    return method.Batch(
        images, jnp.zeros(rows, int), jnp.zeros(images.shape[:3]), jnp.arange(rows), jnp.ones(rows, bool)
    )


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def shapes_of(cfg, side, rows=15):
    spec = Spec((side, side, 3), {"train": 209, "labelled": rows})
    method.check(cfg, spec)
    return jax.eval_shape(lambda: train.init(method.METHOD, jax.random.key(0), cfg, spec))


# --- networks -----------------------------------------------------------------------------------------------------


def test_the_full_networks_have_the_known_numbers_of_parameters():
    """Of the layers as the later system has them; counted by hand from the table of layers."""

    def params_of(state):
        zeros = jax.tree.map(jnp.zeros_like, _first(state))
        return jax.eval_shape(lambda: method.variables_of(state.cfg, zeros, 3))["params"]

    state, skip = shapes_of(FULL, 256), dataclasses.replace(FULL, ae_skip=True)
    params = params_of(state)
    assert count(params) == 4_902_923 and count(params_of(shapes_of(skip, 256))) == 5_951_499
    encoder = [
        count(layer) for name, layer in params.items() if name.split("_")[0] in ("down", "keep", "narrow", "code")
    ]
    assert sum(encoder) == 2_031_624
    assert count(state.params["policy"]) == 335_177
    assert count(state.params["predictor"]) == 9_113 == 288 * 10 + 6_233
    assert count(shapes_of(dataclasses.replace(FULL, profile_length=3), 256).params["predictor"]) == 288 * 3 + 6_233


def _first(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[2:], leaf.dtype), state.snapshots)


def test_an_autoencoder_goes_to_rows_and_back():
    cfg = config()
    weights = jax.jit(lambda key: method.fresh_weights(key, cfg, 3))(jax.random.key(0))
    variables = method.variables_of(cfg, weights, 3)
    for part in Weights._fields:
        leaves, rows = jax.tree.leaves(variables[part]), np.asarray(getattr(weights, part))
        assert len(rows) == sum(-(-leaf.size // 128) for leaf in leaves)
        again = np.concatenate([leaf.ravel() for leaf in leaves])
        assert np.count_nonzero(rows) == np.count_nonzero(again)
        np.testing.assert_array_equal(rows[rows != 0], again[again != 0])
    assert set(variables["params"]) >= {"down_0", "code", "open", "last"}
    kernel = variables["params"]["down_0"]["kernel"]
    assert kernel.shape == (4, 4, 3, 4) and float(abs(kernel).max()) <= 1 / np.sqrt(48)
    means = [leaf["mean"] for leaf in variables["batch_stats"].values()]
    assert all(not mean.any() for mean in means) and all(v["var"].all() for v in variables["batch_stats"].values())


@pytest.mark.parametrize(("inputs", "outputs"), [(2, 5), (5, 2)])
def test_dilated_layers_are_the_same_in_both_forms(inputs, outputs):
    image = jnp.asarray(NUMBERS.normal(size=(2, 6, 7, inputs)), jnp.float32)
    kernel = jnp.asarray(NUMBERS.normal(size=(3, 3, inputs, outputs)), jnp.float32)
    for dilation in (1, 2):
        forms = (dilated3(image, kernel, dilation=dilation, impl=impl) for impl in ("conv", "gemm", "auto"))
        conv, gemm, chosen = forms
        np.testing.assert_allclose(gemm, conv, atol=1e-4)
        np.testing.assert_allclose(chosen, conv, atol=1e-4)
    slow = sum(
        image[0, 3 + 2 * a, 3 + 2 * b] @ kernel[a + 1, b + 1] for a in (-1, 0, 1) for b in (-1, 0, 1)
    )  # the middle pixel, dilation 2
    np.testing.assert_allclose(gemm[0, 3, 3], slow, atol=1e-4)


def test_the_predictor_sees_31_pixels():
    cfg = dataclasses.replace(FULL, conv_impl="conv")
    network = method.predictor_of(cfg)
    variables = jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.zeros((1, 40, 40, 10)), train=True))
    variables = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1), variables)
    seen = jax.grad(lambda x: network.apply(variables, x, train=False)[0, 20, 20])(jnp.ones((1, 40, 40, 10)))
    rows = np.flatnonzero(abs(seen).sum(axis=(0, 2, 3)))
    assert (rows.min(), rows.max()) == (5, 35)


# --- profiles -----------------------------------------------------------------------------------------------------


def test_statistics_are_freed_of_their_start():
    layers = {"one": {"mean": jnp.zeros(3), "var": jnp.ones(3)}, "two": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}
    starts = method.starts_of(layers)
    for leaf, start in zip(jax.tree.leaves(layers), jax.tree.leaves(starts), strict=True):
        np.testing.assert_array_equal(leaf, start)
    seen = jax.tree.map(lambda leaf: 0.7 + jnp.arange(leaf.size, dtype=float), layers)
    running = layers
    for _ in range(3):
        running = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, running, seen)
    found = method.corrected(running, starts, jnp.int32(3))
    for leaf, expected in zip(jax.tree.leaves(found), jax.tree.leaves(seen), strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=1e-5)
    for leaf, start in zip(
        jax.tree.leaves(method.corrected(layers, starts, jnp.int32(0))), jax.tree.leaves(layers), strict=True
    ):
        np.testing.assert_array_equal(leaf, start)


@pytest.fixture(scope="module")
def weights():
    return jax.jit(lambda key: method.fresh_weights(key, config(), 3))(jax.random.key(3))


def test_errors_are_taken_tile_by_tile(weights):
    cfg = config()
    tile = jax.random.uniform(jax.random.key(0), (1, 4, 4, 3))
    rebuilt = method.autoencoder_of(cfg).apply(method.variables_of(cfg, weights, 3), tile, train=False)
    expected = abs(tile - rebuilt).mean(axis=-1)
    np.testing.assert_allclose(
        method.loss_map(cfg, weights, jnp.tile(tile, (1, 2, 3, 1))), jnp.tile(expected, (1, 2, 3))
    )
    other = jax.random.uniform(jax.random.key(1), (2, 8, 12, 3)).at[1, 4:, 8:].set(tile[0])
    np.testing.assert_allclose(method.loss_map(cfg, weights, other)[1, 4:, 8:], expected[0], rtol=1e-5)


def test_tiles_reach_beyond_pictures_and_shifted_tilings_are_averaged(weights):
    image = jax.random.uniform(jax.random.key(2), (1, 6, 8, 3))
    padded = jnp.pad(image, ((0, 0), (0, 2), (0, 0), (0, 0)), mode="edge")
    plain = method.loss_map(config(), weights, image)
    np.testing.assert_allclose(plain, method.loss_map(config(), weights, padded)[:, :6], rtol=1e-5)
    shifted = method.loss_map(config(tile_shifts=2), weights, image)
    maps = []
    for a, b in ((0, 0), (0, 2), (2, 0), (2, 2)):
        around = jnp.pad(image, ((0, 0), (a, (2 - a) % 4), (b, b), (0, 0)), mode="edge")
        maps.append(method.loss_map(config(), weights, around)[:, a : a + 6, b : b + 8])
    np.testing.assert_allclose(shifted, jnp.stack(maps).mean(axis=0), rtol=1e-5)


def test_profiles_are_the_errors_after_the_last_steps_oldest_first():
    """Of five steps: a cycle of three gives the second and third error, a stride of 2 the first, third and fifth."""
    state, images = prepared()

    def profile_of(steps, length, stride=1):
        fields = {"ae_steps": steps, "profile_length": length, "profile_stride": stride, "sampler": "random"}
        cfg = dataclasses.replace(state.cfg, **fields)
        pool = Pool(images[:3].reshape(3, 8, -1), jnp.ones((3, 4, 4)), jnp.zeros((3, 4, 4)))
        numbers = method.draw_numbers(jax.random.key(5), dataclasses.replace(cfg, ae_steps=5))
        numbers = numbers._replace(moves=numbers.moves[:steps])
        cut = pytest.MonkeyPatch()
        with cut.context() as patched:
            patched.setattr(method, "draw_numbers", lambda key, cfg: numbers)
            run = jax.jit(lambda p: method.cycle(jax.random.key(5), cfg, None, p, 3, jnp.float32(0)).snapshots)
            return method.profile(cfg, run(pool), images[:2])

    whole = profile_of(5, 5)
    assert whole.shape == (2, 5, 8, 8) and float(abs(whole[:, 0] - whole[:, 2]).max()) > 1e-4
    np.testing.assert_allclose(profile_of(3, 2), whole[:, 1:3], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(profile_of(5, 3, stride=2), whole[:, ::2], rtol=1e-4, atol=1e-6)


def test_the_predictor_reads_cosines_of_log_errors():
    """Of T = 3: level, slope and bend."""
    errors = np.array([0.01, 0.03, 0.09])
    level, slope, bend = np.log(errors + 0.01) @ np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]).T
    expected = [level / np.sqrt(3), slope / np.sqrt(2), bend / np.sqrt(6)]
    found = method.shape_of(jnp.asarray(errors, jnp.float32)[:, None, None])
    np.testing.assert_allclose(found[:, 0, 0], expected, rtol=1e-4)
    assert method.shape_of(jnp.full((1, 2, 1), 0.09)) == pytest.approx(np.log(0.1), rel=1e-4)


def test_the_statistics_of_an_autoencoder_are_those_of_its_last_patches(weights):
    cfg = config()
    patches = jax.random.uniform(jax.random.key(0), (4, 4, 4, 3))
    network, variables = method.autoencoder_of(cfg), method.variables_of(cfg, weights, 3)
    rebuilt, updated = network.apply(variables, patches, train=True, mutable=["batch_stats"])
    again = network.apply({**variables, **updated}, patches, train=False)
    np.testing.assert_allclose(again, rebuilt, atol=1e-5)


def test_patches_reach_the_border_of_a_picture_with_a_margin():
    images = jnp.arange(8 * 12, dtype=jnp.float32).reshape(1, 1, 8, 12, 1)
    drawn = jnp.asarray(np.random.default_rng(0).random((200, 4)), jnp.float32)
    for reach, cells in (("picture", (4, 6)), ("crop", (2, 4))):
        cfg = config(reach=reach)
        pool = jax.tree.map(lambda leaf: leaf[0], method._pool_of(cfg, images, jnp.zeros((1, 1, 8, 12))))
        _, centre = method._arrive(cfg, pool, 1, jnp.float32(0), drawn)
        corners = method._cut(cfg, pool, jnp.zeros(len(centre), int), centre, 4)[..., 0]
        around = 2 if reach == "crop" else 0
        assert corners.min() == around * 13 and corners.max() == 8 * 12 - 1 - around * 13
        assert len(set(map(tuple, np.asarray(centre)))) == (cells[0] - 1) * (cells[1] - 1)


# --- rewards ------------------------------------------------------------------------------------------------------


def test_the_loss_of_an_undecided_predictor_and_its_gradient():
    masks = jnp.array([[1.0, 0.0, 0.0, 0.0]])
    found = method.pixel_loss(jnp.zeros((1, 4)), masks, jnp.float32(0.3)).mean()
    assert float(found) == pytest.approx(np.log(2) * (0.25 + 0.3 * 0.75))
    logits = jnp.array([[0.4, -1.0, 2.0, 0.0]])
    grad = jax.grad(lambda x: method.pixel_loss(x, masks, jnp.float32(0.3)).mean())(logits)
    q = jax.nn.sigmoid(logits)
    np.testing.assert_allclose(grad, -(masks * (1 - q) - 0.3 * (1 - masks) * q) / 4, rtol=1e-5)


def test_the_balance_is_that_of_the_labelled_pixels():
    state, _ = prepared()
    assert float(method.balance(state)) == pytest.approx(15 / 49)
    late = state._replace(cfg=dataclasses.replace(state.cfg, alpha_schedule="linear_decay"), updates=jnp.int32(3))
    assert float(method.balance(late)) == pytest.approx(0.25)


def test_coverage_is_paid_by_visits_before():
    """-0.5 for a patch never seen, -sigmoid(1) after one visit, -sigmoid(2) after two: one picture, one place."""
    cfg = config(sampler="random", walkers=1, ae_batch=1, ae_steps=3, profile_length=1)
    pool = Pool(jnp.zeros((1, 8, 8 * 3)), jnp.full((1, 4, 4), 1e-4), jnp.ones((1, 4, 4)))
    run = jax.jit(lambda key: method.cycle(key, cfg, None, pool, 1, jnp.float32(0)))
    found = run(jax.random.key(0))
    np.testing.assert_allclose(found.rollout.cover.ravel(), [-0.5, -0.731059, -0.880797], rtol=1e-5)
    np.testing.assert_allclose(found.rollout.clone, 0.500025, atol=1e-6)
    assert float(found.coverage) == 0.25 and (found.rollout.anomalous == 1).all()


def test_advantages_of_a_small_case():
    """Two episodes of two moves of one walker each, by hand; then they are brought to a root mean square of 1."""
    clone, cover = jnp.array([[1.0, 2.0], [3.0, 4.0]])[:, :, None, None], jnp.zeros((2, 2, 1, 1))
    action = jnp.array([[1, 0], [2, 3]])[:, :, None, None]
    rollout = Rollout(None, None, None, None, action, clone, cover, None)
    end = jnp.array([-1.0, -3.0])
    found = method.advantages_of(rollout, end, beta=jnp.float32(0.5), leave_cost=0.4)[..., 0]
    returns = np.array([[0.5 * 2.6 / 2 - 0.5, 0.5 * 1.6 / 2 - 0.5], [0.5 * 7 / 2 - 1.5, 0.5 * 4 / 2 - 1.5]])
    apart = returns - returns[::-1]
    np.testing.assert_allclose(found, apart / np.sqrt((apart**2).mean()), rtol=1e-5)
    only_end = method.advantages_of(rollout, end, beta=jnp.float32(0), leave_cost=0.4)
    np.testing.assert_allclose(only_end[..., 0], [[1, 1], [-1, -1]], rtol=1e-6)


# --- cycles and updates -------------------------------------------------------------------------------------------


def step(state, images, key=0):
    return jax.jit(method.sampler_step)(jax.random.key(key), state, batch_of(images))


@pytest.fixture(scope="module")
def stepped():
    state, images = prepared()
    return state, images, *step(state, images)


def test_the_first_policy_is_nearly_uniform(stepped):
    _, _, _, found = stepped
    assert float(found["entropy"]) == pytest.approx(np.log(9), abs=0.01)
    assert sum(float(found[f"action_{a}"]) for a in range(9)) == pytest.approx(1)


def test_the_sampler_gets_a_gradient_and_changes_its_actions(stepped):
    state, images, after, found = stepped
    assert float(found["policy_gradient"]) > 1e-6
    crops = jax.random.uniform(jax.random.key(0), (3, 8, 8, 5))
    logits = [method.policy_of(s.cfg).apply({"params": s.params["policy"]}, crops) for s in (state, after)]
    assert float(abs(jax.nn.softmax(logits[1]) - jax.nn.softmax(logits[0])).max()) > 1e-5
    again, more = step(after, images, key=1)
    assert int(again.updates) == 2 and float(more["beta"]) < float(found["beta"]) == 1


def test_a_larger_batch_has_more_episodes_not_larger_ones(monkeypatch):
    state, images = prepared()
    seen, run = [], method.run_cycles
    monkeypatch.setattr(method, "run_cycles", lambda *a, episodes: seen.append(episodes) or run(*a, episodes=episodes))
    for times in (1, 2):
        batch = batch_of(jnp.tile(images, (times, 1, 1, 1)))
        traced_anew = lambda s, b: method.sampler_step(jax.random.key(0), s, b)  # noqa: E731
        jax.eval_shape(traced_anew, state, batch)
    assert seen == [state.cfg.episodes, 2 * state.cfg.episodes]


def test_each_loss_moves_its_own_network_only():
    """With nothing to gain the policy stays; the predictor's steps move the predictor."""
    state, images = prepared()
    idle = dataclasses.replace(state.cfg, entropy_weight=jnp.float32(0))
    shapes = jax.eval_shape(lambda s: method.run_cycles(jax.random.key(0), s, images, episodes=4), state)
    cycles = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)
    fit = jax.jit(lambda s: method.fit_sampler(s, cycles, jnp.zeros((4, 4 * 2, 2))))
    stays, norm, _ = fit(state._replace(cfg=idle))
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), stays.params, state.params)
    assert float(norm) < 1e-6 and max(jax.tree.leaves(moved["predictor"])) == 0
    assert float(fit(state)[1]) > 1e-6  # the entropy bonus alone
    profiles, masks = jnp.ones((4, 3, 2, 8, 8)), jnp.ones((4, 3, 8, 8))
    fitted, _ = jax.jit(method.fit_predictor)(jax.random.key(0), state, profiles, masks)
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), fitted.params, state.params)
    assert max(jax.tree.leaves(moved["policy"])) == 0 and max(jax.tree.leaves(moved["predictor"])) > 1e-4


def test_the_gradient_from_stored_observations_is_that_of_the_rollout():
    """What walkers saw can be put together again: the stored actions are the best of logits plus the drawn noise."""
    state, images = prepared()
    cfg = state.cfg
    share = jnp.float32(0.5)
    pool = Pool(images[:3].reshape(3, 8, -1), jnp.ones((3, 4, 4)), jnp.zeros((3, 4, 4)))
    key = jax.random.key(9)
    found = jax.jit(lambda s: method.cycle(key, s.cfg, s.params["policy"], pool, 2, share))(state).rollout
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[3:]), found)
    seen = method.observe(cfg, pool, flat.image, flat.centre, flat.error, flat.visits)
    logits = method.policy_of(cfg).apply({"params": state.params["policy"]}, seen)
    drawn = method.draw_numbers(jax.random.split(key)[1], cfg).moves.reshape(-1, 13)
    np.testing.assert_array_equal(jnp.argmax(logits - jnp.log(-jnp.log(drawn[:, :9])), axis=-1), flat.action)
    assert float(flat.visits.max()) >= 1 and float(flat.error.min()) > 0


@pytest.mark.parametrize("walkers", [1, 4])
def test_every_step_takes_as_many_patches_whatever_the_walkers(walkers):
    state, images = prepared()
    cfg = dataclasses.replace(state.cfg, walkers=walkers, sampler="random")
    pool = Pool(images[:3].reshape(3, 8, -1), jnp.ones((3, 4, 4)), jnp.zeros((3, 4, 4)))
    run = jax.jit(lambda key: method.cycle(key, cfg, None, pool, 3, jnp.float32(0)))
    found = run(jax.random.key(0))
    assert found.rollout.action.shape == (4, 4 // walkers, walkers) and bool(jnp.isfinite(found.loss))
    for a, b in zip(jax.tree.leaves(run(jax.random.key(0))), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(a, b)


def test_walkers_arrive_everywhere_and_at_labelled_pictures_in_their_share():
    cfg = config()
    pool = Pool(jnp.zeros((5, 12, 8 * 3)), jnp.zeros((5, 6, 4)), jnp.zeros((5, 6, 4)))
    drawn = jax.random.uniform(jax.random.key(0), (4000, 4))
    image, centre = method._arrive(cfg, pool, 3, jnp.float32(0.25), drawn)
    shares = np.bincount(image, minlength=5) / 4000
    np.testing.assert_allclose(shares, [0.25, 0.25, 0.25, 0.125, 0.125], atol=0.03)
    assert set(map(tuple, np.asarray(centre))) == {(2, 2), (3, 2), (4, 2)}


# --- the whole ----------------------------------------------------------------------------------------------------


def test_it_runs_without_labels_and_scores_the_mean_of_the_profile():
    cfg, data = config(predictor="none", sampler="random"), jax.device_put(sources())
    assert [phase.name for phase in method.phases(config(predictor="none"))] == ["sampler", "profile"]
    assert [phase.name for phase in method.phases(cfg)] == ["profile"]
    method.check(cfg, Spec((8, 8, 3), {"train": 6}))
    for progress in train.drive(method.METHOD, jax.random.key(0), cfg, {"train": data["train"]}):
        state = progress.state
    images = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))
    snapshots = jax.tree.map(lambda leaf: leaf[0], state.snapshots)
    expected = method.profile(state.cfg, snapshots, images).mean(axis=1)
    found = jax.jit(method.score)(state, images)
    np.testing.assert_allclose(found.map, expected, rtol=1e-4)
    np.testing.assert_allclose(found.image, found.map.max(axis=(1, 2)), rtol=1e-6)


def test_transductive_cycles_walk_on_the_pictures_to_be_scored():
    cfg = config(transductive=True)
    assert [phase.source for phase in method.phases(cfg)] == ["labelled", "train", "aux"]
    with pytest.raises(ValueError, match="transductive=true walks on the source 'aux'"):
        method.check(cfg, Spec((8, 8, 3), {"train": 6, "labelled": 3}))
    method.check(cfg, Spec((8, 8, 3), {"train": 6, "labelled": 3, "aux": 4}))


@pytest.mark.parametrize(
    ("fields", "spec", "message"),
    [
        ({"sampler": "best"}, {}, "sampler='best' is unknown; expected one of"),
        ({}, {"labelled": 0}, "no source 'labelled'.*Pass --labels-per-type 5"),
        ({"episodes": 1}, {}, "episodes=1, .*at least 2 episodes"),
        ({"batch_size": 9}, {}, "batch_size=9, .* that divide the batch"),
        ({"profile_length": 5}, {}, "profile_length=5, profile_stride=1, ae_steps=4"),
        ({"patch": 6}, {}, "patch=6, .*expected a patch divisible by 4"),
        ({"stride": 3}, {}, "stride=3, .*and a stride by 2. Pass --set grid=1"),
        ({"patch": 8}, {}, "pictures of 8x8; expected multiples of grid=2, at least 16.*Pass --image-size 16"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields, spec, message):
    with pytest.raises(ValueError, match=f"neural_batch: .*{message}"):
        method.check(config(**fields), Spec((8, 8, 3), {"train": 6, "labelled": 3, **spec}))


def test_the_top_of_the_map_makes_the_image_score():
    state, images = prepared()
    found = jax.jit(method.score)(state._replace(cfg=dataclasses.replace(state.cfg, image_score="top")), images[:2])
    np.testing.assert_allclose(
        found.image, found.map.reshape(2, -1).max(axis=1)
    )  # one pixel in a thousand of 64 is one


@pytest.mark.slow
def test_a_defect_that_colours_show_is_learned():
    """Dark pictures with a bright square: after training its pixels are above the others."""
    numbers = np.random.default_rng(0)
    image = (60 + 10 * numbers.normal(size=(40, 16, 16, 3))).clip(0, 255).astype(np.uint8)
    mask = np.zeros((20, 16, 16), np.uint8)
    for i, (y, x) in enumerate(numbers.integers(0, 12, (20, 2))):
        mask[i, y : y + 4, x : x + 4] = 1
    marked = np.where(mask[..., None] == 1, 230, image[20:]).astype(np.uint8)
    data = {
        "train": Source(image=image[:20], label=np.zeros(20, np.int32)),
        "labelled": Source(image=marked[:10], label=np.ones(10, np.int32), mask=mask[:10]),
    }
    rates = dict.fromkeys(("learning_rate", "predictor_learning_rate", "ae_learning_rate"), 0.01)
    cfg = config(patch=4, steps=25, predictor_steps=8, profile_pictures=6, **rates)
    for progress in train.drive(method.METHOD, jax.random.key(0), cfg, jax.device_put(data)):
        state = progress.state
    test = Source(image=jnp.asarray(marked[10:]), label=jnp.ones(10, jnp.int32))
    maps = score.score_dataset(method.METHOD, state, test).map
    inside, outside = maps[mask[10:] == 1], maps[mask[10:] == 0]
    assert np.median(inside) > np.quantile(outside, 0.95)


def test_the_step_can_be_lowered_for_an_accelerator_without_grouped_convolutions():
    """Episodes have autoencoders of their own: a convolution of theirs would become a grouped one."""
    state, images = prepared()
    with lowering_for(platform="tpu"):
        text = jax.jit(lambda s: method.sampler_step(jax.random.key(0), s, batch_of(images))).lower(state).as_text()
    assert "feature_group_count = 1" in text and "stablehlo.convolution" in text  # those of policy and predictor
    assert not [
        line for line in text.splitlines() if "group_count = " in line and "feature_group_count = 1" not in line
    ]
