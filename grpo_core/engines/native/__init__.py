"""The `native` engine: this project's own model in TRL's loop, with a mode for training and one for generating.

`architecture` says which models are supported, `weights` loads them, `adapter` is the trained LoRA and `model` the
arithmetic of a layer. `packed` trains and scores, `decode` generates with the sampler in `sampling`. On a GPU,
`kernels` has the Triton kernels and `fused` the decoding step made of them. `loop` connects both modes with TRL's
trainer, and `engine` with a run.
"""

from typing import Final

FAMILIES: Final = ("llama", "mistral", "qwen2", "qwen3")
"""`model_type` of the families whose layer this is. Qwen2.5 is `qwen2`; SmolLM2 is `llama`. Here because the choice of
the engine imports no torch."""
CAPABILITY: Final = (8, 0)
"""The least compute capability of a GPU: before it none computes in bfloat16."""
