"""One rank of a tensor-parallel group that runs many tiny models in turn: `parallel_rank.py RANK RANKS FOLDER`.

FOLDER has a folder for each model, and the file by which the ranks find each other. Each rank makes the same steps;
rank 0 tells the others what it has sampled. Rank 0 also runs each model alone, and prints a line of JSON for each.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from lmserve.errors import LmserveError
from lmserve.model import RunnerOptions, load_runner, open_checkpoint
from lmserve.model.adapters import open_adapter
from lmserve.model.checkpoint import Checkpoint
from lmserve.model.shares import Place, Share
from lmserve.model.torch_ranks import Ranks
from model_driver import Driver, greedy
from torch import distributed

STEPS = 8
ADAPTER = "adapter"  # in the folder of a model
LONGEST = 128
OPTIONS = {
    "device": "cpu",
    "ops": "torch",
    "max_batch": 4,
    "max_batch_tokens": 128,
    "kv_memory": 4 << 20,
    "threads": 1,
}


class Told:
    """A runner whose samples all ranks know."""

    def __init__(self, runner) -> None:
        self.runner = runner
        self.info, self.buffers = runner.info, runner.buffers

    def launch(self, n_tokens, n_seqs, n_rows, edits) -> None:
        self.runner.launch(n_tokens, n_seqs, n_rows, edits)

    def collect(self) -> None:
        self.runner.collect()
        sampled = torch.from_numpy(self.buffers.sampled)
        distributed.broadcast(sampled, src=0)


def load_adapter(runner, path: Path, checkpoint: Checkpoint) -> None:
    """Load the adapter that the model has, if any."""
    if (path / ADAPTER).exists():
        runner.load_adapter(1, open_adapter(path / ADAPTER, checkpoint, max_rank=8))


def tokens_of(runner, *, adapted: bool) -> list[list[int]]:
    """Greedy tokens of two prompts together, in chunks; where there is an adapter, once more with it."""
    greedy(runner)
    driver = Driver(runner)
    generator = np.random.default_rng(7)
    prompts = [generator.integers(0, 199, length) for length in (1, 40)]
    sequences = [driver.start(prompt) for prompt in prompts * (1 + adapted)]
    for sequence in sequences[2:]:
        sequence.adapter = 1
    driver.generate(sequences, STEPS, chunk=16, logits=False)
    return [sequence.tokens for sequence in sequences]


def vectors_of(runner) -> list[list[float]]:
    ids, bounds = np.arange(5, 36, dtype=np.int32), np.array([0, 4, 31], np.int32)
    return np.asarray(runner.embed(ids, bounds), np.float64).round(4).tolist()


def result(runner, path: Path) -> list:
    adapted = (path / ADAPTER).exists()
    return tokens_of(runner, adapted=adapted) if runner.info.can_generate else vectors_of(runner)


def main() -> None:
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    place = Place(Share(rank, ranks), str(folder / "store"))
    joined = Ranks.join(place, torch.device("cpu"))
    # All models are run by one group.
    Ranks.join = classmethod(lambda cls, place, device: joined)
    for path in sorted(each for each in folder.iterdir() if each.is_dir()):
        checkpoint = open_checkpoint(path)
        options = OPTIONS | {"max_model_len": min(LONGEST, checkpoint.max_model_len)}
        said: dict[str, object] = {"model": path.name}
        try:
            runner = load_runner(checkpoint, RunnerOptions(**options, tensor_parallel=ranks), place)
        except LmserveError as error:
            said["error"] = str(error)
        else:
            load_adapter(runner, path, checkpoint)
            found = result(Told(runner) if runner.info.can_generate else runner, path)
            said |= {"bytes": runner.info.weight_bytes, "found": found}
        if rank == 0:
            alone = load_runner(checkpoint, RunnerOptions(**options))
            load_adapter(alone, path, checkpoint)
            said |= {"alone": result(alone, path), "alone_bytes": alone.info.weight_bytes}
            sys.stdout.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
