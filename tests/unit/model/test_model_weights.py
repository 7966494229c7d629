from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from captioner.errors import BundleError, ShapeError
from captioner.model.folder import Folder, open_folder
from captioner.model.weights import Weights, read_weights
from tests.unit.model.tiny_models import edit_json, save_llama


def weights(folder: Path) -> Weights:
    return read_weights(Folder.local(folder))


def save(folder: Path, **tensors: torch.Tensor) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_shards_have_the_fingerprint_of_the_single_file(tmp_path: Path):
    one = weights(save_llama(tmp_path / "one"))
    many = weights(save_llama(tmp_path / "many", max_shard_size="50KB"))
    assert len({tensor.file for tensor in many.tensors.values()}) > 2
    assert one.fingerprint() == many.fingerprint()
    assert (
        one.num_parameters
        == many.num_parameters
        == sum(t.numel() for t in load_file(one.folder.path + "/model.safetensors").values())
    )


def test_one_changed_number_changes_the_fingerprint_of_a_small_model(tmp_path: Path):
    before = save(tmp_path / "a", x=torch.zeros(100, 100))
    changed = torch.zeros(100, 100)
    changed[37, 11] = 1e-9
    assert weights(before).fingerprint() != weights(save(tmp_path / "b", x=changed)).fingerprint()


def test_the_tensors_of_a_small_model_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = weights(save_llama(tmp_path / "many", max_shard_size="50KB"))
    reads: list[str] = []
    read = Folder.read

    def counted(folder: Folder, name: str, *span: int) -> bytes:
        reads.append(name)
        return read(folder, name, *span)

    monkeypatch.setattr(Folder, "read", counted)
    found.fingerprint()
    assert sorted(reads) == sorted({tensor.file for tensor in found.tensors.values()})


def test_tensors_far_apart_in_one_file_have_the_fingerprint_of_the_same_ones_together(tmp_path: Path):
    first, last = torch.full((3,), 1.0), torch.full((5,), 2.0)
    apart = weights(save(tmp_path / "a", a=first, b=torch.zeros(17 << 20), c=last))
    assert (
        apart.select({"a": "a", "c": "c"}.get).fingerprint()
        == weights(save(tmp_path / "b", a=first, c=last)).fingerprint()
    )


def test_of_a_large_model_each_tensor_is_sampled(tmp_path: Path):
    x, y = torch.zeros(3000, 3000), torch.zeros(3000, 3000)
    before = weights(save(tmp_path / "a", x=x, y=y)).fingerprint()
    y[-1, -1] = 1
    assert weights(save(tmp_path / "b", x=x, y=y)).fingerprint() != before
    y[-1, -1] = 0
    x[2, 2] = 1  # between the sampled blocks: what the docstring admits
    assert weights(save(tmp_path / "c", x=x, y=y)).fingerprint() == before


def test_names_and_shapes_count_as_well_as_bytes(tmp_path: Path):
    prints = {
        weights(save(tmp_path / "a", x=torch.zeros(2, 3))).fingerprint(),
        weights(save(tmp_path / "b", y=torch.zeros(2, 3))).fingerprint(),
        weights(save(tmp_path / "c", x=torch.zeros(3, 2))).fingerprint(),
    }
    assert len(prints) == 3


def test_a_cut_file_is_refused_before_anything_is_loaded(tmp_path: Path):
    file = save(tmp_path / "a", x=torch.zeros(100)) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(BundleError, match=r"model.safetensors is cut: it has \d+ bytes of \d+; copy it again"):
        weights(tmp_path / "a")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 this was a pickle once", b"\x05\0\0\0\0\0\0\0{nope"])
def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(BundleError, match="is not a safetensors file"):
        weights(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path):
    folder = save_llama(tmp_path / "many", max_shard_size="50KB")
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(BundleError, match=r"of which model-00002-of-\d+.safetensors is not there"):
        weights(folder)


def test_a_pickle_is_never_opened_and_the_remedy_is_named(tmp_path: Path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"boom")
    with pytest.raises(BundleError, match=r"only pytorch_model.bin, a pickle, which is never opened; convert it once"):
        weights(tmp_path)


def test_quantized_weights_are_refused(tmp_path: Path):
    with pytest.raises(BundleError, match=r"x is stored as I8; expected one of F64, F32, F16, BF16"):
        weights(save(tmp_path / "a", x=torch.zeros(4, dtype=torch.int8)))


def test_buffers_that_old_checkpoints_store_are_ignored(tmp_path: Path):
    ids = {"vision_model.embeddings.position_ids": torch.arange(17), "weight": torch.zeros(2)}
    assert weights(save(tmp_path / "a", **ids)).tensors.keys() == {"weight"}


def test_tensors_must_be_those_of_the_module(tmp_path: Path):
    shapes = {"weight": (2, 3), "bias": (2,)}

    def check(**tensors: torch.Tensor) -> None:
        weights(save(tmp_path / "-".join(tensors), **tensors)).check_fits(shapes, "Linear")

    with pytest.raises(BundleError, match=r"do not fit Linear as its config describes it: missing bias"):
        check(weight=torch.zeros(2, 3))
    with pytest.raises(BundleError, match=r"no place for extra"):
        check(weight=torch.zeros(2, 3), bias=torch.zeros(2), extra=torch.zeros(1))
    with pytest.raises(ShapeError, match=r"weight is \[2, 4\], its config says \[2, 3\]"):
        check(weight=torch.zeros(2, 4), bias=torch.zeros(2))


def test_loading_casts_to_the_dtype_of_the_module(tmp_path: Path):
    module = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    weights(save(tmp_path / "a", weight=torch.ones(2, 3), bias=torch.zeros(2))).load_into(module)
    assert module.weight.dtype == torch.bfloat16
    assert module.weight.sum() == 6


def test_an_index_that_is_not_json_is_refused(tmp_path: Path):
    folder = save_llama(tmp_path / "many", max_shard_size="50KB")
    edit_json(folder / "model.safetensors.index.json", metadata={})
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(BundleError, match=r"model.safetensors.index.json is not JSON"):
        weights(folder)


@pytest.mark.parametrize(
    "header",
    [
        '{"x": 5}',
        '{"x": {}}',
        '{"x": {"dtype": "F32", "shape": 3, "data_offsets": [0, 4]}}',
        '{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        '{"x": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}',
        '{"x": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}',
        "[]",
        "[" * 50_000,
    ],
)
def test_a_header_that_says_something_else_is_refused(tmp_path: Path, header: str):
    data = header.encode()
    (tmp_path / "model.safetensors").write_bytes(len(data).to_bytes(8, "little") + data + bytes(4))
    with pytest.raises(BundleError, match=r"model.safetensors (has a header|is not a saf)|stored as"):
        read_weights(open_folder(str(tmp_path)))
