"""Every format of an export: to add one, write its file and enter it in EXPORT_FORMATS."""

from captioner.export.formats.coco import COCO
from captioner.export.formats.delimited import CSV
from captioner.export.formats.hf_folder import HF_FOLDER
from captioner.export.formats.hf_parquet import HF
from captioner.export.formats.iceberg import ICEBERG
from captioner.export.formats.json_lines import JSONL
from captioner.export.formats.kohya import KOHYA
from captioner.export.formats.lance import LANCE
from captioner.export.formats.llava import LLAVA
from captioner.export.formats.txt import TXT
from captioner.export.formats.webdataset import WEBDATASET
from captioner.export.request import ExportFormat

__all__ = ["EXPORT_FORMATS", "describe_export_formats"]

EXPORT_FORMATS: dict[str, ExportFormat] = {
    form.name: form for form in (JSONL, CSV, TXT, KOHYA, COCO, LLAVA, WEBDATASET, HF, HF_FOLDER, ICEBERG, LANCE)
}


def describe_export_formats() -> str:
    """Return the help on formats: name and content of each."""
    entries = "; ".join(f"{form.name}: {form.help}" for form in EXPORT_FORMATS.values())
    return f"--format takes one of these. {entries}."
