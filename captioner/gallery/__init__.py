"""Captions beside their images, on one HTML page that needs no server and loads nothing.

    cards.py           the content of a page, one card an image
    page.py            cards -> one self-contained file, from page.html, page.css and four scripts
    table_rows.py      rows of a table, drawn at random or found by key, without reading the table
    page_images.py     the images behind rows, fetched again and made small
    wording.py         values of a table in words
    caption_cards.py   rows and images -> cards
    differences.py     two captions, word by word
    comparison.py      two tables: the captions that differ most
    references.py      references of the same images, from a file
    gallery.py         the pages of a table: its rows, or two tables beside each other
    gallery_job.py, query_job.py    what jobs/gallery.py and jobs/query.py do
    fit_page.py        the page of a fit: validation images and their captions

To show images and texts from elsewhere, make `Card`s of them and call `write_page`. Knows no Ray, and no torch but for
`fit_page`.
"""

from captioner.gallery.cards import Card, Text
from captioner.gallery.gallery import write_comparison, write_gallery
from captioner.gallery.page import Page, write_page

__all__ = ["Card", "Page", "Text", "write_comparison", "write_gallery", "write_page"]
