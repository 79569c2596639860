"""A process of a run of several, as `test_distributed.py` starts them: `one_of_several.py WHAT ARGUMENT...`.

Its last line on standard output tells how many pictures it decoded.
"""

import sys

from jaxad.data import decode

reads = []
_picture = decode.picture


def counted(store, name, *args):
    reads.append(name)
    return _picture(store, name, *args)


decode.picture = counted


def stream(data, out, *cluster):
    """Trains from feeds that read while training runs, and saves the scores of the training pictures."""
    import jax
    import numpy as np

    from jaxad import distributed, load, methods, score, shard, train
    from jaxad.data import stream

    coordinator, processes, process = cluster or (None, "1", "0")
    with distributed.session(distributed.Cluster(coordinator, int(processes), int(process))):
        mesh = shard.data_mesh()
        method = methods.get("memae")
        cfg = method.config(**{**method.presets["tiny"].config, "steps": 5, "encoder": (8, 16), "decoder": (8,)})
        feeds = stream.feeds(data, image_size=32, threads=1, mesh=mesh)
        state, log = train.fit_stream(method, jax.random.key(0), cfg, {"train": feeds["train"]}, mesh=mesh)
        del reads[5 * 16 :]  # what is read ahead stays unused
        streamed = len(set(reads)), len(reads)
        source = load(data, image_size=32).sources["train"]
        scores = score.score_dataset(method, state, source)
        if distributed.is_first():
            np.savez(out, loss=log["train"]["loss"], image=scores.image, map=scores.map)
        print(*streamed)


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "stream":
        stream(*arguments)
    else:
        from jaxad.cli import main

        main([what, *arguments])
        print(len(reads))
