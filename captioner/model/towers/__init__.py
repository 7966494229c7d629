"""Vision towers: a family is one file here and one entry in `table`.

Knows how a tower is found, checked, built and asked for its states; nothing of projectors and language models. Without
torch and transformers until a tower is built.
"""
