"""Projectors, one file each: from image features to the embeddings that a language model reads in place of the image.

Know tensors and their own config; nothing of towers, language models or files. A new one is a file here and an entry of
`projector_config.KINDS`.
"""
