"""One fit of a projector without Ray: labels, the features of their images, the fit itself.

Knows no Ray. A caption table is a format of labels, read by SQL; nothing here writes one.
"""
