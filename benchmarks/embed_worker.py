"""Embeds with onnxruntime or sentence-transformers, for `embed_peers.py`, in the Python that has them.

    PYTHON benchmarks/embed_worker.py onnxruntime|sentence-transformers FOLDER mean|cls|lasttoken THREADS

Reads a JSON list of texts from each line, and prints their vectors in base64 as a JSON list. onnxruntime runs the model
as torch exports it, with the fusions of its own optimizer, on texts sorted by length, so that little is padding.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

Vectors = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
# Texts of a batch: of 1 to 64, the fastest.
AT_ONCE = 8


def onnx_file(folder: Path) -> Path:
    """The model as ONNX, fused where onnxruntime can; written beside it if it is not there."""
    import torch
    import transformers
    from onnxruntime.transformers import optimizer

    path = folder / "onnx" / "model_optimized.onnx"
    if path.exists():
        return path
    path.parent.mkdir(exist_ok=True)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

    class States(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    # A mask of ones alone would be left out of the graph.
    tokens, mask = torch.ones(2, 8, dtype=torch.long), torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    plain = path.with_name("model.onnx")
    torch.onnx.export(
        States().eval(),
        (tokens, mask),
        plain,
        input_names=["input_ids", "attention_mask"],
        output_names=["states"],
        dynamo=True,
        dynamic_shapes=(sizes, sizes),
        verbose=False,
    )
    heads, width = model.config.num_attention_heads, model.config.hidden_size
    fused = optimizer.optimize_model(str(plain), model_type="bert", num_heads=heads, hidden_size=width, opt_level=0)
    fused.save_model_to_file(str(path), use_external_data_format=True)
    return path


def by_onnxruntime(folder: Path, pooling: str, threads: int) -> Callable[[list[str]], Vectors]:
    """Tokenizer, session and pooling."""
    import onnxruntime
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    limit = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    tokenizer.enable_truncation(limit)
    tokenizer.enable_padding()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(onnx_file(folder), options, providers=["CPUExecutionProvider"])

    def embed(texts: list[str]) -> Vectors:
        order = sorted(range(len(texts)), key=lambda at: -len(texts[at]))
        vectors: list[Vectors] = [np.zeros(0, np.float32)] * len(texts)
        for start in range(0, len(texts), AT_ONCE):
            chosen = order[start : start + AT_ONCE]
            batch = tokenizer.encode_batch([texts[at] for at in chosen])
            mask = np.array([item.attention_mask for item in batch], np.int64)
            given = {"input_ids": np.array([item.ids for item in batch], np.int64), "attention_mask": mask}
            (states,) = session.run(None, given)
            for at, row, own in zip(chosen, states, mask, strict=True):
                kept = row[: own.sum()]
                vector = kept.mean(0) if pooling == "mean" else kept[0 if pooling == "cls" else -1]
                vectors[at] = vector / np.linalg.norm(vector)
        return np.stack(vectors)

    return embed


def by_sentence_transformers(folder: Path, pooling: str, threads: int) -> Callable[[list[str]], Vectors]:
    """The model as it is, in fp32; it sorts texts by length itself."""
    del pooling
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})

    def embed(texts: list[str]) -> Vectors:
        vectors: Vectors = model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
        return vectors

    return embed


def main() -> None:
    """Answer line by line; the first line says that the model is there."""
    library, folder, pooling, threads = sys.argv[1:]
    load = by_onnxruntime if library == "onnxruntime" else by_sentence_transformers
    output, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    embed = load(Path(folder), pooling, int(threads))
    print("ready", file=output, flush=True)
    for line in sys.stdin:
        vectors = embed(json.loads(line))
        answer = [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
        print(json.dumps(answer), file=output, flush=True)


if __name__ == "__main__":
    main()
