"""The formats of an export: one file and one entry of `table.EXPORT_FORMATS` each. A format knows no other."""
