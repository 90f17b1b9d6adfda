"""A trained model in the forms in which others load it: merged in 16 bits as safetensors, or one GGUF file.

Owns merging, both formats, their model card and the comparison with the adapter on its base. Needs no service, and
publishes nothing. Invariant: an export that answers otherwise than the adapter does fails.
"""
