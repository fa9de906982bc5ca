"""Weights that llama.cpp does not look at before it uses them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from selfextend_gguf.errors import ModelFileError
from selfextend_gguf.models import TINY_MODELS
from selfextend_gguf.weights import check_vectors


def written(path: Path, name: str, data: np.ndarray, kind: gguf.GGMLQuantizationType | None = None) -> Path:
    """A GGUF file with one tensor."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ["output_norm.weight", "blk.1.attn_q_norm.weight", "blk.0.attn_q.bias"])
def test_norms_and_biases_are_in_f32(tmp_path, name):
    """llama.cpp would end the process at the first token."""
    wrong = written(tmp_path / "wrong.gguf", name, np.ones(32, np.float16))
    with pytest.raises(ModelFileError, match=f"wrong.gguf has {name} in F16, of which llama.cpp takes F32 alone"):
        check_vectors(wrong)
    check_vectors(written(tmp_path / "right.gguf", name, np.ones(32, np.float32)))


def test_the_later_parts_of_a_model_are_looked_at(tmp_path):
    first = written(tmp_path / "m-00001-of-00002.gguf", "output_norm.weight", np.ones(32, np.float32))
    written(tmp_path / "m-00002-of-00002.gguf", "blk.0.ffn_norm.weight", np.ones(32, np.float16))
    with pytest.raises(ModelFileError, match=r"m-00002-of-00002\.gguf has blk\.0\.ffn_norm\.weight"):
        check_vectors(first)


def test_other_weights_may_be_of_any_type(tmp_path):
    check_vectors(written(tmp_path / "m.gguf", "blk.0.ffn_gate_inp_shexp.weight", np.ones(32, np.float16)))
    for model in TINY_MODELS:
        check_vectors(model)
