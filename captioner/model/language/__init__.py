"""Language models: a family is one file here and one entry in `table`.

Knows how a language model and its tokenizer are found, checked and built, and how its family writes a turn; nothing of
images. Without torch and transformers until a model is built.
"""
