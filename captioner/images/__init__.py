"""From the bytes of an image file to `uint8[3, S, S]`, or a reject with a typed reason.

The only place where an image is decoded. Knows Pillow, and CLIP's resize and crop; knows no store, no torch and no Ray:
normalisation belongs on the device, so that an image travels as 3 bytes a pixel.

    preprocessing.py   what a CLIP's preprocessor config asks of an image
    formats.py         which formats are read, and what other bytes seem to be
    colours.py         any Pillow mode -> L or RGB
    resampling.py      Pillow's resize, as two products of small matrices
    reader.py          `decode`: one image, in this process
    child.py           the same in a child process, with a hard deadline and a limit on memory
    decoder.py         `Decoder`: as many children as there are cores to use

A job uses `Decoder`: an image that hangs or crashes C code then costs one child process and becomes one reject.
"""

from captioner.images.decoder import Decoder
from captioner.images.preprocessing import Preprocessing
from captioner.images.reader import Decoded, decode, pixels_of

__all__ = ["Decoded", "Decoder", "Preprocessing", "decode", "pixels_of"]
