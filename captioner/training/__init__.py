"""One fit of a projector without Ray: labels, the features of their images, the fit itself.

Knows no Ray and no caption table.
"""
