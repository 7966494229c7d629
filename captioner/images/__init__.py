"""From the bytes of an image file to `uint8[3, S, S]`, in tiles `uint8[T, 3, S, S]`, or a reject with a typed reason.

The only place where an image is decoded. Knows Pillow, and how vision towers want their images; knows no store, no
torch and no Ray. Normalisation belongs on the device, so that an image is moved as 3 bytes a pixel.

    preprocessing.py   size, crop, padding, tiles and normalisation from a preprocessor config
    grids.py           which grid of tiles an image gets
    formats.py         which formats are read, and what other bytes seem to be
    colours.py         any Pillow mode -> L or RGB
    jpegs.py           JPEGs by simplejpeg, which is quicker than Pillow
    second_tries.py    valid images that Pillow refuses, in bytes that it reads
    orientation.py     the turn that EXIF asks for
    resampling.py      Pillow's resize of a part of an image, faster
    square.py          reduce, resize, crop and turn: the squares that the model reads
    reader.py          `decode`: one image, in this process
    pixel_blocks.py    memory that child processes write pixels into
    child.py           the same in a child process, with a hard deadline and a limit on memory
    decoder.py         `Decoder`: one child process for each core to use
    thumbnails.py      small WebP files of whole images, for pages

A job uses `Decoder`: an image that hangs or crashes C code costs one child process and becomes one reject.
"""

from captioner.images.decoder import Decoder
from captioner.images.preprocessing import Preprocessing
from captioner.images.reader import Decoded, decode, pixels_of

__all__ = ["Decoded", "Decoder", "Preprocessing", "decode", "pixels_of"]
