"""Runs llama.cpp's converter on models without a tokenizer: llama_cpp_convert.py LLAMA_CPP FOLDER...

Each folder gets a model.gguf. Prints a JSON line for each: the folder, and why it could not be converted (or null).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# The last three are read where a model is called phi3.
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>", "<s>", "</s>"]


def add_what_is_published(path: Path) -> None:
    """Write what published configurations say and transformers leaves out, or calls otherwise."""
    config = json.loads(path.read_text())
    added: dict[str, Any] = {}
    architecture = config["architectures"][0]
    if architecture in ("DeepseekV3ForCausalLM", "Glm4MoeLiteForCausalLM", "MiniMaxM2ForCausalLM"):
        added["scoring_func"] = "sigmoid"
    if "dense" in config.get("mlp_layer_types", []):
        added["first_k_dense_replace"] = config["mlp_layer_types"].count("dense")
    if architecture == "MiniMaxM2ForCausalLM":
        added["rotary_dim"] = int(config["head_dim"] * config["rope_parameters"]["partial_rotary_factor"])
    elif architecture == "Cohere2ForCausalLM":
        added["rotary_pct"] = 1.0
    elif architecture == "PhimoeForCausalLM":
        added["architectures"] = ["PhiMoEForCausalLM"]
    elif architecture == "GraniteMoeHybridForCausalLM":
        names = {"full_attention": "attention", "linear_attention": "mamba"}
        added["layer_types"] = [names[kind] for kind in config["layer_types"]]
    path.write_text(json.dumps(config | added))


def main() -> None:
    """Convert all folders."""
    source, *folders = map(Path, sys.argv[1:])
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    import gguf
    from conversion import ModelBase, get_model_class

    def set_vocab(model: Any) -> None:
        size = model.hparams["vocab_size"]
        kinds = gguf.TokenType
        writer = model.gguf_writer
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(SPECIAL + [f"t{number}" for number in range(len(SPECIAL), size)])
        writer.add_token_types([kinds.CONTROL] * len(SPECIAL) + [kinds.NORMAL] * (size - len(SPECIAL)))
        writer.add_token_merges([f"t {len(SPECIAL)}"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(0)

    ModelBase.no_mtp = True
    for folder in folders:
        error = None
        try:
            add_what_is_published(folder / "config.json")
            hparams = ModelBase.load_hparams(folder, is_mistral_format=False)
            if "moe" not in hparams.get("layers_block_type", ["moe"]):
                # transformers gives every Nemotron-H the keys of experts; published ones without any do not have them.
                for key in [key for key in hparams if "expert" in key or key in ("n_group", "topk_group")]:
                    del hparams[key]
                letters = {"linear_attention": "M", "full_attention": "*", "mlp": "-"}
                pattern = [letters[kind] for kind in hparams["layers_block_type"]]
                hparams["hybrid_override_pattern"] = "".join(pattern)
            # Some read the tokenizer of a published model for what it says beside the vocabulary.
            words = {f"t{at}": at for at in range(len(SPECIAL), hparams["vocab_size"])}
            tokens = [{"id": at, "content": name, "special": True} for at, name in enumerate(SPECIAL)]
            (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens, "model": {"vocab": words}}))
            kind = get_model_class(hparams["architectures"][0])
            kind.set_vocab = set_vocab
            kind(folder, gguf.LlamaFileType.ALL_F32, folder / "model.gguf", hparams=hparams).write()
        except (Exception, SystemExit) as problem:  # noqa: BLE001 - whatever it finds in the next folder
            error = f"{type(problem).__name__}: {problem}".splitlines()[0]
        sys.stdout.write(json.dumps([str(folder), error]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
