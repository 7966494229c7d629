"""Captions beside their pictures, on one HTML page that needs no server and loads nothing.

    cards.py           the vocabulary: what stands on a page, one card an image
    page.py            cards -> one self-contained file, from page.html, page.css and page.js
    table_rows.py      rows of a table, drawn at random or found by key, without reading the table
    pictures.py        the images behind rows, fetched again
    caption_cards.py   rows and pictures -> cards
    differences.py     two captions, word by word
    comparison.py      two tables: the captions that differ most
    references.py      references of the same images, from a file
    gallery.py         the pages of a table: its rows, or two tables beside each other

Whoever has pictures and texts of his own makes `Card`s of them and calls `write_page`.
"""

from captioner.gallery.cards import Card, Text
from captioner.gallery.gallery import write_comparison, write_gallery
from captioner.gallery.page import Page, write_page

__all__ = ["Card", "Page", "Text", "write_comparison", "write_gallery", "write_page"]
