"""A world where one image token is not enough, and the rungs of fitting on it. See `__main__`."""
